"""Low precision: an adapted layer is finite wherever the layer that it adapts is. (Odd weights: `test_tucker`.)"""

import copy

import pytest
import torch
from laws import assert_close
from method_table import METHODS
from peft import get_peft_model
from torch import nn

SIZE, LAYERS = 64, 3
TARGETS = [str(layer) for layer in range(LAYERS)]


def base_model(dtype):
    """Layers whose outputs are in the range of float16 for inputs at the end of that range."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(SIZE, SIZE) for _ in TARGETS)).apply(shrink).to(dtype)


def shrink(module):
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=1e-2)


def adapted(method, base, **fields):
    return get_peft_model(copy.deepcopy(base), method.config(target_modules=TARGETS, **fields)).base_model.model


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fields", [{}, {"dropout": 0.5}], ids=["fused", "with dropout"])
def test_low_precision_stays_finite(method, dtype, fields):
    base = base_model(dtype)
    model = adapted(method, base, **fields)
    x = torch.full((2, 5, SIZE), 6e4, dtype=dtype, requires_grad=True)
    for layer in range(LAYERS):
        expected = base[layer](x)
        found = model[layer](x)
        assert torch.isfinite(expected).all() and torch.equal(found, expected)
        (found * 1e-3).sum().backward()
        assert all(p.grad is None or torch.isfinite(p.grad).all() for p in [x, *model[layer].parameters()])


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_right(method, dtype):
    base = base_model(dtype)
    model = adapted(method, base, init_weights=False, alpha=1e-2)
    x = torch.full((2, 5, SIZE), 2e3, dtype=dtype)
    for layer in range(LAYERS):
        delta = model[layer].get_delta_weight("default").detach().double()
        exact = x.double() @ (base[layer].weight.double() + delta).T + base[layer].bias.double()
        # Every product may be rounded to `dtype`; the sums are in float32.
        assert_close(model[layer](x).detach(), exact, products=SIZE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_in_mixed_batches(dtype):
    base = base_model(dtype)
    model = get_peft_model(copy.deepcopy(base), METHODS[0].config(target_modules=TARGETS)).eval()
    model.add_adapter("second", METHODS[0].config(target_modules=TARGETS))
    x = torch.full((3, SIZE), 6e4, dtype=dtype)
    first = model.base_model.model[0]
    with torch.no_grad(), model._enable_peft_forward_hooks(adapter_names=["default", "second", "__base__"]):
        pass
    found = first(x, adapter_names=["default", "second", "__base__"])
    assert torch.equal(found, base[0](x))
