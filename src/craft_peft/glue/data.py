"""GLUE tasks and tables of the user's own as data sets with uniform columns: `text`, `text_pair` and `label`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import datasets
import numpy as np

from ..errors import CraftError
from .labels import LabelColumn
from .tables import FORMATS, Table, name_lines, read_table
from .tasks import Task

HUB_NAME = "nyu-mll/glue"
DEV_SHARE = 0.1


@dataclass(frozen=True)
class TextData:
    """The data sets of one task.

    Args:
        task: What is predicted.
        train: Training rows, or None when only development sets were read.
        dev: Development sets by name; their mean score is the task's score.
        notes: Sentences about what was decided while reading, for the user to see.
    """

    task: Task
    train: datasets.Dataset | None
    dev: dict[str, datasets.Dataset]
    notes: tuple[str, ...] = field(default=())


def read_glue(task: Task, data: str | Path | None = None, train: bool = True) -> TextData:
    """Reads a GLUE task.

    Args:
        task: A row of `TASKS`.
        data: The folder of the official download, or the task's own folder in it; None reads from the Hub.
        train: Also read the training set; without it only the development sets are needed.

    Returns:
        The data sets.

    Raises:
        CraftError: A folder, file, column, row or label that cannot be used; names file and line.
    """
    if data is None:
        return _read_hub(task, train)
    folder = _task_folder(task, Path(data))
    notes: list[str] = []
    train_set = _read_file(task, folder / "train.tsv", notes) if train else None
    dev = {dev_set.name: _read_file(task, folder / dev_set.file, notes) for dev_set in task.dev_sets}
    return TextData(task, train_set, dev, tuple(notes))


def read_own(
    train: str | Path | None,
    dev: str | Path | None,
    text_columns: Sequence[str] = ("text",),
    label_column: str = "label",
    kind: str = "auto",
    task: Task | None = None,
) -> TextData:
    r"""Reads tables of the user's own (`.csv`, `.tsv` or `.jsonl`).

    Args:
        train: The training table, or None to read a development table alone (which takes `task`).
        dev: The development table; None holds a tenth of the training table out, the same rows every time.
        text_columns: One column of text, or two for pairs.
        label_column: The column of labels or scores.
        kind: "classification", "regression", or "auto": a regression when every label is a number and at least one
            is not whole, else a classification. "auto" refuses cells of which only you can say what they are: `nan`,
            `inf`, `N/A` and decimal commas anywhere, and words where nearly all labels are numbers and not all whole.
        task: What an earlier run was trained for: its labels and kind are used instead of new ones.

    Returns:
        The data sets; `notes` says what was decided.

    Raises:
        CraftError: A file, column, row or label that cannot be used; names file and line.

    Example:
        >>> import pathlib, tempfile
        >>> from craft_peft.glue.data import read_own
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "train.csv"
        ...     rows = [f"sentence {i},{'good' if i % 2 else 'bad'}" for i in range(20)]
        ...     _ = path.write_text("text,label\n" + "\n".join(rows))
        ...     data = read_own(path, None)
        >>> data.task.labels, len(data.train), len(data.dev["dev"])
        (('bad', 'good'), 18, 2)
    """
    notes: list[str] = []
    train_set = None
    if task is not None:
        task = replace(task, text_columns=tuple(text_columns), label_column=label_column)
    if train is not None:
        table = read_table(Path(train))
        if task is None:
            task = _own_task(table, tuple(text_columns), label_column, kind, notes)
        train_set = _to_dataset(task, table, notes)
    if task is None:
        raise CraftError("Without a training table the labels are unknown. Give a training table or a trained run.")
    if dev is not None:
        dev_set = _to_dataset(task, read_table(Path(dev)), notes)
        return TextData(task, train_set, {"dev": dev_set}, tuple(notes))
    if train_set is None:
        raise CraftError("No data was given. Give the path of a `.csv`, `.tsv` or `.jsonl` table.")
    train_set, dev_set = hold_out(train_set, DEV_SHARE)
    notes.append(
        f"No development table was given: {len(dev_set)} of {len(dev_set) + len(train_set)} training rows are held "
        "out for it, the same ones every time."
    )
    return TextData(task, train_set, {"dev": dev_set}, tuple(notes))


def hold_out(
    train: datasets.Dataset, fraction: float = DEV_SHARE, seed: int = 0
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Splits a training set in two, class by class, the same way every time.

    Args:
        train: Rows with a column `label`.
        fraction: Share of the rows to hold out, between 0 and 1; of each class when there are classes. A class with
            too few rows for a whole one stays in the first part.
        seed: Decides which rows.

    Returns:
        The rows to train on and the rows held out, each in the order of the file.

    Raises:
        CraftError: A fraction outside (0, 1), or one that leaves a part empty.

    Example:
        >>> from datasets import Dataset
        >>> from craft_peft.glue.data import hold_out
        >>> rest, held = hold_out(Dataset.from_dict({"label": [0.5] * 20}), fraction=0.1)
        >>> len(rest), len(held)
        (18, 2)
    """
    if not 0 < fraction < 1:
        raise CraftError(f"The share to hold out is {fraction}; it must lie between 0 and 1, for example 0.1.")
    labels = np.asarray(train["label"])
    classes = isinstance(train.features["label"], datasets.ClassLabel)
    groups = [np.flatnonzero(labels == label) for label in np.unique(labels)] if classes else [np.arange(len(labels))]
    generator = np.random.default_rng(seed)
    chosen = [generator.permutation(group)[: round(fraction * len(group))] for group in groups]
    held = np.sort(np.concatenate(chosen))
    if not 0 < len(held) < len(labels):
        raise CraftError(
            f"A share of {fraction} of {len(labels)} training rows holds {len(held)} out and leaves "
            f"{len(labels) - len(held)}. Both parts need rows: use another share or more data."
        )
    rest = np.setdiff1d(np.arange(len(labels)), held)
    return train.select(rest), train.select(held)


def take_rows(data: TextData, count: int) -> TextData:
    """Keeps some of the training rows, drawn once for all: the same ones whatever the seed of a run.

    Args:
        data: The data sets.
        count: How many to keep.

    Returns:
        The data sets, the training rows fewer and in the order of the file.

    Raises:
        CraftError: Fewer rows than that, or none wanted.

    Example:
        >>> from craft_peft.glue.tasks import TASKS
        >>> rows = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [0, 1, 1]})
        >>> len(take_rows(TextData(TASKS["cola"], rows, {}), 2).train)
        2
    """
    found = len(data.train) if data.train is not None else 0
    if not 0 < count <= found:
        raise CraftError(f"rows={count} cannot be used: task `{data.task.name}` has {found:,} training rows.")
    assert data.train is not None
    chosen = np.sort(np.random.default_rng(0).permutation(found)[:count])
    note = f"Trained on {count:,} of the {found:,} training rows, the same ones whatever the seed."
    return replace(data, train=data.train.select(chosen), notes=(*data.notes, note))


def _task_folder(task: Task, data: Path) -> Path:
    if not data.is_dir():
        raise CraftError(f"There is no folder {data}. Give the folder of the GLUE download, or {task.folder} in it.")
    folder = data / task.folder
    if folder.is_dir():
        return folder
    if (data / task.dev_sets[0].file).is_file():
        return data
    raise CraftError(
        f"{data} holds neither a folder {task.folder} nor a file {task.dev_sets[0].file}. Give the folder of the GLUE "
        f"download, or {task.folder} in it."
    )


def _read_file(task: Task, path: Path, notes: list[str]) -> datasets.Dataset:
    table = read_table(path, header=task.header, keep_broken_out=task.broken_rows)
    if table.broken:
        lines = ", ".join(str(line) for line in table.broken[:5])
        notes.append(f"{path}: {len(table.broken)} rows with a wrong number of fields left out (lines {lines} ...).")
    return _to_dataset(task, table, notes)


def _to_dataset(task: Task, table: Table, notes: list[str]) -> datasets.Dataset:
    table.require((*task.text_columns, task.label_column))
    if table.blank:
        notes.append(f"{table.path}: blank lines are no rows, and left out ({name_lines(table.blank)}).")
    names = ("text", "text_pair")
    columns: dict[str, list] = {
        name: [row.fields[column] for row in table.rows] for name, column in zip(names, task.text_columns, strict=False)
    }
    labels = LabelColumn(table, task.label_column)
    columns["label"] = (
        labels.read_scores() if task.is_regression else labels.read_classes(task.file_labels or task.labels, notes)
    )
    return datasets.Dataset.from_dict(columns, features=_features(task))


def _features(task: Task) -> datasets.Features:
    texts = {name: datasets.Value("string") for name, _ in zip(("text", "text_pair"), task.text_columns, strict=False)}
    label = datasets.Value("float32") if task.is_regression else datasets.ClassLabel(names=list(task.labels))
    return datasets.Features({**texts, "label": label})


def _own_task(table: Table, text_columns: tuple[str, ...], label_column: str, kind: str, notes: list[str]) -> Task:
    if not 1 <= len(text_columns) <= 2:
        raise CraftError(f"{len(text_columns)} text columns were named ({', '.join(text_columns)}); give one or two.")
    table.require((*text_columns, label_column))
    if len({*text_columns, label_column}) <= len(text_columns):
        named = ", ".join(f"`{column}`" for column in (*text_columns, label_column))
        raise CraftError(f"The columns of texts and labels are {named}: one is named twice. Name different ones.")
    labels = LabelColumn(table, label_column).find_classes(kind, notes)
    metrics = ("accuracy",) if labels else ("pearson", "spearman")
    return Task(table.path.stem, text_columns, label_column, labels, metrics)


def _read_hub(task: Task, train: bool) -> TextData:
    # The Hub client raises its own errors, those of its HTTP library and plain OSError, depending on what failed.
    try:
        splits = datasets.load_dataset(HUB_NAME, task.hub_subset)
    except Exception as error:
        raise CraftError(
            f"Could not read `{HUB_NAME}` ({task.hub_subset}) from the Hub: {error}. Check the connection, or download "
            "GLUE and give its folder as data."
        ) from error
    return TextData(
        task,
        _from_hub(task, splits["train"]) if train else None,
        {dev_set.name: _from_hub(task, splits[dev_set.hub_split]) for dev_set in task.dev_sets},
    )


def _from_hub(task: Task, split: datasets.Dataset) -> datasets.Dataset:
    columns = task.hub_text_columns or task.text_columns
    names = dict(zip(columns, ("text", "text_pair"), strict=False))
    return split.select_columns([*columns, "label"]).rename_columns(names).cast(_features(task))


def format_names() -> str:
    """The file formats that can be read, for help texts."""
    return ", ".join(FORMATS)
