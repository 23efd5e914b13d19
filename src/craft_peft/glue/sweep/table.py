"""What the user of a sweep sees: the plan, and how far it is."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from ..tasks import TASKS
from .estimate import duration
from .plan import Cell, Planned
from .runner import BLOCKED, DIVERGED, FAILED, FINISHED, RUNNING, STATES, WAITING, Listener, Sweep

SHOWN = 8


def plan_table(sweep: Sweep) -> Table:
    """The plan, a row a method: what it trains, its rates, its runs, and the time that is still to come."""
    table = Table("method", "setting", title=f"{sweep.plan.experiment.name}: {sweep.plan.experiment.model}")
    for column in ("adapter", "head", "rates", "runs", "done", "to come"):
        table.add_column(column, justify="right")
    plan = sweep.plan
    heads = sorted({plan.counts.head(TASKS[row.task].outputs) for row in plan.experiment.tasks.values()})
    for label, row in plan.experiment.methods.items():
        cells = [cell for cell in sweep.cells if cell.method == label]
        states = Counter(sweep.state(cell) for cell in unique(sweep, cells))
        count = plan.counts.of(row)
        rates = sorted(
            {
                planned.settings["recipe"]["learning_rate"]
                for cell in cells
                if row.has_adapter and (planned := plan.decide(cell, sweep.factors)) is not None
            }
        )
        table.add_row(
            label,
            count.setting,
            f"{count.trainable:,}",
            "/".join(f"{head:,}" for head in heads),
            "  ".join(f"{rate:.2g}" for rate in rates),
            str(sum(states.values())),
            str(states[FINISHED] + states[DIVERGED]),
            duration(sum((seconds for seconds, _ in _to_come(sweep, label)), 0.0)),
        )
    return table


def unique(sweep: Sweep, cells: list[Cell]) -> list[Cell]:
    """The cells without those that are the same run as one before; a rate that is not chosen makes none the same."""
    found: dict[Any, Cell] = {}
    for cell in cells:
        planned = sweep.plan.decide(cell, sweep.factors)
        found.setdefault(cell if planned is None else planned.id, cell)
    return list(found.values())


def _to_come(sweep: Sweep, method: str | None = None) -> list[tuple[float, bool]]:
    """Seconds of each run that is not done, and whether finished runs say so; any factor is as long as the others."""
    found = []
    for cell in unique(sweep, [cell for cell in sweep.cells if method in (None, cell.method)]):
        if sweep.state(cell) in (WAITING, BLOCKED, RUNNING):
            planned = sweep.plan.decide(cell, {cell.method: 1.0, **sweep.factors})
            assert planned is not None
            found.append(sweep.estimates.seconds(planned))
    return found


def describe_time(sweep: Sweep, slots: int) -> str:
    """The time that is still to come, in a sentence that says where it is from."""
    found = _to_come(sweep)
    measured = sum(known for _, known in found)
    total = sum((seconds for seconds, _ in found), 0.0)
    source = f"{measured} of {len(found)} by the time of finished runs, the others by steps x tokens x the model's size"
    if measured == len(found):
        source = "by the time of finished runs"
    elif not measured:
        source = "by steps x tokens x the model's size, since no run of these tasks is finished"
    return (
        f"{len(found)} runs to come: {duration(total)}, or {duration(total / slots)} at {slots} at a time ({source})."
    )


def describe_rates(sweep: Sweep) -> str:
    """How the learning rates are found."""
    rates = sweep.plan.experiment.rates
    factors = ", ".join(f"{factor:.3g}" for factor in rates.factors)
    if not rates.choose_on:
        return f"Learning rates: {factors} times each method's own." if len(rates.factors) > 1 else ""
    return (
        f"Learning rates: the best of {factors} times each method's own, by the mean score on held-out training rows "
        f"of {', '.join(rates.choose_on)} with seed {rates.seed}."
    )


class Progress(Listener):
    """Shows how far a sweep is: a table that is drawn again and again at a terminal, else a line for each event.

    Args:
        sweep: The sweep.
        console: Where to.
        slots: Runs at a time.
    """

    def __init__(self, sweep: Sweep, console: Console, slots: int) -> None:
        self.sweep, self.console, self.slots = sweep, console, slots
        self.live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> Progress:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *problem: object) -> None:
        if self.live is not None:
            self.live.stop()

    def started(self, planned: Planned) -> None:
        """Says so."""
        if self.live is None:
            self.console.print(f"started {planned.name}", soft_wrap=True)

    def ended(self, planned: Planned, state: str) -> None:
        """Says how, with the score, or the reason."""
        self.console.print(f"{state} {planned.name}{self._outcome(planned, state)}", soft_wrap=True, highlight=False)

    def _outcome(self, planned: Planned, state: str) -> str:
        if state == FINISHED:
            result = self.sweep.store.result(planned.id)
            return f": {result['score']['last']:.4f} in {duration(result['seconds'])}"
        record = self.sweep.record(planned)
        return "" if record is None else f": {record.reason.splitlines()[0]}"

    def chosen(self, method: str, scores: dict[float, float]) -> None:
        """Says which."""
        shown = ", ".join(f"{factor:.3g}: {score:.4f}" for factor, score in scores.items())
        text = f"rate of {method}: {self.sweep.factors[method]:.3g} times its own (held-out scores {shown})"
        self.console.print(text, soft_wrap=True, highlight=False)

    def turned(self) -> None:
        """Draws the table again."""
        if self.live is not None:
            self.live.update(self.table(), refresh=True)

    def table(self) -> Table:
        """How far it is, and what runs now."""
        states = Counter(self.sweep.state(cell) for cell in unique(self.sweep, self.sweep.cells))
        counts = ", ".join(f"{states[state]} {state}" for state in STATES if states[state])
        left = sum((seconds for seconds, _ in _to_come(self.sweep)), 0.0) / self.slots
        table = Table("running", "since", "about", title=f"{counts}; about {duration(left)} to come")
        for planned, start in list(self.sweep.running.values())[:SHOWN]:
            seconds, _ = self.sweep.estimates.seconds(planned)
            table.add_row(planned.name, duration(time.monotonic() - start), f"of {duration(seconds)}")
        return table


def summary_lines(sweep: Sweep) -> list[str]:
    """What the sweep came to; failures by name."""
    cells = unique(sweep, sweep.cells)
    states = {cell: sweep.state(cell) for cell in cells}
    counts = Counter(states.values())
    lines = [", ".join(f"{counts[state]} {state}" for state in STATES if counts[state]) + f" of {len(cells)} runs"]
    for cell, state in states.items():
        planned = sweep.plan.decide(cell, sweep.factors)
        if state in (FAILED, DIVERGED) and planned is not None and (record := sweep.record(planned)) is not None:
            more = f" ({sweep.store.runs / record.traceback})" if record.traceback else ""
            lines.append(f"{state}: {planned.name}: {record.reason.splitlines()[0]}{more}")
    if counts[FAILED]:
        lines.append("Start the same command with `retry_failed=True` to do the failed runs again.")
    if counts[BLOCKED]:
        lines.append(f"{counts[BLOCKED]} runs need one that failed or diverged.")
    return lines
