"""What a user reads before and after training."""

from __future__ import annotations

from collections import Counter
from typing import Any

import datasets
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from torch import nn

from .data import TextData
from .methods import METHODS
from .recipes import Recipe
from .results import Parameters, Result


def print_summary(
    console: Console,
    data: TextData,
    model: nn.Module,
    recipe: Recipe,
    parameters: Parameters,
    settings: dict[str, Any],
    held_out: datasets.Dataset | None,
    steps: int,
) -> None:
    """Shows what will be trained, on what and how, before the first step.

    Args:
        console: Where to.
        data: Data sets, `train` without the rows held out.
        model: The model to train.
        recipe: The recipe, resolved.
        parameters: Parameter counts.
        settings: Resolved settings.
        held_out: Rows held out of the training set, or None.
        steps: Optimizer steps of the whole run.
    """
    assert data.train is not None
    table = Table(show_header=False, title=f"{data.task.name}: {settings['method']} on {settings['model']}")
    labels = ", ".join(data.task.labels) or "a number (regression)"
    sizes = [f"{len(data.train):,} train", *(f"{len(rows):,} {name}" for name, rows in data.dev.items())]
    sizes += [] if held_out is None else [f"{len(held_out):,} held out of train"]
    share = 100 * parameters.trainable / parameters.total
    method = METHODS[settings["method"]]
    rows = {
        "method": method.summary,
        **({"setting": method.setting.describe(settings["ranks"])} if isinstance(model, PeftModel) else {}),
        "adapted modules": describe_targets(model),
        "trained": f"{parameters.adapter:,} adapter + {parameters.head:,} head = {parameters.trainable:,} of "
        f"{parameters.total:,} ({share:.2f} %)",
        "data": ", ".join(sizes),
        "predicts": labels,
        "learning rates": f"adapter {recipe.learning_rate:g}, head {recipe.head_learning_rate:g}, "
        f"warm-up {100 * recipe.warmup_ratio:g} % of the steps",
        "steps": f"{steps:,} in {settings['precision']} (epochs: {recipe.epochs}, rows a step: {recipe.batch_size})",
        "seed": str(settings["seed"]),
    }
    for name, text in rows.items():
        table.add_row(name, text)
    for note in data.notes:
        table.add_row("note", note)
    console.print(table)


def describe_targets(model: nn.Module) -> str:
    """The adapted modules by the last part of their names, with how many there are: the stacks of a tied method."""
    if not isinstance(model, PeftModel):
        return "none"
    counts = Counter(name.rpartition(".")[2] for name in model.base_model.targeted_module_names)
    return ", ".join(f"{name} x {count}" for name, count in counts.items())


def print_metrics(console: Console, title: str, metrics: dict[str, dict[str, float]]) -> None:
    """Shows metrics, one row a data set.

    Args:
        console: Where to.
        title: Above the table.
        metrics: Metrics by data set.
    """
    table = Table("data set", *next(iter(metrics.values())), title=title)
    for name, values in metrics.items():
        table.add_row(name, *(f"{value:.4f}" for value in values.values()))
    console.print(table)


def print_result(console: Console, result: Result) -> None:
    """Shows the scores of a finished run and where it is.

    Args:
        console: Where to.
        result: The result.
    """
    print_metrics(console, f"{result.task}, {result.method}: after the last epoch", result.metrics)
    score = result.score
    console.print(f"score {score.last:.4f}; best epoch {score.best_epoch}: {score.best:.4f} (chosen on the same rows)")
    if score.held_out is not None:
        console.print(f"epoch {score.held_out_epoch}, chosen on held-out training rows: {score.held_out:.4f}")
    console.print(f"{result.seconds:,.0f} s; {result.parameters.stored_bytes:,} bytes of weights")
    console.print(f"Everything is in {result.output}", soft_wrap=True)
