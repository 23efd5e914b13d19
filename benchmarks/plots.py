"""Draws how time grows, from the committed figures: time against tokens, width, depth and rank.

python benchmarks/plots.py            # results/performance/*.json -> docs/img/*.svg
python benchmarks/plots.py --check    # changes nothing; exit status 1 names the pictures that are out of date
"""

import argparse
import io
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

PROJECT = Path(__file__).resolve().parent.parent
LABELS = {"floor": "floor (frozen base)", "craft": "CRAFT, rank 100", "lora-8": "LoRA, rank 8", "lora": "LoRA"}
COLOURS = {"floor": "0.6", "craft": "tab:blue", "lora-8": "tab:orange", "lora": "tab:orange"}
Point = tuple[str, float, float]
"""A side, where it is on the horizontal axis, its seconds."""


def seconds(side: dict[str, Any]) -> float:
    return statistics.median(side["seconds"])


def points(settings: list[dict[str, Any]], place: Callable[[dict[str, Any]], float]) -> list[Point]:
    return [
        (name, place(setting), seconds(side))
        for setting in settings
        for name, side in setting["sides"].items()
        if name in ("floor", "craft", "lora-8")
    ]


def rank_points(settings: list[dict[str, Any]]) -> list[Point]:
    named = [
        (*name.partition("-")[::2], seconds(side)) for setting in settings for name, side in setting["sides"].items()
    ]
    found = [(method, float(rank), took) for method, rank, took in named if rank]
    floor = next(took for method, _, took in named if method == "floor")
    return found + [("floor", rank, floor) for _, rank, _ in found]


def draw(axes: Axes, found: list[Point], xlabel: str) -> None:
    for name in dict.fromkeys(name for name, _, _ in found):
        places, times = zip(*sorted({(x, y) for n, x, y in found if n == name}), strict=True)
        axes.plot(places, times, marker="o", markersize=3, label=LABELS[name], color=COLOURS[name])
    scale(axes, xlabel, [x for _, x, _ in found])


def scale(axes: Axes, xlabel: str, places: Iterable[float]) -> None:
    """Logarithmic axes with plain numbers, and a tick where there is a point."""
    axes.set(xscale="log", yscale="log", xlabel=xlabel)
    axes.xaxis.set_major_locator(FixedLocator(sorted(set(places))))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(alpha=0.3, linewidth=0.4)


def step_figure(result: dict[str, Any]) -> Figure:
    settings = result["settings"]
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    tokens, width, depth, rank = figure.subplots(1, 4)
    plain = [setting for setting in settings if setting["dtype"] == "float32"]
    of = {kind: [s for s in plain if s["shape"].startswith(kind)] for kind in ("RoBERTa-base", "width", "depth")}
    ranked = [s for s in plain if any(name.startswith("craft-") for name in s["sides"])]
    grid = [s for s in of["RoBERTa-base"] if len(s["sides"]) == 3]
    draw(tokens, points(grid, lambda setting: setting["batch"] * setting["length"]), "tokens (RoBERTa-base)")
    wide = [setting for setting in of["width"] if "craft" in setting["sides"]]
    draw(width, points(wide, lambda setting: setting["width"]), "width (4 layers, 256 tokens)")
    draw(depth, points(of["depth"], lambda setting: setting["layers"]), "layers (width 512, 256 tokens)")
    draw(rank, rank_points(ranked), "rank (width 512, 256 tokens)")
    rank.get_lines()[0].set_label("CRAFT")
    tokens.set_ylabel("seconds of a training step")
    tokens.legend(fontsize=7)
    rank.legend(fontsize=7)
    return figure


def decompose_figure(result: dict[str, Any]) -> Figure:
    """Time against width, at 12 layers, and against depth, at width 768: flat spectra."""
    rows = [row for row in result["rows"] if row["spectrum"] == "flat" and row["shape"][1] == row["shape"][2]]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    panels = ((left, "width (12 layers)", 1, 0, 12), (right, "layers (width 768)", 0, 1, 768))
    for axes, label, along, across, fixed in panels:
        chosen = [row for row in rows if row["shape"][across] == fixed]
        for side in dict.fromkeys(side for row in chosen for side in row["sides"]):
            found = sorted((row["shape"][along], seconds(row["sides"][side])) for row in chosen if side in row["sides"])
            if len(found) > 1:
                axes.plot(*zip(*found, strict=True), marker="o", markersize=3, label=side)
        scale(axes, label, [row["shape"][along] for row in chosen])
    left.set_ylabel("seconds of a decomposition")
    figure.legend(*left.get_legend_handles_labels(), loc="outside right upper", fontsize=7)
    return figure


FIGURES: dict[str, tuple[str, Callable[[dict[str, Any]], Figure]]] = {
    "step": ("step-cpu.json", step_figure),
    "decompose": ("decompose-cpu.json", decompose_figure),
}


def number_ids(svg: str) -> str:
    """Short identifiers by number: matplotlib hashes positions, whose last bits differ between processors."""
    numbers: dict[str, str] = {}
    return re.sub(r"\b[mp][0-9a-f]{10}\b", lambda found: numbers.setdefault(found[0], f"s{len(numbers)}"), svg)


def render(name: str, project: Path = PROJECT) -> str:
    """A picture as SVG text, the same for the same figures."""
    file, figure = FIGURES[name]
    result = json.loads((project / "results" / "performance" / file).read_text())
    with matplotlib.rc_context({"svg.hashsalt": "craft-peft", "font.size": 8, "svg.fonttype": "none"}):
        text = io.StringIO()
        figure(result).savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return "\n".join(line.rstrip() for line in number_ids(text.getvalue()).splitlines()) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, fail if a picture would change")
    check, stale = parser.parse_args().check, 0
    for name in FIGURES:
        path = PROJECT / "docs" / "img" / f"{name}.svg"
        text = render(name)
        if not path.is_file() or path.read_text() != text:
            stale += 1
            print(
                f"{path.relative_to(PROJECT)}: {'out of date, run python benchmarks/plots.py' if check else 'written'}"
            )
            if not check:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
