"""`craft-peft evaluate`: the metrics of a finished run."""

from __future__ import annotations

import argparse
import json
import sys

from ..glue.tasks import TASKS
from .arguments import Several, words
from .wording import in_options

EXAMPLE = """\
examples:
  On the development set of its training:
    craft-peft evaluate runs/rte

  On a table of your own:
    craft-peft evaluate runs/reviews --data other_reviews.csv --json
"""


def register(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command to the parser."""
    parser = subparsers.add_parser(
        "evaluate",
        help="measure a finished run",
        description="Measure a finished run, by default on the development set of its training.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="DIR", help="output folder of a training run")
    parser.add_argument("--task", metavar="NAME", help=f"another GLUE task with the same labels: {', '.join(TASKS)}")
    parser.add_argument("--data", metavar="PATH", help="folder of GLUE files, or your own table")
    parser.add_argument(
        "--text-columns", action=Several, read=words, metavar="NAME", help="(default: those of training)"
    )
    parser.add_argument("--label-column", metavar="NAME", help="(default: that of training)")
    parser.add_argument("--model", metavar="NAME_OR_FOLDER", help="base model, if it is no longer where it was")
    parser.add_argument("--json", action="store_true", help="print the metrics as JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    from rich.console import Console

    from ..glue.inference import evaluate, read_for
    from ..glue.metrics import mean_score
    from ..glue.models import load_trained
    from ..glue.summary import print_metrics

    trained = load_trained(arguments.folder, arguments.model)
    data = read_for(trained, arguments.task, arguments.data, arguments.text_columns, arguments.label_column)
    for note in data.notes:
        print(f"note: {in_options(note, arguments)}", file=sys.stderr)
    metrics = evaluate(trained, data)
    if arguments.json:
        print(json.dumps({"metrics": metrics, "score": mean_score(metrics)}))
        return 0
    console = Console()
    print_metrics(console, f"{arguments.folder} on {arguments.task or trained.task.name}", metrics)
    console.print(f"score {mean_score(metrics):.4f}")
    return 0
