"""What the numbers say, in sentences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .grouping import Grid, Selection, Variant, task_title
from .rates import HIGHEST, LOWEST, RateChoice
from .significance import LEVEL, Difference, pairs_needed, smallest_p

Differences = dict[tuple[str, str | None], Difference]


@dataclass(frozen=True)
class TaskWords:
    """What is said of one task.

    Args:
        title: The task.
        sentences: In order.
    """

    title: str
    sentences: tuple[str, ...]


def summarise(grid: Grid, baseline: Variant, selection: Selection, differences: Differences) -> list[str]:
    """The whole in a few sentences: where the baseline wins, where it loses and by how much, and what that is worth.

    Args:
        grid: The results.
        baseline: The method that the others are compared with.
        selection: Which score.
        differences: What `compare` returned.

    Returns:
        The sentences.
    """
    sentences = [f"Scores are of the {selection.title}: {selection.meaning}."]
    measured = [task for task in grid.tasks if baseline.scores(task, selection)]
    others = [
        task for task in measured if any(_median(grid, v, task, selection) is not None for v in _rest(grid, baseline))
    ]
    best = [task for task in others if grid.best(task, selection) is baseline]
    if others:
        sentences.append(
            f"{baseline.label} has the best median on {len(best) or 'none'} of the {_count(len(others), 'task')} with "
            f"another method to compare with{_listed(best)}."
        )
    behind = [_behind(grid, baseline, task, selection) for task in others if task not in best]
    if behind:
        sentences.append(f"It loses on {'; on '.join(behind)}.")
    sentences += _average(grid, baseline, selection)
    sentences += _power(baseline, differences)
    sentences += _together(baseline, differences)
    return sentences


def by_task(grid: Grid, baseline: Variant, selection: Selection, differences: Differences) -> list[TaskWords]:
    """For each task: the best method, and the difference of each to the baseline.

    Args:
        grid: The results.
        baseline: The method that the others are compared with.
        selection: Which score.
        differences: What `compare` returned.

    Returns:
        One entry a task.
    """
    return [
        TaskWords(task_title(task), tuple(_task(grid, baseline, task, selection, differences))) for task in grid.tasks
    ]


def on_rates(choices: Sequence[RateChoice], only_chose: int) -> list[str]:
    """What to know of the learning rates.

    Args:
        choices: The rates that were chosen.
        only_chose: How many runs were there only to choose them.

    Returns:
        The sentences.
    """
    sentences = []
    if only_chose:
        sentences.append(f"Not compared: {_count(only_chose, 'run')} that chose a learning rate on held-out rows.")
    for place, side in ((HIGHEST, "higher"), (LOWEST, "lower")):
        if found := [choice.label for choice in choices if choice.place == place]:
            sentences.append(f"The chosen rate is {place}, so that a {side} one may do better: {', '.join(found)}.")
    return sentences


def _task(grid: Grid, baseline: Variant, task: str, selection: Selection, differences: Differences) -> Iterator[str]:
    best = grid.best(task, selection)
    if best is None:
        yield f"No run has a score of the {selection.title}."
        return
    scores = best.scores(task, selection)
    yield f"Best: {best.label}, median {np.median(list(scores.values())):.1f} over {_count(len(scores), 'seed')}."
    if not baseline.scores(task, selection):
        yield f"{baseline.label}, the baseline, has no run here."
        return
    told = [d for (_, name), d in differences.items() if name == task and d.mean is not None]
    if told:
        parts = [f"{d.variant.label} {signed(d.mean or 0.0)}" for d in sorted(told, key=lambda d: -(d.mean or 0.0))]
        yield f"Against {baseline.label}, in points on the same seeds: {', '.join(parts)}. {_worth(told)}"
    lacking = [d.variant for (_, name), d in differences.items() if name == task and d.mean is None]
    missing = [variant.label for variant in lacking if variant.scores(task, selection)]
    if missing:
        yield f"No common seed with {baseline.label}: {', '.join(missing)}."


def _worth(differences: list[Difference]) -> str:
    found = [f"{d.variant.label} (p {probability(d.corrected)})" for d in differences if d.is_significant]
    if found:
        return f"Significant: {', '.join(found)}; of the others none."
    one = len(differences) == 1
    if not any(d.is_tested for d in differences):
        return f"Not tested: {'it is' if one else 'they are'} of one seed."
    return "It is not significant." if one else "None of these is significant."


def _behind(grid: Grid, baseline: Variant, task: str, selection: Selection) -> str:
    best = grid.best(task, selection)
    assert best is not None
    gap = (_median(grid, best, task, selection) or 0) - (_median(grid, baseline, task, selection) or 0)
    return f"{task_title(task)} by {gap:.1f} points to {best.label}"


def _average(grid: Grid, baseline: Variant, selection: Selection) -> Iterator[str]:
    whole = [variant for variant in grid.variants if grid.average(variant, selection)]
    best = grid.best(None, selection)
    if best is None or len(whole) < 2:
        yield (
            f"No average is compared yet: {_count(len(whole), 'method')} of {len(grid.variants)} ran on all "
            f"{_count(len(grid.tasks), 'task')} with a common seed."
        )
        return
    medians = sorted(
        ((_median(grid, variant, None, selection) or 0, variant) for variant in whole), key=lambda pair: -pair[0]
    )
    tasks, score = f"all {len(grid.tasks)} tasks", f"{medians[0][0]:.1f}"
    sentence = f"On average over {tasks} the best of {len(whole)} methods is {best.label}, {score}"
    places = [variant for _, variant in medians]
    if baseline in places and baseline is not best:
        gap = medians[0][0] - medians[places.index(baseline)][0]
        sentence += f"; {baseline.label} is number {places.index(baseline) + 1}, {gap:.1f} points behind"
    yield f"{sentence}."


def _power(baseline: Variant, differences: Differences) -> Iterator[str]:
    tested = [d for (_, task), d in differences.items() if task is not None and d.is_tested]
    if not tested:
        if differences:
            yield "No difference was tested: that takes two seeds that both methods have."
        return
    significant = sum(d.is_significant for d in tested)
    yield (
        f"Of {_count(len(tested), 'difference')} to {baseline.label} on single tasks {significant or 'none'} "
        f"{'is' if significant < 2 else 'are'} significant (p < {LEVEL} after Holm's correction)."
    )
    most = max(d.pairs for d in tested)
    best = min(1.0, smallest_p(most) * len(tested))
    if best >= LEVEL:
        yield (
            f"With at most {most} seeds the smallest p-value that a paired test can give is "
            f"{probability(smallest_p(most))}, and {probability(best)} after the correction: no difference on a single "
            f"task can be significant here, however large. That would take {pairs_needed(len(tested))} seeds."
        )


def _together(baseline: Variant, differences: Differences) -> Iterator[str]:
    together = "Over all tasks together, in pairs of task and seed"
    tested = [d for (_, task), d in differences.items() if task is None and d.is_tested]
    found = sorted((d for d in tested if d.is_significant), key=lambda d: -(d.mean or 0))
    if found:
        listed = ", ".join(f"{d.variant.label} {signed(d.mean or 0.0)} (p {probability(d.corrected)})" for d in found)
        yield f"{together}, these differ significantly from {baseline.label}: {listed}."
    elif tested:
        yield f"{together}, no method differs significantly from {baseline.label}."


def _median(grid: Grid, variant: Variant, task: str | None, selection: Selection) -> float | None:
    scores = grid.scores(variant, task, selection)
    return float(np.median(list(scores.values()))) if scores else None


def _rest(grid: Grid, baseline: Variant) -> list[Variant]:
    return [variant for variant in grid.variants if variant is not baseline]


def _listed(tasks: list[str]) -> str:
    return f" ({', '.join(map(task_title, tasks))})" if tasks else ""


def _count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def signed(points: float) -> str:
    """A difference with its sign.

    Example:
        >>> signed(1.24), signed(-0.31), signed(0.01)
        ('+1.2', '−0.3', '±0.0')
    """
    text = f"{abs(points):.1f}"
    return f"±{text}" if text == "0.0" else f"{'+' if points > 0 else '−'}{text}"


def probability(p: float | None) -> str:
    """A p-value in the digits that it deserves.

    Example:
        >>> probability(0.25), probability(0.0312), probability(0.00001), probability(1.0)
        ('0.25', '0.031', '< 0.001', '1')
    """
    if p is None:
        return ""
    return "< 0.001" if p < 0.001 else f"{p:.2g}"
