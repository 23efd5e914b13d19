"""Quantised bases: what holds on a plain base holds on one of bitsandbytes or torchao, up to its rounding."""

import copy
import sys
import types

import pytest
import torch
from bitsandbytes.functional import _convert_weight_packed_for_cpu
from bitsandbytes.nn import Linear4bit
from laws import TARGETS, assert_close, tolerance
from method_table import METHODS
from peft import (
    PeftConfig,
    PeftModel,
    get_layer_status,
    get_model_status,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from peft.utils import quantization_utils
from quantised_models import BACKENDS, WIDTH, Backend
from small_models import LAYERS, bert, logits, tokens
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from craft_peft import CraftError
from craft_peft.lora_export import to_lora
from craft_peft.plugin.layer import StackedLinear
from craft_peft.plugin.quantization import read_weight

CRAFT = next(method for method in METHODS if method.name == "craft")
ONE_STAGE = [backend for backend in BACKENDS if backend.rounding is not None]
SMOOTH = [backend for backend in ONE_STAGE if not backend.rounds_inputs]

every_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)


def on(backends):
    return pytest.mark.parametrize(
        "backend", backends, ids=lambda backend: f"{backend.name} {backend.dtype}".replace("torch.", "")
    )


def adapted(method, base, **fields):
    """An adapter away from its start, large beside the quantiser's rounding."""
    torch.manual_seed(1)
    fields = {"target_modules": TARGETS, "init_weights": False, "alpha": 5.0, **fields}
    return get_peft_model(base, method.config(**fields)).eval()


def layers_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, StackedLinear)}


def inputs(backend: Backend, rows: int = 4) -> torch.Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(3)).to(backend.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


@every_method
@on(BACKENDS)
@pytest.mark.peft_feature("bases quantised by bitsandbytes (8 and 4 bit) and torchao (int8)")
def test_a_fresh_adapter_leaves_a_quantised_model_unchanged(method, backend):
    base = backend.bert()
    before = logits(base)
    model = adapted(method, base, init_weights=True)
    assert torch.equal(logits(model), before)
    adapter = [p for n, p in model.named_parameters() if f".{method.name}_" in n]
    assert adapter and {parameter.dtype for parameter in adapter} == {torch.float32}


@every_method
@on(BACKENDS)
@pytest.mark.peft_feature("`get_layer_status` and `get_model_status`")
def test_statuses_name_the_back_end(method, backend):
    model = adapted(method, backend.bert())
    assert get_model_status(model).quantization_backend == backend.name
    assert [status.quantization_backend for status in get_layer_status(model)] == 2 * LAYERS * [backend.name]


@every_method
@on(BACKENDS)
@pytest.mark.peft_feature('`target_modules="all-linear"`')
def test_all_linear_finds_quantised_layers(method, backend):
    model = adapted(
        method, backend.bert(), task_type="SEQ_CLS", target_modules="all-linear", exclude_modules=["pooler.dense"]
    )
    assert len(layers_of(model)) == 6 * LAYERS
    assert torch.isfinite(logits(model)).all()


@every_method
@on(BACKENDS)
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.peft_feature("`prepare_model_for_kbit_training`")
def test_training_moves_the_adapter_alone(method, backend, reentrant):
    base = prepare_model_for_kbit_training(backend.bert(), gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model = adapted(method, base, init_weights=True)
    before = logits(copy.deepcopy(model))  # of a copy: on some processors bitsandbytes cannot train after evaluation
    frozen = {name: read_weight(layer.base_layer).clone() for name, layer in layers_of(model).items()}
    adapter = {n: p for n, p in model.named_parameters() if p.requires_grad and f".{method.name}_" in n}
    optimizer = torch.optim.Adam(adapter.values(), lr=0.05)
    for _ in range(2):  # some tensors have no gradient before others have moved from zero
        optimizer.zero_grad()
        model.train()(tokens(), labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()
    assert all(parameter.grad.abs().max() > 0 for parameter in adapter.values())
    for name, layer in layers_of(model).items():
        assert torch.equal(read_weight(layer.base_layer), frozen[name])
    assert not torch.equal(logits(model.eval()), before)


@every_method
@on(SMOOTH)
def test_gradients_are_those_of_the_dequantised_weights(method, backend):
    quantised, plain = backend.bert(), bert(width=WIDTH)
    for name, module in plain.named_modules():
        if isinstance(module, nn.Linear):
            module.weight.data = read_weight(quantised.get_submodule(name)).clone()
    gradients = []
    for base in (quantised, plain):
        model = adapted(method, base).train()  # in evaluation some processors compute 4-bit products in bfloat16
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model(tokens(), labels=torch.tensor([0, 1])).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        if gradient is not None:
            assert_close(gradient, gradients[1][name], products=5000)


@every_method
@on(BACKENDS)
@pytest.mark.peft_feature("`disable_adapter`")
def test_disabling_and_unloading_leave_the_quantised_base(method, backend):
    base = backend.bert()
    before = logits(base)
    model = adapted(method, base)
    assert not torch.equal(logits(model), before)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    unloaded = model.unload()
    assert torch.equal(logits(unloaded), before)
    assert not layers_of(unloaded)


@every_method
@on(BACKENDS)
@pytest.mark.peft_feature("mixed batches (`adapter_names=[...]`, `__base__`)")
def test_a_batch_mixes_adapters(method, backend):
    model = adapted(method, backend.bert())
    torch.manual_seed(2)
    model.add_adapter("second", method.config(target_modules=TARGETS, init_weights=False, alpha=5.0))
    layer, x = next(iter(layers_of(model.eval()).values())), inputs(backend, rows=1)
    expected = {"__base__": layer.base_layer(x)}
    for name in ("default", "second"):
        model.set_adapter(name)
        expected[name] = layer(x)
    names = ["second", "__base__", "default", "second"]
    mixed = layer(x.repeat(len(names), 1), adapter_names=names)
    for row, name in zip(mixed, names, strict=True):
        assert_close(row.detach(), expected[name][0].detach(), products=200)
    rows = model(tokens()[:1].repeat(len(names), 1), adapter_names=names).logits
    assert_close(rows[3].detach(), rows[0].detach(), products=1000)
    assert not torch.allclose(rows[0], rows[2])


# ---------------------------------------------------------------------------------------------------------------------
# Merging
# ---------------------------------------------------------------------------------------------------------------------


@every_method
@on(BACKENDS)
@pytest.mark.peft_feature("`merge_and_unload` into a quantised base")
def test_merging_is_quantising_the_sum(method, backend):
    """Bit for bit the model that transformers makes of weights with the adapter already in them."""
    model, plain = adapted(method, backend.bert()), bert(width=WIDTH)
    logits(model)  # some back ends change their state in the first forward pass
    for name, layer in layers_of(model.get_base_model()).items():
        weight, delta = read_weight(layer.base_layer), layer.get_delta_weight("default").detach()
        plain.get_submodule(name).weight.data = (weight.to(delta.dtype) + delta).to(weight.dtype).float()
    expected = backend.quantise(plain)
    merged = model.merge_and_unload(safe_merge=True)
    for name, module in expected.named_modules():
        assert type(merged.get_submodule(name)) is type(module)
        if name.endswith((".query", ".value")):
            found = merged.get_submodule(name)
            assert type(found.weight) is type(module.weight) and not found.weight.requires_grad
            assert torch.equal(read_weight(found), read_weight(module))
    assert torch.equal(logits(merged), logits(expected))


@every_method
@on(ONE_STAGE)
@pytest.mark.peft_feature("`merge_adapter` and `unmerge_adapter` on a quantised base")
def test_merging_is_within_the_quantisers_rounding_and_unmerging_exact(method, backend):
    def rounding(weight):
        return backend.rounding(weight) + tolerance(torch.float32, 10) * weight.abs().max()

    model = adapted(method, backend.bert())
    before = {name: read_weight(layer.base_layer).clone() for name, layer in layers_of(model).items()}
    model.merge_adapter()
    for name, layer in layers_of(model).items():
        delta = layer.get_delta_weight("default").detach()
        bound = rounding(before[name] + delta)
        assert ((read_weight(layer.base_layer) - before[name] - delta).abs() <= bound).all()
        assert (delta.abs() > 2 * bound).any(), "a delta below the rounding shows nothing"
    model.unmerge_adapter()
    for name, layer in layers_of(model).items():
        assert torch.equal(read_weight(layer.base_layer), before[name])
        assert not layer.merged


@every_method
@on(BACKENDS)
@pytest.mark.peft_feature("`safe_merge`")
def test_safe_merge_changes_nothing_where_it_refuses(method, backend):
    base = backend.bert()
    before = logits(base)
    model = adapted(method, base)
    for name, parameter in model.named_parameters():
        if f".{method.name}_" in name:
            parameter.data.fill_(torch.nan)
    with pytest.raises(CraftError, match="NaNs detected in the merged weights"):
        model.merge_adapter(safe_merge=True)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)


@pytest.mark.parametrize("double", [False, True])
def test_a_weight_that_bitsandbytes_packed_for_the_processor_is_read_as_it_was(double):
    """With AVX512-BF16 the first forward pass in evaluation packs it. The packing is called here on any processor."""
    torch.manual_seed(0)
    layer = Linear4bit(256, 64, quant_type="nf4", compress_statistics=double).to("cpu")
    before = read_weight(layer).clone()
    layer.weight.data, layer.weight.quant_state = _convert_weight_packed_for_cpu(
        layer.weight.data, layer.weight.quant_state
    )
    packed, scales = layer.weight.data.clone(), layer.weight.quant_state.absmax.clone()
    found = read_weight(layer)
    assert found.dtype == before.dtype
    # Packing rounds the scale of each block to bfloat16.
    assert ((found - before).abs() <= before.abs() * torch.finfo(torch.bfloat16).eps / 2).all()
    state = layer.weight.quant_state
    assert state.packing_format_for_cpu and not state.nested
    assert torch.equal(layer.weight.data, packed) and torch.equal(state.absmax, scales)


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


@every_method
@on(BACKENDS)
@pytest.mark.peft_feature("saving and loading on a quantised base")
def test_an_adapter_of_a_quantised_base_loads_on_it_bit_equal(method, backend, tmp_path):
    model = adapted(method, backend.bert())
    model.save_pretrained(tmp_path)
    for name, low_memory in (("default", False), ("low", True)):
        loaded = PeftModel.from_pretrained(backend.bert(), tmp_path, name, low_cpu_mem_usage=low_memory)
        assert torch.equal(logits(loaded), logits(model))


@on(BACKENDS)
def test_factors_are_computed_again_from_the_same_quantised_base_alone(backend, tmp_path):
    model = adapted(CRAFT, backend.bert(), save_factors=False)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(backend.bert(), tmp_path)), logits(model))
    with pytest.raises(CraftError, match="base weights are not those that the adapter was trained with"):
        PeftModel.from_pretrained(bert(width=WIDTH), tmp_path)


@every_method
@on(BACKENDS)
@pytest.mark.peft_feature("an adapter of a plain base on a quantised one")
def test_an_adapter_of_the_plain_base_loads_on_the_quantised_one(method, backend, tmp_path):
    model = adapted(method, bert(width=WIDTH))
    model.save_pretrained(tmp_path)
    for low_memory in (False, True):
        loaded = PeftModel.from_pretrained(backend.bert(), tmp_path, low_cpu_mem_usage=low_memory).eval()
        for name, layer in layers_of(model).items():
            found = loaded.get_submodule(name)
            assert torch.equal(found.get_delta_weight("default"), layer.get_delta_weight("default"))
            x = inputs(backend)
            expected = found.base_layer(x) + layer.slots["default"].delta_output(x)
            assert torch.equal(found(x), expected)


@every_method
@on(BACKENDS)
@pytest.mark.peft_feature("export to LoRA")
def test_the_export_serves_on_the_quantised_base(method, backend, tmp_path):
    model = adapted(method, backend.bert())
    export = to_lora(model)
    export.save(tmp_path)
    assert export.total_error == 0
    lora = PeftModel.from_pretrained(backend.bert(), tmp_path).eval()
    for name, layer in layers_of(model).items():
        served, x = lora.get_submodule(name), inputs(backend)
        delta = layer.get_delta_weight("default").detach()
        assert_close(served.get_delta_weight("default").detach(), delta, products=200)
        assert_close(served(x).detach(), layer(x).detach(), products=200)


# ---------------------------------------------------------------------------------------------------------------------
# Back ends that only run
# ---------------------------------------------------------------------------------------------------------------------


class EetqLinear(nn.Module):
    """Stands for the layer of EETQ, one of those that PEFT knows to run only. PEFT tells it by its class."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        scales = linear.weight.data.abs().amax(1) / 127
        self.weight = nn.Parameter((linear.weight.data.T / scales).round().to(torch.int8), requires_grad=False)
        self.register_buffer("weight_scales", scales)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.weight * self.weight_scales).to(x.dtype) + self.bias


@pytest.fixture
def forward_only(monkeypatch):
    """A model whose attention a back end without a way back has quantised."""
    monkeypatch.setitem(sys.modules, "eetq", types.SimpleNamespace(EetqLinear=EetqLinear))
    monkeypatch.setattr(quantization_utils, "is_eetq_available", lambda: True)
    model = bert(width=WIDTH)
    for layer in model.bert.encoder.layer:
        for name in ("query", "key", "value"):
            setattr(layer.attention.self, name, EetqLinear(getattr(layer.attention.self, name)))
    return model


@pytest.mark.peft_feature(
    "a new adapter on bases of GPTQ, AWQ, AQLM, EETQ, ...",
    no="their weights cannot be turned back into numbers to decompose; an adapter with saved factors loads and trains",
)
def test_a_new_adapter_is_refused_where_the_weights_cannot_be_read(forward_only):
    before = {name: type(module) for name, module in forward_only.named_modules()}
    with pytest.raises(
        CraftError,
        match=r"'bert.encoder.layer.0.attention.self.query', a EetqLinear \(eetq\), is quantised and cannot be .* "
        r"Load an adapter that was saved with its factors .*, or load the base model unquantised",
    ):
        adapted(CRAFT, forward_only)
    assert {name: type(module) for name, module in forward_only.named_modules()} == before


def test_every_use_of_an_adapter_that_cannot_be_computed_is_refused(forward_only, tmp_path):
    """A config from a file defers the computation, in case a file brings what it would give."""
    adapted(CRAFT, bert(width=WIDTH)).save_pretrained(tmp_path)
    model = get_peft_model(forward_only, PeftConfig.from_pretrained(tmp_path))
    for use in (logits, logits, lambda model: model.state_dict(), lambda model: model.merge_adapter()):
        with pytest.raises(CraftError, match="cannot be turned back into floating-point numbers"):
            use(model)


@every_method
@pytest.mark.peft_feature("an adapter with saved factors on bases of GPTQ, AWQ, AQLM, EETQ, ...")
def test_saved_factors_work_where_the_weights_cannot_be_read(method, forward_only, tmp_path):
    model = adapted(method, bert(width=WIDTH))
    model.save_pretrained(tmp_path)
    before = logits(forward_only)
    for low_memory in (False, True):
        loaded = PeftModel.from_pretrained(
            copy.deepcopy(forward_only), tmp_path, low_cpu_mem_usage=low_memory, is_trainable=True
        ).eval()
        assert get_model_status(loaded).quantization_backend == "eetq"
        for name, layer in layers_of(model).items():
            assert torch.equal(
                loaded.get_submodule(name).get_delta_weight("default"), layer.get_delta_weight("default")
            )
        assert not torch.equal(logits(loaded), before)
        with loaded.disable_adapter():
            assert torch.equal(logits(loaded), before)
        loaded(tokens(), labels=torch.tensor([0, 1])).loss.backward()
        trained = [p for n, p in loaded.named_parameters() if p.requires_grad and f".{method.name}_" in n]
        assert trained and all(parameter.grad.abs().max() > 0 for parameter in trained)
        with pytest.raises(CraftError, match=r"a EetqLinear \(eetq\), .* neither decomposed nor merged into"):
            loaded.merge_adapter()
        assert not any(layer.merged for layer in layers_of(loaded).values())
        assert to_lora(loaded).total_error == 0


def test_numbers_of_8_bits_are_no_weight_without_their_scale():
    """As in transformers' layers for 8-bit floating point: the scale is a tensor beside the weight."""
    base = bert()
    for layer in base.bert.encoder.layer:
        weight = layer.attention.self.query.weight
        layer.attention.self.query.weight = nn.Parameter(weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(CraftError, match=r"'bert.encoder.layer.0.attention.self.query', a Linear, is quantised"):
        adapted(CRAFT, base)


class ReadOnlyTensor(torch.Tensor):
    """Stands for a quantised tensor that PEFT does not know (quanto's): computes as numbers, ignores `data = ...`."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> torch.Tensor:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        args, kwargs = torch.utils._pytree.tree_map_only(cls, lambda tensor: tensor.inner, (args, kwargs or {}))
        return function(*args, **kwargs)


@pytest.mark.parametrize("quantise", [lambda layer: quantize_(layer, Int8WeightOnlyConfig()), None])
def test_merging_is_refused_where_the_weight_cannot_be_quantised_again(quantise):
    """torchao without the transformers' config that says how; and a class of tensor that PEFT does not know."""
    base = bert(width=WIDTH)
    for layer in base.bert.encoder.layer:
        for linear in (layer.attention.self.query, layer.attention.self.value):
            if quantise:
                quantise(linear)
            else:
                linear.weight = nn.Parameter(ReadOnlyTensor(linear.weight.data), requires_grad=False)
    before = logits(base)
    fresh = adapted(CRAFT, copy.deepcopy(base) if quantise else base, init_weights=True)
    assert torch.equal(logits(fresh), before)
    fresh.unload()
    model = adapted(CRAFT, base)
    expected = logits(model)
    assert not torch.equal(expected, before)
    with pytest.raises(CraftError, match=r"merged into a Linear whose weight is a .*Tensor.*TorchAoConfig"):
        model.merge_adapter()
    assert torch.equal(logits(model), expected) and not any(layer.merged for layer in layers_of(model).values())
