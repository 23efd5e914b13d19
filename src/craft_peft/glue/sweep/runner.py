"""Decides what runs next, starts it, and keeps what comes back."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from typing import Any

from ...errors import CraftError
from ..results import held_out_score
from .commands import Command, Ended, words_of
from .estimate import Estimates
from .executors import JOB, Executor, memory_need
from .plan import Cell, Plan, Planned
from .store import DIVERGED, FAILED, LOCK, Record, Store, write_record

FINISHED, RUNNING, WAITING, BLOCKED = "finished", "running", "waiting", "blocked"
STATES = (FINISHED, DIVERGED, FAILED, RUNNING, WAITING, BLOCKED)


class Listener:
    """Is told what happens; does nothing with it."""

    def started(self, planned: Planned) -> None:
        """A run was handed to the executor."""

    def ended(self, planned: Planned, state: str) -> None:
        """A run ended."""

    def chosen(self, method: str, scores: dict[float, float]) -> None:
        """The rate of a method was chosen; held-out scores by factor."""

    def turned(self) -> None:
        """Time went by."""


class Sweep:
    """The state of an experiment, and what moves it on.

    Args:
        plan: Its runs.
        store: Where they are.
        only: Patterns of names of cells; of all others nothing is run that these do not need.
        threads: Of each run, for estimates.
        report_to: Loggers of the runs.
        launch: Words for `accelerate launch`, or None.
        job: The module that is a run.
    """

    def __init__(
        self,
        plan: Plan,
        store: Store,
        only: Sequence[str] = (),
        threads: int = 1,
        report_to: tuple[str, ...] = (),
        launch: Sequence[str] | None = None,
        job: str = JOB,
    ) -> None:
        self.plan, self.store, self.report_to, self.launch, self.job = plan, store, report_to, launch, job
        self.cells = _wanted(plan, only)
        self.estimates = Estimates(plan, threads)
        self.factors: dict[str, float] = {}
        self.broken: dict[str, Record] = {}
        self.running: dict[Future[Ended], tuple[Planned, float]] = {}
        self.choose_rates(Listener())
        self._require_sources()
        for cell in self.cells:
            planned = plan.decide(cell, self.factors)
            if planned is not None:
                self._keep(planned)

    def state(self, cell: Cell) -> str:
        """Where a run stands."""
        planned = self.plan.decide(cell, self.factors)
        if planned is None:
            states = {self.state(chooser) for chooser in self.plan.choosers(cell.method)}
            return BLOCKED if states & {FAILED, BLOCKED} or states == {DIVERGED} else WAITING
        if any(planned.id == other.id for other, _ in self.running.values()):
            return RUNNING
        record = self.record(planned)
        if record is not None:
            return record.kind
        if planned.id in self.store.finished:
            return FINISHED
        if planned.source is not None:
            before = self.state(self._source(cell))
            return BLOCKED if before in (FAILED, DIVERGED, BLOCKED) else WAITING
        return WAITING

    def record(self, planned: Planned) -> Record | None:
        """Why a run is not finished, or its result cannot be read."""
        if planned.id in self.broken:
            return self.broken[planned.id]
        if planned.id not in self.store.finished:
            return self.store.record(planned)
        try:
            self.store.result(planned.id)
        except CraftError as error:
            self.broken[planned.id] = Record(FAILED, str(error))
        return self.broken.get(planned.id)

    def _source(self, cell: Cell) -> Cell:
        label = self.plan.experiment.tasks[cell.task].start_from
        assert label is not None
        return dataclasses.replace(cell, task=label, chooses=False)

    def _require_sources(self) -> None:
        """What a run is to start from is done again where all that is left of it is its published result."""
        for cell in self.cells:
            planned = self.plan.decide(cell, self.factors)
            if planned is not None and planned.source is not None and self.state(cell) == WAITING:
                self.store.require_folder(planned.source)

    def choose_rates(self, listener: Listener) -> None:
        """Chooses the rate of each method all of whose runs for that have ended."""
        for method in self.plan.experiment.methods:
            if method in self.factors or not self.plan.chooses_rate(method):
                continue
            cells = self.plan.choosers(method)
            if {self.state(cell) for cell in cells} <= {FINISHED, DIVERGED}:
                scores: dict[float, list[dict[str, Any] | None]] = {}
                for cell in cells:
                    assert cell.factor is not None
                    scores.setdefault(cell.factor, []).append(self._result(cell))
                means = {factor: held_out_score(results) for factor, results in scores.items()}
                best = max(means, key=lambda factor: means[factor])
                if means[best] > float("-inf"):
                    self.factors[method] = best
                    listener.chosen(method, means)

    def _result(self, cell: Cell) -> dict[str, Any] | None:
        planned = self.plan.decide(cell, self.factors)
        assert planned is not None
        return self.store.result(planned.id) if planned.id in self.store.finished else None

    def memory_need(self) -> int:
        """Bytes that a run takes: what the largest finished one took, else by the size of the model."""
        planned = [self.plan.decide(cell, self.factors) for cell in self.cells]
        finished = [p.id for p in planned if p is not None and p.id in self.store.finished and not self.record(p)]
        peaks = [self.store.result(key).get("peak_memory_bytes") or 0 for key in finished]
        return max(peaks, default=0) or memory_need(self.plan.counts.layers)

    def run(self, executor: Executor, listener: Listener, retry: bool = False) -> bool:
        """Runs everything that is not finished.

        Args:
            executor: Where.
            listener: Is told what happens.
            retry: Also what failed in an earlier call.

        Returns:
            Whether every run ended as a result.
        """
        for cell in self.cells if retry else ():
            planned = self.plan.decide(cell, self.factors)
            if planned is not None:
                self.store.forget(planned)
        self.publish()
        try:
            while True:
                self._start_ready(executor, listener)
                if not self.running:
                    break
                done, _ = wait(self.running, timeout=1.0, return_when=FIRST_COMPLETED)
                for future in done:
                    self._end(future, listener)
                listener.turned()
        finally:
            executor.close()
        return {self.state(cell) for cell in self.cells} <= {FINISHED, DIVERGED}

    def _start_ready(self, executor: Executor, listener: Listener) -> None:
        for cell in self.cells:
            if len(self.running) >= executor.slots:
                return
            planned = self.plan.decide(cell, self.factors)
            if planned is None or self.state(cell) != WAITING:
                continue
            if planned.source is None or self.state(self._source(cell)) == FINISHED:
                self.running[executor.submit(self._command(planned))] = planned, time.monotonic()
                listener.started(planned)

    def _command(self, planned: Planned) -> Command:
        output = self.store.runs / planned.name
        start = None if planned.source is None else self.store.folder(planned.source)
        config = dataclasses.replace(planned.config, output=output, start_from=start, report_to=self.report_to)
        fields = {name: str(v) if isinstance(v, Path) else v for name, v in dataclasses.asdict(config).items()}
        words = words_of(self.job, json.dumps(fields), self.launch)
        path = os.pathsep.join(entry for entry in sys.path if entry)
        module = self.job if self.launch is None else None
        return Command(words, output, {"PYTHONPATH": path}, self.store.runs / LOCK, module)

    def _end(self, future: Future[Ended], listener: Listener) -> None:
        planned, _ = self.running.pop(future)
        folder = self.store.runs / planned.name
        try:
            ended = future.result()
            self.store.take(ended.files)
            if not self.store.look(folder) and self.store.record(planned) is None:
                write_record(folder, FAILED, _reason(ended.status, folder))
        except Exception as error:  # of a cluster, or a disk that is full: this run failed, the others go on
            self.broken[planned.id] = Record(FAILED, f"{type(error).__name__}: {error}")
        self._keep(planned)
        self.choose_rates(listener)
        self._require_sources()
        self.publish()
        listener.ended(planned, self.state(planned.cell))

    def _keep(self, planned: Planned) -> None:
        if self.record(planned) is None and planned.id in self.store.finished:
            self.estimates.learn(planned, self.store.result(planned.id))

    def publish(self) -> None:
        """Writes the results of all that ended where they are not written yet."""
        for cell in self.cells:
            planned = self.plan.decide(cell, self.factors)
            if planned is None:
                continue
            record = self.record(planned)
            try:
                if record is None and planned.id in self.store.finished:
                    self.store.publish(planned, self.plan.experiment)
                elif record is not None and record.kind == DIVERGED:
                    self.store.publish(planned, self.plan.experiment, record)
            except (CraftError, OSError) as error:
                self.broken[planned.id] = Record(FAILED, f"its result could not be published: {error}")


def _reason(status: int, folder: Path) -> str:
    how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
    return f"The process {how} and left no reason; see {folder.name}.log."


def _wanted(plan: Plan, only: Sequence[str]) -> list[Cell]:
    if not only:
        return plan.cells
    chosen = [cell for cell in plan.cells if not cell.chooses and any(fnmatch.fnmatch(cell.name, p) for p in only)]
    if not chosen:
        names = sorted({cell.name for cell in plan.cells if not cell.chooses})
        raise CraftError(f"No run matches `only={','.join(only)}`. The runs are: {', '.join(names)}.")
    methods = {cell.method for cell in chosen}
    needed = {*chosen, *(cell for cell in plan.cells if cell.chooses and cell.method in methods)}
    starts = {cell.task: plan.experiment.tasks[cell.task].start_from for cell in chosen}
    needed |= {dataclasses.replace(cell, task=label) for cell in chosen if (label := starts[cell.task]) is not None}
    return [cell for cell in plan.cells if cell in needed]
