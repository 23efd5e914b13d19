"""`craft-peft train`: fine-tune a model and leave a finished run folder."""

from __future__ import annotations

import argparse
import sys

from ..glue.methods import METHODS
from ..glue.recipes import Recipe
from ..glue.tasks import TASKS
from .arguments import Several, named_value, whole_numbers, words, words_or_none
from .wording import option_console

EXAMPLE = """\
examples:
  A GLUE task, from a folder of the official download, with CRAFT at its default ranks:
    craft-peft train --task rte --data glue_data --model roberta-base --output runs/rte

  A table of your own, with columns `review` and `stars`, with LoRA of rank 4:
    craft-peft train --data reviews.csv --text-columns review --label-column stars \\
      --model roberta-base --method lora --ranks 4 --epochs 5 --output runs/reviews

  The same with VeRA, at the setting that comes closest to 40,000 adapter parameters from below:
    craft-peft train --data reviews.csv --text-columns review --label-column stars \\
      --model roberta-base --method vera --budget 40000 --output runs/reviews-vera

  After an interruption, the same command with --resume.

methods, and what --ranks sets:
"""
EXAMPLE += "\n".join(
    f"  {name:<10} {method.summary}" + (f" ({','.join(method.setting.names)})" if method.config else "")
    for name, method in METHODS.items()
)

RECIPE_HELP = {
    "learning_rate": "peak rate of the adapter",
    "head_learning_rate": "peak rate of the classification head",
    "warmup_ratio": "share of the steps in which the rates rise",
    "head_start": "where the head starts: random, prior or fitted",
    "weight_decay": "on the adapter",
    "clip": "largest gradient norm",
    "batch_size": "rows a step, of all processes together",
    "max_length": "tokens a row; longer texts are cut",
    "epochs": "passes over the training set (default: the task's)",
}


def register(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command to the parser."""
    parser = subparsers.add_parser(
        "train",
        help="fine-tune a model on a GLUE task or a table of your own",
        description="Fine-tune a model and leave a folder with adapter, head, tokenizer, model card and result.json.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the run")
    parser.add_argument("--model", required=True, metavar="NAME_OR_FOLDER", help="base model: Hub name or folder")
    parser.add_argument(
        "--method", default="craft", metavar="NAME", help="how to adapt it, see the list below (default: craft)"
    )
    _add_data(parser)
    parser.add_argument(
        "--start-from",
        metavar="DIR",
        help="begin with the adapter of this finished run, of the same method and model, under a new head",
    )
    parser.add_argument(
        "--ranks",
        action=Several,
        read=whole_numbers,
        metavar="R",
        help="the method's setting, as 12,100,100 or 8 (see below)",
    )
    parser.add_argument(
        "--budget",
        type=int,
        metavar="N",
        help="train at most N adapter parameters: chooses the ranks that come closest to it",
    )
    parser.add_argument(
        "--option",
        dest="method_options",
        action=Several,
        read=named_value,
        add=True,
        formed=True,
        metavar="NAME=VALUE",
        help="further fields of the method's PEFT config, as tying=free",
    )
    parser.add_argument(
        "--target-modules",
        action=Several,
        read=words,
        metavar="NAME",
        help="modules to adapt, as query,value (default: query and value, as the model calls them)",
    )
    _add_recipe(parser)
    _add_run(parser)
    parser.set_defaults(run=run, interrupted=" The same command with --resume goes on.")


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    from rich.console import Console

    from ..glue import machine
    from ..glue.summary import print_result
    from ..glue.training import TrainingConfig, train

    fields = {name: value for name, value in vars(arguments).items() if name not in ("run", "interrupted", "options")}
    fields["method_options"] = dict(arguments.method_options)
    result = train(
        TrainingConfig(**fields), console=option_console(arguments, file=sys.stderr), began=machine.process_start()
    )
    if machine.join_processes().is_main_process:
        print_result(Console(), result)
    return 0


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument(
        "--hold-out",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of the training set not to train on, to choose an epoch by (0.1 for the protocol's tenth; "
        "default: 0, train on all of it)",
    )
    parser.add_argument("--precision", default="auto", metavar="TYPE", help="auto, float32 or bf16 (default: auto)")
    parser.add_argument(
        "--report-to",
        action=Several,
        read=words_or_none,
        default=(),
        metavar="NAME",
        help="also log to tensorboard, wandb or mlflow (default: none)",
    )
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run in DIR")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier run in DIR")


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    recipe = parser.add_argument_group("recipe (defaults: the method's)")
    types = {entry: type(getattr(Recipe(epochs=1), entry)) for entry in RECIPE_HELP}
    for name, text in RECIPE_HELP.items():
        recipe.add_argument(f"--{name.replace('_', '-')}", type=types[name], help=text)


def _add_data(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("data")
    data.add_argument("--task", metavar="NAME", help=f"a GLUE task: {', '.join(TASKS)}; leave out for your own table")
    data.add_argument(
        "--data",
        metavar="PATH",
        help="with --task: folder of the official GLUE files (default: read from the Hub); else your training table, "
        ".csv, .tsv or .jsonl",
    )
    data.add_argument(
        "--rows", type=int, metavar="N", help="train on N of the training rows, the same whatever the seed"
    )
    data.add_argument("--dev-data", metavar="FILE", help="your development table (default: a tenth of --data)")
    data.add_argument(
        "--text-columns",
        action=Several,
        read=words,
        default=("text",),
        metavar="NAME",
        help="one or two (default: text)",
    )
    data.add_argument("--label-column", default="label", metavar="NAME", help="(default: label)")
    data.add_argument(
        "--kind",
        default="auto",
        help="classification, regression, or auto: a regression when all labels are numbers and not all are whole",
    )
