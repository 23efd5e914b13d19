"""The rest of what PEFT's users count on, for every method: statuses, transformers' own integration, ..."""

import copy
import pickle

import pytest
import torch
from laws import TARGETS, assert_close, moved
from method_table import METHODS
from peft import (
    AutoPeftModelForSequenceClassification,
    PeftModel,
    get_layer_status,
    get_model_status,
    get_peft_model,
)
from small_models import LAYERS, bert, gpt2, logits, tokens
from transformers import AutoModelForSequenceClassification

from craft_peft.plugin.layer import StackedLinear

pytestmark = pytest.mark.parametrize("method", METHODS, ids=str)


@pytest.mark.peft_feature("`get_layer_status` and `get_model_status`")
def test_statuses_see_every_layer(method):
    model = get_peft_model(bert(), method.config(target_modules=TARGETS))
    status = get_model_status(model)
    assert status.peft_types == {"default": method.name.upper()}
    assert status.num_adapter_layers == 2 * LAYERS
    assert status.available_adapters == ["default"] == status.active_adapters
    assert status.enabled is True and status.merged_adapters == []
    layers = get_layer_status(model)
    assert all(layer.available_adapters == ["default"] for layer in layers)
    model.merge_adapter()
    assert get_model_status(model).merged_adapters == ["default"]
    with model.disable_adapter():
        assert get_model_status(model).enabled is False


@pytest.mark.peft_feature(
    "transformers' own `model.add_adapter`, `load_adapter`, `disable_adapters`, `enable_adapters`"
)
def test_transformers_adds_and_loads_adapters_itself(method, tmp_path):
    base = bert()
    torch.manual_seed(1)
    plain = copy.deepcopy(base)
    plain.add_adapter(method.config(target_modules=TARGETS, init_weights=False), adapter_name="mine")
    adapted = logits(plain.eval())
    assert not torch.equal(adapted, logits(base))
    plain.disable_adapters()
    assert torch.equal(logits(plain), logits(base))
    plain.enable_adapters()
    plain.save_pretrained(tmp_path)
    for name in ("default", "another"):
        loaded = copy.deepcopy(base)
        loaded.load_adapter(str(tmp_path), adapter_name=name)
        assert torch.equal(logits(loaded.eval()), adapted)


@pytest.mark.peft_feature("`AutoPeftModel`")
def test_auto_classes_find_base_and_adapter(method, tmp_path):
    bert().save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    config = method.config(task_type="SEQ_CLS", target_modules=TARGETS, init_weights=False)
    model = get_peft_model(base, config).eval()
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.peft_feature("`copy.deepcopy` and pickle")
def test_a_model_can_be_pickled(method):
    model, _ = moved(method)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), logits(model))


@pytest.mark.peft_feature("`load_adapter`")
def test_load_adapter_beside_another(method, tmp_path):
    model, base = moved(method)
    model.save_pretrained(tmp_path)
    other = get_peft_model(copy.deepcopy(base), method.config(task_type="SEQ_CLS", target_modules=["key"])).eval()
    before = logits(other)
    other.load_adapter(tmp_path, adapter_name="second")
    assert torch.equal(logits(other), before)
    other.set_adapter("second")
    assert torch.equal(logits(other), logits(model))


@pytest.mark.peft_feature("several active adapters")
def test_several_active_adapters_add_up(method):
    model = get_peft_model(bert(), method.config(target_modules=TARGETS, init_weights=False))
    model.add_adapter("second", method.config(target_modules=TARGETS, init_weights=False))
    model.base_model.set_adapter(["default", "second"])
    layer = next(module for module in model.modules() if isinstance(module, StackedLinear))
    x = torch.randn(3, 16)
    weight = layer.base_layer.weight + layer.get_delta_weight("default") + layer.get_delta_weight("second")
    assert_close(layer(x).detach(), torch.nn.functional.linear(x, weight, layer.base_layer.bias).detach(), products=300)


@pytest.mark.peft_feature("`layers_to_transform` and `layers_pattern`")
@pytest.mark.peft_feature("`exclude_modules`")
def test_layers_can_be_chosen_and_excluded(method):
    chosen, _ = moved(method, layers_to_transform=[0, 2], layers_pattern="layer")
    adapted = {
        key: module.slots["default"].adapter
        for key, module in chosen.get_base_model().named_modules()
        if isinstance(module, StackedLinear)
    }
    assert adapted.keys() == {f"bert.encoder.layer.{i}.attention.self.{name}" for i in (0, 2) for name in TARGETS}
    assert sum(adapter.shape.layers for adapter in set(adapted.values())) == len(adapted)
    excluded, _ = moved(method, exclude_modules=r".*layer\.1\..*")
    assert sum(isinstance(module, StackedLinear) for module in excluded.modules()) == 4


@pytest.mark.peft_feature('`target_modules="all-linear"`')
def test_all_linear(method):
    model = get_peft_model(
        bert(), method.config(task_type="SEQ_CLS", target_modules="all-linear", exclude_modules=["pooler.dense"])
    )
    adapted = [key for key, module in model.get_base_model().named_modules() if isinstance(module, StackedLinear)]
    assert len(adapted) == 6 * LAYERS and not any("classifier" in key or "pooler" in key for key in adapted)


@pytest.mark.peft_feature("`generate` with cache")
@pytest.mark.peft_feature("`generate` with positional arguments")
def test_generation_uses_the_adapter(method):
    torch.manual_seed(1)
    base = gpt2()
    model = get_peft_model(copy.deepcopy(base), method.config(init_weights=False, task_type="CAUSAL_LM")).eval()
    fields = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    cached, uncached = (model.generate(input_ids=tokens(), **fields, use_cache=cache) for cache in (True, False))
    assert torch.equal(cached, uncached) and cached.shape == (2, 12)
    assert torch.equal(model.generate(tokens(), **fields), cached)
    assert torch.equal(model.merge_and_unload().generate(tokens(), **fields), cached)


@pytest.mark.peft_feature("`load_adapter`")
def test_reloading_under_a_name_that_exists_replaces_it(method, tmp_path):
    model, base = moved(method)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    for name, parameter in loaded.named_parameters():
        if parameter.requires_grad and f".{method.name}_" in name:
            parameter.data.zero_()
    assert not torch.equal(logits(loaded.eval()), logits(model))
    loaded.load_adapter(tmp_path, adapter_name="default")
    assert torch.equal(logits(loaded.eval()), logits(model))
