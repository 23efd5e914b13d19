"""`craft-peft inspect`: what CRAFT would find in a model, and which ranks to choose."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CraftError
from .arguments import Several, whole_numbers, words

if TYPE_CHECKING:
    from rich.table import Table

    from ..glue.inspection import StackReport

EXAMPLE = """\
examples:
  The stacks of a model, how much of each the default ranks hold, and what other ranks would hold:
    craft-peft inspect --model roberta-base --plot spectra.png

  Other modules at other ranks (layer, out, in):
    craft-peft inspect --model roberta-base --target-modules query,key,value --ranks 12,64,64
"""


def register(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command to the parser."""
    parser = subparsers.add_parser(
        "inspect",
        help="show a model's stacks, how much of them CRAFT's core would hold, and what to choose",
        description="Show which weights of a model form stacks, how much of their energy the frozen core of CRAFT "
        "holds at some ranks, in total and for each layer, and how many numbers would be trained.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, metavar="NAME_OR_FOLDER", help="base model: Hub name or folder")
    parser.add_argument(
        "--ranks",
        action=Several,
        read=whole_numbers,
        metavar="R",
        help="layer, out and in rank (default: the paper's 24,100,100)",
    )
    parser.add_argument(
        "--target-modules",
        action=Several,
        read=words,
        metavar="NAME",
        help="modules to adapt, as query,value (default: query and value, as the model calls them)",
    )
    parser.add_argument("--plot", metavar="FILE.png", help="write the singular values of each mode as a picture")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    if arguments.plot is not None:
        _check_plot(Path(arguments.plot))
    from rich.console import Console

    from ..glue.inspection import draw_spectra, inspect_model
    from ..glue.pretrained import load_encoder

    console = Console()
    with Console(stderr=True).status("reading and decomposing ..."):
        model = load_encoder(arguments.model)
        reports = inspect_model(model, arguments.target_modules, arguments.ranks or "paper")
    console.print(stack_table(reports))
    for name, report in zip(short_names(reports), reports, strict=True):
        console.print(f"{name}: {report.pattern}", highlight=False)
    console.print(layer_table(reports))
    console.print(rank_table(reports))
    for line in advice(reports):
        console.print(f"- {line}", highlight=False)
    if arguments.plot is not None:
        draw_spectra(reports, Path(arguments.plot))
        console.print(f"Singular values: {arguments.plot}", soft_wrap=True)
    return 0


def _check_plot(path: Path) -> None:
    if path.suffix != ".png":
        raise CraftError(f"--plot {path} does not end in .png. Give the name of a PNG file.")
    if not path.absolute().parent.is_dir():
        raise CraftError(
            f"--plot {path}: there is no folder {path.absolute().parent}. Create it, or give another path."
        )


def stack_table(reports: Sequence[StackReport]) -> Table:
    """The stacks, and what CRAFT does with them at the chosen ranks."""
    from rich.table import Table

    table = Table("stack", title="Stacks")
    for column in ("layers x out x in", "ranks", "energy held", "trained", "saved"):
        table.add_column(column, no_wrap=True, justify="right")
    for name, report in zip(short_names(reports), reports, strict=True):
        table.add_row(
            name,
            " x ".join(map(str, (report.shape.layers, *report.shape.matrix))),
            ", ".join(map(str, report.ranks)),
            f"{report.energy():.1%}",
            f"{report.trained():,}",
            _megabytes(report.stored_bytes()),
        )
    table.add_section()
    trained, stored = sum(r.trained() for r in reports), sum(r.stored_bytes() for r in reports)
    table.add_row("together", "", "", "", f"{trained:,}", _megabytes(stored))
    return table


def layer_table(reports: Sequence[StackReport]) -> Table:
    """The energy of each layer's weight that the core holds at the chosen ranks."""
    from rich.table import Table

    table = Table("layer", *short_names(reports), title="Energy held, layer by layer")
    columns = [report.layer_energies() for report in reports]
    for layer in range(max(map(len, columns))):
        table.add_row(str(layer), *(f"{column[layer]:.1%}" if layer < len(column) else "" for column in columns))
    return table


def rank_table(reports: Sequence[StackReport]) -> Table:
    """What other out and in ranks would hold and cost, all layer directions kept."""
    from rich.table import Table

    from ..glue.inspection import candidate_ranks, clip_ranks

    title = "Other ranks: (all layers, r, r)"
    table = Table("r", *(f"energy of {name}" for name in short_names(reports)), "trained", "saved", title=title)
    for rank in candidate_ranks(reports):
        ranks = [clip_ranks(report, rank) for report in reports]
        pairs = list(zip(reports, ranks, strict=True))
        table.add_row(
            str(rank),
            *(f"{report.energy(chosen):.1%}" for report, chosen in pairs),
            f"{sum(report.trained(chosen) for report, chosen in pairs):,}",
            _megabytes(sum(report.stored_bytes(chosen) for report, chosen in pairs)),
        )
    return table


def advice(reports: Sequence[StackReport]) -> list[str]:
    """What the numbers mean for the choice of ranks, in sentences."""
    from ..glue.inspection import clip_ranks

    lines = [
        "CRAFT multiplies what its frozen core holds: directions outside the core stay as they were pretrained. More "
        "energy means more that training can change, not necessarily a better score."
    ]
    short = [report for report in reports if report.ranks[0] < report.shape.layers]
    if short:
        layers = max(report.shape.layers for report in short)
        lines.append(
            f"The layer rank is below the number of layers. Keeping all {layers} costs {layers**2:,} trained numbers a "
            "stack at most, far less than the other two: raise it unless the model has hundreds of layers."
        )
    half = max(report.rank_for(0.5) for report in reports)
    ranks = clip_ranks(max(reports, key=lambda report: max(report.shape.matrix)), half)
    trained = sum(report.trained(clip_ranks(report, half)) for report in reports)
    energy, weakest = min((report.energy(), name) for report, name in zip(reports, short_names(reports), strict=True))
    lines.append(
        f"The chosen ranks hold {energy:.1%} of the weakest stack ({weakest}). Half of every stack "
        f"takes --ranks {','.join(map(str, ranks))}: {trained:,} trained numbers."
    )
    lines.append(
        "The step of the optimizer grows with the rank: `craft-peft train` scales its learning rate with 100 / r; do "
        "the same in code of your own."
    )
    return lines


def short_names(reports: Sequence[StackReport]) -> list[str]:
    """The last part of each stack's path, and as many before it as tell it apart from the others."""
    paths = [report.pattern.split(".") for report in reports]
    endings = Counter(".".join(path[start:]) for path in paths for start in range(len(path)))
    names = []
    for path in paths:
        suffixes = [".".join(path[start:]) for start in reversed(range(len(path)))]
        names.append(next((suffix for suffix in suffixes if endings[suffix] == 1), suffixes[-1]))
    return names


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.2f} MB"
