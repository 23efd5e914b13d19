"""The pictures of a report, as SVG that takes the colours of the page around it, dark or light."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from ..figures import MODES
from .grouping import Grid, Selection, Spread, task_title
from .transforms import Insight

# Of middle lightness: readable on white and on near black. With the markers, no two of 84 methods look the same.
COLOURS = (
    *("#3b7dd8", "#d9772b", "#2f9e6e", "#c2476f", "#8a6fd1", "#a8891c"),
    *("#1f9bb0", "#9a6b4f", "#6f8f2f", "#b05fbf", "#7f8a96", "#d4574b"),
)
MARKERS = "osD^vPX"
# Stand-ins that no other element uses; the page decides what they become.
_INK, _LINE = "#010203", "#040506"
_STYLE = {
    "svg.fonttype": "none",
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _INK,
    "axes.titlecolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "text.color": _INK,
    "legend.frameon": False,
    "legend.labelcolor": _INK,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


def looks(grid: Grid) -> dict[str, dict[str, Any]]:
    """Colour and marker of each method, the same in all pictures."""
    return {
        variant.label: {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
        for number, variant in enumerate(grid.variants)
    }


def draw_pareto(grid: Grid, selection: Selection) -> str:
    """Score against adapter parameters, one panel a task and one for the average; the line is the Pareto front.

    A method is on the front when none with as few parameters has a higher median.
    """
    tasks = _scored(grid, selection, 1)
    figure, panels = _panels(len(tasks), legend=len(grid.variants))
    style = looks(grid)
    fewest = min((variant.adapter for variant in grid.variants if variant.adapter), default=1)
    for task, axis in zip(tasks, panels, strict=True):
        points = []
        for variant in grid.variants:
            scores = tuple(grid.scores(variant, task, selection).values())
            if not scores:
                continue
            spread, x = Spread(scores), variant.adapter or fewest / 4
            points.append((x, spread.median))
            below, above = spread.median - spread.low, spread.high - spread.median
            axis.errorbar(x, spread.median, [[below], [above]], **style[variant.label], ms=6, lw=1.2, capsize=2)
        front = pareto_front(points)
        axis.plot(*zip(*front, strict=True), drawstyle="steps-post", color=_INK, lw=1, ls=":", zorder=1)
        _count_axis(axis, fewest / 4)
        axis.set(title=_title(task), xlabel="adapter parameters")
    _legend(figure, grid, style)
    return as_svg(figure, "pareto", "Median score against adapter parameters, with lowest and highest.")


def _count_axis(axis: Axes, zero: float) -> None:
    """Makes the horizontal axis one of counts, as a logarithm, with a place of its own for 0."""
    axis.set_xscale("log")
    axis.margins(x=0.12)
    axis.minorticks_off()
    least, most = axis.get_xlim()
    subdivisions = (1, 2, 5) if most < 50 * least else (1,)
    counts = [x for x in LogLocator(subs=subdivisions).tick_values(least, most) if max(least, 2 * zero) < x < most]
    labels = {zero: "0"} if least <= zero else {}
    labels |= {x: _short(x) for x in counts}
    axis.set_xticks(list(labels), list(labels.values()))


def pareto_front(points: Sequence[tuple[float | int, float]]) -> list[tuple[float | int, float]]:
    """The points that no other beats with as few parameters, from left to right.

    Example:
        >>> pareto_front([(10, 80.0), (5, 70.0), (20, 75.0), (10, 60.0), (30, 81.0)])
        [(5, 70.0), (10, 80.0), (30, 81.0)]
    """
    front: list[tuple[float | int, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front


def draw_spread(grid: Grid, selection: Selection) -> str:
    """One bar a method and task: from the lowest to the highest seed, thick between the quartiles, a dot a seed."""
    tasks = _scored(grid, selection, 1)
    rows = len(grid.variants)
    longest = max(len(variant.label) for variant in grid.variants)
    figure, panels = _panels(len(tasks), height=1.05 + 0.27 * rows, left=max(1.1, 0.3 + 0.075 * longest))
    style = looks(grid)
    for number, (task, axis) in enumerate(zip(tasks, panels, strict=True)):
        for row, variant in enumerate(grid.variants):
            scores = tuple(grid.scores(variant, task, selection).values())
            if not scores:
                continue
            spread, colour = Spread(scores), style[variant.label]["color"]
            axis.barh(row, spread.high - spread.low, left=spread.low, height=0.28, color=colour, alpha=0.35)
            low, high = spread.quartiles
            axis.barh(row, high - low, left=low, height=0.56, color=colour, alpha=0.45)
            axis.plot([spread.median] * 2, [row - 0.36, row + 0.36], color=colour, lw=2.4)
            axis.plot(scores, [row] * len(scores), "o", ms=3, color=colour)
        axis.set_yticks(range(rows), [variant.label for variant in grid.variants] if number % 3 == 0 else [])
        axis.set_ylim(rows - 0.4, -0.6)
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.use_sticky_edges = False
        axis.set(title=_title(task), xlabel="score")
        axis.margins(x=0.08)
        axis.grid(visible=False, axis="y")
    return as_svg(figure, "spread", "Scores of every seed by task and method, with median, quartiles and range.")


def draw_curves(grid: Grid) -> str:
    """The development score after each epoch: median over seeds, and from the lowest to the highest.

    Of the tasks with more than one epoch; nothing where there is none.
    """
    tasks = [task for task in grid.tasks if any(len(run.result.curve) > 1 for run in grid.runs if run.task == task)]
    if not tasks:
        return ""
    figure, panels = _panels(len(tasks), legend=len(grid.variants))
    style = looks(grid)
    for task, axis in zip(tasks, panels, strict=True):
        for variant in grid.variants:
            curves = [run.result.curve for (name, _), run in variant.runs.items() if name == task]
            length = min(map(len, curves), default=0)
            if not length:
                continue
            scores = 100 * np.array([[record.score for record in curve[:length]] for curve in curves])
            epochs = range(1, length + 1)
            look = style[variant.label]
            axis.plot(epochs, np.median(scores, axis=0), **look, ms=4, lw=1.5, markevery=max(1, length // 8))
            if len(scores) > 1:
                axis.fill_between(epochs, scores.min(0), scores.max(0), color=look["color"], alpha=0.13, lw=0)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axis.set(title=_title(task), xlabel="epoch")
    _legend(figure, grid, style)
    return as_svg(figure, "curves", "Development score after each epoch, median over seeds with the range.")


def draw_energy(insights: Sequence[Insight]) -> str:
    """The share of the pretrained weights' squared norm that the frozen core of each stack holds."""
    shares: dict[tuple[str, str], list[float]] = {}
    for insight in insights:
        for stack in insight.stacks:
            if stack.energy is not None:
                shares.setdefault((insight.label, stack.name), []).append(100 * stack.energy)
    if not shares:
        return ""
    names = [f"{label}: {stack}" for label, stack in shares]
    figure, (axis,) = _panels(1, height=1.05 + 0.32 * len(shares), left=0.3 + 0.075 * max(map(len, names)))
    for row, values in enumerate(shares.values()):
        axis.barh(row, float(np.median(values)), height=0.6, color=COLOURS[0], alpha=0.75)
        axis.text(float(np.median(values)) + 1, row, f"{np.median(values):.1f} %", va="center", color=_INK)
    axis.set_yticks(range(len(shares)), names)
    axis.set(xlim=(0, 100), ylim=(len(shares) - 0.5, -0.5), xlabel="energy of the weights in the core, %")
    axis.grid(visible=False, axis="y")
    return as_svg(figure, "energy", "Share of the weights' energy that the frozen core holds, by method and stack.")


def draw_moved(insights: Sequence[Insight], most: int = 4) -> Iterator[tuple[str, str]]:
    """Heat maps of J - I: a title and a picture for the first run of each method and task, some of them."""
    shown: set[tuple[str, str]] = set()
    for insight in insights:
        stacks = [stack for stack in insight.stacks if stack.matrices]
        if not stacks or (insight.label, insight.task) in shown or len(shown) == most:
            continue
        shown.add((insight.label, insight.task))
        figure, panels = _panels(len(MODES) * len(stacks), height=3.4)
        for number, axis in enumerate(panels):
            stack, mode = stacks[number // len(MODES)], MODES[number % len(MODES)]
            _heat(axis, stack.matrices.get(mode), f"{stack.name}, {mode} transform")
        title = f"{insight.label} on {task_title(insight.task)}, seed {insight.seed}"
        yield title, as_svg(figure, f"moved-{len(shown)}", f"J − I of each transform: {title}.")


def _heat(axis: Axes, matrix: np.ndarray | None, title: str) -> None:
    axis.set_axis_off()
    if matrix is None:
        return
    # The largest entries would leave all others white: the scale ends at the 99.5th percentile.
    limit = max(float(np.percentile(np.abs(matrix), 99.5)), 1e-12)
    axis.imshow(matrix, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
    axis.set_title(f"{title}: ±{limit:.2g}")


def as_svg(figure: Figure, name: str, meaning: str) -> str:
    """A figure as an SVG element for a page.

    Args:
        figure: The figure.
        name: A word that is unique on the page.
        meaning: What screen readers say.

    Returns:
        The element: text as text, colours of the page, ids of its own.
    """
    buffer = io.StringIO()
    with rc_context({**_STYLE, "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor").replace(_LINE, "var(--line)")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font: ((?:bold |[\d.]+px )+)[^;\"]*", r"font: \1inherit", svg)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    width = float(re.search(r'width="([\d.]+)pt"', svg)[1])  # type: ignore[index]
    label = meaning.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    start = f'<svg role="img" aria-label="{label}" style="max-width: {4 / 3 * width:.0f}px"'
    return re.sub(r'^<svg( [^>]*?)? width="[\d.]+pt" height="[\d.]+pt"|^<svg height="[\d.]+pt"', start, svg, count=1)


def _panels(count: int, height: float = 2.9, left: float = 0.5, legend: int = 0) -> tuple[Figure, list[Axes]]:
    """Panels in up to three columns; placed by hand, in inches: matplotlib's own layout takes as long as drawing."""
    columns, below = min(3, count), 0.3 + 0.22 * -(-legend // 4) if legend else 0.1
    rows = -(-count // columns)
    width = left + max(columns, 2) * 3.75
    tall = rows * height + below
    with rc_context(_STYLE):
        figure = Figure(figsize=(width, tall))
        step = (width - left) / columns
        axes = [
            figure.add_axes(
                (
                    (left + step * (number % columns)) / width,
                    (below + 0.55 + height * (rows - 1 - number // columns)) / tall,
                    (step - (0.3 if left > 1 else 0.6)) / width,
                    (height - 0.9) / tall,
                )
            )
            for number in range(count)
        ]
    return figure, axes


def _legend(figure: Figure, grid: Grid, style: dict[str, dict[str, Any]]) -> None:
    axis = figure.axes[0]
    handles = [
        axis.plot([], [], **style[variant.label], ls="", ms=6, label=variant.label)[0] for variant in grid.variants
    ]
    with rc_context(_STYLE):
        figure.legend(handles=handles, loc="lower center", ncols=min(4, len(handles)), fontsize=10)


def _scored(grid: Grid, selection: Selection, least: int) -> list[str | None]:
    """The tasks with scores, and None for the average where there is one."""
    tasks: list[str | None] = [*grid.tasks, None] if len(grid.tasks) > 1 else [*grid.tasks]
    return [task for task in tasks if sum(bool(grid.scores(v, task, selection)) for v in grid.variants) >= least]


def _title(task: str | None) -> str:
    return "average" if task is None else task_title(task)


def _short(number: float | int) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"
