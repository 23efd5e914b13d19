"""HOSVD: its definition, its guarantees, and tensorly as an independent implementation."""

import itertools

import numpy as np
import pytest
import tensorly
import torch
from hypothesis import given
from hypothesis import strategies as st
from laws import assert_close, tolerance
from tensorly.decomposition import tucker as tensorly_tucker

from craft_peft import CraftError, Tucker, explained_energy, hosvd, mode_product, unfold

DECOMPOSITIONS = ["hosvd", "st-hosvd", "hooi"]
SHAPE, RANKS = (4, 9, 7), (3, 5, 4)


def random_tensor(shape=SHAPE, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@st.composite
def shapes_and_ranks(draw):
    shape = draw(st.lists(st.integers(1, 6), min_size=2, max_size=4))
    return tuple(shape), tuple(draw(st.integers(1, size)) for size in shape)


def assert_orthonormal(factor):
    identity = torch.eye(factor.shape[1], dtype=torch.float64)
    assert (factor.double().T @ factor.double() - identity).abs().max() <= tolerance(factor.dtype, factor.shape[0])


def test_unfold_by_its_definition():
    tensor = random_tensor((2, 3, 4))
    for mode in range(3):
        others = [dim for dim in range(3) if dim != mode]
        for index in itertools.product(*map(range, tensor.shape)):
            column = index[others[0]] * tensor.shape[others[1]] + index[others[1]]
            assert unfold(tensor, mode)[index[mode], column] == tensor[index]


def test_mode_product_by_its_definition():
    tensor = random_tensor((2, 3, 4))
    for mode, size in enumerate(tensor.shape):
        matrix = random_tensor((5, size), seed=mode)
        found = mode_product(tensor, matrix, mode)
        expected = torch.empty_like(found)
        for index in itertools.product(*map(range, found.shape)):
            fibre = tensor[tuple(slice(None) if dim == mode else i for dim, i in enumerate(index))]
            expected[index] = matrix[index[mode]] @ fibre
        assert_close(found, expected, products=size)


@given(shapes_and_ranks(), st.sampled_from(DECOMPOSITIONS), st.integers(0, 5))
def test_factors_are_orthonormal_and_the_core_is_the_projection(shape_ranks, method, seed):
    shape, ranks = shape_ranks
    tensor = random_tensor(shape, seed)
    tucker = hosvd(tensor, ranks, method)
    assert tucker.ranks == ranks and tucker.shape == shape
    projected = tensor
    for mode, factor in enumerate(tucker.factors):
        assert_orthonormal(factor)
        projected = mode_product(projected, factor.T, mode)
    assert_close(tucker.core, projected, products=tensor.numel() + 10)


@given(shapes_and_ranks(), st.sampled_from(DECOMPOSITIONS))
def test_at_full_rank_it_is_the_tensor(shape_ranks, method):
    tensor = random_tensor(shape_ranks[0])
    assert_close(hosvd(tensor, shape_ranks[0], method).reconstruct(), tensor, products=20 * tensor.numel())


def test_hosvd_factors_are_the_singular_vectors_of_the_unfoldings():
    tensor = random_tensor()
    for mode, factor in enumerate(hosvd(tensor, RANKS).factors):
        expected = torch.linalg.svd(unfold(tensor, mode), full_matrices=False).U[:, : RANKS[mode]]
        assert_close(factor @ factor.T, expected @ expected.T, products=1000)


@pytest.mark.parametrize("rank", [2, 6, 20])
def test_a_mode_larger_than_the_others_together(rank, monkeypatch):
    """As of one layer's vocabulary: its singular vectors, without a matrix of its size squared."""
    tensor, largest, eigh = random_tensor((1, 40, 6)), [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: largest.append(len(matrix)) or eigh(matrix))
    factor = hosvd(tensor, (1, rank, 6)).factors[1]
    assert max(largest) <= 6
    assert_orthonormal(factor)
    vectors = torch.linalg.svd(tensor[0], full_matrices=False).U[:, :rank]
    cosines = (vectors * factor[:, :6]).sum(0).abs()
    assert_close(cosines, torch.ones_like(cosines), products=1000)
    for further in factor[:, 6:].T:
        assert (further @ tensor[0]).abs().max() <= tolerance(torch.float64, 40) * tensor.abs().max()


def test_the_core_of_a_full_hosvd_is_all_orthogonal():
    """De Lathauwer et al. (2000), theorem 2: slices of the core are orthogonal, their norms are the singular values."""
    tensor = random_tensor()
    core = hosvd(tensor, SHAPE).core
    for mode in range(3):
        gram = unfold(core, mode) @ unfold(core, mode).T
        singular = torch.linalg.svdvals(unfold(tensor, mode))
        assert_close(gram, torch.diag(singular**2), products=1000)


@pytest.mark.parametrize("method", ["hosvd", "hooi"])
def test_agrees_with_tensorly(method):
    tensor = random_tensor((5, 12, 10))
    ranks = (4, 6, 5)
    ours = hosvd(tensor, ranks, method)
    sweeps = 0 if method == "hosvd" else 2
    theirs = tensorly_tucker(tensor.numpy(), ranks, init="svd", svd="truncated_svd", n_iter_max=sweeps, tol=0)
    reference = torch.from_numpy(np.ascontiguousarray(tensorly.tucker_to_tensor(theirs)))
    assert_close(ours.reconstruct(), reference, products=10000)


def test_better_methods_fit_better():
    energies = [
        explained_energy(random_tensor((6, 20, 18)), hosvd(random_tensor((6, 20, 18)), (4, 5, 5), method)).item()
        for method in DECOMPOSITIONS
    ]
    assert energies[0] < energies[1] < energies[2] < 1


@given(shapes_and_ranks(), st.sampled_from(DECOMPOSITIONS))
def test_signs_are_canonical_and_the_result_is_repeatable(shape_ranks, method):
    shape, ranks = shape_ranks
    tensor = random_tensor(shape)
    first, second = hosvd(tensor, ranks, method), hosvd(tensor.clone(), ranks, method)
    assert torch.equal(first.core, second.core)
    for factor, again in zip(first.factors, second.factors, strict=True):
        assert torch.equal(factor, again)
        largest = factor.gather(0, factor.abs().argmax(0, keepdim=True))
        assert (largest > 0).all()


@pytest.mark.parametrize("method", DECOMPOSITIONS)
@pytest.mark.parametrize(
    "tensor",
    [
        pytest.param(torch.zeros(SHAPE), id="zero"),
        pytest.param(torch.full(SHAPE, 3.0), id="constant"),
        pytest.param(random_tensor(dtype=torch.float32) * 1e-30, id="tiny"),
        pytest.param(random_tensor(dtype=torch.float32) * 1e30, id="huge"),
        pytest.param(torch.einsum("a,b,c->abc", *(torch.arange(1.0, n + 1) for n in SHAPE)), id="rank one"),
        pytest.param(torch.eye(9)[None].repeat(4, 1, 1)[:, :, :7], id="repeated singular values"),
        pytest.param(random_tensor(dtype=torch.float32).bfloat16(), id="bfloat16"),
        pytest.param(random_tensor(dtype=torch.float32).half(), id="float16"),
    ],
)
def test_hard_tensors_give_orthonormal_factors(tensor, method):
    tucker = hosvd(tensor, RANKS, method)
    assert tucker.core.dtype == torch.float32 and torch.isfinite(tucker.core).all()
    for factor in tucker.factors:
        assert torch.isfinite(factor).all()
        assert_orthonormal(factor)


def test_scaling_the_tensor_scales_the_core_alone():
    tensor = random_tensor(dtype=torch.float32)
    base, scaled = hosvd(tensor, RANKS), hosvd(tensor * 2.0**-90, RANKS)
    assert torch.equal(base.core * 2.0**-90, scaled.core)
    assert all(torch.equal(a, b) for a, b in zip(base.factors, scaled.factors, strict=True))


def test_explained_energy_by_its_definition():
    tensor = random_tensor()
    tucker = hosvd(tensor, RANKS)
    error = (tensor - tucker.reconstruct()).square()
    assert_close(explained_energy(tensor, tucker), 1 - error.sum() / tensor.square().sum(), products=1000)
    assert_close(explained_energy(tensor, tucker), tucker.core.square().sum() / tensor.square().sum(), products=1000)
    for mode in range(3):
        others = [dim for dim in range(3) if dim != mode]
        expected = 1 - error.sum(others) / tensor.square().sum(others)
        assert_close(explained_energy(tensor, tucker, mode=mode), expected, products=1000)


def test_explained_energy_of_nothing_is_one():
    tensor = random_tensor()
    tensor[1] = 0
    tucker = hosvd(tensor, SHAPE)
    assert explained_energy(tensor, tucker, mode=0)[1] == 1
    assert explained_energy(torch.zeros(SHAPE), hosvd(torch.zeros(SHAPE), RANKS)) == 1


def test_a_tucker_is_frozen():
    with pytest.raises(AttributeError):
        hosvd(random_tensor(), RANKS).core = torch.zeros(1)
    assert Tucker(torch.ones(1, 1), (torch.ones(2, 1), torch.ones(3, 1))).reconstruct().shape == (2, 3)


@pytest.mark.parametrize(
    ("tensor", "ranks", "method", "message"),
    [
        (torch.zeros(SHAPE), (3, 5), "hosvd", r"ranks=\(3, 5\) has 2 entries for a tensor of 3 modes"),
        (torch.zeros(SHAPE), (5, 5, 4), "hosvd", r"ranks\[0\]=5 is outside 1..4, the size of mode 0"),
        (torch.zeros(SHAPE), (3, 0, 4), "hosvd", r"ranks\[1\]=0 is outside 1..9"),
        (torch.full(SHAPE, torch.nan), RANKS, "hosvd", "holds NaN or infinity"),
        (torch.full(SHAPE, -torch.inf), RANKS, "hooi", "holds NaN or infinity"),
    ],
)
def test_bad_input(tensor, ranks, method, message):
    with pytest.raises(CraftError, match=message):
        hosvd(tensor, ranks, method)
