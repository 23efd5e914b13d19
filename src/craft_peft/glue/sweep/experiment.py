"""An experiment file: which methods are trained on which tasks, with which seeds and learning rates."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import CraftError
from ..methods import METHODS
from ..models import PRECISIONS
from ..recipes import Recipe
from ..tasks import TASKS
from . import schema
from .schema import Document, Kind

DEFAULT_FACTORS = (1.0, 3.0, 1 / 3)


@dataclass(frozen=True)
class MethodRow:
    """One way to adapt the model: a row of the tables.

    Args:
        label: Its name in the file, in the results and in the tables.
        method: A key of `METHODS`.
        ranks: Its setting, or None.
        budget: The adapter parameters that choose the setting, or None.
        options: Further fields of the method's PEFT config.
        target_modules: Modules to adapt; None for query and value.
        recipe: Numbers of its recipe that are not the default ones, the learning rate perhaps among them.
    """

    label: str
    method: str
    ranks: tuple[int, ...] | None = None
    budget: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    target_modules: tuple[str, ...] | None = None
    recipe: dict[str, Any] = field(default_factory=dict)

    @property
    def has_adapter(self) -> bool:
        """Whether it trains anything besides the head, so that the adapter's rate matters."""
        return METHODS[self.method].config is not None or METHODS[self.method].trains_base


@dataclass(frozen=True)
class TaskRow:
    """One task, the same for all methods.

    Args:
        label: Its name in the file, in the results and in the tables.
        task: A key of `TASKS`.
        rows: Training rows to keep, or None for all.
        start_from: The label of the task on which the same method was trained before, or None.
        recipe: Numbers that go before those of the methods' recipes, the epochs among them.
    """

    label: str
    task: str
    rows: int | None = None
    start_from: str | None = None
    recipe: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rates:
    """Which learning rates are tried.

    Args:
        factors: On the start rate of each method's recipe.
        choose_on: Labels of tasks: the factor with the best mean of their held-out scores is then fixed. Without any,
            every factor is trained on every task.
        seed: Of the runs that choose.
    """

    factors: tuple[float, ...] = (1.0,)
    choose_on: tuple[str, ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class Experiment:
    """A checked experiment file.

    Args:
        path: The file; its stem is the experiment's name.
        model: The base model: a name on the Hub, a folder, or a folder in a Python package.
        methods: By label, in the order of the file.
        tasks: By label, in the order of the file.
        seeds: Of every method on every task.
        rates: The learning rates.
        first: Blocks of (task labels, method labels) that go before all others.
        hold_out: Share of the training rows that is not trained on, to choose an epoch or a rate by.
        precision: As in `TrainingConfig`.
        data: Folder of the GLUE files, or None.
        launch: Words for `accelerate launch`, when each run is itself distributed.
    """

    path: Path
    model: str
    methods: dict[str, MethodRow]
    tasks: dict[str, TaskRow]
    seeds: tuple[int, ...]
    rates: Rates
    first: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = ()
    hold_out: float = 0.0
    precision: str = "auto"
    data: str | None = None
    launch: str | None = None

    @property
    def name(self) -> str:
        """What the experiment is called: the file's stem."""
        return self.path.stem


_RECIPE: dict[str, Kind] = {
    entry.name: schema.TEXT if entry.name == "head_start" else schema.NUMBER
    for entry in dataclasses.fields(Recipe)
    if entry.name not in ("batch_size", "max_length", "epochs")
}
_SIZES: dict[str, Kind] = dict.fromkeys(("batch_size", "max_length", "epochs"), schema.COUNT)
_TOP: dict[str, Kind] = {
    "model": schema.TEXT,
    "seeds": schema.SEEDS,
    "budget": schema.COUNT,
    "hold_out": schema.SHARE,
    "precision": schema.TEXT,
    "data": schema.TEXT,
    "launch": schema.TEXT,
    "recipe": schema.TABLE,
    "learning_rates": schema.TABLE,
    "tasks": schema.TABLE,
    "methods": schema.TABLE,
    "first": schema.TABLES,
}
_TASK = {"task": schema.TEXT, "rows": schema.COUNT, "start_from": schema.TEXT, **_SIZES}
_METHOD = {
    "method": schema.TEXT,
    "ranks": schema.RANKS,
    "budget": schema.COUNT,
    "options": schema.TABLE,
    "target_modules": schema.TEXTS,
    **_RECIPE,
}
_RATES = {"factors": schema.FACTORS, "choose_on": schema.TEXTS, "seed": schema.SEED}
_BLOCK = {"tasks": schema.TEXTS, "methods": schema.TEXTS}


def read_experiment(path: str | Path) -> Experiment:
    """Reads an experiment file.

    Args:
        path: A TOML file; docs/sweeps.md describes it.

    Returns:
        The experiment.

    Raises:
        CraftError: Anything in the file that cannot be used; names the line or key, what is allowed, and the nearest
            name.
    """
    document = Document(Path(path))
    top = document.read(document.values, _TOP)
    for name in ("model", "seeds", "tasks", "methods"):
        if not top.get(name):
            raise CraftError(f"{document.path}: `{name}` is missing: it must be {_TOP[name].meaning}.")
    document.choose(top.setdefault("precision", "auto"), PRECISIONS, "precision", "precision")
    recipe = document.read(top.pop("recipe", {}), {**_RECIPE, **_SIZES}, "recipe")
    budget = top.pop("budget", None)
    methods = {label: _method(document, label, entry, budget, recipe) for label, entry in top.pop("methods").items()}
    tasks = {label: _task(document, label, entry) for label, entry in top.pop("tasks").items()}
    _check_starts(document, tasks)
    _check_labels(document, methods, tasks)
    rates = _rates(document, top.pop("learning_rates", {}), tasks)
    if rates.choose_on and not top.get("hold_out"):
        raise document.error("needs `hold_out` above 0, such as 0.1: rates are never chosen on the development set.",
                             "learning_rates", "choose_on")  # fmt: skip
    first = tuple(_block(document, entry, tasks, methods) for entry in top.pop("first", []))
    return Experiment(path=document.path, methods=methods, tasks=tasks, rates=rates, first=first, **top)


def slug(label: str) -> str:
    """A label as part of a file name.

    Example:
        >>> slug("LoRA r=8, 2 epochs")
        'lora-r8-2-epochs'
    """
    return re.sub(r"[^a-z0-9.]+", "-", label.lower().replace("=", "")).strip("-")


def _method(document: Document, label: str, entry: Any, budget: int | None, recipe: dict[str, Any]) -> MethodRow:
    place = ("methods", label)
    fields = document.read({label: entry}, {label: schema.TABLE}, "methods")[label]
    fields = document.read(fields, _METHOD, *place)
    name = document.choose(fields.pop("method", label), METHODS, "method", *place, "method")
    if METHODS[name].config is not None and not {"ranks", "budget"} & fields.keys():
        fields["budget"] = budget
    if fields.get("ranks") and fields.get("budget"):
        raise document.error("both `ranks` and `budget`: a budget chooses the ranks. Give one of them.", *place)
    own = {key: fields.pop(key) for key in list(fields) if key in _RECIPE}
    row = MethodRow(label, name, recipe={**recipe, **own}, **fields)
    _check_recipe(document, row.recipe, *place)
    return row


def _task(document: Document, label: str, entry: Any) -> TaskRow:
    place = ("tasks", label)
    fields = document.read({label: entry}, {label: schema.TABLE}, "tasks")[label]
    fields = document.read(fields, _TASK, *place)
    name = document.choose(fields.pop("task", label), TASKS, "task", *place, "task")
    recipe = {key: fields.pop(key) for key in list(fields) if key in _SIZES}
    _check_recipe(document, recipe, *place)
    return TaskRow(label, name, recipe=recipe, **fields)


def _check_recipe(document: Document, recipe: dict[str, Any], *place: str) -> None:
    try:
        Recipe(**recipe)
    except CraftError as error:
        raise document.error(str(error), *place) from error


def _check_starts(document: Document, tasks: dict[str, TaskRow]) -> None:
    for label, task in tasks.items():
        if task.start_from is not None:
            source = document.choose(task.start_from, tasks, "task", "tasks", label, "start_from")
            if tasks[source].start_from is not None:
                raise document.error(
                    f"`{source}` starts from another task itself. Start from one that starts from the base model.",
                    "tasks", label, "start_from",
                )  # fmt: skip


def _check_labels(document: Document, *tables: dict[str, Any]) -> None:
    for name, table in zip(("methods", "tasks"), tables, strict=True):
        seen: dict[str, str] = {}
        for label in table:
            other = seen.setdefault(slug(label), label)
            if other != label or not slug(label):
                raise document.error(
                    f"names files like `{other}` does ({slug(label)!r}). Give it another name.", name, label
                )


def _rates(document: Document, entry: dict[str, Any], tasks: dict[str, TaskRow]) -> Rates:
    fields = document.read(entry, _RATES, "learning_rates")
    if entry:
        fields.setdefault("factors", DEFAULT_FACTORS)
    for label in fields.get("choose_on", ()):
        document.choose(label, tasks, "task", "learning_rates", "choose_on")
    return Rates(**fields)


def _block(
    document: Document, entry: Any, tasks: dict[str, TaskRow], methods: dict[str, MethodRow]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    fields = document.read({"first": entry}, {"first": schema.TABLE})["first"]
    fields = document.read(fields, _BLOCK, "first")
    chosen: list[tuple[str, ...]] = []
    for name, known in (("tasks", tasks), ("methods", methods)):
        labels = fields.get(name, tuple(known))
        chosen.append(tuple(document.choose(label, known, name[:-1], "first", name) for label in labels))
    return chosen[0], chosen[1]
