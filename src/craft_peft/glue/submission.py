"""The files that GLUE's server takes: a prediction for every row of every test set, in the official layout."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from ..errors import CraftError
from .inference import predict_logits
from .models import TrainedModel, load_trained
from .runs import METADATA, RunFolder
from .tables import Table, read_table
from .tasks import TASKS, Task, find_task


@dataclass(frozen=True)
class TestSet:
    """A test set and the file of its predictions.

    Args:
        name: Of the file, without `.tsv`.
        task: Whose model predicts it.
        sources: Where it may lie in a GLUE folder.
        rows: How many rows the official set has.
        majority: The class that is the most frequent in train, as the server writes it; the mean for a regression.
    """

    __test__ = False  # pytest would take it for a test by its name

    name: str
    task: str
    sources: tuple[str, ...]
    rows: int
    majority: str


TEST_SETS = (
    TestSet("CoLA", "cola", ("CoLA/test.tsv",), 1063, "1"),
    TestSet("SST-2", "sst2", ("SST-2/test.tsv",), 1821, "1"),
    TestSet("MRPC", "mrpc", ("MRPC/test.tsv",), 1725, "1"),
    TestSet("STS-B", "stsb", ("STS-B/test.tsv",), 1379, "2.700"),
    TestSet("QQP", "qqp", ("QQP/test.tsv",), 390965, "0"),
    TestSet("MNLI-m", "mnli", ("MNLI/test_matched.tsv",), 9796, "entailment"),
    TestSet("MNLI-mm", "mnli", ("MNLI/test_mismatched.tsv",), 9847, "entailment"),
    TestSet("QNLI", "qnli", ("QNLI/test.tsv",), 5463, "entailment"),
    TestSet("RTE", "rte", ("RTE/test.tsv",), 3000, "entailment"),
    TestSet("WNLI", "wnli", ("WNLI/test.tsv",), 146, "0"),
    # The diagnostic set: premises and hypotheses for the model of MNLI.
    TestSet("AX", "mnli", ("diagnostic/diagnostic.tsv", "diagnostic.tsv", "AX/test.tsv"), 1104, "entailment"),
)

_INDEX = ("index", "id")


@dataclass(frozen=True)
class Plan:
    """What will be written, found to be possible before the first prediction.

    Args:
        runs: Run folder by task.
        tables: Test set by name; without those that are filled and not there.
    """

    runs: dict[str, Path]
    tables: dict[str, Table]


def find_runs(folder: Path | None, named: Mapping[str, str | Path]) -> dict[str, Path]:
    """Finds a finished run for each task.

    Args:
        folder: A run folder, or a folder with run folders at any depth; None for those named alone.
        named: Run folders by task; they come before those found.

    Returns:
        A run folder by task.

    Raises:
        CraftError: A folder that is missing or holds no run, several runs of a task, or a run of another task.
    """
    runs = {find_task(task).name: Path(path) for task, path in named.items()}
    for task, path in runs.items():
        found = _task_of(RunFolder(path).read_finished())
        if found != task:
            raise CraftError(f"The run in {path} is of task `{found}`, not `{task}`. Name a run of `{task}`.")
    if folder is None:
        return runs
    if not folder.is_dir():
        raise CraftError(f"There is no folder {folder}. Give a folder of finished runs.")
    candidates: dict[str, list[Path]] = {}
    for here, folders, files in os.walk(folder):
        folders.sort()
        if METADATA not in files:
            continue
        folders.clear()
        if (run := RunFolder(Path(here))).is_finished:
            candidates.setdefault(_task_of(run.read_finished()), []).append(Path(here))
    if not candidates and not runs:
        raise CraftError(f"{folder} holds no finished run. Give the folder of the runs of `craft-peft train`.")
    for task, paths in candidates.items():
        if task not in TASKS or task in runs:
            continue
        if len(paths) > 1:
            raise CraftError(
                f"{folder} holds {len(paths)} runs of `{task}` ({', '.join(map(str, paths[:4]))}"
                f"{', ...' if len(paths) > 4 else ''}), and a submission takes one. Name it: "
                f"`named={{{task!r}: {str(paths[0])!r}}}`."
            )
        runs[task] = paths[0]
    return runs


def _task_of(metadata: dict[str, Any]) -> str:
    return metadata["task"]["name"]


def plan(runs: dict[str, Path], data: Path, fill: bool) -> Plan:
    """Checks that every file can be written.

    Args:
        runs: Run folder by task.
        data: The folder of the official download, with the test sets.
        fill: Fill the files of tasks without a run with the most frequent class.

    Returns:
        The plan.

    Raises:
        CraftError: A task without a run and without `fill`, or a test set that is missing or no such table.
    """
    if not data.is_dir():
        raise CraftError(f"There is no folder {data}. Give the folder of the GLUE download, with the test sets.")
    missing = [test.name for test in TEST_SETS if test.task not in runs]
    if missing and not fill:
        raise CraftError(
            f"There is no run for {', '.join(missing)}, and GLUE's server takes a submission with all "
            f"{len(TEST_SETS)} files only. Train these tasks too, name their runs with `named={{'TASK': 'DIR'}}`, "
            "or give `fill=True` to fill their files with the most frequent class of the training set."
        )
    tables = {}
    for test in TEST_SETS:
        path = next((data / source for source in test.sources if (data / source).is_file()), None)
        if path is None and test.task in runs:
            raise CraftError(
                f"There is no file {data / test.sources[0]}, the test set of {test.name} that {runs[test.task]} is to "
                "predict. Give the folder of the whole GLUE download with `data=...`."
            )
        if path is not None:
            tables[test.name] = read_table(path)
            tables[test.name].require(TASKS[test.task].text_columns)
            _indices(tables[test.name])
    return Plan(runs, tables)


def predict_submission(
    wanted: Plan, say: Callable[[str], object], load: Callable[[Path], TrainedModel] = load_trained
) -> dict[str, str]:
    """Predicts all test sets.

    Args:
        wanted: What `plan` returned.
        say: Takes a sentence a file: what it holds, and what the server or a reader would stumble over.
        load: Reads the run in a folder.

    Returns:
        The text of each file by its name.

    Raises:
        CraftError: A run that cannot be read, or with other labels than GLUE's.
    """
    files = {}
    loaded: dict[str, TrainedModel] = {}
    for test in TEST_SETS:
        table = wanted.tables.get(test.name)
        indices = _indices(table) if table else [str(number) for number in range(test.rows)]
        if test.task in wanted.runs:
            if test.task not in loaded:
                # One model at a time: the test sets of a task follow one another but for the diagnostic set.
                loaded = {test.task: _load(wanted.runs[test.task], TASKS[test.task], load)}
            assert table is not None, "planned"
            answers = _answers(loaded[test.task], TASKS[test.task], table)
            say(f"{test.name}.tsv: {len(indices):,} rows by {wanted.runs[test.task]}")
        else:
            answers = [test.majority] * len(indices)
            say(
                f"FILLED, NOT PREDICTED: {test.name}.tsv has `{test.majority}` in all {len(indices):,} rows, since "
                f"there is no run of {test.task}; its score and the average are those of no model."
            )
        if len(indices) != test.rows:
            say(f"The official test set of {test.name} has {test.rows:,} rows: the server refuses a file with others.")
        lines = [f"{index}\t{answer}\n" for index, answer in zip(indices, answers, strict=True)]
        files[f"{test.name}.tsv"] = "index\tprediction\n" + "".join(lines)
    return files


def _load(path: Path, task: Task, load: Callable[[Path], TrainedModel]) -> TrainedModel:
    trained = load(path)
    if trained.task.labels != task.labels:
        raise CraftError(
            f"The run in {path} predicts the labels {', '.join(trained.task.labels) or 'of no class'}; `{task.name}` "
            f"has {', '.join(task.labels) or 'a number'}. Name a run of GLUE's own task."
        )
    return trained


def _answers(trained: TrainedModel, task: Task, table: Table) -> list[str]:
    names = ("text", "text_pair")
    texts = {
        name: [row.fields[column] for row in table.rows] for name, column in zip(names, task.text_columns, strict=False)
    }
    logits = predict_logits(trained, datasets.Dataset.from_dict(texts))
    if task.is_regression:
        return [f"{value:.3f}" for value in np.clip(logits.reshape(-1), 0, 5)]
    written = task.file_labels or task.labels
    return [written[number] for number in logits.argmax(axis=-1)]


def _indices(table: Table) -> list[str]:
    column = next((name for name in _INDEX if name in table.columns), None)
    if column is None:
        return [str(number) for number in range(len(table.rows))]
    seen: set[str] = set()
    for row in table.rows:
        index = row.fields[column]
        if not index.isdecimal() or index in seen:
            raise CraftError(
                f"{table.path}, line {row.line}: `{index}` in column `{column}` "
                f"{'was there before' if index in seen else 'is no whole number'}. Every row needs an index of its own."
            )
        seen.add(index)
    return [row.fields[column] for row in table.rows]


def check_target(target: Path) -> None:
    """Refuses a target that exists, or whose parent does not.

    Args:
        target: A `.zip`, or a folder.

    Raises:
        CraftError: See above.
    """
    if target.exists():
        raise CraftError(f"{target} exists already; it is left alone. Give a new name, or remove it.")
    if not target.parent.is_dir():
        raise CraftError(f"{target} cannot be written: there is no folder {target.parent}. Make it, or give another.")


def write_submission(files: Mapping[str, str], target: Path) -> None:
    """Writes the files into a zip (a name that ends in `.zip`) or a new folder.

    Args:
        files: Text by name.
        target: Where to; must not exist.
    """
    check_target(target)
    if target.suffix != ".zip":
        target.mkdir()
        for name, text in files.items():
            (target / name).write_text(text, encoding="utf-8")
        return
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            archive.writestr(zipfile.ZipInfo(name), text, zipfile.ZIP_DEFLATED)
    target.write_bytes(buffer.getvalue())
