"""`craft-peft report`: from result files to tables, pictures and plain words."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..errors import CraftError

EXAMPLE = """\
examples:
  All runs below a folder, as one page that opens in any browser:
    craft-peft report runs --to report.html

  Published result files, compared with one method, beside figures of other people, as Markdown too:
    craft-peft report results/minilm --baseline lora --against published --to report.html --markdown report.md
"""


def register(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command to the parser."""
    parser = subparsers.add_parser(
        "report",
        help="compare the results of many runs",
        description="Compare methods over tasks and seeds: one HTML page without any link to a network, and Markdown.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", nargs="+", metavar="RESULTS", help="folder of runs or of result files; or several")
    parser.add_argument("--to", metavar="FILE", help="the page to write (default: report.html, unless --markdown)")
    parser.add_argument("--markdown", metavar="FILE", help="the Markdown file to write")
    parser.add_argument(
        "--baseline", metavar="METHOD", help="compare the others with this one (default: the first of the methods)"
    )
    parser.add_argument("--against", metavar="NAME", help="show these figures as well, set apart: published")
    parser.add_argument(
        "--selection",
        choices=("last", "held_out", "best"),
        default="last",
        help="the score that comparisons and pictures are of: of the last epoch, of the epoch chosen on held-out rows, "
        "or of the best epoch (default: last)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    from rich.console import Console

    from ..glue.report.page import make_report, render_markdown, render_page

    page = arguments.to or (None if arguments.markdown else "report.html")
    targets = [Path(name) for name in (page, arguments.markdown) if name]
    for target in targets:
        if target.is_dir() or not target.parent.is_dir():
            found = "is a folder" if target.is_dir() else f"cannot be written: there is no folder {target.parent}"
            raise CraftError(f"{target} {found}. Give the path of a file in a folder that exists.")
    report = make_report(arguments.results, arguments.baseline, arguments.against, arguments.selection)
    if page:
        Path(page).write_text(render_page(report), encoding="utf-8")
    if arguments.markdown:
        Path(arguments.markdown).write_text(render_markdown(report), encoding="utf-8")
    console, warnings = (
        Console(soft_wrap=True, highlight=False),
        Console(file=sys.stderr, soft_wrap=True, highlight=False),
    )
    for left in report.left_out:
        warnings.print(f"left out: {left.path}: {left.reason}", markup=False)
    for path in report.unfinished:
        warnings.print(f"not finished: {path}", markup=False)
    for note in report.notes:
        warnings.print(f"note: {note}", markup=False)
    for sentence in report.summary:
        console.print(sentence, markup=False)
    console.print(f"Written: {', '.join(map(str, targets))}", markup=False)
    return 0
