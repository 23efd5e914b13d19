"""The nine GLUE tasks as rows of a table, and the type of such a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import CraftError, did_you_mean


@dataclass(frozen=True)
class DevSet:
    """One development set of a task.

    Args:
        name: What results call it.
        file: Its file in the layout of the official download.
        hub_split: Its split in the Hub data set.
    """

    name: str
    file: str
    hub_split: str


@dataclass(frozen=True)
class Task:
    """What a model is trained to predict, and where GLUE keeps the data.

    A table of the user's own becomes a `Task` with the first five fields only.

    Args:
        name: As a user gives it.
        text_columns: One or two columns that hold the text.
        label_column: The column that holds the label or the score.
        labels: Names of the classes in the order of their numbers; empty for a regression.
        metrics: Keys of `craft_peft.glue.metrics.METRICS`; a task's score is their mean.
        file_labels: How the official files write the labels, in the order of `labels`; empty when they write the names.
        folder: Folder of the official download.
        header: Column names of files that have no header line; empty when they have one.
        dev_sets: The development sets; MNLI has two.
        hub_subset: Subset of the Hub's `nyu-mll/glue`.
        hub_text_columns: Names of the text columns there; empty when they are the same.
        epochs: Passes over the training set that the measuring protocol prescribes.
        broken_rows: The official file is known to hold rows cut by a line break in a text; they are left out, counted
            and reported, where any other task refuses them.

    Example:
        >>> from craft_peft.glue.tasks import TASKS
        >>> TASKS["rte"].labels
        ('entailment', 'not_entailment')
        >>> TASKS["stsb"].is_regression
        True
    """

    name: str
    text_columns: tuple[str, ...]
    label_column: str
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    file_labels: tuple[str, ...] = ()
    folder: str = ""
    header: tuple[str, ...] = ()
    dev_sets: tuple[DevSet, ...] = (DevSet("dev", "dev.tsv", "validation"),)
    hub_subset: str = ""
    hub_text_columns: tuple[str, ...] = ()
    epochs: int = 10
    broken_rows: bool = False

    @property
    def is_regression(self) -> bool:
        """Whether the model predicts a number."""
        return not self.labels

    @property
    def outputs(self) -> int:
        """Width of the head: one for a regression, else the number of classes."""
        return len(self.labels) or 1

    def fields(self) -> dict[str, Any]:
        """What a trained model has to know of its task, in the types that JSON has."""
        return {
            "name": self.name,
            "text_columns": list(self.text_columns),
            "label_column": self.label_column,
            "labels": list(self.labels),
            "metrics": list(self.metrics),
        }

    @classmethod
    def restore(cls, fields: dict[str, Any]) -> Task:
        """The task whose `fields` were kept.

        Example:
            >>> Task.restore(TASKS["rte"].fields()).labels
            ('entailment', 'not_entailment')
        """
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()
        }
        return cls(**values)


_NUMBERS = ("0", "1")
_PAIR = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="cola",
            text_columns=("sentence",),
            label_column="label",
            labels=("unacceptable", "acceptable"),
            metrics=("matthews",),
            file_labels=_NUMBERS,
            folder="CoLA",
            header=("source", "label", "mark", "sentence"),
            hub_subset="cola",
            epochs=40,
        ),
        Task(
            name="sst2",
            text_columns=("sentence",),
            label_column="label",
            labels=("negative", "positive"),
            metrics=("accuracy",),
            file_labels=_NUMBERS,
            folder="SST-2",
            hub_subset="sst2",
            epochs=20,
        ),
        Task(
            name="mrpc",
            text_columns=("#1 String", "#2 String"),
            label_column="Quality",
            labels=("not_equivalent", "equivalent"),
            metrics=("accuracy", "f1"),
            file_labels=_NUMBERS,
            folder="MRPC",
            hub_subset="mrpc",
            hub_text_columns=_PAIR,
            epochs=30,
        ),
        Task(
            name="stsb",
            text_columns=_PAIR,
            label_column="score",
            labels=(),
            metrics=("pearson", "spearman"),
            folder="STS-B",
            hub_subset="stsb",
            epochs=30,
        ),
        Task(
            name="qqp",
            text_columns=("question1", "question2"),
            label_column="is_duplicate",
            labels=("not_duplicate", "duplicate"),
            metrics=("accuracy", "f1"),
            file_labels=_NUMBERS,
            folder="QQP",
            hub_subset="qqp",
            broken_rows=True,
        ),
        Task(
            name="mnli",
            text_columns=_PAIR,
            label_column="gold_label",
            labels=("entailment", "neutral", "contradiction"),
            metrics=("accuracy",),
            folder="MNLI",
            dev_sets=(
                DevSet("matched", "dev_matched.tsv", "validation_matched"),
                DevSet("mismatched", "dev_mismatched.tsv", "validation_mismatched"),
            ),
            hub_subset="mnli",
            hub_text_columns=("premise", "hypothesis"),
        ),
        Task(
            name="qnli",
            text_columns=("question", "sentence"),
            label_column="label",
            labels=_ENTAILMENT,
            metrics=("accuracy",),
            folder="QNLI",
            hub_subset="qnli",
        ),
        Task(
            name="rte",
            text_columns=_PAIR,
            label_column="label",
            labels=_ENTAILMENT,
            metrics=("accuracy",),
            folder="RTE",
            hub_subset="rte",
            epochs=50,
        ),
        Task(
            name="wnli",
            text_columns=_PAIR,
            label_column="label",
            # The Hub and the files agree here: 1 is entailment, the other way round than RTE and QNLI.
            labels=("not_entailment", "entailment"),
            metrics=("accuracy",),
            file_labels=_NUMBERS,
            folder="WNLI",
            hub_subset="wnli",
            epochs=30,
        ),
    )
}


def find_task(name: str) -> Task:
    """Looks up a GLUE task.

    Args:
        name: Its name; capitals and dashes do not matter, so that the names of the folders work too.

    Returns:
        The row of `TASKS`.

    Raises:
        CraftError: No such task; names the nearest one and all of them.

    Example:
        >>> from craft_peft.glue.tasks import find_task
        >>> find_task("STS-B").name
        'stsb'
    """
    key = name.lower().replace("-", "").replace("_", "")
    if key in TASKS:
        return TASKS[key]
    hint = did_you_mean(key, TASKS)
    raise CraftError(
        f"Unknown task `{name}`.{hint} The tasks are: {', '.join(TASKS)}. For a table of your own, leave the task out "
        "and name the file, its text columns and its label column."
    )
