"""Which learning rates an experiment tried for each method, and which it chose."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..checking import recipe_of
from ..results import held_out_score
from .grouping import Variant
from .reading import Run

LOWEST, HIGHEST = "the lowest tried", "the highest tried"


@dataclass(frozen=True)
class RateChoice:
    """The rates of one method.

    Args:
        label: The method.
        scores: By rate, from the lowest, the mean score over tasks on the held-out rows, times 100; rates that were
            not tried on all tasks are left out.
        chosen: The rate of the runs that are compared.
    """

    label: str
    scores: dict[float, float]
    chosen: float

    @property
    def place(self) -> str:
        """Where the chosen rate lies if it is the last one on a side, beyond which a better one may be, else ""."""
        if len(self.scores) < 2:
            return ""
        return {min(self.scores): LOWEST, max(self.scores): HIGHEST}.get(self.chosen, "")


def read_choices(runs: Sequence[Run], variants: Sequence[Variant]) -> list[RateChoice]:
    """What the runs of an experiment tell of how it chose its rates.

    Args:
        runs: All runs, those too that are not compared.
        variants: What is compared.

    Returns:
        A choice for each of the variants whose rate was chosen.
    """
    tried: dict[str, dict[float, dict[str, dict[str, Any]]]] = defaultdict(lambda: defaultdict(dict))
    for run in runs:
        rate = _rate(run)
        if run.chose_rate and rate is not None and run.result.curve[-1].held_out_score is not None:
            tried[str(run.experiment.get("label"))][rate][run.task] = run.fields
    choices = []
    for variant in variants:
        tasks = {task for by_task in tried[variant.label].values() for task in by_task}
        means = {
            rate: 100 * held_out_score(by_task.values())
            for rate, by_task in sorted(tried[variant.label].items())
            if by_task.keys() == tasks
        }
        compared = {_rate(run) for run in variant.runs.values()}
        chosen = compared.pop() if len(compared) == 1 else None
        if means and chosen is not None:
            choices.append(RateChoice(variant.label, means, chosen))
    return choices


def _rate(run: Run) -> float | None:
    rate = recipe_of(run.result).get("learning_rate")
    return float(rate) if isinstance(rate, int | float) else None
