"""The tables of a report, once, for the page and for Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ..figures import MODES, Stack
from ..results import Result
from .grouping import SELECTIONS, Grid, Selection, Spread, Variant, task_title
from .published import PublishedRow
from .rates import RateChoice
from .reading import Run
from .transforms import Insight
from .words import Differences, probability, signed

MISSING = "–"
WORK = ("fitting", "training", "evaluation")
"""Fields of `results.Seconds` that are not the runner's own cost."""


@dataclass(frozen=True)
class Cell:
    """One cell.

    Args:
        text: What it says.
        detail: What it says in small print.
        value: What it is sorted by; None sorts last. Cells of text are sorted by it.
        mark: Of the best in its column, of what differs significantly, of what is missing.
    """

    text: str
    detail: str = ""
    value: float | int | None = None
    mark: str = ""


@dataclass(frozen=True)
class Column:
    """One column.

    Args:
        title: Its heading.
        is_number: Whether it holds numbers.
    """

    title: str
    is_number: bool = True


@dataclass(frozen=True)
class Table:
    """One table.

    Args:
        name: A word that is unique on the page.
        title: Above it.
        columns: Its columns.
        rows: Its rows.
        note: Below it.
        apart: Rows of other origin, with the heading of their part: never mixed with the others.
        apart_title: That heading.
    """

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    apart: tuple[tuple[Cell, ...], ...] = ()
    apart_title: str = ""


NOTHING = Cell(MISSING, "no run", mark="missing")

SPREAD_NOTE = "Median over seeds, with lowest, highest and the number of seeds; times 100."
APART_TITLE = (
    "Published figures: other models, other protocols. CoLA Matthews, STS-B Pearson, all else accuracy, where the "
    "rows above have the mean of a task's metrics. Not to be ranked with them."
)


def overview(grid: Grid, selection: Selection, published: Sequence[PublishedRow] = ()) -> Table:
    """Methods by tasks at one selection.

    Args:
        grid: The results.
        selection: Which score.
        published: Rows to set apart below.

    Returns:
        The table.
    """
    tasks: list[str | None] = [*grid.tasks, None]
    best = {task: grid.best(task, selection) for task in tasks}
    rivals = {task: sum(bool(grid.scores(variant, task, selection)) for variant in grid.variants) for task in tasks}
    rows = []
    for variant in grid.variants:
        cells = [Cell(variant.label), _count(variant.adapter)]
        for task in tasks:
            scores = tuple(grid.scores(variant, task, selection).values())
            mark = "best" if best[task] is variant and rivals[task] > 1 else ""
            cells.append(_scores(scores, mark) if scores else _missing(grid, variant, task, selection))
        rows.append(tuple(cells))
    columns = [Column("method", False), Column("adapter"), *(Column(task_title(task)) for task in grid.tasks)]
    return Table(
        f"overview-{selection.name.replace('_', '-')}",
        f"Scores of the {selection.title}",
        (*columns, Column("average")),
        tuple(rows),
        f"{selection.title[0].upper()}{selection.title[1:]}: {selection.meaning}. {SPREAD_NOTE} The average is over "
        f"the seeds that ran on all {len(grid.tasks)} tasks. Adapter: its trained numbers, without the head.",
        tuple(_published(row, grid.tasks) for row in published if set(row.scores) & set(grid.tasks)),
        APART_TITLE if published else "",
    )


def details(grid: Grid, baseline: Variant, selection: Selection, differences: Differences) -> Table:
    """One row a task and method: all selections, the difference to the baseline, and what it cost.

    Args:
        grid: The results.
        baseline: The method that the others are compared with.
        selection: Which score the differences are of.
        differences: What `compare` returned.

    Returns:
        The table.
    """
    rows = []
    for task in grid.tasks:
        for variant in grid.variants:
            scores = [tuple(variant.scores(task, each).values()) for each in SELECTIONS.values()]
            if not any(scores):
                continue
            rows.append(
                (
                    Cell(task_title(task)),
                    Cell(variant.label),
                    *(_scores(found, quartiles=True) if found else _not_chosen() for found in scores),
                    *_difference(variant, task, baseline, differences),
                    _number(variant.spread(lambda result: result.seconds, task), "{:,.0f}"),
                    _number(variant.spread(_memory, task), "{:,.0f}"),
                )
            )
    columns = [Column("task", False), Column("method", False), *(Column(each.title) for each in SELECTIONS.values())]
    columns += [Column(f"against {baseline.label}"), Column("p, corrected"), Column("seconds"), Column("memory, MB")]
    return Table(
        "details",
        "Every task",
        tuple(columns),
        tuple(rows),
        f"{SPREAD_NOTE} IQR: between which the middle half lies. Compare methods within one column. Difference and p: "
        f"of the {selection.title}, over the seeds that both have. Seconds and memory: median of the runs; seconds "
        "with the evaluations, memory at its peak.",
    )


def significance(grid: Grid, baseline: Variant, selection: Selection, differences: Differences) -> Table:
    """Differences to the baseline on each task and on all together.

    Args:
        grid: The results.
        baseline: The method that the others are compared with.
        selection: Which score.
        differences: What `compare` returned.

    Returns:
        The table.
    """
    tasks: list[str | None] = [*grid.tasks, None]
    rows = [
        (Cell(variant.label), *(_tested(differences, variant, task) for task in tasks))
        for variant in grid.variants
        if variant is not baseline
    ]
    single = [d for (_, task), d in differences.items() if task is not None and d.is_tested]
    return Table(
        "significance",
        f"Differences to {baseline.label}",
        (Column("method", False), *(Column(task_title(task)) for task in grid.tasks), Column("all tasks")),
        tuple(rows),
        f"Mean difference in points of the {selection.title}, method minus {baseline.label}, over the seeds that both "
        "have. p: a sign-flip permutation test over these pairs, for all tasks over pairs of task and seed; after "
        f"Holm's correction for the {len(single)} comparisons on tasks, and by itself for those on all tasks. "
        "All tasks: only for methods that have a common seed on every task.",
    )


def costs(grid: Grid) -> Table:
    """What each method trains, keeps and takes.

    Args:
        grid: The results.

    Returns:
        The table.
    """
    columns: dict[str, tuple[Callable[[Result], float | None], str]] = {
        "adapter": (lambda result: result.parameters.adapter, "{:,.0f}"),
        "head": (lambda result: result.parameters.head, "{:,.0f}"),
        "stored, KB": (lambda result: result.parameters.stored_bytes / 1000, "{:,.0f}"),
        "of the model, %": (_share, "{:.3g}"),
        "seconds a step": (_step_seconds, "{:.3g}"),
        "peak memory, MB": (_memory, "{:,.0f}"),
    }
    rows = []
    for variant in grid.variants:
        cells = [_range(variant.spread(value), form) for value, form in columns.values()]
        setup = [share for run in variant.runs.values() if (share := _setup(run)) is not None]
        cells.append(_number(Spread(tuple(setup)) if setup else None, "{:.1f}"))
        rows.append((Cell(variant.label), Cell(f"{len(variant.runs)}", value=len(variant.runs)), *cells))
    titles = [Column("method", False), Column("runs"), *map(Column, columns), Column("setup, %")]
    if all(row[-1] is UNKNOWN for row in rows):
        titles, rows = titles[:-1], [row[:-1] for row in rows]
    return Table(
        "costs",
        "Parameters and cost",
        tuple(titles),
        tuple(rows),
        "Trained numbers of the adapter and of the head, with the range over the tasks where it is one. Stored: the "
        "saved weight files, with what a method keeps besides its trained numbers; the whole model where no adapter is "
        "saved. Seconds a step: of all wall time, the evaluations after each epoch included. Setup, where it is known: "
        "the share of a run's time in which nothing is fitted, trained or evaluated.",
    )


def rates(choices: Sequence[RateChoice]) -> Table:
    """The learning rate of each method, and what the others reached that were tried.

    Args:
        choices: What `read_choices` returned.

    Returns:
        The table.
    """
    rows = []
    for choice in choices:
        tried = ", ".join(f"{rate:g}: {score:.1f}" for rate, score in choice.scores.items())
        rows.append((Cell(choice.label), Cell(f"{choice.chosen:g}", choice.place, choice.chosen), Cell(tried)))
    return Table(
        "rates",
        "Learning rates",
        (Column("method", False), Column("chosen"), Column("score by rate", False)),
        tuple(rows),
        "Score by rate: on the held-out training rows after the last epoch, times 100, the mean over the tasks that "
        "the rate was chosen on. The development sets had no part in the choice.",
    )


def movement(insights: Sequence[Insight]) -> Table:
    """How far the transforms of saved adapters moved from the identity.

    Args:
        insights: What `read_insights` returned.

    Returns:
        The table.
    """
    grouped: dict[tuple[str, str, str], list[Stack]] = {}
    for insight in insights:
        for stack in insight.stacks:
            grouped.setdefault((insight.label, insight.task, stack.name), []).append(stack)
    rows = [
        (
            Cell(label),
            Cell(task_title(task)),
            Cell(name),
            Cell(str(len(stacks)), value=len(stacks)),
            _middle([100 * stack.energy for stack in stacks if stack.energy is not None], 1),
            *(_middle([stack.moved[mode] for stack in stacks if mode in stack.moved], 3) for mode in MODES),
        )
        for (label, task, name), stacks in grouped.items()
    ]
    titles = [Column("method", False), Column("task", False), Column("stack", False), Column("runs")]
    titles += [Column("energy held, %"), *(Column(f"moved, {mode}") for mode in MODES)]
    return Table(
        "movement",
        "How far the transforms moved",
        tuple(titles),
        tuple(rows),
        "Energy held: the share of the pretrained weights' squared norm that the frozen core holds. Moved: the "
        "Frobenius norm of J − I relative to that of I, for the transform of each mode; median over seeds, with lowest "
        "and highest. In the heat maps, which need the adapters themselves, blue is below zero, red above; the colours "
        "end at the number above each.",
    )


UNKNOWN = Cell(MISSING, mark="missing")


def _middle(values: list[float], places: int) -> Cell:
    if not values:
        return UNKNOWN
    spread = Spread(tuple(values))
    low, middle, high = (f"{value:.{places}f}" for value in (spread.low, spread.median, spread.high))
    return Cell(middle, f"{low}–{high}" if low != high else "", spread.median)


def _not_chosen() -> Cell:
    return Cell(MISSING, "no rows held out", mark="missing")


def _missing(grid: Grid, variant: Variant, task: str | None, selection: Selection) -> Cell:
    if task is not None:
        ran = any(name == task for name, _ in variant.runs)
        return _not_chosen() if ran else NOTHING
    ran_on = sum(bool(variant.scores(name, selection)) for name in grid.tasks)
    detail = "no common seed" if ran_on == len(grid.tasks) else f"{ran_on} of {len(grid.tasks)} tasks"
    return Cell(MISSING, detail, mark="missing")


def _scores(scores: tuple[float, ...], mark: str = "", quartiles: bool = False) -> Cell:
    spread = Spread(scores)
    if len(scores) == 1:
        return Cell(f"{spread.median:.1f}", "1 seed", spread.median, mark)
    detail = f"{spread.low:.1f}–{spread.high:.1f}"
    if quartiles:
        detail += f"; IQR {spread.quartiles[0]:.1f}–{spread.quartiles[1]:.1f}"
    return Cell(f"{spread.median:.1f}", f"{detail}; {len(scores)} seeds", spread.median, mark)


def _tested(differences: Differences, variant: Variant, task: str | None) -> Cell:
    found = differences.get((variant.label, task))
    if found is None or found.mean is None:
        return Cell(MISSING, "no common seed" if task is not None else "not on all tasks", mark="missing")
    pairs = f"{found.pairs} pair{'' if found.pairs == 1 else 's'}"
    detail = f"p {probability(found.corrected)}; {pairs}" if found.is_tested else f"{pairs}, not tested"
    return Cell(signed(found.mean), detail, found.mean, "significant" if found.is_significant else "")


def _difference(variant: Variant, task: str, baseline: Variant, differences: Differences) -> Iterable[Cell]:
    found = differences.get((variant.label, task))
    if variant is baseline:
        return Cell("baseline", mark="quiet"), UNKNOWN
    if found is None or found.mean is None:
        return UNKNOWN, UNKNOWN
    mark = "significant" if found.is_significant else ""
    p = Cell(probability(found.corrected), value=found.corrected, mark=mark) if found.is_tested else UNKNOWN
    return Cell(signed(found.mean), value=found.mean, mark=mark), p


def _published(row: PublishedRow, tasks: Sequence[str]) -> tuple[Cell, ...]:
    scores = [Cell(f"{row.scores[t]:.1f}", value=row.scores[t]) if t in row.scores else UNKNOWN for t in tasks]
    return Cell(f"{row.method}, {row.model}", row.protocol), _count(row.parameters), *scores, UNKNOWN


def _count(number: int) -> Cell:
    return Cell(f"{number:,}", value=number)


def _number(spread: Spread | None, form: str) -> Cell:
    return UNKNOWN if spread is None else Cell(form.format(spread.median), value=spread.median)


def _range(spread: Spread | None, form: str) -> Cell:
    if spread is None:
        return UNKNOWN
    ends = [form.format(end) for end in (spread.low, spread.high)]
    return Cell(form.format(spread.median), "" if ends[0] == ends[1] else "–".join(ends), spread.median)


def _memory(result: Result) -> float | None:
    return None if result.peak_memory_bytes is None else result.peak_memory_bytes / 1e6


def _share(result: Result) -> float | None:
    return 100 * result.parameters.trainable / result.parameters.total if result.parameters.total else None


def _step_seconds(result: Result) -> float | None:
    # The last logged step is the last one of the run, or within a log interval of it.
    return result.seconds / result.loss[-1][0] if result.loss else None


def _setup(run: Run) -> float | None:
    """The share of a run's time that neither fits nor measures anything, in percent; None where it was not kept."""
    parts = run.fields.get("time")
    if not isinstance(parts, dict) or "setup" not in parts:
        return None
    known = {name: part for name, part in parts.items() if isinstance(part, int | float)}
    whole = sum(known.values())
    work = sum(known.get(name, 0.0) for name in WORK)
    return 100 * (1 - work / whole) if whole > 0 else None
