"""Merging puts another weight in the place of the pretrained one; unmerging puts that back, bit for bit."""

import copy
import gc
import pickle
import weakref
from contextlib import nullcontext

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from compiled_laws import Blocks, rows
from laws import TARGETS, assert_close
from method_table import METHODS
from peft import get_peft_model
from quantised_models import BACKENDS
from small_models import bert, gpt2, logits
from torch import nn
from transformers import BertForSequenceClassification

from craft_peft import CraftError
from craft_peft.plugin.layer import StackedLinear
from craft_peft.plugin.quantization import read_weight

every_method = pytest.mark.parametrize("method", METHODS, ids=str)
CRAFT = METHODS[0]
CYCLES = 5


def on_disk(folder):
    """As transformers loads a model that fits neither the GPU nor the memory."""
    bert().save_pretrained(folder / "model")
    places = {"bert.embeddings": "cpu", "bert.encoder": "disk", "bert.pooler": "cpu", "classifier": "cpu"}
    return BertForSequenceClassification.from_pretrained(
        folder / "model", device_map=places, offload_folder=folder / "offloaded"
    ).eval()


def offloaded(offload, folder):
    base = bert()
    offload(base, execution_device=torch.device("cpu"), **({"offload_dir": folder} if offload is disk_offload else {}))
    return base


PLAIN = {
    **{
        f"{dtype}".replace("torch.", ""): lambda _, dtype=dtype: bert(dtype) for dtype in (torch.float32, torch.float16)
    },
    "conv1d in bfloat16": lambda _: gpt2().to(torch.bfloat16),
}
OFFLOADED = {
    "offloaded to the cpu": lambda folder: offloaded(cpu_offload, folder),
    "offloaded to disk": lambda folder: offloaded(disk_offload, folder),
    "loaded on disk": on_disk,
}
BASES = {
    **PLAIN,
    **{f"{backend.name} {backend.dtype}": lambda _, backend=backend: backend.bert() for backend in BACKENDS},
    **OFFLOADED,
}


def over(bases):
    return pytest.mark.parametrize("make", bases.values(), ids=bases)


def every_base_and_every_method(bases, on):
    """Every base with one method, and every method on some bases."""
    pairs = [(CRAFT, name) for name in bases] + [(method, name) for name in on for method in METHODS[1:]]
    return pytest.mark.parametrize(
        ("method", "make"), [pytest.param(method, bases[name], id=f"{method}-{name}") for method, name in pairs]
    )


def adapted(method, base, **fields):
    """An adapter away from its start, large beside the rounding of the base."""
    torch.manual_seed(1)
    targets = None if base.config.model_type == "gpt2" else TARGETS
    return get_peft_model(base, method.config(target_modules=targets, init_weights=False, **fields)).eval()


def layers_of(model):
    return {key: module for key, module in model.named_modules() if isinstance(module, StackedLinear)}


def move(model, seed):
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)


def weights_of(model):
    return {key: read_weight(layer.base_layer).clone() for key, layer in layers_of(model).items()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), key


@every_base_and_every_method(BASES, on=["conv1d in bfloat16", "bnb 4bit torch.float32"])
@pytest.mark.peft_feature("`merge_adapter` and `unmerge_adapter`, bit for bit, on plain, quantised and offloaded bases")
def test_the_pretrained_weight_comes_back_however_often_a_moving_adapter_is_merged(method, make, tmp_path):
    model = adapted(method, make(tmp_path))
    with model.disable_adapter():
        plain = logits(model)
    before = weights_of(model)
    for cycle in range(CYCLES):
        move(model, cycle)
        model.merge_adapter()
        assert all(not torch.equal(weight, before[key]) for key, weight in weights_of(model).items())
        if cycle % 2:
            with model.disable_adapter():  # unmerges
                assert torch.equal(logits(model), plain)
        model.unmerge_adapter()
        assert_equal(weights_of(model), before)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)


@every_base_and_every_method({"float32": PLAIN["float32"], **OFFLOADED}, on=["float32", "offloaded to disk"])
@pytest.mark.peft_feature("merging into weights that accelerate has offloaded to CPU or disk")
def test_merged_is_adapted_wherever_the_weights_are(method, make, tmp_path):
    model = adapted(method, make(tmp_path))
    expected = logits(model)
    model.merge_adapter()
    assert_close(logits(model), expected, products=1000)
    model.unmerge_adapter()
    assert torch.equal(logits(model), expected)
    assert_close(logits(model.merge_and_unload(safe_merge=True)), expected, products=1000)


@every_method
@pytest.mark.filterwarnings("ignore:Already following adapters were merged default:UserWarning")  # once a layer
@pytest.mark.parametrize("together", [True, False])
def test_of_several_adapters_nothing_stays(method, together):
    base = bert(torch.bfloat16)
    model = adapted(method, base)
    torch.manual_seed(2)
    model.add_adapter("second", method.config(target_modules=["key", "value"], init_weights=False))
    before = weights_of(model)
    model.merge_adapter(["default", "second"] if together else ["default"])
    move(model, 0)
    if not together:
        model.merge_adapter(["second"])
    model.unmerge_adapter()
    assert_equal(weights_of(model), before)


def test_several_adapters_are_rounded_once():
    """In float16 a sum that is rounded after each summand would be another."""
    model = adapted(CRAFT, bert(torch.float16))
    torch.manual_seed(2)
    model.add_adapter("second", CRAFT.config(target_modules=TARGETS, init_weights=False))
    before = weights_of(model)
    deltas = {k: sum(m.get_delta_weight(n).detach() for n in m.slots) for k, m in layers_of(model).items()}
    model.merge_adapter(["default", "second"])
    for key, weight in weights_of(model).items():
        assert_close(weight.float(), before[key] + deltas[key], products=1 / torch.finfo(torch.float32).eps / 2**13)
        assert (weight != (before[key] + deltas[key]).half()).float().mean() < 0.02, "summed in another order at most"


@every_method
@pytest.mark.parametrize("cast", [torch.float32, torch.bfloat16])
def test_an_adapter_of_less_precision_costs_the_weight_none(method, cast):
    """What a fresh adapter adds is nothing, whatever it is cast to."""
    base = bert(torch.float64)
    for parameter in base.parameters():
        parameter.data /= 3  # numbers that float32 does not have
    model = get_peft_model(base, method.config(target_modules=TARGETS))
    before = weights_of(model)
    for layer in layers_of(model).values():
        layer.owned.to(cast)
    model.merge_adapter()
    assert_equal(weights_of(model), before)


# ---------------------------------------------------------------------------------------------------------------------
# While it is merged
# ---------------------------------------------------------------------------------------------------------------------


def pickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize(
    ("make", "copied"),
    [
        pytest.param(make, copied, id=f"{name}-{copied.__name__}")
        for name, make in BASES.items()
        for copied in (copy.deepcopy, pickled)
        if name in PLAIN or (copied is copy.deepcopy and name not in OFFLOADED)  # not all quantised ones can be pickled
    ],
)
def test_a_copy_of_a_merged_model_unmerges(make, copied, tmp_path):
    model = adapted(CRAFT, make(tmp_path))
    before, expected = weights_of(model), logits(model)
    model.merge_adapter()
    merged = weights_of(model)
    twin = copied(model)
    assert_equal(weights_of(twin), merged)
    twin.unmerge_adapter()
    assert_equal(weights_of(twin), before)
    assert torch.equal(logits(twin), expected)
    assert_equal(weights_of(model), merged)


def test_what_is_kept_is_in_no_state_and_no_file(tmp_path):
    model = adapted(CRAFT, bert())
    parts = {**dict(model.named_parameters()), **dict(model.named_buffers())}.keys()
    states = model.state_dict().keys()
    model.save_pretrained(tmp_path / "before")
    model.merge_adapter()
    assert model.state_dict().keys() == states
    assert {**dict(model.named_parameters()), **dict(model.named_buffers())}.keys() == parts
    model.save_pretrained(tmp_path / "merged")
    sizes = [{f.name: f.stat().st_size for f in (tmp_path / name).iterdir()} for name in ("before", "merged")]
    assert sizes[0] == sizes[1]


def test_what_is_kept_is_in_no_exported_program():
    model = get_peft_model(Blocks(), CRAFT.config(target_modules=TARGETS, init_weights=False)).eval()
    before = weights_of(model)
    model.merge_adapter()
    program = torch.export.export(model, (rows(2),))
    held = [tensor for tensor in [*program.state_dict.values(), *program.constants.values()] if tensor.ndim == 2]
    assert len(held) > len(before)
    for weight in before.values():
        assert not any(torch.equal(tensor, weight) for tensor in held)


def test_a_merged_model_that_is_cast_unmerges_to_the_cast_base():
    model = adapted(CRAFT, bert())
    expected = {key: weight.bfloat16() for key, weight in weights_of(model).items()}
    model.merge_adapter()
    model.to(torch.bfloat16)
    model.unmerge_adapter()
    assert_equal(weights_of(model), expected)


def test_a_merged_model_goes_to_another_device_with_what_is_kept():
    model = adapted(CRAFT, bert())
    model.merge_adapter()
    model.to("meta")
    model.unmerge_adapter()
    assert all(layer.base_layer.weight.is_meta for layer in layers_of(model).values())


@pytest.mark.parametrize("end", ["merge_and_unload", "unmerge_adapter"])
def test_nothing_is_kept_longer_than_it_may_be_needed(end):
    model = adapted(CRAFT, bert())
    model.merge_adapter()
    unloads = end == "merge_and_unload"
    watched = [
        weakref.ref((layer._pretrained[0] if unloads else layer.base_layer).weight)
        for layer in layers_of(model).values()
    ]
    with pytest.warns(UserWarning, match="already merged") if unloads else nullcontext():
        kept = getattr(model, end)()
    gc.collect()
    assert kept is None or not layers_of(kept)
    assert all(reference() is None for reference in watched)


def test_bases_that_wait_for_their_first_use_are_not_those_of_a_merged_weight():
    """An adapter that computes its factors when it is first used, beside one that is merged before."""
    alone = adapted(CRAFT, bert(), ranks=(2, 3, 3))
    config = copy.deepcopy(alone.peft_config["default"])
    config._read_from_file = True
    torch.manual_seed(3)
    model = adapted(CRAFT, bert())
    model.add_adapter("waiting", config)
    model.merge_adapter()
    for key, layer in layers_of(alone).items():
        found = model.get_submodule(key).slots["waiting"].adapter
        found.make_ready()
        assert torch.equal(found.core, layer.slots["default"].adapter.core)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.peft_feature("`safe_merge`")
@pytest.mark.filterwarnings("ignore:Already following adapters were merged default:UserWarning")  # once a layer
@pytest.mark.parametrize("first", [[], ["default"]])
def test_what_is_refused_in_one_layer_is_merged_into_none(first):
    free = next(method for method in METHODS if method.setting == "free on random bases")
    model = adapted(free, bert())
    torch.manual_seed(2)
    model.add_adapter("second", free.config(target_modules=TARGETS, init_weights=False))
    for layer in layers_of(model).values():
        if "second" in layer.owned:
            layer.owned["second"].middles.data[-1] = torch.nan  # of the last layer alone
    if first:
        model.merge_adapter(first)
    before = weights_of(model)
    with pytest.raises(CraftError, match=r"NaNs detected in the merged weights\. The adapter second"):
        model.merge_adapter(safe_merge=True, adapter_names=["second"])
    assert_equal(weights_of(model), before)
    assert all(layer.merged_adapters == first for layer in layers_of(model).values())


def test_a_weight_that_is_computed_from_others_is_not_merged_into():
    base = bert()
    for layer in base.bert.encoder.layer:
        nn.utils.parametrizations.weight_norm(layer.attention.self.query)
    model = adapted(CRAFT, base)
    expected = logits(model)
    with pytest.raises(CraftError, match="ParametrizedLinear whose weight is computed from other tensors"):
        model.merge_adapter()
    assert torch.equal(logits(model), expected)
