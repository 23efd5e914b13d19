"""`craft-peft params`: what each method trains and stores on a model, at its default setting or at a budget."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from typing import TYPE_CHECKING, Any

from ..glue.budgets import Choice, Offers, offers
from ..glue.method_row import MethodOptions
from ..glue.methods import METHODS
from ..glue.targets import Targets, empty_model, find_model_targets
from .arguments import Several, words

if TYPE_CHECKING:
    from rich.table import Table

EXAMPLE = """\
examples:
  What each method trains at its default setting, on query and value of all layers:
    craft-peft params --model roberta-large

  The setting of each method that comes closest to 41,000 trained numbers from below, on other modules:
    craft-peft params --model roberta-large --budget 41000 --target-modules query,key,value

  `craft-peft train --budget 41000` trains with it.
"""


def register(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command to the parser."""
    parser = subparsers.add_parser(
        "params",
        help="show what each method would train and store on a model, at its default setting or at a budget",
        description="Show how many numbers each method would train and store on a model, without the head. Needs the "
        "model's config alone: no weights are read.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model", required=True, metavar="NAME_OR_FOLDER", help="Hub name, or a folder that holds a config.json"
    )
    parser.add_argument(
        "--budget", type=int, metavar="N", help="the settings that train at most N numbers (default: each its default)"
    )
    parser.add_argument(
        "--target-modules",
        action=Several,
        read=words,
        metavar="NAME",
        help="modules to adapt, as query,value (default: query and value, as the model calls them)",
    )
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    from rich.console import Console

    options = MethodOptions(budget=arguments.budget)  # refuses a budget that is none, before anything is read
    with Console(stderr=True).status("counting ..."):
        targets = find_model_targets(empty_model(arguments.model), arguments.target_modules)
        found = offers(options, targets)
    if arguments.json:
        names = sorted(targets.names) if isinstance(targets.names, set) else targets.names
        fields = {"model": arguments.model, "budget": arguments.budget, "target_modules": names}
        print(json.dumps({**fields, "matrices": len(targets.modules), "methods": method_fields(found)}))
        return 0
    console = Console()
    wish = "default settings" if arguments.budget is None else f"at most {arguments.budget:,} trained numbers"
    console.print(params_table(f"{arguments.model}: {wish}", found))
    console.print(
        f"T = {len(targets.modules)} matrices of d_out x d_in: {describe(targets)}; n_p: projections; G: groups of one "
        "shape; d_1, d_2, d_3: sizes of the tensor that they all fold into.",
        soft_wrap=True,
    )
    if any(isinstance(choice, Choice) and not choice.fits for choice in found.values()):
        console.print("(over): the smallest setting of a method that has none within the budget.", soft_wrap=True)
    return 0


def params_table(title: str, found: Offers) -> Table:
    """A row a method: its setting, what it trains and stores, and by which formula."""
    from rich.table import Table

    table = Table("method", "setting", title=title)
    for column in ("trained", "stored"):
        table.add_column(column, no_wrap=True, justify="right")
    table.add_column("formula")
    for method, choice in found.items():
        formula = METHODS[method].formula
        if isinstance(choice, Choice):
            over = "" if choice.fits else " (over)"
            table.add_row(method, choice.setting + over, f"{choice.trainable:,}", f"{choice.stored:,}", formula)
        else:
            table.add_row(method, str(choice), "", "", formula)
    return table


def method_fields(found: Offers) -> list[dict[str, Any]]:
    """The same for machines."""
    return [
        {
            "method": name,
            "setting": dict(zip(METHODS[name].setting.names, choice.ranks, strict=True)) if choice.ranks else None,
            "trainable": choice.trainable,
            "stored": choice.stored,
            "fits": choice.fits,
            "formula": METHODS[name].formula,
        }
        if isinstance(choice, Choice)
        else {"method": name, "problem": str(choice)}
        for name, choice in found.items()
    ]


def describe(targets: Targets) -> str:
    """The matrices by projection, with their sizes."""
    names = [path.rpartition(".")[2] for path, _ in targets.modules]
    counts = Counter(zip(names, targets.shapes, strict=True))
    return ", ".join(f"{name} {d_out:,} x {d_in:,} ({count}x)" for (name, (d_out, d_in)), count in counts.items())
