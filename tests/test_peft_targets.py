"""Which modules an adapter is put on, and what else is trained beside it, for every method."""

import copy
import re

import peft
import pytest
import torch
from compiled_laws import Blocks
from laws import TARGETS, assert_close, moved
from method_table import METHODS
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from small_models import LAYERS, bert, gpt2, logits, tokens
from torch import nn

from craft_peft import CraftConfig, CraftError
from craft_peft.plugin.layer import StackedLinear

over_methods = pytest.mark.parametrize("method", METHODS, ids=str)
ATTENTION = "bert.encoder.layer.{}.attention.self.{}"


def adapted_paths(model):
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    return {key for key, module in model.named_modules() if isinstance(module, StackedLinear)}


# ---------------------------------------------------------------------------------------------------------------------
# Names
# ---------------------------------------------------------------------------------------------------------------------


@over_methods
@pytest.mark.peft_feature("`target_modules`: names, paths, a regular expression")
@pytest.mark.parametrize(
    "targets",
    [
        r".*\.layer\.\d+\.attention\.self\.(query|value)",
        ["self.query", "self.value"],
        [ATTENTION.format(layer, name) for layer in range(LAYERS) for name in TARGETS],
        [ATTENTION.format(layer, name) for layer in range(12) for name in TARGETS],  # PEFT shortens so long a list
    ],
    ids=["regular expression", "endings", "paths", "many paths"],
)
def test_targets_are_found_by(targets, method):
    layers = 12 if targets == [ATTENTION.format(layer, name) for layer in range(12) for name in TARGETS] else LAYERS
    model = get_peft_model(bert(layers=layers), method.config(target_modules=targets))
    assert adapted_paths(model) == {ATTENTION.format(layer, name) for layer in range(layers) for name in TARGETS}


@over_methods
@pytest.mark.peft_feature('`target_modules="all-linear"`')
def test_a_second_adapter_on_all_linear_modules_finds_the_same(method):
    model = get_peft_model(Blocks(), method.config(target_modules="all-linear"))
    first = adapted_paths(model)
    config = method.config(target_modules="all-linear")
    model.add_adapter("second", config)
    assert adapted_paths(model) == first == {f"layers.{layer}.{name}" for layer in range(2) for name in TARGETS}
    assert config.target_modules == model.peft_config["default"].target_modules


@over_methods
@pytest.mark.peft_feature("`exclude_modules`")
@pytest.mark.parametrize(
    ("fields", "left_out"),
    [({"exclude_modules": TARGETS}, ATTENTION.format(0, "query")), ({"modules_to_save": TARGETS}, "query")],
)
def test_what_leaves_no_target_is_named(fields, left_out, method):
    with pytest.raises(CraftError, match=re.escape(left_out)) as caught:
        get_peft_model(bert(), method.config(target_modules=TARGETS, **fields))
    assert "`exclude_modules` and `modules_to_save` leave out" in str(caught.value)
    assert isinstance(caught.value, peft.NoMatchingPeftModuleError)


LEAVES_NOTHING = {
    "a negative index": (
        {"layers_to_transform": [-1]},
        r"`layers_to_transform=\[-1\]` leaves out 'bert\..*count from 0",
    ),
    "another pattern": (
        {"layers_to_transform": [0], "layers_pattern": "blocks"},
        r"`layers_to_transform=\[0\]` with `layers_pattern='blocks'` leaves out 'bert\.",
    ),
    "both": (
        {"layers_to_transform": [9], "exclude_modules": ["query", "value"]},
        "`exclude_modules`, `modules_to_save` and `layers_to_transform` leave out 'bert\\.",
    ),
    "neither": ({"layers_to_transform": [0], "target_modules": ["querry"]}, r"\. Did you mean 'query'\?"),
}


@over_methods
@pytest.mark.peft_feature("`layers_to_transform`")
@pytest.mark.parametrize("case", LEAVES_NOTHING)
def test_the_field_that_leaves_no_target_is_named(case, method):
    fields, message = LEAVES_NOTHING[case]
    with pytest.raises(CraftError, match=message):
        get_peft_model(bert(), method.config(**{"target_modules": TARGETS, **fields}))


@pytest.mark.parametrize("method", [METHODS[0], METHODS[-1]], ids=str)
@pytest.mark.peft_feature(
    "an adapter on a module that another method has adapted",
    no="it would be decomposed or merged with the other's change in it; merge or remove the other first.",
)
@pytest.mark.parametrize("other", ["LORA", "IA3", "LOTR"])
def test_a_module_that_another_method_has_adapted_is_refused(other, method):
    ours = {method.name.upper(): method.config(target_modules=TARGETS) for method in METHODS}
    theirs = {
        "LORA": LoraConfig(target_modules=TARGETS),
        "IA3": IA3Config(target_modules=TARGETS, feedforward_modules=[]),
    }
    model = inject_adapter_in_model({**ours, **theirs}[other], bert())
    config = method.config(target_modules=TARGETS)
    layer = type(model.bert.encoder.layer[0].attention.self.query)
    kind = {"LORA": "LoRA"}.get(other, other)
    state = model.state_dict().keys()
    warns = pytest.warns(UserWarning, match="Already found a `peft_config` attribute")
    with (
        warns,
        pytest.raises(
            CraftError, match=rf"already adapted by {kind} \({layer.__module__}\.{layer.__name__}\).*Merge or"
        ),
    ):
        inject_adapter_in_model(config, model, adapter_name="second")
    assert model.state_dict().keys() == state


@over_methods
@pytest.mark.peft_feature("`exclude_modules`")
def test_an_exclusion_without_effect_is_said(method):
    with pytest.warns(UserWarning, match="no modules were excluded"):
        get_peft_model(bert(), method.config(target_modules=TARGETS, exclude_modules=["nothing"]))


@over_methods
@pytest.mark.peft_feature("several adapters")
def test_a_second_adapter_without_targets_is_refused_and_leaves_nothing(method):
    model, _ = moved(method)
    before, state = logits(model), model.state_dict().keys()
    with pytest.raises(CraftError, match=r"'querry'.* Did you mean 'query'\?.* called 'dense', .*'value'"):
        model.add_adapter("second", method.config(target_modules=["querry"]))
    assert model.peft_config.keys() == {"default"} and model.state_dict().keys() == state
    assert torch.equal(logits(model), before)


@over_methods
@pytest.mark.peft_feature(
    "targets that are embeddings, convolutions or a whole `torch.nn.MultiheadAttention`",
    no="a stack is made of the weights of linear layers; name those.",
)
@pytest.mark.parametrize("target", [nn.Embedding(7, 4), nn.Conv2d(1, 1, 2), nn.MultiheadAttention(4, 2)])
def test_other_modules_are_refused(target, method):
    with pytest.raises(CraftError, match=f"target module 'it' is a {type(target).__name__}, not a linear layer"):
        get_peft_model(nn.ModuleDict({"it": target}), method.config(target_modules=["it"]))


@over_methods
@pytest.mark.peft_feature(
    "the output projection of `torch.nn.MultiheadAttention`",
    no="torch uses its weight without calling it, so an adapter on it would do nothing.",
)
def test_a_projection_that_is_never_called_is_refused(method):
    model = nn.ModuleDict({"layers": nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 16) for _ in range(2))})
    with pytest.raises(CraftError, match=r"'layers.0.self_attn.out_proj' is the output projection of"):
        get_peft_model(model, method.config(target_modules="all-linear"))
    adapted = get_peft_model(model, method.config(target_modules="all-linear", exclude_modules=["out_proj"]))
    assert adapted_paths(adapted) == {f"layers.{layer}.{name}" for layer in (0, 1) for name in ("linear1", "linear2")}


REFUSED_FIELDS = {
    "target_parameters": "a parameter outside a linear layer has no input and output that a stack could share.",
    "alpha_pattern": "the layers of a stack share what is trained, so `alpha` is one factor for all.",
    "layer_replication": "a layer that is there twice has one weight, and a stack counts it once.",
    "ensure_weight_tying": "a tied pair in `modules_to_save` is warned about; `trainable_token_indices` keeps the tie.",
}


def refused(name):
    return pytest.param(name, marks=pytest.mark.peft_feature(f"`{name}`", no=REFUSED_FIELDS[name]))


@over_methods
@pytest.mark.parametrize("name", [refused(name) for name in REFUSED_FIELDS])
def test_fields_of_lora_alone_are_refused(name, method):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        method.config(**{name: {}})


@pytest.mark.peft_feature("tied weights: a warning when an adapter is put on one of them")
def test_a_tied_head_is_warned_about():
    with pytest.warns(UserWarning, match="`tie_word_embeddings=True` and a tied layer is part of the adapter"):
        model = get_peft_model(gpt2(), CraftConfig(target_modules=["lm_head"], init_weights=False))
    with pytest.warns(UserWarning, match=r"tied_target_modules=\['lm_head'\] are part of the adapter"):
        model.merge_and_unload()


# ---------------------------------------------------------------------------------------------------------------------
# From the keys of a state dict
# ---------------------------------------------------------------------------------------------------------------------


@over_methods
@pytest.mark.peft_feature("`inject_adapter_in_model(state_dict=...)`")
def test_the_keys_of_a_state_dict_are_enough_to_find_the_targets(method):
    torch.manual_seed(1)
    made = inject_adapter_in_model(method.config(target_modules=["key"], init_weights=False), bert()).eval()
    state = get_peft_model_state_dict(made)
    with pytest.warns(RuntimeWarning, match="inconsistency was discovered between the PEFT config and the provided"):
        other = inject_adapter_in_model(method.config(target_modules=["value"]), bert(), state_dict=state)
    assert adapted_paths(other) == adapted_paths(made)
    set_peft_model_state_dict(other, state)
    assert torch.equal(logits(other.eval()), logits(made))


@over_methods
@pytest.mark.peft_feature("`low_cpu_mem_usage`")
def test_an_adapter_can_be_injected_without_memory(method):
    torch.manual_seed(1)
    config = method.config(target_modules=TARGETS, init_weights=False)
    made = inject_adapter_in_model(config, bert()).eval()
    state = get_peft_model_state_dict(made)
    for keys in (None, state):
        other = inject_adapter_in_model(
            method.config(target_modules=TARGETS), bert(), state_dict=keys, low_cpu_mem_usage=True
        )
        assert all(tensor.is_meta for tensor in get_peft_model_state_dict(other).values())
        set_peft_model_state_dict(other, state, low_cpu_mem_usage=True)
        assert torch.equal(logits(other.eval()), logits(made))


@over_methods
@pytest.mark.peft_feature("`inject_adapter_in_model(state_dict=...)`")
def test_a_compiled_model_takes_the_keys_of_one_that_was_not(method):
    config = method.config(target_modules=TARGETS, init_weights=False)
    state = get_peft_model_state_dict(inject_adapter_in_model(config, bert()))
    compiled = torch.compile(bert(), backend="eager")
    compiled = inject_adapter_in_model(method.config(target_modules=TARGETS), compiled, state_dict=state)
    assert {key.removeprefix("_orig_mod.") for key in get_peft_model_state_dict(compiled)} == state.keys()


# ---------------------------------------------------------------------------------------------------------------------
# What is trained beside the adapter
# ---------------------------------------------------------------------------------------------------------------------


@over_methods
@pytest.mark.peft_feature("`modules_to_save`, several and per adapter")
def test_every_adapter_has_its_own_copies_of_modules(method):
    model = get_peft_model(bert(), method.config(target_modules=TARGETS, modules_to_save=["classifier", "pooler"]))
    model.add_adapter("second", method.config(target_modules=TARGETS, modules_to_save=["classifier"]))
    copies = {name.partition(".modules_to_save.")[::2] for name in model.state_dict() if ".modules_to_save." in name}
    assert {(module.rpartition(".")[2], key.split(".")[0]) for module, key in copies} == {
        ("classifier", "default"), ("classifier", "second"), ("pooler", "default"),
    }  # fmt: skip
    heads = model.base_model.model.classifier.modules_to_save
    heads["second"].weight.data.add_(1.0)
    first = logits(model.eval())
    model.set_adapter("second")
    assert not torch.allclose(logits(model), first)
    assert heads["second"].weight.requires_grad and not heads["default"].weight.requires_grad
    with pytest.warns(UserWarning, match="Setting active adapter to default"):
        model.delete_adapter("second")
    assert torch.equal(logits(model), first) and not any("second" in name for name in model.state_dict())


def with_tokens(method, base, **fields):
    """A language model with an adapter and three trained tokens, all away from their start."""
    torch.manual_seed(1)
    config = method.config(init_weights=False, task_type="CAUSAL_LM", trainable_token_indices=[1, 2, 40], **fields)
    model = get_peft_model(copy.deepcopy(base), config).eval()
    for name, parameter in model.named_parameters():
        if "trainable_tokens_delta" in name:
            parameter.data.add_(torch.randn_like(parameter))
    return model


@over_methods
@pytest.mark.peft_feature("`trainable_token_indices`")
def test_chosen_tokens_are_trained_saved_and_merged(method, tmp_path):
    base = gpt2()
    model = with_tokens(method, base)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    tokens_ = [name for name in trained if "trainable_tokens_delta.default" in name]
    assert len(tokens_) == 1 and trained[tokens_[0]].shape == (3, 16)
    model(tokens(), labels=tokens()).loss.backward()
    assert trained[tokens_[0]].grad.abs().max() > 0
    adapted = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))
    model.save_pretrained(tmp_path)
    for low_memory in (False, True):
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, low_cpu_mem_usage=low_memory)
        assert torch.equal(logits(loaded), adapted)
    merged = model.merge_and_unload()
    assert_close(logits(merged), adapted, products=1000)
    assert merged.lm_head.weight is merged.transformer.wte.weight, "the tied head lost its embedding"


@over_methods
@pytest.mark.peft_feature("`trainable_token_indices`")
def test_trained_tokens_are_those_of_the_active_adapter(method):
    model = with_tokens(method, gpt2())
    first = logits(model)
    config = method.config(task_type="CAUSAL_LM", trainable_token_indices={"wte": [3]})
    model.add_adapter("second", config)
    model.set_adapter("second")
    assert not torch.allclose(logits(model.eval()), first)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)


@over_methods
@pytest.mark.peft_feature("`bias`")
@pytest.mark.parametrize("which", ["all", "only"])
def test_biases_are_trained_and_saved(which, method, tmp_path):
    bias = "all" if which == "all" else f"{method.name}_only"
    model = get_peft_model(bert(), method.config(target_modules=TARGETS, bias=bias)).eval()
    biases = {name: p for name, p in model.named_parameters() if name.endswith("bias")}
    trained = {name for name, p in biases.items() if p.requires_grad}
    wanted = {name for name in biases if which == "all" or any(f".{target}." in name for target in TARGETS)}
    assert trained == wanted
    for name in trained:
        biases[name].data.add_(0.1)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(bert(), tmp_path)), logits(model))
    with pytest.raises(ValueError, match="supports only 1 adapter with bias"):
        model.add_adapter("second", method.config(target_modules=TARGETS, bias=bias))
