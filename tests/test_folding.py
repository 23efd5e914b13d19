"""Near-equal factorisations, against a search through all of them."""

from math import prod

import pytest

from craft_peft.folding import SPREAD, fold_sizes, near_equal_sizes


def factorisations(number, order):
    if order == 1:
        return [(number,)]
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return [tuple(sorted((d, *rest))) for d in divisors for rest in factorisations(number // d, order - 1)]


@pytest.mark.parametrize("order", [1, 2, 3])
def test_near_equal_sizes_have_the_smallest_sum(order):
    for number in range(1, 120):
        found = near_equal_sizes(number, order)
        assert prod(found) == number and len(found) == order and list(found) == sorted(found)
        assert sum(found) == min(map(sum, factorisations(number, order)))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_fold_sizes_are_those_of_the_next_number_that_has_near_ones(order):
    for number in range(1, 120):
        larger = number
        while not (near := [sizes for sizes in factorisations(larger, order) if max(sizes) <= SPREAD * min(sizes)]):
            larger += 1
        found = fold_sizes(number, order)
        assert found in near and sum(found) == min(map(sum, near))


# Query and value of RoBERTa-base (24 matrices of 768 x 768) and RoBERTa-large (48 of 1024 x 1024) as one vector.
@pytest.mark.parametrize(
    ("entries", "sizes"),
    [
        (24 * 768**2, (3456, 4096)),
        (24 * 768**2, (216, 256, 256)),
        (24 * 768**2, (54, 64, 64, 64)),
        (48 * 1024**2, (256, 384, 512)),
    ],
)
def test_sizes_of_the_reference(entries, sizes):
    assert fold_sizes(entries, len(sizes)) == near_equal_sizes(entries, len(sizes)) == sizes


def test_large_numbers_without_factors_take_no_time():
    """A 7B model's query and value, plus a prime's worth."""
    for order in (2, 3, 4, 6):
        entries = 64 * 4096**2 + 7
        assert 0 <= prod(fold_sizes(entries, order)) - entries < 1000
