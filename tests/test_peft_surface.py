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
from safetensors.torch import load_file
from small_models import LAYERS, bert, gpt2, logits, tokens
from transformers import (
    AutoModelForSequenceClassification,
    GenerationConfig,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

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


def sequence_to_sequence():
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, eos_token_id=None)).eval()


@pytest.mark.peft_feature("mixed batches in `generate`, with beam search")
@pytest.mark.parametrize(("make", "task"), [(gpt2, "CAUSAL_LM"), (sequence_to_sequence, "SEQ_2_SEQ_LM")])
def test_generation_mixes_adapters_in_a_batch(make, task, method):
    model = get_peft_model(make(), method.config(init_weights=False, task_type=task)).eval()
    torch.manual_seed(2)
    model.add_adapter("second", method.config(init_weights=False, task_type=task))
    for name, parameter in model.named_parameters():
        if f".{method.name}_" in name:
            parameter.data.mul_(30)  # so that the adapters choose other tokens
    rows = tokens()[0].repeat(3, 1)
    fields = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "num_beams": 2}
    with model.disable_adapter():
        expected = {"__base__": model.generate(input_ids=rows, **fields)[0]}
    for name in ("default", "second"):
        model.set_adapter(name)
        expected[name] = model.eval().generate(input_ids=rows, **fields)[0]
    assert len({tuple(row.tolist()) for row in expected.values()}) == 3
    names = ["second", "__base__", "default"]
    mixed = model.generate(input_ids=rows, adapter_names=names, **fields)
    for row, name in zip(mixed, names, strict=True):
        assert torch.equal(row, expected[name])
    # Said in a config instead, and with more than one sequence returned per row.
    config = GenerationConfig(**{**fields, "num_return_sequences": 2})
    mixed = model.generate(input_ids=rows, adapter_names=names, generation_config=config)
    for row, name in zip(mixed[::2], names, strict=True):
        assert torch.equal(row, expected[name])


@pytest.mark.peft_feature("`transformers.Trainer`: checkpoints, resuming, the best model at the end")
def test_the_trainer_resumes_where_it_stopped(method, tmp_path):
    data = [{"input_ids": row, "labels": i % 2} for i, row in enumerate(torch.randint(0, 50, (12, 7)))]
    fields = {
        "per_device_train_batch_size": 4, "num_train_epochs": 2, "learning_rate": 1e-2, "use_cpu": True,
        "report_to": "none", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True,
    }  # fmt: skip

    def train(folder, **more):
        config = method.config(task_type="SEQ_CLS", target_modules=TARGETS)
        torch.manual_seed(1)
        model, arguments = get_peft_model(bert(), config), TrainingArguments(folder, **fields)
        trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data)
        trainer.train(**more)
        return trainer

    whole = train(tmp_path / "whole")
    resumed = train(tmp_path / "resumed", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert resumed.state.global_step == whole.state.global_step == 6
    states = [load_file(folder / "checkpoint-6" / "adapter_model.safetensors") for folder in tmp_path.iterdir()]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    best = PeftModel.from_pretrained(bert(), whole.state.best_model_checkpoint)
    assert torch.equal(logits(whole.model.eval()), logits(best))
