"""What a run is asked to do."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CraftError
from .data import TextData, read_glue, read_own, take_rows
from .method_row import MethodOptions
from .methods import find_method
from .pretrained import portable_model_name
from .recipes import Recipe
from .runs import RunFolder
from .tasks import find_task

UNTOUCHED = ("output", "resume", "overwrite", "report_to")
"""Fields that say where a run is and how it is treated, not how it ends."""


@dataclass(frozen=True)
class TrainingConfig:
    """What to train, on what, and how. Every number left at None comes from the method's recipe.

    Args:
        output: Folder for the run; new, empty, or an earlier run with `resume` or `overwrite`.
        model: Base model: a name on the Hub or a folder.
        method: A key of `craft_peft.glue.methods.METHODS`.
        task: A GLUE task; None for a table of your own.
        data: For a GLUE task the folder of the official download (None: from the Hub); else the training table.
        dev_data: For a table of your own: the development table; None holds a tenth of the training table out.
        text_columns: For a table of your own: one column of text, or two for pairs.
        label_column: For a table of your own: the column of labels or scores.
        kind: For a table of your own: "classification", "regression" or "auto" (by the labels).
        rows: Train on so many of the training rows, the same ones whatever the seed; None takes all.
        start_from: A finished run of the same method on the same model: its adapter (or whole encoder) is where
            training starts, under a new head.
        ranks: The method's ranks; None for its default.
        budget: The most adapter parameters to train: chooses the ranks that come closest to it from below.
        target_modules: Names of the modules to adapt; None for query and value, as the model calls them.
        method_options: Further fields of the method's PEFT config.
        learning_rate: Peak rate of the adapter.
        head_learning_rate: Peak rate of the head.
        warmup_ratio: Share of the steps in which the rate rises.
        head_start: Where the head starts, a key of `craft_peft.glue.heads.HEAD_STARTS`.
        weight_decay: On the adapter.
        head_weight_decay: On the head.
        clip: Largest gradient norm.
        batch_size: Rows a step, of all processes together.
        max_length: Tokens a row.
        epochs: Passes over the training set; None takes the recipe's, else the task's.
        recipe: A recipe to use instead of the method's; the numbers above still go before its own.
        seed: Decides the head's start, the order of rows and dropout; also which rows `hold_out` takes.
        hold_out: Share of the training set to select an epoch on; it is then really not trained on. 0 trains on
            everything, and the result has no held-out score.
        precision: "float32", "bf16", or "auto" (see `craft_peft.glue.models.choose_precision`).
        resume: Go on with an interrupted run in `output`, or start it if there is none.
        overwrite: Replace an earlier run in `output`.
        report_to: Loggers that `transformers.Trainer` knows, as "tensorboard", "wandb" or "mlflow"; none by default.

    Example:
        >>> from craft_peft.glue.training import TrainingConfig
        >>> TrainingConfig(output="runs/rte", model="roberta-base", task="rte", epochs=3).resolve_recipe(50).epochs
        3
    """

    output: str | Path
    model: str
    method: str = "craft"
    task: str | None = None
    data: str | Path | None = None
    dev_data: str | Path | None = None
    text_columns: tuple[str, ...] = ("text",)
    label_column: str = "label"
    kind: str = "auto"
    rows: int | None = None
    start_from: str | Path | None = None
    ranks: tuple[int, ...] | None = None
    budget: int | None = None
    target_modules: tuple[str, ...] | None = None
    method_options: dict[str, Any] = field(default_factory=dict)
    learning_rate: float | None = None
    head_learning_rate: float | None = None
    warmup_ratio: float | None = None
    head_start: str | None = None
    weight_decay: float | None = None
    head_weight_decay: float | None = None
    clip: float | None = None
    batch_size: int | None = None
    max_length: int | None = None
    epochs: int | None = None
    recipe: Recipe | None = None
    seed: int = 0
    hold_out: float = 0.0
    precision: str = "auto"
    resume: bool = False
    overwrite: bool = False
    report_to: tuple[str, ...] = ()

    def options(self) -> MethodOptions:
        """What the config says about its method.

        Raises:
            CraftError: Ranks and a budget.
        """
        return MethodOptions(self.ranks, self.target_modules, dict(self.method_options), self.budget)

    def resolve_recipe(self, task_epochs: int) -> Recipe:
        """The method's recipe with this config's numbers in it.

        Args:
            task_epochs: Epochs when neither the config nor the recipe says.

        Returns:
            The recipe, epochs decided.

        Raises:
            CraftError: An unknown method, or a number outside its range.
        """
        names = [entry.name for entry in dataclasses.fields(Recipe)]
        chosen = {name: value for name in names if (value := getattr(self, name, None)) is not None}
        method = find_method(self.method)
        if self.recipe is None and self.ranks is not None:
            chosen.setdefault("learning_rate", method.recipe.learning_rate * method.scale_rate(self.ranks))
        recipe = dataclasses.replace(self.recipe or method.recipe, **chosen)
        return recipe if recipe.epochs else dataclasses.replace(recipe, epochs=task_epochs)

    def settings(self, recipe: Recipe, model: str, precision: str, in_memory: bool) -> dict[str, Any]:
        """The config with everything decided, in the types that JSON has; two runs with equal settings are equal.

        Args:
            recipe: The recipe, epochs decided.
            model: The model's name as resolved.
            precision: As decided.
            in_memory: Whether the data sets were handed over instead of read.

        Returns:
            What a run folder keeps: not where it is, nor how the command was asked to treat it.
        """
        kept = dataclasses.asdict(self)
        for name in (*(entry.name for entry in dataclasses.fields(Recipe)), *UNTOUCHED):
            kept.pop(name, None)
        kept |= {"model": model, "precision": precision, "recipe": dataclasses.asdict(recipe)}
        for name in ("data", "dev_data"):
            kept[name] = None if in_memory or kept[name] is None else str(Path(kept[name]).resolve())
        if self.start_from is not None:
            # By what it is, not by where it is: the folder may be moved.
            kept["start_from"] = identity(RunFolder(Path(self.start_from)).read_finished()["settings"])
        return kept


def identity(settings: dict[str, Any]) -> str:
    """The hash of everything that decides how a run ends: two runs with the same one end in the same result.

    Where the data of a GLUE task lie and how the ranks were found does not matter, nor does a setting that is left out.
    A base model in a Python package is known by its place in it.

    Args:
        settings: What `TrainingConfig.settings` returned, or a run folder keeps.

    Returns:
        Twelve hexadecimal digits.

    Example:
        >>> one = {"model": "roberta-base", "task": "rte", "seed": 0, "data": "/here/glue", "rows": None}
        >>> identity(one) == identity({"seed": 0, "model": "roberta-base", "task": "rte"})
        True
        >>> identity(one) == identity({**one, "seed": 1})
        False
    """
    free = {"budget", *(("data", "dev_data", "text_columns", "label_column", "kind") if settings["task"] else ())}
    kept = {name: value for name, value in settings.items() if name not in free and value not in (None, [], (), {})}
    kept["model"] = portable_model_name(settings["model"])
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]


def read_data(config: TrainingConfig) -> TextData:
    """Reads the data sets that a config names.

    Args:
        config: Names a GLUE task, or a table with its columns.

    Returns:
        The data sets.

    Raises:
        CraftError: Data that cannot be used.
    """
    if config.task is not None:
        data = read_glue(find_task(config.task), config.data)
    elif config.data is None:
        raise CraftError(
            "Neither a task nor data was given. Give a GLUE task (`task=...`), or a table of your own (`data=...`)."
        )
    else:
        data = read_own(config.data, config.dev_data, config.text_columns, config.label_column, config.kind)
    return data if config.rows is None else take_rows(data, config.rows)
