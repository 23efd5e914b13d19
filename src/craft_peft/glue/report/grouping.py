"""Results as a grid of methods, tasks and seeds."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import CraftError, did_you_mean
from ..checking import recipe_of
from ..methods import METHODS
from ..results import Result
from ..tasks import TASKS
from .reading import LeftOut, Run

# Settings that make no other method: where a run comes from and goes to, and what a budget has become ranks by.
_NOT_OF_THE_METHOD = {
    *("seed", "output", "task", "data", "dev_data", "text_columns", "label_column", "kind", "method", "adapter"),
    *("budget", "recipe", "report_to", "resume", "overwrite"),
}
# The order in which settings are used to tell two variants of a method apart.
_TELLING = ("model", "method_options", "ranks", "target_modules")


@dataclass(frozen=True)
class Selection:
    """Which epoch's score counts.

    Args:
        name: The field of `Scores`.
        title: In tables.
        meaning: In a sentence.
    """

    name: str
    title: str
    meaning: str


SELECTIONS = {
    selection.name: selection
    for selection in (
        Selection("last", "last epoch", "the score after the last epoch; nothing was chosen"),
        Selection("held_out", "held-out choice", "the epoch chosen on rows of train that were not trained on"),
        Selection("best", "best epoch", "the epoch chosen on the very rows that it is measured on: flatters"),
    )
}


@dataclass(frozen=True)
class Spread:
    """Median and spread of some numbers.

    Args:
        values: The numbers; at least one.
    """

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one."""
        return float(np.median(self.values))

    @property
    def low(self) -> float:
        """The smallest."""
        return min(self.values)

    @property
    def high(self) -> float:
        """The largest."""
        return max(self.values)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Between which the middle half lies."""
        low, high = np.percentile(self.values, (25, 75))
        return float(low), float(high)


@dataclass(frozen=True)
class Variant:
    """A method at one setting: a row of the tables.

    Args:
        label: What it is called; the method's name, and the setting where the method appears in several.
        method: The method.
        runs: By task and seed.
    """

    label: str
    method: str
    runs: dict[tuple[str, int], Run]

    def scores(self, task: str, selection: Selection) -> dict[int, float]:
        """Scores in percent by seed."""
        found = {
            seed: getattr(run.result.score, selection.name) for (name, seed), run in self.runs.items() if name == task
        }
        return {seed: 100 * score for seed, score in sorted(found.items()) if score is not None}

    def spread(self, value: Callable[[Result], float | None], task: str | None = None) -> Spread | None:
        """A number of each run, on one task or on all."""
        found = [value(run.result) for (name, _), run in self.runs.items() if task in (None, name)]
        known = tuple(float(number) for number in found if number is not None)
        return Spread(known) if known else None

    @property
    def adapter(self) -> int:
        """Adapter parameters; the most that a task took."""
        return max(run.result.parameters.adapter for run in self.runs.values())


@dataclass(frozen=True)
class Grid:
    """All results in order.

    Args:
        variants: In the order of the table of methods.
        tasks: In the order of the table of tasks, other names last.
    """

    variants: tuple[Variant, ...]
    tasks: tuple[str, ...]

    @property
    def runs(self) -> list[Run]:
        """All runs."""
        return [run for variant in self.variants for run in variant.runs.values()]

    def average(self, variant: Variant, selection: Selection) -> dict[int, float]:
        """Mean over all tasks of the grid by seed, for the seeds that ran on all of them; empty when there is none."""
        by_task = [variant.scores(task, selection) for task in self.tasks]
        seeds = set.intersection(*(set(scores) for scores in by_task))
        return {seed: float(np.mean([scores[seed] for scores in by_task])) for seed in sorted(seeds)}

    def scores(self, variant: Variant, task: str | None, selection: Selection) -> dict[int, float]:
        """Scores by seed on a task, or on average."""
        return self.average(variant, selection) if task is None else variant.scores(task, selection)

    def best(self, task: str | None, selection: Selection) -> Variant | None:
        """The method with the highest median on a task, or on average."""
        scores = {variant.label: list(self.scores(variant, task, selection).values()) for variant in self.variants}
        there = [variant for variant in self.variants if scores[variant.label]]
        return max(there, key=lambda variant: float(np.median(scores[variant.label])), default=None)

    def find(self, name: str | None) -> Variant:
        """Looks up a variant; by default the plainest of the first method.

        Args:
            name: Its label, or its method when that has one variant only.

        Returns:
            The variant.

        Raises:
            CraftError: No such variant, or several of the method.
        """
        labels = [variant.label for variant in self.variants]
        if name is None:
            first = [variant for variant in self.variants if variant.method == self.variants[0].method]
            return min(first, key=lambda variant: (len(_options(variant)), -len(variant.runs)))
        if name in labels:
            return self.variants[labels.index(name)]
        of_method = [variant for variant in self.variants if variant.method == name]
        if len(of_method) == 1:
            return of_method[0]
        listed = ", ".join(f"`{label}`" for label in labels)
        if of_method:
            several = ", ".join(f"`{variant.label}`" for variant in of_method)
            raise CraftError(f"The results hold several settings of `{name}`: {several}. Name one of them.")
        methods = [variant.method for variant in self.variants]
        hint = did_you_mean(name, [*methods, *labels])
        raise CraftError(f"No result is of a method `{name}`.{hint} The results are of: {listed}.")


def task_title(task: str) -> str:
    """What readers call a task.

    Example:
        >>> task_title("stsb"), task_title("reviews")
        ('STS-B', 'reviews')
    """
    return TASKS[task].folder if task in TASKS else task


def make_grid(runs: Sequence[Run]) -> tuple[Grid, list[LeftOut]]:
    """Groups results by method, setting, task and seed.

    Two runs of a method are of different variants when an experiment calls them so, or else when, on one task, any of
    their settings differ. Settings that differ between tasks only (epochs) make no variants. Runs that were there to
    choose a learning rate by are left aside.

    Args:
        runs: At least one.

    Returns:
        The grid, and runs that repeat a seed with another outcome.

    Raises:
        CraftError: All runs were there to choose a learning rate by.
    """
    runs = [run for run in runs if not run.experiment.get("chooses_rate")]
    if not runs:
        raise CraftError("All results are of runs that choose a learning rate. Give those of the comparison, too.")
    order = {name: number for number, name in enumerate(METHODS)}
    methods = sorted({run.result.method for run in runs}, key=lambda name: (order.get(name, len(order)), name))
    variants: list[Variant] = []
    left_out: list[LeftOut] = []
    for method in methods:
        of_method = [run for run in runs if run.result.method == method]
        for label, members in _split(method, of_method).items():
            kept: dict[tuple[str, int], Run] = {}
            for run in members:
                key = run.task, run.result.seed
                if key in kept:
                    reason = f"a second run of {label} on {key[0]} with seed {key[1]}; the first is {kept[key].path}"
                    left_out.append(LeftOut(run.path, reason))
                kept.setdefault(key, run)
            variants.append(Variant(label, method, kept))
    names = {run.task for run in runs}
    tasks = [task for task in TASKS if task in names] + sorted(names - set(TASKS))
    return Grid(tuple(variants), tuple(tasks)), left_out


def _split(method: str, runs: list[Run]) -> dict[str, list[Run]]:
    named: dict[str, list[Run]] = {}
    for run in runs:
        named.setdefault(str(run.experiment.get("label", "")), []).append(run)
    unnamed = named.pop("", [])
    # By name, not as the files are found: a new result must not move a row of the tables.
    named = {label: named[label] for label in sorted(named, key=_plain_first)}
    for label, members in (_tell_apart(method, unnamed) if unnamed else {}).items():
        named.setdefault(label, []).extend(members)
    return named


def _tell_apart(method: str, runs: list[Run]) -> dict[str, list[Run]]:
    settings = [_settings(run.result) for run in runs]
    by_task: dict[str, list[dict[str, Any]]] = {}
    for run, values in zip(runs, settings, strict=True):
        by_task.setdefault(run.task, []).append(values)
    names = sorted({name for values in settings for name in values}, key=lambda name: (_rank(name), name))
    varying = [
        name
        for name in names
        if any(len({_key(values.get(name)) for values in of_task}) > 1 for of_task in by_task.values())
    ]
    telling = _fewest(varying, list(by_task.values()))
    groups: dict[str, list[Run]] = {}
    for run, values in sorted(zip(runs, settings, strict=True), key=lambda pair: _order(telling, pair[1])):
        told = [text for name in telling if (text := _describe(method, name, values.get(name)))]
        groups.setdefault(f"{method} ({', '.join(told)})" if told else method, []).append(run)
    return groups


def _fewest(varying: list[str], by_task: list[list[dict[str, Any]]]) -> list[str]:
    """The first settings that tell as many variants apart on each task as all of them do."""

    def count(names: Sequence[str]) -> int:
        return sum(len({tuple(_key(values.get(name)) for name in names) for values in task}) for task in by_task)

    chosen: list[str] = []
    for name in varying:
        if count([*chosen, name]) > count(chosen):
            chosen.append(name)
    return chosen


def _settings(result: Result) -> dict[str, Any]:
    plain = {name: value for name, value in result.config.items() if name not in _NOT_OF_THE_METHOD}
    return {**plain, **recipe_of(result), "model": result.model}


def _describe(method: str, name: str, value: Any) -> str:
    if value in (None, {}, []):
        return ""
    if name == "ranks" and method in METHODS and len(value) == len(METHODS[method].setting.names):
        return METHODS[method].setting.describe(tuple(value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {value[key]}" for key in sorted(value))
    shown = (
        ",".join(map(str, value)) if isinstance(value, list) else f"{value:g}" if isinstance(value, float) else value
    )
    return str(shown) if name == "model" else f"{name.replace('_', ' ')} {shown}"


def _order(telling: list[str], values: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(_plain_first(_key(values.get(name))) for name in telling)


def _plain_first(name: str) -> tuple[int, str]:
    # The plain setting first, then numbers as numbers: r 2 before r 10.
    return len(name), name


def _options(variant: Variant) -> dict[str, Any]:
    return next(iter(variant.runs.values())).result.config.get("method_options") or {}


def _rank(name: str) -> int:
    return _TELLING.index(name) if name in _TELLING else len(_TELLING)


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def what_differs(grid: Grid) -> list[str]:
    """What is not the same in runs that are compared: sentences for the reader to judge."""
    notes = []
    models = sorted({run.result.model for run in grid.runs})
    if len(models) > 1:
        notes.append(f"The runs are of {len(models)} base models ({', '.join(models)}): compare within one only.")
    for task in grid.tasks:
        results = [run.result for run in grid.runs if run.task == task]
        for name, value in _CONDITIONS.items():
            found = sorted({str(value(result)) for result in results})
            if len(found) > 1:
                notes.append(f"{task_title(task)}: the runs differ in {name} ({'; '.join(found)}).")
    versions = sorted({run.result.versions["craft-peft"] for run in grid.runs})
    if len(versions) > 1:
        notes.append(f"The runs were made with several versions of craft-peft ({', '.join(versions)}).")
    return notes


_CONDITIONS: dict[str, Callable[[Result], Any]] = {
    "rows trained on": lambda result: f"{result.data['train']:,}",
    "rows measured on": lambda result: " and ".join(f"{size:,}" for size in result.data["dev"].values()),
    "epochs": lambda result: len(result.curve),
    "precision": lambda result: result.config.get("precision"),
    "processor, so that seconds cannot be compared": lambda result: result.processor,
}
