r"""Whether methods differ: a paired test of each against a baseline, corrected for the number of comparisons.

Runs with the same seed see the same rows in the same order, so they are compared in pairs. The test asks how often a
mean difference of this size or more comes out when the sign of each pair's difference is drawn at random (all
:math:`2^n` draws where they can be listed): it assumes nothing about the distribution, and its smallest possible
p-value is :math:`2^{1-n}`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from .grouping import Grid, Selection, Variant

LEVEL = 0.05
_LISTED = 2**15  # above 15 pairs the sign patterns are drawn, always the same ones


@dataclass(frozen=True)
class Difference:
    """A method against the baseline.

    Args:
        variant: The method.
        task: The task, or None for all tasks together.
        pairs: How many pairs of runs there are.
        mean: Mean difference in points, method minus baseline; None without a pair.
        p: The test's p-value; None with fewer than two pairs.
        corrected: The same, corrected for all comparisons of the table.
    """

    variant: Variant
    task: str | None
    pairs: int
    mean: float | None = None
    p: float | None = None
    corrected: float | None = None

    @property
    def is_significant(self) -> bool:
        """Whether the corrected p-value is below 0.05."""
        return self.corrected is not None and self.corrected < LEVEL

    @property
    def is_tested(self) -> bool:
        """Whether there was anything to test."""
        return self.p is not None


def compare(grid: Grid, baseline: Variant, selection: Selection) -> dict[tuple[str, str | None], Difference]:
    """Compares every other method with the baseline, on each task and on all tasks together.

    The comparisons on tasks are one family for the correction, those on all tasks another. On all tasks together, a
    pair is a task and a seed that both methods have; a method that lacks a task of the baseline is not compared.

    Args:
        grid: The results.
        baseline: Its method to compare with.
        selection: Which score.

    Returns:
        The differences by label and task.
    """
    others = [variant for variant in grid.variants if variant is not baseline]
    single = [_difference(grid, variant, baseline, (task,), selection) for variant in others for task in grid.tasks]
    overall = [
        replace(_difference(grid, variant, baseline, grid.tasks, selection), task=None)
        for variant in others
        if all(grid.scores(both, task, selection) for both in (variant, baseline) for task in grid.tasks)
    ]
    return {(d.variant.label, d.task): d for family in (single, overall) for d in _corrected(family)}


def _difference(
    grid: Grid, variant: Variant, baseline: Variant, tasks: Sequence[str], selection: Selection
) -> Difference:
    pairs = []
    for task in tasks:
        ours, theirs = variant.scores(task, selection), baseline.scores(task, selection)
        pairs += [(ours[seed], theirs[seed]) for seed in ours if seed in theirs]
    if not pairs:
        return Difference(variant, tasks[0], 0)
    ours, theirs = np.array(pairs).T
    p = paired_test(ours - theirs) if len(pairs) > 1 else None
    return Difference(variant, tasks[0], len(pairs), float(np.mean(ours - theirs)), p)


def paired_test(differences: np.ndarray) -> float:
    """The p-value of the sign-flip permutation test for a mean of zero.

    Args:
        differences: One a pair, at least two.

    Returns:
        The two-sided p-value.

    Example:
        >>> paired_test(np.array([0.5, 0.7, 0.2]))
        0.25
    """
    found = stats.permutation_test(
        (differences,),
        lambda sample, axis: np.mean(sample, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=_LISTED,
        random_state=np.random.default_rng(0),
    )
    return min(1.0, float(found.pvalue))


def smallest_p(pairs: int) -> float:
    """The smallest p-value that so many pairs can give.

    Example:
        >>> smallest_p(3)
        0.25
    """
    return min(1.0, 2.0 ** (1 - pairs))


def pairs_needed(comparisons: int) -> int:
    """How many pairs it takes before the largest of so many comparisons can be significant.

    Example:
        >>> pairs_needed(1), pairs_needed(50)
        (6, 11)
    """
    pairs = 1
    while smallest_p(pairs) * comparisons >= LEVEL:
        pairs += 1
    return pairs


def holm(values: Sequence[float]) -> list[float]:
    """Holm's correction: the smallest p-value times their number, the next times one less, never falling.

    Args:
        values: The p-values of a family.

    Returns:
        The corrected ones, in the same order.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    order = np.argsort(values, kind="stable")
    scaled = np.asarray(values, dtype=float)[order] * np.arange(len(values), 0, -1)
    corrected = np.empty(len(values))
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(scaled))
    return [float(value) for value in corrected]


def _corrected(family: list[Difference]) -> list[Difference]:
    tested = [d.p for d in family if d.p is not None]
    values = iter(holm(tested) if tested else [])
    return [d if d.p is None else replace(d, corrected=next(values)) for d in family]
