"""Tools that look at single operations see those of an adapted model, and what they make of it computes the same."""

import pytest
import torch
from compiled_laws import Blocks, adapted, rows
from laws import assert_close
from method_table import METHODS
from small_models import bert, tokens
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.func import functional_call

from craft_peft.fused import is_looked_into

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.[a-z_]*. is deprecated:DeprecationWarning")
every_method = pytest.mark.parametrize("method", METHODS, ids=str)
MANY = 8  # rows of 5 tokens; from 4 on base and adapter are one step of our own, as training takes it


def saved_trace(model, x, folder):
    torch.jit.save(torch.jit.trace(model, x), folder / "model.pt")
    return torch.jit.load(folder / "model.pt")


def graph_of_operations(model, x, folder):
    return make_fx(model)(x)


class Plain(nn.Module):
    """A model with one input and no keyword arguments, which is what tools take."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x):
        output = self.model(x)
        return output if isinstance(output, torch.Tensor) else output.logits


@every_method
@pytest.mark.parametrize("tool", [saved_trace, graph_of_operations], ids=lambda tool: tool.__name__)
@pytest.mark.peft_feature("`torch.jit.trace`: saved, loaded, the same outputs")
def test_what_a_tool_makes_of_the_model_computes_the_same(tool, method, tmp_path):
    model = Plain(adapted(method, Blocks()).eval())
    with torch.no_grad():
        expected = model(rows(MANY))
    made = tool(model, rows(MANY) + 1, tmp_path)
    with torch.no_grad():
        assert_close(made(rows(MANY)), expected, products=200)


@pytest.mark.parametrize("method", [method for method in METHODS if not method.setting], ids=str)
def test_a_traced_transformer_computes_the_same(method, tmp_path):
    base = bert()
    base.set_attn_implementation("eager")
    model = Plain(adapted(method, base).eval())
    with torch.no_grad():
        expected = model(tokens())
        traced = torch.jit.trace(model, tokens(1), strict=False)
        torch.jit.save(traced, tmp_path / "model.pt")
        assert_close(torch.jit.load(tmp_path / "model.pt")(tokens()), expected, products=1000)


def test_what_is_kept_for_unmerging_is_in_no_saved_program(tmp_path):
    sizes = []
    for keep in (True, False):
        model = adapted(METHODS[0], Blocks()).eval()
        with torch.no_grad():
            if keep:
                model.merge_adapter()
            model = Plain(model if keep else model.merge_and_unload())
            folder = tmp_path / str(keep)
            folder.mkdir()
            saved_trace(model, rows(MANY), folder)
            sizes.append((folder / "model.pt").stat().st_size)
    adapters = sum(t.nbytes for name, t in adapted(METHODS[0], Blocks()).state_dict().items() if "craft" in name)
    weights = sum(p.nbytes for p in Blocks().parameters() if p.ndim == 2)
    assert weights == 4 * 16 * 16 * 4
    assert sizes[0] - sizes[1] < adapters + weights / 2 + 30_000


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
