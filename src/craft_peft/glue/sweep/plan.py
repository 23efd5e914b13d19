"""The runs of an experiment, in the order in which they are worth having, with everything about each decided."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..method_row import Ranks
from ..methods import METHODS
from ..models import choose_precision
from ..pretrained import resolve_model_name
from ..settings import TrainingConfig, identity
from ..tasks import TASKS
from .counts import Counts
from .experiment import Experiment, MethodRow, TaskRow, slug

GLUE_FOLDER = "CRAFT_GLUE_DIR"
"""Environment variable that names the folder of the GLUE files when nothing else does."""
RATES = "rates"
"""Folder, below that of the results, for those of runs that choose a rate."""


@dataclass(frozen=True)
class Cell:
    """A run as the experiment asks for it.

    Args:
        task: Label of its task.
        method: Label of its method.
        seed: Its seed.
        factor: On the method's start rate; None for the factor that is still to be chosen.
        chooses: Whether it is there to choose a rate by.
    """

    task: str
    method: str
    seed: int
    factor: float | None
    chooses: bool = False

    @property
    def name(self) -> str:
        """What `only` is compared with."""
        return f"{slug(self.task)}-{slug(self.method)}-seed{self.seed}"


@dataclass(frozen=True)
class Planned:
    """A run with everything decided.

    Args:
        cell: What was asked for.
        config: What `train` takes, but for its folder and the run that it starts from.
        id: The identity of its settings.
        name: Of its folder.
        file: Of its published result, below the folder of results.
        setting: The method's setting in words.
        settings: Everything that was decided, as a run folder keeps it.
        source: The identity of the run that it starts from, or None.
    """

    cell: Cell
    config: TrainingConfig
    id: str
    name: str
    file: str
    setting: str
    settings: dict[str, Any]
    source: str | None = None


class Plan:
    """The runs of an experiment.

    Args:
        experiment: The experiment.
        counts: Of its model.
        data: Folder of the GLUE files, before what the experiment and the environment say.
    """

    def __init__(self, experiment: Experiment, counts: Counts, data: str | None = None) -> None:
        self.experiment = experiment
        self.counts = counts
        self.data = data or experiment.data or os.environ.get(GLUE_FOLDER)
        self.precision = choose_precision(experiment.precision, counts.width)
        self._planned: dict[tuple[Cell, float], Planned] = {}

    @cached_property
    def cells(self) -> list[Cell]:
        """All runs that are asked for, the most telling first; one that chooses a rate goes before those it decides."""
        found: dict[Cell, None] = {}
        every = (tuple(self.experiment.tasks), tuple(self.experiment.methods))
        for tasks, methods in (*self.experiment.first, every):
            found.update(dict.fromkeys(self._choosing(methods)))
            found.update(dict.fromkeys(self._main(tasks, methods)))
        return list(found)

    def _choosing(self, methods: tuple[str, ...]) -> Iterator[Cell]:
        rates = self.experiment.rates
        for method in filter(self.chooses_rate, methods):
            for task in rates.choose_on:
                for factor in rates.factors:
                    yield Cell(task, method, rates.seed, factor, chooses=True)

    def _main(self, tasks: tuple[str, ...], methods: tuple[str, ...]) -> Iterator[Cell]:
        rates, seeds = self.experiment.rates, self.experiment.seeds
        for factor in (1.0,) if rates.choose_on else rates.factors:
            for seed in seeds:
                for task in tasks:
                    for method in methods:
                        row = self.experiment.methods[method]
                        if self.experiment.tasks[task].start_from is not None and not row.has_adapter:
                            continue  # training a head leaves nothing to start another head from
                        if self.chooses_rate(method):
                            yield Cell(task, method, seed, None)
                        elif factor == 1.0 or (row.has_adapter and "learning_rate" not in row.recipe):
                            yield Cell(task, method, seed, factor)

    def chooses_rate(self, method: str) -> bool:
        """Whether the rate of a method is chosen on held-out rows."""
        row = self.experiment.methods[method]
        return bool(self.experiment.rates.choose_on) and row.has_adapter and "learning_rate" not in row.recipe

    def choosers(self, method: str) -> list[Cell]:
        """The runs that choose the rate of a method."""
        return list(self._choosing((method,)))

    def decide(self, cell: Cell, factors: Mapping[str, float]) -> Planned | None:
        """Decides everything about a run.

        Args:
            cell: What is asked for.
            factors: The chosen factors so far, by method.

        Returns:
            The run, or None as long as its rate is not chosen.
        """
        factor = cell.factor if cell.factor is not None else factors.get(cell.method)
        if factor is None:
            return None
        if (cell, factor) not in self._planned:
            self._planned[cell, factor] = self._decide(cell, factor, factors)
        return self._planned[cell, factor]

    def _decide(self, cell: Cell, factor: float, factors: Mapping[str, float]) -> Planned:
        task, method = self.experiment.tasks[cell.task], self.experiment.methods[cell.method]
        count = self.counts.of(method)
        config = self._config(task, method, cell.seed, factor, count.ranks)
        recipe = config.resolve_recipe(TASKS[task.task].epochs)
        settings = config.settings(recipe, resolve_model_name(config.model), self.precision, in_memory=False)
        source = None
        if task.start_from is not None:
            before = self.decide(dataclasses.replace(cell, task=task.start_from, chooses=False), factors)
            assert before is not None, "the rate of both is the method's"
            source = settings["start_from"] = before.id
        rate = f"-{recipe.learning_rate:.2e}" if method.has_adapter else ""
        name = f"{slug(task.label)}-{slug(method.label)}{rate}-seed{cell.seed}"
        if cell.chooses:
            file = f"{RATES}/{name}.json"
        elif self.experiment.rates.choose_on or len(self.experiment.rates.factors) == 1:
            file = f"{cell.name}.json"
        else:
            file = f"{name}.json"
        key = identity(settings)
        return Planned(cell, config, key, f"{name}-{key}", file, count.setting, settings, source)

    def _config(
        self, task: TaskRow, method: MethodRow, seed: int, factor: float, ranks: Ranks | None
    ) -> TrainingConfig:
        config = TrainingConfig(
            output=Path(),
            model=self.experiment.model,
            method=method.method,
            task=task.task,
            data=self.data,
            rows=task.rows,
            ranks=ranks,
            target_modules=method.target_modules,
            method_options=method.options,
            seed=seed,
            hold_out=self.experiment.hold_out,
            precision=self.precision,
            recipe=dataclasses.replace(METHODS[method.method].recipe),
            resume=True,
        )
        # Numbers of the file go before those of the table of methods; of the file's, the task's go first.
        given = {**method.recipe, **task.recipe}
        plain = dataclasses.replace(config, recipe=None).resolve_recipe(1).learning_rate
        start = given.pop("learning_rate", None)
        rate = start if start is not None else float(f"{plain * factor:.3g}")
        recipe = dataclasses.replace(METHODS[method.method].recipe, **{**given, "learning_rate": rate})
        return dataclasses.replace(config, recipe=recipe)
