"""What the adapters of the runs tell, where they are there or their figures are."""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import CraftError
from ..figures import Stack, from_field, read_stacks
from .grouping import Grid
from .reading import LeftOut


@dataclass(frozen=True)
class Insight:
    """The stacks of one run.

    Args:
        label: The method.
        task: The task.
        seed: The seed.
        stacks: In the order of their names.
    """

    label: str
    task: str
    seed: int
    stacks: tuple[Stack, ...]


def read_insights(grid: Grid) -> tuple[list[Insight], list[LeftOut]]:
    """Reads the adapter of every run that has one with transforms.

    Args:
        grid: The results.

    Returns:
        One entry a run, by method, task and seed; and adapters that cannot be read.
    """
    insights: list[Insight] = []
    left_out: list[LeftOut] = []
    place = {task: number for number, task in enumerate(grid.tasks)}
    for variant in grid.variants:
        for task, seed in sorted(variant.runs, key=lambda key: (place[key[0]], key[1])):
            run = variant.runs[task, seed]
            try:
                stacks = (read_stacks(run.folder) if run.folder else ()) or from_field(run.fields)
            except CraftError as error:
                left_out.append(LeftOut(run.path, f"no figures of its adapter: {error}"))
                continue
            if stacks:
                insights.append(Insight(variant.label, task, seed, stacks))
    return insights, left_out
