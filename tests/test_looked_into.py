"""Tools that look at single operations see those of an adapted model, and what they make of it computes the same."""

import pytest
import torch
from compiled_laws import Blocks, adapted, rows
from laws import assert_close
from method_table import METHODS
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from craft_peft.fused import is_looked_into

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.[a-z_]*. is deprecated:DeprecationWarning")
every_method = pytest.mark.parametrize("method", METHODS, ids=str)
MANY = 8  # rows of 5 tokens; from 4 on base and adapter are one step of our own, as training takes it


@every_method
def test_a_graph_of_operations_computes_the_same(method):
    model = adapted(method, Blocks()).eval()
    with torch.no_grad():
        made = make_fx(model)(rows(MANY) + 1)
        assert_close(made(rows(MANY)), model(rows(MANY)), products=200)


def directional_derivative_by_levels(function, point, direction):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(point, direction))).tangent


def directional_derivative_by_function(function, point, direction):
    return torch.func.jvp(function, (point,), (direction,))[1]


@every_method
@pytest.mark.parametrize("count", [1, MANY])
@pytest.mark.parametrize("derive", [directional_derivative_by_levels, directional_derivative_by_function])
@pytest.mark.peft_feature("forward-mode derivatives: `torch.autograd.forward_ad`, `torch.func.jvp`")
def test_forward_mode_derivatives_are_those_of_the_backward_pass(derive, count, method):
    """By the input and by each trained tensor: v . (J d) = (J^T v) . d."""
    model = adapted(method, Blocks()).double().eval()
    x = rows(count).double()
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def of_input(x):
        return model(x)

    points = {"": (of_input, x)}
    for name, tensor in trained.items():
        points[name] = (lambda t, name=name: functional_call(model, {name: t}, (x,)), tensor)
    torch.manual_seed(2)
    for name, (function, point) in points.items():
        direction, weights = torch.randn_like(point), torch.randn_like(x)
        found = derive(function, point, direction)
        start = point.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(function(start), start, weights, allow_unused=True)
        expected = torch.zeros(()) if gradient is None else (gradient * direction).sum()
        torch.testing.assert_close((weights * found).sum(), expected.double(), rtol=1e-9, atol=1e-12, msg=name)


def test_nobody_looks_where_no_tool_is_at_work():
    assert not is_looked_into()
    with forward_ad.dual_level():
        assert is_looked_into()
    assert not is_looked_into()
    seen = []
    torch.jit.trace(lambda x: seen.append(is_looked_into()) or x + 1, torch.ones(1), check_trace=False)
    torch.func.vmap(lambda x: seen.append(is_looked_into()) or x)(torch.ones(2))
    assert seen == [True, True]
