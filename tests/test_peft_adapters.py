"""The life of adapters beside each other: names, which are active and trained, merged, in which dtype; every method."""

import copy

import pytest
import torch
from compiled_laws import Blocks
from laws import TARGETS, assert_close, moved
from method_table import METHODS
from peft import (
    LoraConfig,
    PeftModel,
    cast_mixed_precision_params,
    convert_to_lora,
    get_base_model_state_dict,
    get_peft_model,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)
from peft.helpers import disable_input_dtype_casting, rescale_adapter_scale
from peft.utils.hotswap import hotswap_adapter
from small_models import bert, gpt2, logits, tokens
from torch import nn
from transformers import RobertaConfig, RobertaForSequenceClassification

from craft_peft.plugin.layer import StackedLinear

pytestmark = pytest.mark.parametrize("method", METHODS, ids=str)


def two_adapters(method):
    """A model with adapters "default" and "second" on the same modules, both away from their start."""
    model, base = moved(method)
    torch.manual_seed(2)
    model.add_adapter("second", method.config(task_type="SEQ_CLS", target_modules=TARGETS, init_weights=False))
    return model.eval(), base


def two_on_blocks(method):
    """The same without a head, so that both can be active together; and the weights of the layers."""
    torch.manual_seed(0)
    model = get_peft_model(Blocks(), method.config(target_modules=TARGETS, init_weights=False))
    model.add_adapter("second", method.config(target_modules=TARGETS, init_weights=False))
    layers = {key: module for key, module in model.named_modules() if isinstance(module, StackedLinear)}
    return model.eval(), {key: layer.base_layer.weight.detach().clone() for key, layer in layers.items()}


def outputs(model, *names):
    """The logits with these adapters active, one after the other."""
    found = []
    for name in names:
        model.set_adapter(name)
        found.append(logits(model))
    return found


def parameters_of(model, method, name):
    return [p for key, p in model.named_parameters() if f".{method.name}_" in key and f".{name}." in key]


# ---------------------------------------------------------------------------------------------------------------------
# Names
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.peft_feature("several adapters")
@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda model, config: model.set_adapter("third"), "Adapter third not found"),
        (lambda model, config: model.delete_adapter("third"), "Adapter third does not exist"),
        (lambda model, config: model.add_adapter("second", config), "Adapter with name 'second' already exists"),
        (lambda model, config: (model.merge_adapter(["second"]), model.delete_adapter("second")), "while they are mer"),
    ],
    ids=["set unknown", "delete unknown", "add existing", "delete merged"],
)
def test_a_wrong_name_is_refused_and_changes_nothing(act, message, method):
    model, _ = two_adapters(method)
    before = outputs(model, "second", "default")
    with pytest.raises(ValueError, match=message):
        act(model, method.config(target_modules=["key"]))
    model.unmerge_adapter()
    for found, expected in zip(outputs(model, "second", "default"), before, strict=True):
        assert_close(found, expected, products=1000)
    assert model.peft_config.keys() == {"default", "second"}


@pytest.mark.peft_feature("`delete_adapter`")
@pytest.mark.filterwarnings("ignore:Adapter default was active which is now deleted:UserWarning")  # once a layer
def test_deleting_the_active_adapter_leaves_the_next_then_the_base(method):
    model, base = two_adapters(method)
    (second,) = outputs(model, "second")
    model.set_adapter("default")
    model.delete_adapter("default")
    assert model.active_adapters == ["second"] and torch.equal(logits(model), second)
    model.delete_adapter("second")
    assert model.active_adapters == [] and torch.equal(logits(model.base_model.model), logits(base))
    assert not any("default" in name or "second" in name for name in model.state_dict())


@pytest.mark.peft_feature("`get_peft_model` twice: a warning")
def test_wrapping_twice_is_warned_about(method):
    model, base = moved(method)
    with (
        pytest.warns(UserWarning, match="modify a model with PEFT for a second time"),
        pytest.warns(UserWarning, match="multiple adapters"),
    ):
        get_peft_model(model.get_base_model(), method.config(target_modules=["key"]), adapter_name="second")
    unloaded = moved(method)[0].unload()
    assert torch.equal(logits(get_peft_model(unloaded, method.config(target_modules=TARGETS)).eval()), logits(base))


# ---------------------------------------------------------------------------------------------------------------------
# Which parameters are trained
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.peft_feature("`requires_grad` of active, inactive and frozen adapters")
def test_only_the_active_adapter_is_trained(method):
    model, _ = two_adapters(method)

    def trained():
        return {n for n in ("default", "second") if any(p.requires_grad for p in parameters_of(model, method, n))}

    for active in ("default", "second"):
        model.set_adapter(active)
        assert trained() == {active}
        assert all(p.requires_grad for p in parameters_of(model, method, active))
    model.set_adapter("default", inference_mode=True)
    assert not any(p.requires_grad for p in model.parameters())
    model.set_requires_grad("second")
    assert trained() == {"second"}
    model.set_requires_grad(["default", "second"], requires_grad=False)
    assert not trained()
    model.set_adapter("second")
    with model.disable_adapter():
        assert not trained()
    assert trained() == {"second"}
    assert not any(p.requires_grad for n, p in model.named_parameters() if "base_layer" in n or "embeddings" in n)
    several, _ = two_on_blocks(method)
    several.base_model.set_adapter(["default", "second"])
    assert all(p.requires_grad for name in ("default", "second") for p in parameters_of(several, method, name))


@pytest.mark.peft_feature("`disable_adapter`")
def test_disabling_nests(method):
    model, base = moved(method)
    adapted, plain = logits(model), logits(base)
    with model.disable_adapter():
        with model.disable_adapter():
            assert torch.equal(logits(model), plain)
        assert torch.equal(logits(model), plain)
    assert torch.equal(logits(model), adapted)


@pytest.mark.peft_feature("`print_trainable_parameters`")
def test_trainable_parameters_are_counted(method, capsys):
    model = get_peft_model(Blocks(), method.config(target_modules=TARGETS))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert model.get_nb_trainable_parameters() == (trained, sum(p.numel() for p in model.parameters()))
    model.print_trainable_parameters()
    assert capsys.readouterr().out.startswith(f"trainable params: {trained:,} || all params: ")


# ---------------------------------------------------------------------------------------------------------------------
# Merging
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.peft_feature("`merge_and_unload(adapter_names=[...])`")
def test_chosen_adapters_are_merged(method):
    model, weights = two_on_blocks(method)
    for names in (["default"], ["second"], ["second", "default"]):
        merged = copy.deepcopy(model).merge_and_unload(adapter_names=names)
        for key, weight in weights.items():
            delta = sum(model.get_submodule(key).get_delta_weight(name).detach() for name in names)
            found = merged.get_submodule(key.removeprefix("base_model.model.")).weight.detach()
            assert_close(found - weight, delta, products=1000)


@pytest.mark.peft_feature("merging several adapters one after the other, and unmerging them")
@pytest.mark.filterwarnings("ignore:Already following adapters were merged default:UserWarning")  # once a layer
def test_merging_in_turn_is_merging_at_once(method):
    model, weights = two_on_blocks(method)
    at_once = copy.deepcopy(model)
    at_once.merge_adapter(["default", "second"])
    model.merge_adapter(["default"])
    model.merge_adapter(["second"])
    for key in weights:
        expected = at_once.get_submodule(key).base_layer.weight.detach()
        assert_close(model.get_submodule(key).base_layer.weight.detach(), expected, products=100)
    model.unmerge_adapter()
    for key, weight in weights.items():
        assert torch.equal(model.get_submodule(key).base_layer.weight, weight)


@pytest.mark.peft_feature("merging an adapter that is merged: a warning, and no change")
def test_merging_twice_changes_nothing(method):
    model, _ = moved(method)
    model.merge_adapter()
    merged = logits(model)
    with pytest.warns(UserWarning, match="following adapters are already merged|already unmerged|already merged"):
        model.merge_adapter()
    assert torch.equal(logits(model), merged)


@pytest.mark.peft_feature("`unload` and `merge_and_unload` with a head of several layers")
def test_a_head_of_several_layers_survives_unloading(method):
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16
    )
    base = RobertaForSequenceClassification(config).eval()
    torch.manual_seed(1)
    model = get_peft_model(copy.deepcopy(base), method.config(task_type="SEQ_CLS", init_weights=False)).eval()
    head = model.base_model.model.classifier.modules_to_save["default"]
    head.out_proj.weight.data.add_(1.0)
    adapted = logits(model)
    merged = copy.deepcopy(model).merge_and_unload()
    assert_close(logits(merged), adapted, products=2000)
    assert torch.equal(merged.classifier.out_proj.weight, head.out_proj.weight)
    for result in (merged, model.unload()):
        assert {n: type(m) for n, m in result.named_modules()} == {n: type(m) for n, m in base.named_modules()}


@pytest.mark.peft_feature("`convert_to_lora`")
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is `Conv1D`:UserWarning")
def test_conversion_to_lora_at_full_rank_is_the_adapter(method):
    torch.manual_seed(0)
    for base, targets in ((Blocks(), TARGETS), (gpt2(), ["c_attn"])):
        model = get_peft_model(copy.deepcopy(base), method.config(target_modules=targets, init_weights=False)).eval()
        config, state = convert_to_lora(model, rank=16)
        assert isinstance(config, LoraConfig)
        lora = get_peft_model(copy.deepcopy(base), config).eval()
        set_peft_model_state_dict(lora, state)
        x = torch.randn(4, 5, 16) if isinstance(base, Blocks) else tokens()
        found, expected = (m(x) if isinstance(base, Blocks) else m(x).logits for m in (lora, model))
        assert_close(found.detach(), expected.detach(), products=5000)


# ---------------------------------------------------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.peft_feature("`autocast_adapter_dtype`")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_are_float32_unless_they_have_to_follow_the_base(dtype, method, tmp_path):
    """As of LoRA, with the exception that adapters injected without `PeftModel` are float32 too."""
    for autocast, expected in ((True, torch.float32), (False, dtype)):
        model = get_peft_model(
            bert(dtype), method.config(target_modules=TARGETS, init_weights=False), autocast_adapter_dtype=autocast
        )
        model.save_pretrained(tmp_path)
        config = method.config(target_modules=TARGETS, init_weights=False)
        model.add_adapter("added", config, autocast_adapter_dtype=autocast)
        model.load_adapter(tmp_path, "loaded", autocast_adapter_dtype=autocast)
        model.load_adapter(tmp_path, "small", autocast_adapter_dtype=autocast, low_cpu_mem_usage=True)
        for name in ("default", "added", "loaded", "small"):
            assert {p.dtype for p in parameters_of(model, method, name)} == {expected}, name
            model.set_adapter(name)
            assert logits(model.eval()).isfinite().all()


@pytest.mark.peft_feature("a model moved to half precision with its adapter")
def test_a_whole_model_can_be_cast(method):
    base = bert().to(torch.bfloat16)
    fresh = get_peft_model(bert(), method.config(target_modules=TARGETS)).to(torch.bfloat16).eval()
    assert torch.equal(logits(fresh), logits(base)), "the start is no longer the base model"
    model = get_peft_model(bert(), method.config(target_modules=TARGETS, init_weights=False)).to(torch.float16).eval()
    assert logits(model).isfinite().all()
    model.merge_and_unload(safe_merge=True)


@pytest.mark.peft_feature("`cast_mixed_precision_params`")
def test_only_what_is_frozen_is_cast_down(method):
    model, _ = moved(method)
    cast_mixed_precision_params(model, torch.bfloat16)
    for parameter in model.parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16)


@pytest.mark.peft_feature("`disable_input_dtype_casting`")
def test_inputs_are_never_cast(method):
    model, _ = moved(method)
    before = logits(model)
    with disable_input_dtype_casting(model):
        assert torch.equal(logits(model), before)


@pytest.mark.peft_feature("`get_base_model_state_dict` and `set_base_model_state_dict`")
def test_the_state_of_the_base_model_has_its_own_names(method):
    model, base = moved(method)
    state, expected = get_base_model_state_dict(model), base.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    set_base_model_state_dict(model, {name: torch.zeros_like(tensor) for name, tensor in expected.items()})
    assert not any(tensor.any() for tensor in get_base_model_state_dict(model).values())


class Normalised(nn.Module):
    """Batch normalisation between the layers: parameters and running statistics that are no linear layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"lin": nn.Linear(8, 8), "norm": nn.BatchNorm1d(8)}) for _ in "123")

    def forward(self, x):
        for layer in self.layers:
            x = layer["norm"](layer["lin"](x)).relu()
        return x


@pytest.mark.peft_feature("batch normalisation in `modules_to_save`")
def test_running_statistics_are_saved(method, tmp_path):
    torch.manual_seed(0)
    base = Normalised()
    config = method.config(target_modules=["lin"], modules_to_save=["norm"], init_weights=False)
    model = get_peft_model(copy.deepcopy(base), config).train()
    x = torch.randn(6, 8)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        model(x).square().sum().backward()
        optimizer.step()
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(loaded(x), model(x)) and not torch.allclose(loaded(x), base.eval()(x))


# ---------------------------------------------------------------------------------------------------------------------
# What PEFT does for LoRA alone
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.peft_feature("`PeftMixedModel`", no="PEFT lists the methods that it mixes, and takes no others.")
def test_mixed_models_are_refused(method):
    with pytest.raises(ValueError, match=r"is not compatible with the `PeftMixedModel`"):
        get_peft_model(bert(), method.config(target_modules=TARGETS), mixed=True)


@pytest.mark.peft_feature("`hotswap_adapter`", no="PEFT swaps LoRA tensors alone; load beside it and `set_adapter`.")
def test_hotswapping_is_refused(method, tmp_path):
    model, _ = moved(method)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Hotswapping only supports LORA"):
        hotswap_adapter(model, tmp_path, adapter_name="default")


@pytest.mark.peft_feature("`rescale_adapter_scale`", no="PEFT looks for LoRA layers; the factor is the field `alpha`.")
def test_rescaling_is_refused(method):
    model, _ = moved(method)
    with pytest.raises(ValueError, match="scaling is only supported for models with `LoraLayer`s"):
        rescale_adapter_scale(model, multiplier=0.5).__enter__()
