"""Decompositions that read a tensor slice by slice: the same as of the tensor in memory, with few readings and little
memory; and the randomised search for directions, which keeps what the exact one keeps."""

import weakref

import pytest
import torch
from laws import assert_close, tolerance

from craft_peft import explained_energy, hosvd, mode_product, unfold
from craft_peft.directions import cheaper_directions, exact_directions, krylov_directions, krylov_size
from craft_peft.slices import SlicedTensor, slabs_of
from craft_peft.tucker import decomposition_cost, reads_of_each_slice
from craft_peft.weights import weights_fingerprint

METHODS = ["auto", "hosvd", "st-hosvd", "randomized", "hooi"]
SHAPE, RANKS = (4, 9, 7), (3, 5, 4)
WIDE, WIDE_RANKS = (3, 420, 400), (3, 6, 5)  # wide enough for Krylov spaces to pay


class Reader:
    """The slices of a tensor, copied out of it at each reading; counts readings, and slices in memory at each."""

    def __init__(self, tensor):
        self.tensor, self.alive, self.most_alive = tensor, weakref.WeakSet(), 0
        self.reads = [0] * len(tensor)

    def __len__(self):
        return len(self.tensor)

    def __getitem__(self, index):
        slice_ = self.tensor[index].clone()
        self.alive.add(slice_.untyped_storage())
        self.most_alive = max(self.most_alive, len(self.alive))
        self.reads[index] += 1
        return slice_


def random_tensor(shape=SHAPE, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def singular_vectors(tensor, mode, rank):
    return torch.linalg.svd(unfold(tensor, mode), full_matrices=False).U[:, :rank]


def naive(tensor, ranks, method):
    """The bases by their definition, from singular value decompositions of whole unfoldings in float64."""
    tensor = tensor.double()
    if method == "hosvd":
        return [singular_vectors(tensor, mode, rank) for mode, rank in enumerate(ranks)]
    if method == "st-hosvd":
        factors = [None] * tensor.ndim
        for mode in [*range(1, tensor.ndim), 0]:
            factors[mode] = singular_vectors(tensor, mode, ranks[mode])
            tensor = mode_product(tensor, factors[mode].T, mode)
        return factors
    factors = naive(tensor, ranks, "hosvd")
    for _ in range(2):
        for mode in range(tensor.ndim):
            others = tensor
            for other in range(tensor.ndim):
                if other != mode:
                    others = mode_product(others, factors[other].T, other)
            factors[mode] = singular_vectors(others, mode, ranks[mode])
    return factors


@pytest.fixture(params=[2**23, 0], ids=["held", "computed anew"])
def truncated(request, monkeypatch):
    """Whether truncated tensors are held, or computed from the slices in every pass as those of large models are."""
    monkeypatch.setattr("craft_peft.slices.HELD_NUMBERS", request.param)


@pytest.mark.usefixtures("truncated")
@pytest.mark.parametrize("shape", [SHAPE, (6, 6), (3, 4, 5, 6)], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_read_one_by_one_it_is_what_the_definition_says(method, shape):
    tensor, ranks = random_tensor(shape), [max(1, size - 2) for size in shape]
    found = hosvd(Reader(tensor), ranks, method)
    definition = {"auto": "hosvd", "randomized": "st-hosvd"}.get(method, method)  # what they are at such sizes
    for factor, expected in zip(found.factors, naive(tensor, ranks, definition), strict=True):
        assert_close(factor @ factor.T, expected @ expected.T, products=10000)


@pytest.mark.parametrize("tensor", [random_tensor(), random_tensor(WIDE, dtype=torch.float32)], ids=["small", "wide"])
@pytest.mark.parametrize("method", METHODS)
def test_how_the_slices_are_given_changes_no_bit(method, tensor):
    ranks = RANKS if tensor.shape == SHAPE else WIDE_RANKS
    whole = hosvd(tensor, ranks, method)
    for slices in (Reader(tensor), list(tensor)):
        found = hosvd(slices, ranks, method)
        assert torch.equal(found.core, whole.core)
        assert all(torch.equal(*pair) for pair in zip(found.factors, whole.factors, strict=True))
    assert torch.equal(explained_energy(Reader(tensor), whole), explained_energy(tensor, whole))


@pytest.mark.usefixtures("truncated")
@pytest.mark.parametrize("shape", [SHAPE, (7, 3, 5), (5, 8), (3, 4, 5, 6), WIDE], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_slices_are_read_as_often_as_it_says_and_let_go(method, shape):
    ranks = [max(1, min(5, size - 2)) for size in shape]
    reader = Reader(random_tensor(shape, dtype=torch.float32))
    hosvd(reader, ranks, method)
    assert set(reader.reads) == {reads_of_each_slice(shape, ranks, method)}
    assert reader.most_alive == 1


def test_how_often_a_randomised_decomposition_reads_does_not_grow_with_depth():
    for layers in (2, 8):
        assert reads_of_each_slice((layers, *WIDE[1:]), (2, 6, 5), "randomized") == 8
    assert reads_of_each_slice((32, 4096, 4096), (24, 100, 100), "auto") == 14


@pytest.mark.parametrize(("shape", "slabs"), [((4, 9, 7), 5), ((9, 4, 7), 4), ((3, 12, 7), 3), ((5,), 1)])
def test_the_first_mode_is_compared_in_parts_no_larger_than_a_slice(shape, slabs):
    assert slabs_of(shape) == slabs
    tensor = random_tensor(shape)
    blocks = list(SlicedTensor.of(tensor).unfolded(0).read())
    assert len(blocks) == slabs
    assert all(block.numel() <= max(tensor[0].numel(), tensor.numel() // max(1, len(blocks))) for block in blocks[:-1])
    assert torch.equal(torch.cat(blocks, dim=1), unfold(tensor, 0))


def test_auto_is_the_exact_decomposition_of_encoders_and_the_randomised_one_of_large_models():
    def auto_is(shape, other):
        ranks = (min(24, shape[0]), 100, 100)
        return decomposition_cost(shape, ranks, "auto") == decomposition_cost(shape, ranks, other)

    assert auto_is((6, 384, 384), "hosvd") and auto_is((12, 768, 768), "hosvd") and auto_is((24, 768, 768), "hosvd")
    assert auto_is((24, 1024, 1024), "randomized") and auto_is((32, 4096, 4096), "randomized")
    costs = [decomposition_cost((32, 4096, 4096), (24, 100, 100), m) for m in ("randomized", "st-hosvd", "hosvd")]
    assert costs[0] < costs[1] < costs[2]


# ---------------------------------------------------------------------------------------------------------------------
# Directions from a Krylov space
# ---------------------------------------------------------------------------------------------------------------------


def blocked(tensor):
    """The unfolding along mode 1, a slice a block."""
    return SlicedTensor.of(tensor).unfolded(1)


def with_spectrum(values, layers, seed=0):
    """Matrices with these singular values in random directions; beside what they share, each has as much of its own."""
    generator = torch.Generator().manual_seed(seed)
    size = len(values)

    def one():
        left, right = (torch.linalg.qr(torch.randn(size, size, generator=generator)).Q for _ in range(2))
        return left * values @ right

    shared = one()
    return torch.stack([shared + one() for _ in range(layers)])


@pytest.fixture(scope="module")
def encoder_stacks(minilm_folder):
    from safetensors.torch import load_file

    state = load_file(minilm_folder / "model.safetensors")
    names = [sorted(key for key in state if key.endswith(f".{part}.weight")) for part in ("query", "value")]
    return [torch.stack([state[key] for key in keys]) for keys in names]


def energy(tensor, ranks, method):
    return explained_energy(tensor, hosvd(tensor, ranks, method)).item()


@pytest.mark.parametrize("rank", [10, 20, 44, 100])
def test_it_keeps_the_energy_of_a_real_encoder(encoder_stacks, rank):
    for tensor in encoder_stacks:
        ranks = (6, rank, rank)
        assert energy(tensor, ranks, "randomized") >= 0.99 * energy(tensor, ranks, "hosvd")


@pytest.mark.parametrize("spectrum", ["of the encoder", "flat", "slow", "steps"])
def test_it_keeps_the_energy_of_large_stacks(encoder_stacks, spectrum):
    """Flat spectra are the hard ones: with two products instead of six this loses a tenth and more."""
    size, layers, rank = 640, 4, 40
    if spectrum == "flat":
        tensor = random_tensor((layers, size, size), dtype=torch.float32)
    else:
        real = torch.linalg.svdvals(encoder_stacks[0][0])
        values = {
            "of the encoder": torch.nn.functional.interpolate(real[None, None], size, mode="linear")[0, 0],
            "slow": torch.arange(1.0, size + 1).pow(-0.25),
            "steps": torch.tensor([3.0] * 30 + [2.0] * 200 + [1.0] * (size - 230)),
        }[spectrum]
        tensor = with_spectrum(values, layers)
    assert decomposition_cost(tensor.shape, (layers, rank, rank), "randomized") < decomposition_cost(
        tensor.shape, (layers, rank, rank), "st-hosvd"
    )
    kept = energy(tensor, (layers, rank, rank), "randomized")
    assert kept >= 0.99 * energy(tensor, (layers, rank, rank), "hosvd")
    assert kept <= energy(tensor, (layers, rank, rank), "hooi") * 1.001


HARD = {
    "zero": torch.zeros(2, 400, 300),
    "constant": torch.full((2, 400, 300), 3.0),
    "tiny": random_tensor((2, 400, 300), dtype=torch.float32) * 1e-30,
    "huge": random_tensor((2, 400, 300), dtype=torch.float32) * 1e30,
    "rank one": torch.einsum("a,b,c->abc", *(torch.arange(1.0, n + 1) for n in (2, 400, 300))),
    "identity": torch.eye(400)[None, :, :300].repeat(2, 1, 1),
    "repeated": torch.diag(torch.tensor([5.0] * 150 + [1.0] * 250))[None].repeat(2, 1, 1),
    "bfloat16": random_tensor((2, 400, 300), dtype=torch.float32).bfloat16(),
    "float64": random_tensor((2, 400, 300)),
}


@pytest.mark.parametrize("name", HARD)
def test_hard_matrices_give_orthonormal_directions_that_keep_what_can_be_kept(name):
    tensor, rank = HARD[name], 8
    found = krylov_directions(blocked(tensor), rank)
    assert found.dtype == torch.float64 and torch.isfinite(found).all()
    identity = torch.eye(rank, dtype=torch.float64)
    assert (found.T @ found - identity).abs().max() <= tolerance(torch.float64, 400)
    assert torch.equal(found, krylov_directions(blocked(tensor), rank))
    largest = found.gather(0, found.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()

    matrix = unfold(tensor.double() / blocked(tensor).scale, 1)
    best = torch.linalg.svdvals(matrix)[:rank].square().sum()
    assert (found.T @ matrix).square().sum() >= 0.99 * best


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-3, 1.0, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_norms_of_a_fingerprint_are_right_at_every_scale(size, dtype):
    weights = (random_tensor((2, 30, 40)) * size).to(dtype)
    found = weights_fingerprint(weights).reshape(2, -1)[:, 0]
    assert_close(found, weights.double().square().sum((1, 2)).sqrt(), products=100)


def test_a_wide_stack_of_nothing_has_a_core_of_nothing():
    tucker = hosvd(torch.zeros(WIDE), WIDE_RANKS, "randomized")
    assert not tucker.core.any()
    assert all(torch.isfinite(factor).all() for factor in tucker.factors)


@pytest.mark.parametrize("name", ["tiny", "huge"])
def test_the_scale_of_a_tensor_changes_the_core_alone(name):
    factor = {"tiny": 2.0**-100, "huge": 2.0**100}[name]
    tensor = random_tensor(WIDE, dtype=torch.float32)
    base, scaled = (hosvd(t, WIDE_RANKS, "randomized") for t in (tensor, tensor * factor))
    assert torch.isfinite(scaled.core).all()
    assert_close(scaled.core / factor, base.core, products=1000)


def test_the_cheaper_way_is_exact_where_the_space_would_be_half_of_everything():
    assert krylov_size(100) == 288 and krylov_size(1) == 192
    few = blocked(random_tensor((2, 300, 320)))
    assert torch.equal(cheaper_directions(few, 5), exact_directions(few, 5))
    many = blocked(random_tensor((2, 400, 400)))
    assert torch.equal(cheaper_directions(many, 5), krylov_directions(many, 5))
