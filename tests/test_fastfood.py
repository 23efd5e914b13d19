"""Fastfood: the map by its matrix, what its random numbers promise, and that they never change."""

import pytest
import torch
from laws import assert_close
from naive_superlora import fastfood_matrix, sylvester

from craft_peft.fastfood import Fastfood, hadamard, random_bits, random_permutation


@pytest.mark.parametrize("size", [1, 2, 32, 64, 128, 1024])
def test_hadamard_by_its_definition(size):
    torch.manual_seed(0)
    x = torch.randn(3, size, dtype=torch.float64)
    assert_close(hadamard(x), x @ torch.from_numpy(sylvester(size)), products=size)


@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (1, 7), (5, 5), (5, 30), (8, 16), (100, 120), (130, 131)])
def test_the_map_by_its_matrix(inputs, outputs):
    torch.manual_seed(0)
    fastfood = Fastfood.from_seed(3, inputs, outputs)
    matrix = torch.from_numpy(fastfood_matrix(fastfood, inputs, outputs))
    x = torch.randn(2, inputs, dtype=torch.float64)
    assert_close(fastfood(x, outputs), x @ matrix.T, products=outputs**2 + inputs**2)


def test_gradients_are_right():
    fastfood = Fastfood.from_seed(0, 5, 12)
    x = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: fastfood(x, 12), x)


def test_outputs_have_the_mean_square_of_the_inputs():
    """Over 2^16 outputs, whose squares have a standard deviation of sqrt(2) times their mean; six of it here."""
    x = torch.randn(1, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = Fastfood.from_seed(0, 64, 2**16)(x, 2**16).square().mean() / x.square().mean()
    assert abs(found.item() - 1) < 6 * (2 / 2**16) ** 0.5


def splitmix64(state):
    """Vigna's reference code, in whole numbers without bound."""
    mask = (1 << 64) - 1
    state = (state + 0x9E3779B97F4A7C15) & mask
    mixed = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & mask
    return state, mixed ^ (mixed >> 31)


def test_random_bits_are_those_of_splitmix64():
    # The first 8 bytes of sha256("7/signs"), little-endian.
    state, expected = int.from_bytes(bytes.fromhex("c67c654b968a164e"), "little"), []
    for _ in range(1000):
        state, number = splitmix64(state)
        expected.append(number >> 11)
    assert random_bits(7, "signs", (10, 100)).flatten().tolist() == expected


def test_random_numbers_are_the_same_for_ever():
    """An adapter that was saved holds none of them: if these change, every saved adapter is broken."""
    fastfood = Fastfood.from_seed(0, 3, 8)
    assert fastfood.signs.tolist() == [[-1, -1, 1, 1], [1, 1, -1, 1]]
    assert fastfood.places.tolist() == [[2, 0, 3, 1], [0, 1, 2, 3]]
    torch.testing.assert_close(
        fastfood.gains,
        torch.tensor(
            [
                [1.3568270680059404, 0.27826184757491684, -1.2011443902570473, 0.5836003757316621],
                [-0.20744476318967986, 1.7681626309270067, -1.8683139136715783, -0.4209797077061875],
            ],
            dtype=torch.float64,
        ),
        rtol=1e-12,
        atol=0,
    )
    assert random_permutation(5, 8).tolist() == [0, 1, 5, 7, 6, 4, 2, 3]


def test_seeds_and_streams_are_independent():
    numbers = [random_bits(seed, stream, (4096,)) for seed in (0, 1) for stream in ("signs", "gains")]
    for i, first in enumerate(numbers):
        assert abs(first.double().mean().item() / 2**53 - 0.5) < 6 * (1 / 12 / 4096) ** 0.5
        for second in numbers[:i]:
            assert not (first == second).any()


def test_permutations_are_uniform():
    """Each of the 6 orders of 3 places, over 6000 seeds; six standard deviations."""
    orders = [tuple(random_permutation(seed, 3).tolist()) for seed in range(6000)]
    for order in set(orders):
        assert abs(orders.count(order) - 1000) < 6 * (6000 * 1 / 6 * 5 / 6) ** 0.5
    assert len(set(orders)) == 6
