"""A report as one HTML page that needs no network, and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import jinja2

from . import pictures, tables, words
from .grouping import SELECTIONS, Grid, Selection, Variant, make_grid, what_differs
from .markdown import as_markdown
from .published import PublishedRow, read_published
from .rates import RateChoice, read_choices
from .reading import Found, LeftOut, read_runs
from .significance import compare
from .transforms import Insight, read_insights

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Report:
    """Everything that a report shows.

    Args:
        grid: The results.
        baseline: The method that the others are compared with.
        selection: Which score the comparisons are of.
        differences: Each method against the baseline.
        published: Figures of other people, set apart.
        left_out: Files that are not used.
        unfinished: Run folders without a result.
        insights: What saved adapters tell.
        only_chose: How many runs were there only to choose a learning rate by.
        choices: The rates that were chosen, and those they were chosen from.
    """

    grid: Grid
    baseline: Variant
    selection: Selection
    differences: words.Differences
    published: tuple[PublishedRow, ...]
    left_out: tuple[LeftOut, ...]
    unfinished: tuple[Path, ...]
    insights: tuple[Insight, ...]
    only_chose: int = 0
    choices: tuple[RateChoice, ...] = ()

    @property
    def summary(self) -> list[str]:
        """The whole in sentences."""
        return words.summarise(self.grid, self.baseline, self.selection, self.differences)

    @property
    def by_task(self) -> list[words.TaskWords]:
        """Each task in sentences."""
        return words.by_task(self.grid, self.baseline, self.selection, self.differences)

    @property
    def notes(self) -> list[str]:
        """What differs between runs that are compared, and what was left aside."""
        return what_differs(self.grid) + words.on_rates(self.choices, self.only_chose)

    @property
    def overviews(self) -> list[tables.Table]:
        """Methods by tasks, the chosen selection first."""
        chosen = [self.selection, *(each for each in SELECTIONS.values() if each is not self.selection)]
        return [tables.overview(self.grid, each, self.published) for each in chosen if self._has(each)]

    @property
    def details(self) -> tables.Table:
        """A row a task and method."""
        return tables.details(self.grid, self.baseline, self.selection, self.differences)

    @property
    def significance(self) -> tables.Table:
        """Differences to the baseline."""
        return tables.significance(self.grid, self.baseline, self.selection, self.differences)

    @property
    def costs(self) -> tables.Table:
        """What each method trains, keeps and takes."""
        return tables.costs(self.grid)

    @property
    def rates(self) -> tables.Table | None:
        """The learning rates, where they were chosen."""
        return tables.rates(self.choices) if self.choices else None

    @property
    def movement(self) -> tables.Table | None:
        """How far transforms moved, where adapters are there."""
        return tables.movement(self.insights) if self.insights else None

    def _has(self, selection: Selection) -> bool:
        return any(variant.scores(task, selection) for variant in self.grid.variants for task in self.grid.tasks)


def make_report(
    paths: Sequence[str | Path], baseline: str | None = None, against: str | None = None, selection: str = "last"
) -> Report:
    """Reads results and compares them.

    Args:
        paths: Folders of runs or of published result files.
        baseline: Label or name of the method to compare with; None for the first in the table of methods.
        against: Name of published figures to show as well.
        selection: A key of `SELECTIONS`.

    Returns:
        The report.

    Raises:
        CraftError: Nothing to report on, or names that are not there.
    """
    published = tuple(read_published(against)) if against else ()
    found: Found = read_runs(paths)
    grid, repeated = make_grid(found.runs)
    chosen, compared = SELECTIONS[selection], grid.find(baseline)
    insights, unread = read_insights(grid)
    return Report(
        grid=grid,
        baseline=compared,
        selection=chosen,
        differences=compare(grid, compared, chosen),
        published=published,
        left_out=(*found.left_out, *repeated, *unread),
        unfinished=found.unfinished,
        insights=tuple(insights),
        only_chose=sum(bool(run.experiment.get("chooses_rate")) for run in found.runs),
        choices=tuple(read_choices(found.runs, grid.variants)),
    )


def render_page(report: Report) -> str:
    """The report as HTML.

    Args:
        report: The report.

    Returns:
        One page with styles, script and pictures in it.
    """
    grid, selection = report.grid, report.selection
    drawn = [
        ("Score against parameters", PARETO_NOTE, [("", pictures.draw_pareto(grid, selection))]),
        ("Every seed", SPREAD_NOTE, [("", pictures.draw_spread(grid, selection))]),
        *([("Learning curves", CURVES_NOTE, [("", curves)])] if (curves := pictures.draw_curves(grid)) else []),
    ]
    inside = [("", energy)] if (energy := pictures.draw_energy(report.insights)) else []
    return (
        _environment(autoescape=True)
        .get_template("report.html.jinja")
        .render(
            report=report,
            pictures=drawn,
            inside=[*inside, *pictures.draw_moved(report.insights)],
            style=(TEMPLATES / "report.css").read_text(encoding="utf-8"),
            script=(TEMPLATES / "report.js").read_text(encoding="utf-8"),
            models=sorted({run.result.model for run in grid.runs}),
            version=metadata.version("craft-peft"),
            date=datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        )
    )


PARETO_NOTE = (
    "Up and to the left is better. The dotted line is the Pareto front: no method below it is worth its parameters."
)
SPREAD_NOTE = (
    "A dot is a seed; the line is the median, the thick bar holds the middle half. The axes do not start at zero."
)
CURVES_NOTE = (
    "Score on the development set after each epoch, for tasks with more than one: median over seeds, shaded from "
    "lowest to highest."
)


def render_markdown(report: Report, title: str = "# Results") -> str:
    """The report as Markdown: sentences and tables.

    Args:
        report: The report.
        title: What it begins with.

    Returns:
        The text.
    """
    text = _environment(autoescape=False).get_template("report.md.jinja").render(report=report, title=title)
    return text.strip() + "\n"


def _environment(autoescape: bool) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=autoescape,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["markdown"] = as_markdown
    return environment
