"""What holds for every method, each law a function of one row of the table. `test_faults` breaks them on purpose."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable

import torch
from method_table import Method
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from small_models import LAYERS, WIDTH, bert, gpt2, logits, tokens
from torch import Tensor

from craft_peft.plugin.layer import StackedLinear
from craft_peft.weights import StackShape

SHAPE = StackShape.uniform(layers=3, d_out=7, d_in=5)
TARGETS = ["query", "value"]
Law = Callable[[Method], None]


def tolerance(dtype: torch.dtype, products: int) -> float:
    """The relative error of a sum of so many products: rounding grows with their number at worst; 4 for headroom."""
    return 4 * products * torch.finfo(dtype).eps


def assert_close(found: Tensor, expected: Tensor, products: int) -> None:
    """Equal within the rounding of `products` products a number, relative to the largest number expected."""
    error = (found.double() - expected.double()).abs().max()
    bound = tolerance(found.dtype, products) * expected.double().abs().max()
    assert error <= bound, f"largest error {error:.3g} above {bound:.3g}"


def shows(*features: str) -> Callable[[Law], Law]:
    """The features of PEFT that a law shows; `test_laws` marks its tests with them."""

    def record(law: Law) -> Law:
        law.features = features  # type: ignore[attr-defined]
        return law

    return record


def moved(method: Method, dtype: torch.dtype = torch.float32, **fields):
    """A model with an adapter that is away from its start, and the base model that it was made from."""
    base = bert(dtype)
    torch.manual_seed(1)
    config = method.config(task_type="SEQ_CLS", target_modules=TARGETS, init_weights=False, **fields)
    return get_peft_model(copy.deepcopy(base), config).eval(), base


# ---------------------------------------------------------------------------------------------------------------------
# The adapter by itself
# ---------------------------------------------------------------------------------------------------------------------


def starts_at_zero(method: Method) -> None:
    adapter = method.adapter(SHAPE)
    for layer in range(SHAPE.layers):
        assert (adapter.delta_weight(layer) == 0).all()
        assert (adapter.delta_output(layer, torch.randn(4, SHAPE.d_in).double()) == 0).all()


def moves_from_the_start(method: Method) -> None:
    """The gradient at the start is not zero, for some parameter of every layer."""
    adapter = method.adapter(SHAPE)
    for layer in range(SHAPE.layers):
        adapter.zero_grad()
        (adapter.delta_weight(layer) * torch.randn(SHAPE.matrix).double()).sum().backward()
        assert any(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in adapter.parameters())


def follows_the_papers_equation(method: Method) -> None:
    adapter = method.adapter(SHAPE, init_weights=False, alpha=0.7)
    for layer in range(SHAPE.layers):
        assert_close(adapter.delta_weight(layer).detach(), method.naive_delta(adapter, layer), products=1000)


def output_is_the_weight_applied(method: Method) -> None:
    for dtype in (torch.float64, torch.float32):
        adapter = method.adapter(SHAPE, dtype=dtype, init_weights=False, alpha=0.7)
        x = torch.randn(2, 6, SHAPE.d_in, dtype=dtype)
        for layer in range(SHAPE.layers):
            expected = x @ adapter.delta_weight(layer).T
            assert_close(adapter.delta_output(layer, x).detach(), expected.detach(), products=100)


def scales_with_alpha(method: Method) -> None:
    once, thrice = (method.adapter(SHAPE, init_weights=False, alpha=alpha) for alpha in (1.0, 3.0))
    assert_close(thrice.delta_weight(1).detach(), 3 * once.delta_weight(1).detach(), products=100)


def is_the_same_with_and_without_gradients(method: Method) -> None:
    """Bit for bit, so that a loaded adapter is the trained one: PyTorch may sum in another order without gradients."""
    adapter = method.adapter(SHAPE, dtype=torch.float32, init_weights=False)
    for layer in range(SHAPE.layers):
        trained = adapter.delta_weight(layer)
        with torch.no_grad():
            assert torch.equal(adapter.delta_weight(layer), trained)


def gradients_are_right(method: Method) -> None:
    adapter = method.adapter(SHAPE, init_weights=False, alpha=0.7)
    names = [name for name, _ in adapter.named_parameters()]
    x = torch.randn(3, SHAPE.d_in, dtype=torch.float64, requires_grad=True)

    def output(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(
            _Output(adapter), {f"adapter.{n}": v for n, v in zip(names, values, strict=False)}, (x,)
        )

    assert torch.autograd.gradcheck(output, (x, *(p.detach().requires_grad_() for p in adapter.parameters())))


class _Output(torch.nn.Module):
    def __init__(self, adapter) -> None:
        super().__init__()
        self.adapter = adapter

    def forward(self, x: Tensor) -> Tensor:
        return self.adapter.delta_output(1, x)


# ---------------------------------------------------------------------------------------------------------------------
# In a model, through PEFT
# ---------------------------------------------------------------------------------------------------------------------


@shows("a fresh adapter leaves every output bit for bit")
def leaves_a_fresh_model_unchanged(method: Method) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for base in (bert(dtype), gpt2().to(dtype)):
            before = logits(base)
            config = method.config(target_modules=None if base.config.model_type == "gpt2" else TARGETS)
            assert torch.equal(logits(get_peft_model(base, config).eval()), before)


@shows("only the adapter and the modules to save are trained")
def trains_only_what_it_declares(method: Method) -> None:
    model = get_peft_model(bert(), method.config(task_type="SEQ_CLS", target_modules=TARGETS))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    adapter = {name: p for name, p in trained.items() if f".{method.name}_" in name}
    assert sum(p.numel() for p in adapter.values()) == method.count([StackShape.uniform(LAYERS, WIDTH, WIDTH)] * 2)
    assert all(".classifier.modules_to_save." in name for name in trained.keys() - adapter.keys())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD(trained.values(), lr=0.5)
    model.train()(tokens(), labels=torch.tensor([0, 1])).loss.backward()
    optimizer.step()
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed, "one step changed nothing"
    assert changed <= trained.keys()


@shows("`init_weights=False`", "`get_delta_weight`")
def adapts_every_target(method: Method) -> None:
    model, base = moved(method)
    changed = [name for name, module in model.named_modules() if isinstance(module, StackedLinear)]
    assert len(changed) == 2 * LAYERS
    for name in changed:
        layer = model.get_submodule(name)
        delta = layer.get_delta_weight("default")
        assert delta.abs().max() > 0
        x = torch.randn(4, WIDTH)
        expected = torch.nn.functional.linear(x, layer.base_layer.weight + delta, layer.base_layer.bias)
        assert_close(layer(x).detach(), expected.detach(), products=200)
    assert not torch.allclose(logits(model), logits(base))


@shows("`merge_adapter` and `unmerge_adapter`", "`merge_and_unload`", "`safe_merge`")
def merges_and_unmerges(method: Method) -> None:
    for make in (bert, gpt2):
        torch.manual_seed(1)
        base = make()
        model = get_peft_model(copy.deepcopy(base), method.config(target_modules=None, init_weights=False)).eval()
        adapted = logits(model)
        model.merge_adapter(safe_merge=True)
        assert all(m.merged for m in model.modules() if isinstance(m, StackedLinear))
        assert_close(logits(model), adapted, products=1000)
        model.unmerge_adapter()
        assert_close(logits(model), adapted, products=1000)
        for name, weight in base.state_dict().items():
            kept = model.get_base_model().state_dict()
            found = kept[
                name
                if name in kept
                else name.replace(".weight", ".base_layer.weight")
                if name.replace(".weight", ".base_layer.weight") in kept
                else name.replace(".bias", ".base_layer.bias")
            ]
            assert torch.equal(found, weight)
        merged = model.merge_and_unload(safe_merge=True)
        assert_close(logits(merged), adapted, products=1000)
        assert {n: type(m) for n, m in merged.named_modules()} == {n: type(m) for n, m in base.named_modules()}


@shows("`unload`")
def unloads_to_the_base(method: Method) -> None:
    model, base = moved(method)
    unloaded = model.unload()
    state = base.state_dict()
    assert unloaded.state_dict().keys() == state.keys()
    for name, tensor in unloaded.state_dict().items():
        assert torch.equal(tensor, state[name])


@shows("`disable_adapter`")
def disables_exactly(method: Method) -> None:
    base = bert()
    before = logits(base)
    model = get_peft_model(base, method.config(target_modules=TARGETS, init_weights=False)).eval()
    adapted = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), adapted)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), before)


@shows("`disable_adapter`")
def disables_without_unfreezing(method: Method) -> None:
    """A loaded adapter is frozen, its head too, and one that is trained is not."""
    model, base = moved(method)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for one in (model, PeftModel.from_pretrained(copy.deepcopy(base), folder)):
            before = {name: parameter.requires_grad for name, parameter in one.named_parameters()}
            with one.disable_adapter(), one.disable_adapter():
                logits(one)
            assert {name: parameter.requires_grad for name, parameter in one.named_parameters()} == before
            assert any(before.values()) == (one is model)


@shows(
    "`save_pretrained` and `from_pretrained`, bit for bit", "loading under another adapter name", "`low_cpu_mem_usage`"
)
def saves_and_loads_bit_equal(method: Method) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model, base = moved(method, dtype)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            for name, low_memory in (("default", False), ("another", False), ("query", False), ("low", True)):
                fresh = copy.deepcopy(base)
                loaded = PeftModel.from_pretrained(fresh, folder, adapter_name=name, low_cpu_mem_usage=low_memory)
                assert torch.equal(logits(loaded), logits(model))
                assert not any(p.requires_grad for n, p in loaded.named_parameters())


@shows("`from_pretrained(is_trainable=True)`")
def resumes_training(method: Method) -> None:
    model, base = moved(method)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), folder, is_trainable=True)
    trained = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (model, loaded)]
    assert trained[0] == trained[1]


@shows("several adapters", "`add_adapter`", "`set_adapter`", "`delete_adapter`")
def keeps_two_adapters_apart(method: Method) -> None:
    model, _base = moved(method)
    first = logits(model)
    torch.manual_seed(2)
    model.add_adapter("second", method.config(task_type="SEQ_CLS", target_modules=["key", "value"], init_weights=False))
    assert torch.equal(logits(model), first), "adding an adapter changed the active one"
    model.set_adapter("second")
    second = logits(model.eval())
    assert not torch.allclose(first, second)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.delete_adapter("second")
    assert torch.equal(logits(model), first)
    assert not any("second" in name for name in model.state_dict())
    torch.manual_seed(2)
    model.add_adapter("second", method.config(task_type="SEQ_CLS", target_modules=["key", "value"], init_weights=False))
    model.set_adapter("second")
    assert torch.equal(logits(model.eval()), second), "an adapter that was deleted and added again differs"


@shows("`delete_adapter`")
def survives_losing_its_first_adapter(method: Method) -> None:
    model, _base = moved(method)
    torch.manual_seed(2)
    model.add_adapter("second", method.config(task_type="SEQ_CLS", target_modules=TARGETS, init_weights=False))
    model.set_adapter("second")
    second = logits(model.eval())
    model.delete_adapter("default")
    assert torch.equal(logits(model), second)


@shows("mixed batches (`adapter_names=[...]`, `__base__`)")
def mixes_adapters_in_a_batch(method: Method) -> None:
    model, base = moved(method)
    torch.manual_seed(2)
    model.add_adapter("second", method.config(task_type="SEQ_CLS", target_modules=["key", "value"], init_weights=False))
    model.eval()
    rows = tokens()[0].repeat(4, 1)
    expected = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        expected[name] = model(rows).logits[0]
    mixed = model(rows, adapter_names=["second", "__base__", "default", "second"]).logits
    assert_close(mixed[0], expected["second"], products=200)
    assert_close(mixed[2], expected["default"], products=200)
    assert_close(mixed[3], mixed[0], products=200)
    assert_close(mixed[1], base(rows).logits[0], products=200)


@shows("`inject_adapter_in_model`", "`inject_adapter_in_model(state_dict=...)`")
def works_without_peft_model(method: Method) -> None:
    base, fields = bert(), {"target_modules": TARGETS, "init_weights": False}
    torch.manual_seed(1)
    model = inject_adapter_in_model(method.config(**fields), copy.deepcopy(base)).eval()
    state = get_peft_model_state_dict(model)
    for keys in (None, state):
        torch.manual_seed(3)
        other = inject_adapter_in_model(method.config(**fields), copy.deepcopy(base), "other", state_dict=keys).eval()
        assert not torch.equal(logits(other), logits(model))
        set_peft_model_state_dict(other, state, "other")
        assert torch.equal(logits(other), logits(model))


@shows("`copy.deepcopy` and pickle")
def survives_copying(method: Method) -> None:
    model, _ = moved(method)
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))


@shows("gradient checkpointing, reentrant and not")
def checkpoints_gradients(method: Method) -> None:
    gradients = []
    for reentrant in (None, False, True):
        model, _ = moved(method)
        if reentrant is not None:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()  # the reentrant kind needs it, as PEFT's users know
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model(tokens(), labels=torch.tensor([0, 1])).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None})
    for checkpointed in gradients[1:]:
        assert gradients[0].keys() == checkpointed.keys() and gradients[0]
        for name, gradient in gradients[0].items():
            assert_close(checkpointed[name], gradient, products=100)


@shows("float32 adapters on a bfloat16 base")
def trains_in_float32_on_a_bfloat16_base(method: Method) -> None:
    model, _ = moved(method, torch.bfloat16)
    for name, parameter in model.named_parameters():
        if f".{method.name}_" in name:
            assert parameter.dtype == torch.float32, name
    model.train()(tokens(), labels=torch.tensor([0, 1])).loss.backward()
    layer = next(module for module in model.modules() if isinstance(module, StackedLinear))
    assert layer(torch.randn(2, WIDTH, dtype=torch.bfloat16)).dtype == torch.bfloat16


@shows("`torch.autocast`")
def works_under_autocast(method: Method) -> None:
    """In bfloat16 autocast the start is still exact, and the gradients are those of float32 up to its rounding."""
    base = bert()
    fresh = get_peft_model(copy.deepcopy(base), method.config(target_modules=TARGETS)).eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits(fresh), logits(base))
    gradients = []
    for enabled in (False, True):
        model, _ = moved(method)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = model(tokens(), labels=torch.tensor([0, 1])).loss
        loss.backward()
        gradients.append(
            torch.cat(
                [p.grad.flatten() for n, p in model.named_parameters() if p.requires_grad and f".{method.name}_" in n]
            )
        )
    assert torch.nn.functional.cosine_similarity(gradients[0], gradients[1], dim=0) > 0.99


ADAPTER_LAWS = [
    starts_at_zero,
    moves_from_the_start,
    follows_the_papers_equation,
    output_is_the_weight_applied,
    scales_with_alpha,
    is_the_same_with_and_without_gradients,
    gradients_are_right,
]
MODEL_LAWS = [
    leaves_a_fresh_model_unchanged,
    trains_only_what_it_declares,
    adapts_every_target,
    merges_and_unmerges,
    unloads_to_the_base,
    disables_exactly,
    disables_without_unfreezing,
    saves_and_loads_bit_equal,
    resumes_training,
    keeps_two_adapters_apart,
    survives_losing_its_first_adapter,
    mixes_adapters_in_a_batch,
    works_without_peft_model,
    survives_copying,
    checkpoints_gradients,
    trains_in_float32_on_a_bfloat16_base,
    works_under_autocast,
]
