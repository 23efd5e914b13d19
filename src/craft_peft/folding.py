"""How a long vector is cut into groups, and each group folded into small tensors of near-equal sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, count, pairwise
from typing import Literal

from .errors import CraftError

Matrices = Sequence[tuple[int, int]]
Sizes = tuple[tuple[int, ...], ...]
"""The sizes of the folded tensors: of each Kronecker split, of each mode."""


@dataclass(frozen=True)
class Kind:
    """Groups that are folded alike.

    Args:
        places: which of all groups.
        entries: how many entries of the vector each of them covers.
        needed: how many numbers of the folded tensor they are made from: n.
        sizes: of the folded tensors.
    """

    places: tuple[int, ...]
    entries: int
    needed: int
    sizes: Sizes


@dataclass(frozen=True)
class Folding:
    """How the vector is cut into groups, and how a group becomes a product of small tensors.

    Args:
        groups: one group a matrix (``"weight"``), a layer of the model (``"layer"``), one for ``"all"``, or how many.
        order: M, the order of the folded tensor, from 2.
        splits: K, the number of tensors whose Kronecker product a group is.
        core: ``"identity"`` or ``"dense"``.
        sizes: ``"equal"``: near-equal sizes of as many numbers as the group has entries, or of the next larger number
            that has such (`craft_peft.folding`); ``"weights"``: the sizes of the group's matrices, ``(out, in)`` for a
            group of one matrix and order 2, ``(matrices, out, in)`` for order 3; or the sizes themselves.
        identity_modes: modes (from 0) that have the identity for a factor, and the full size in the core.
        ratio: n is so many times the entries of a group, and F is fastfood; None for no F.
        cut_weights: allow groups that are smaller than a matrix.

    Example:
        >>> [kind.sizes for kind in Folding(groups="all", order=3).kinds([(768, 768)] * 24)]
        [((216, 256, 256),)]
    """

    groups: int | Literal["weight", "layer", "all"] = "all"
    order: int = 3
    splits: int = 1
    core: Literal["identity", "dense"] = "dense"
    sizes: Literal["equal", "weights"] | Sizes = "equal"
    identity_modes: tuple[int, ...] = ()
    ratio: float | None = None
    cut_weights: bool = False

    def kinds(self, matrices: Matrices, blocks: Sequence[int] = ()) -> list[Kind]:
        """The groups, those that are folded alike together.

        Args:
            matrices: the sizes of the matrices that the vector holds, in their order.
            blocks: how many of them lie in each layer of the model; by default one in each.

        Raises:
            CraftError: more groups than matrices without `cut_weights`; sizes that do not multiply to what a group
                needs, or ``"weights"`` for groups that are not whole matrices of one shape; says what would fit.
        """
        starts = [0, *accumulate(math.prod(matrix) for matrix in matrices)]
        alike: dict[tuple[int, tuple[tuple[int, int], ...]], list[int]] = {}
        for place, (start, end) in enumerate(pairwise([0, *self._ends(matrices, blocks)])):
            inside: tuple[tuple[int, int], ...] = ()
            if self.sizes == "weights":
                inside = tuple(
                    matrix
                    for matrix, (first, last) in zip(matrices, pairwise(starts), strict=True)
                    if start <= first and last <= end
                )
            alike.setdefault((end - start, inside), []).append(place)
        return [
            Kind(tuple(places), entries, self._needed(entries), self._folded(entries, inside))
            for (entries, inside), places in alike.items()
        ]

    def _ends(self, matrices: Matrices, blocks: Sequence[int]) -> list[int]:
        """Where the groups end; the last of a number of equal groups may end behind the vector."""
        ends = list(accumulate(math.prod(matrix) for matrix in matrices))
        if self.groups == "weight":
            return ends
        if self.groups == "layer":
            return [ends[last - 1] for last in accumulate(blocks)] if blocks else ends
        number = 1 if self.groups == "all" else int(self.groups)
        if number > len(matrices) and not self.cut_weights:
            raise CraftError(
                f"groups={number} makes groups that are smaller than a matrix: there are {len(matrices)} matrices. Use "
                f"groups={len(matrices)} or fewer ('weight' is one group a matrix), or say that you mean it with "
                "cut_weights=True."
            )
        entries = -(-ends[-1] // number)
        if (number - 1) * entries >= ends[-1]:
            raise CraftError(
                f"groups={number} leaves nothing for the last groups of a vector of {ends[-1]} entries. Use "
                f"groups={-(-ends[-1] // entries)}."
            )
        return [entries * (place + 1) for place in range(number)]

    def _needed(self, entries: int) -> int:
        return entries if self.ratio is None else math.ceil(self.ratio * entries)

    def _folded(self, entries: int, inside: tuple[tuple[int, int], ...]) -> Sizes:
        needed = self._needed(entries)
        if self.sizes == "equal":
            return _dealt(fold_sizes(needed, self.order * self.splits), self.order)
        if self.sizes == "weights":
            modes = _sizes_of_matrices(inside, self.order)
            if modes is None or math.prod(modes) != needed:
                raise CraftError(
                    "sizes='weights' needs groups of whole matrices of one shape, one matrix for order 2 or any number "
                    f"of them for order 3, and no projection from fewer numbers. Here a group of {entries} entries "
                    f"holds {len(inside)} whole matrices of {len(set(inside))} shapes, is made from {needed} numbers, "
                    f"and order={self.order}. Use sizes='equal', or other groups."
                )
            return tuple(zip(*(near_equal_sizes(size, self.splits) for size in modes), strict=True))
        found = math.prod(math.prod(split) for split in self.sizes)
        if found != needed:
            fitting = _dealt(near_equal_sizes(needed, self.order * self.splits), self.order)
            raise CraftError(
                f"sizes={_shown(self.sizes)} multiply to {found}, but a group needs {needed} numbers. "
                f"sizes={_shown(fitting)} would fit."
            )
        return self.sizes


def _dealt(sizes: tuple[int, ...], order: int) -> Sizes:
    """Ascending sizes as splits of `order` modes, dealt forth and back so that the modes come out near-equal."""
    splits = [sizes[first : first + order] for first in range(0, len(sizes), order)]
    return tuple(split[::-1] if number % 2 else split for number, split in enumerate(splits))


def _sizes_of_matrices(matrices: tuple[tuple[int, int], ...], order: int) -> tuple[int, ...] | None:
    if len(set(matrices)) != 1 or order not in (2, 3) or (order == 2 and len(matrices) != 1):
        return None
    return matrices[0] if order == 2 else (len(matrices), *matrices[0])


def _shown(sizes: Sizes) -> str:
    return str(sizes[0] if len(sizes) == 1 else sizes)


SPREAD = 2
"""Sizes are near enough to each other if the largest is at most so many times the smallest."""


@cache
def near_equal_sizes(number: int, order: int) -> tuple[int, ...]:
    """The `order` whole numbers whose product is `number` and whose sum is smallest, in ascending order.

    Args:
        number: from 1.
        order: how many, from 1.

    Example:
        >>> near_equal_sizes(14_155_776, 3)
        (216, 256, 256)
        >>> near_equal_sizes(14, 2), near_equal_sizes(13, 2)
        ((2, 7), (1, 13))
    """
    found = _smallest_sum(number, order, 1, number)
    assert found is not None  # (1, ..., 1, number) always is one
    return found


@cache
def fold_sizes(entries: int, order: int) -> tuple[int, ...]:
    """Near-equal sizes of the smallest tensor that holds so many entries.

    Its product is `entries` where that has a factorisation whose sizes differ by a factor of `SPREAD` at most. Most
    numbers have none (a prime has none at all); then it is the next larger number that has one.

    Args:
        entries: from 1.
        order: of the tensor, from 1.

    Example:
        >>> fold_sizes(14_155_776, 2)
        (3456, 4096)
        >>> fold_sizes(13, 2)
        (3, 5)
    """
    for number in count(entries):
        # The smallest size is at least this: all others are at most SPREAD times as large.
        least = int((number / SPREAD ** (order - 1)) ** (1 / order))
        sizes = _smallest_sum(number, order, max(1, least), SPREAD * _root(number, order))
        if sizes is not None and sizes[-1] <= SPREAD * sizes[0]:
            return sizes
    raise AssertionError("numbers do not end")


def _root(number: int, order: int) -> int:
    """The smallest whole number whose power of that order is at least `number`."""
    root = max(1, round(number ** (1 / order)) - 1)
    while root**order < number:
        root += 1
    return root


def _smallest_sum(number: int, order: int, least: int, most: int) -> tuple[int, ...] | None:
    """Sizes from `least` to `most` in ascending order with that product and the smallest sum, or None."""
    if order == 1:
        return (number,) if least <= number <= most else None
    best: tuple[int, ...] | None = None
    for first in range(_root(number, order), least - 1, -1):
        if number % first or first**order > number:
            continue
        rest = _smallest_sum(number // first, order - 1, first, most)
        if rest is not None and (best is None or first + sum(rest) < sum(best)):
            best = (first, *rest)
    assert best is None or math.prod(best) == number
    return best
