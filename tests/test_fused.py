"""The fused layer against the equation: values, first and second derivatives, what it keeps, low precision."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from laws import assert_close
from torch.nn import functional as F

from craft_peft.fused import adapted_linear, forms_the_weight

D_OUT, D_IN, R_OUT, R_IN = 7, 5, 3, 2
FEW, MANY = (1, 2), (2, 4)  # tokens on either side of the choice at these sizes


def operands(tokens=MANY, dtype=torch.float64, sizes=(D_OUT, D_IN, R_OUT, R_IN), bias=True):
    generator = torch.Generator().manual_seed(0)
    d_out, d_in, r_out, r_in = sizes
    shapes = {"x": (*tokens, d_in), "weight": (d_out, d_in), "bias": (d_out,)}
    shapes |= {"out_factor": (d_out, r_out), "middle": (r_out, r_in), "in_factor": (d_in, r_in)}
    made = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for name, shape in shapes.items()
    }
    return made | ({} if bias else {"bias": None})


def naive(x, weight, bias, out_factor, middle, in_factor):
    return F.linear(x, weight + out_factor @ middle @ in_factor.T, bias)


def test_both_ways_are_taken():
    weight = torch.empty(D_OUT, D_IN)
    few, many = (forms_the_weight(rows * length, weight, torch.float32) for rows, length in (FEW, MANY))
    assert many and not few
    assert not forms_the_weight(10_000, weight, torch.bfloat16)


@pytest.mark.parametrize("tokens", [FEW, MANY])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_derivatives_of_first_and_second_order(tokens, bias):
    given_ = operands(tokens, bias=bias)
    torch.testing.assert_close(adapted_linear(**given_), naive(**given_))

    def output(x, middle):
        return adapted_linear(**(given_ | {"x": x, "middle": middle}))

    arguments = [given_[name].requires_grad_() for name in ("x", "middle")]
    assert torch.autograd.gradcheck(output, arguments)
    assert torch.autograd.gradgradcheck(output, arguments)


@given(
    sizes=st.tuples(*(st.integers(1, 40),) * 2, *(st.integers(1, 9),) * 2),
    tokens=st.lists(st.integers(1, 20), min_size=1, max_size=3).map(tuple),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_random_shapes(sizes, tokens, dtype):
    """Gradients as those of the equation in float64, within the rounding of the dtype."""
    found, exact = operands(tokens, dtype, sizes), operands(tokens, dtype, sizes)
    exact = {name: tensor.double() for name, tensor in exact.items()}
    gradients = []
    for values, function in ((found, adapted_linear), (exact, naive)):
        inputs = [values[name].requires_grad_() for name in ("x", "middle")]
        output = function(**values)
        weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).reshape(output.shape)
        gradients.append([output.detach(), *torch.autograd.grad(output, inputs, weights.to(output.dtype))])
    terms = sum(sizes) + torch.Size(tokens).numel()
    for a, b in zip(*gradients, strict=True):
        assert_close(a, b, products=4 * terms)


@pytest.mark.parametrize("tokens", [(1, 3), (16, 64)])
def test_it_keeps_one_narrow_matrix_for_the_backward_pass(tokens):
    """Bytes saved beside what exists anyway (weights, factors): tokens x r_in numbers."""
    given_ = operands(tokens, torch.float32, (48, 32, 8, 4))
    given_["middle"].requires_grad_()
    given_["x"].requires_grad_()
    existing = {tensor.data_ptr() for tensor in given_.values()}
    saved = {}

    def pack(tensor):
        if tensor.data_ptr() not in existing:
            saved[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        adapted_linear(**given_)
    assert sum(saved.values()) == torch.Size(tokens).numel() * 4


@pytest.mark.parametrize("tokens", [(1, 3), (16, 64)])
@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
def test_low_precision_beside_float32_factors(tokens, base_dtype):
    """A base in bfloat16, or in float32 under autocast: values, gradients, and no matrix but the narrow one kept."""
    sizes = (48, 32, 8, 4)
    exact = operands(tokens, torch.float64, sizes)
    given_ = operands(tokens, torch.float32, sizes)
    given_ |= {name: given_[name].to(base_dtype) for name in ("weight", "bias")} | {"x": given_["x"].bfloat16()}
    existing = {tensor.data_ptr() for tensor in given_.values()}
    saved = {}

    def pack(tensor):
        if tensor.data_ptr() not in existing:
            saved[tensor.data_ptr()] = tensor.nbytes
        return tensor

    for values in (exact, given_):
        for name in ("x", "middle"):
            values[name].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu"):
        found = adapted_linear(**given_)
    assert found.dtype == torch.bfloat16
    assert sum(saved.values()) <= torch.Size(tokens).numel() * 4 * 2 + 32 * 4 * 2  # hidden, and a factor that was cast
    expected = naive(**exact)
    # Sums are in float32: what counts is how often a number is rounded to bfloat16 on the way.
    assert_close(found, expected, products=4)
    with torch.autocast("cpu"):
        found.float().square().sum().backward()
    expected.square().sum().backward()
    assert given_["middle"].grad.dtype == torch.float32
    for name in ("x", "middle"):
        assert_close(given_[name].grad.bfloat16(), exact[name].grad, products=4)


def test_one_token_without_a_batch():
    given_ = operands((), torch.float64)
    torch.testing.assert_close(adapted_linear(**given_), naive(**given_))


def test_the_input_is_not_kept():
    given_ = operands(MANY, torch.float32)
    given_["middle"].requires_grad_()
    given_["x"] = given_["x"].requires_grad_() * 1
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        adapted_linear(**given_)
    assert kept and given_["x"].data_ptr() not in kept


def test_functional_transforms_see_through_it():
    given_ = operands(FEW)

    def loss(middle):
        return adapted_linear(**(given_ | {"middle": middle})).square().sum()

    def plain(middle):
        return naive(**(given_ | {"middle": middle})).square().sum()

    expected = torch.func.jacrev(torch.func.grad(plain))(given_["middle"])
    found = torch.func.jacrev(torch.func.grad(loss))(given_["middle"])
    torch.testing.assert_close(found, expected)
