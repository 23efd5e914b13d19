"""GLUE's submission: the official layout from runs of the official labels, and everything that can be missing."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_encoder import review, write_encoder

from craft_peft.cli.main import main
from craft_peft.glue import submission
from craft_peft.glue.models import TrainedModel
from craft_peft.glue.submission import TEST_SETS, find_runs, plan, predict_submission
from craft_peft.glue.tasks import TASKS

FILES = ["CoLA", "SST-2", "MRPC", "STS-B", "QQP", "MNLI-m", "MNLI-mm", "QNLI", "RTE", "WNLI", "AX"]
WRITTEN = {
    **dict.fromkeys(("CoLA", "SST-2", "MRPC", "QQP", "WNLI"), frozenset(("0", "1"))),
    **dict.fromkeys(("QNLI", "RTE"), frozenset(("entailment", "not_entailment"))),
    **dict.fromkeys(("MNLI-m", "MNLI-mm", "AX"), frozenset(("entailment", "neutral", "contradiction"))),
}
# What the official test files have before and between the texts.
EXTRA = {"STS-B": ["genre", "filename", "year", "old_index", "source1", "source2"], "MRPC": ["#1 ID", "#2 ID"]}


def write_tests(folder: Path, rows: int = 6) -> Path:
    """Test sets in the layout of the official download, with indices, in which the texts are not the first columns."""
    for test in TEST_SETS:
        path = folder / test.sources[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        extra, index = EXTRA.get(test.name, []), "id" if test.name == "QQP" else "index"
        columns = [index, *extra, *TASKS[test.task].text_columns]
        lines = ["\t".join(columns)]
        for row in range(rows):
            texts = [review(row + place)[0] for place in range(len(TASKS[test.task].text_columns))]
            lines.append("\t".join([str(row), *("x" for _ in extra), *texts]))
        path.write_text("\n".join(lines) + "\n")
    return folder


def write_metadata(folder: Path, task: str) -> Path:
    folder.mkdir(parents=True)
    fields = {"format": "craft-peft run 1", "settings": {}, "task": TASKS[task].fields(), "files": []}
    (folder / "run.json").write_text(json.dumps(fields))
    (folder / "result.json").write_text("{}")
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> dict[str, Path]:
    return {task: write_metadata(tmp_path / "runs" / task, task) for task in TASKS}


@pytest.fixture
def guesses(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Any]:
    """Models that answer by the length of the texts, so that no run has to be trained."""

    def logits(trained: Any, rows: Any) -> np.ndarray:
        lengths = np.array([len(text) for text in rows["text"]])
        if trained.task.is_regression:
            return (lengths - 16.0)[:, None]
        return np.eye(len(trained.task.labels))[lengths % len(trained.task.labels)]

    monkeypatch.setattr(submission, "predict_logits", logits)

    def load(path: Path) -> TrainedModel:
        trained = object.__new__(TrainedModel)  # without a model and a tokenizer, which only `logits` would need
        object.__setattr__(trained, "task", TASKS[path.name])
        return trained

    return load


def read(text: str) -> tuple[list[str], list[str]]:
    head, *lines = text.splitlines()
    assert head == "index\tprediction"
    pairs = [line.split("\t") for line in lines]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def test_the_table_of_test_sets() -> None:
    assert [test.name for test in TEST_SETS] == FILES
    for test in TEST_SETS:
        task = TASKS[test.task]
        assert task.is_regression or test.majority in (task.file_labels or task.labels)


def test_every_file_in_the_official_layout(
    runs: dict[str, Path], tmp_path: Path, guesses: Callable[[Path], Any]
) -> None:
    data, said = write_tests(tmp_path / "glue"), []
    files = predict_submission(plan(find_runs(tmp_path / "runs", {}), data, False), said.append, guesses)
    assert list(files) == [f"{name}.tsv" for name in FILES]
    for name, labels in WRITTEN.items():
        indices, predictions = read(files[f"{name}.tsv"])
        assert indices == [str(row) for row in range(6)] and set(predictions) <= labels
    lengths = [len(review(row)[0]) for row in range(6)]
    assert read(files["RTE.tsv"])[1] == [("entailment", "not_entailment")[length % 2] for length in lengths]
    # The numbers of WNLI's classes are the other way round; its file holds numbers, so that they must not be turned.
    assert read(files["WNLI.tsv"])[1] == [str(length % 2) for length in lengths]
    scores = read(files["STS-B.tsv"])[1]
    assert scores == [f"{min(5, max(0, length - 16)):.3f}" for length in lengths] and "5.000" in scores
    assert any("official test set of RTE has 3,000 rows" in sentence for sentence in said)


def test_missing_tasks_are_refused_or_filled_loudly(tmp_path: Path, guesses: Callable[[Path], Any]) -> None:
    run, data, said = write_metadata(tmp_path / "rte", "rte"), write_tests(tmp_path / "glue"), []
    (data / "QQP" / "test.tsv").unlink()
    found = find_runs(None, {"RTE": run})
    with pytest.raises(submission.CraftError, match=r"no run for CoLA, SST-2, .*all 11 files only.*`fill=True`"):
        plan(found, data, False)
    files = predict_submission(plan(found, data, True), said.append, guesses)
    assert read(files["CoLA.tsv"])[1] == ["1"] * 6
    assert len(read(files["QQP.tsv"])[0]) == 390965  # no file to fill: the official number of rows
    filled = [sentence for sentence in said if sentence.startswith("FILLED, NOT PREDICTED")]
    assert len(filled) == 10 and not any("RTE.tsv" in sentence for sentence in filled)


def test_the_diagnostic_set_beside_the_folders(tmp_path: Path, guesses: Callable[[Path], Any]) -> None:
    data = write_tests(tmp_path / "glue")
    (data / "diagnostic" / "diagnostic.tsv").rename(data / "diagnostic.tsv")
    found = find_runs(None, {"mnli": write_metadata(tmp_path / "mnli", "mnli")})
    files = predict_submission(plan(found, data, True), lambda sentence: None, guesses)
    assert set(read(files["AX.tsv"])[1]) == set(read(files["MNLI-m.tsv"])[1]) and len(set(read(files["AX.tsv"])[1])) > 1


class TestBadInput:
    def test_several_runs_of_a_task(self, runs: dict[str, Path], tmp_path: Path) -> None:
        other = write_metadata(tmp_path / "runs" / "rte-again", "rte")
        with pytest.raises(submission.CraftError, match=r"2 runs of `rte` .*`named={'rte': "):
            find_runs(tmp_path / "runs", {})
        assert find_runs(tmp_path / "runs", {"rte": other})["rte"] == other

    def test_a_run_of_another_task(self, runs: dict[str, Path]) -> None:
        with pytest.raises(submission.CraftError, match="is of task `cola`, not `rte`"):
            find_runs(None, {"rte": runs["cola"]})

    def test_unfinished_runs_do_not_count(self, runs: dict[str, Path], tmp_path: Path) -> None:
        (runs["rte"] / "result.json").unlink()
        assert "rte" not in find_runs(tmp_path / "runs", {})

    def test_no_run_at_all(self, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        for name, message in (("empty", "holds no finished run"), ("none", "There is no folder")):
            with pytest.raises(submission.CraftError, match=message):
                find_runs(tmp_path / name, {})

    def test_test_sets_that_are_missing_or_broken(self, runs: dict[str, Path], tmp_path: Path) -> None:
        data = write_tests(tmp_path / "glue")
        path = data / "RTE" / "test.tsv"
        rows = path.read_text()
        for text, message in (
            (rows.replace("sentence2", "other"), "no column `sentence2`"),
            (rows.replace("\n1\t", "\n0\t"), "line 3: `0` in column `index` was there before"),
            (rows.replace("\n1\t", "\nx\t"), "line 3: `x` in column `index` is no whole number"),
            (None, "no file .*RTE/test.tsv, the test set of RTE"),
        ):
            path.unlink() if text is None else path.write_text(text)
            with pytest.raises(submission.CraftError, match=message):
                plan(runs, data, False)

    def test_other_labels(self, tmp_path: Path, guesses: Callable[[Path], Any]) -> None:
        found = find_runs(None, {"rte": write_metadata(tmp_path / "rte", "rte")})
        wanted = plan(found, write_tests(tmp_path / "glue"), True)
        with pytest.raises(submission.CraftError, match=r"predicts the labels unacceptable, acceptable; `rte` has"):
            predict_submission(wanted, lambda sentence: None, lambda path: guesses(Path("cola")))

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ([], "No run was given"),
            (["--fill-missing"], "--fill-missing was given without --glue-submission"),
            (["runs", "--glue-submission", "a.zip"], "needs the test sets"),
            (["--glue-submission", "a.zip", "--data", "."], "No run was given. Give a folder of runs"),
            (["runs", "--glue-submission", "a.zip", "--data", ".", "--json"], "`--json` has no meaning"),
            (["runs", "--glue-submission", ".", "--data", "."], "exists already; it is left alone"),
            (["runs", "--glue-submission", "no/a.zip", "--data", "."], "there is no folder no"),
            (["--glue-submission", "a.zip", "--data", ".", "--task-run", "rta=x"], "Unknown task `rta`"),
        ],
    )
    def test_words_that_do_not_fit(
        self, words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert main(["predict", *words]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("target", ["out.zip", "out"])
def test_from_a_trained_run_to_the_files(target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_tests(tmp_path / "glue")
    for name, numbers in (("train", range(32)), ("dev", range(32, 40))):
        rows = [f"{text}\t{int(label == 'good')}\n" for text, label in map(review, numbers)]
        (data / "SST-2" / f"{name}.tsv").write_text("sentence\tlabel\n" + "".join(rows))
    words = ["--task", "sst2", "--data", data, "--output", tmp_path / "runs" / "sst2", "--epochs", 1]
    words += ["--model", write_encoder(tmp_path / "encoder"), "--learning-rate", 0.01, "--head-learning-rate", 0.02]
    assert main(["train", *map(str, words), "--batch-size", "8", "--ranks", "2,8,8"]) == 0
    (data / "QQP" / "test.tsv").unlink()
    words = [tmp_path / "runs", "--glue-submission", tmp_path / target, "--data", data, "--fill-missing"]
    assert main(["predict", *map(str, words)]) == 0
    out, err = capsys.readouterr()
    assert out.endswith(f"Written: {tmp_path / target}, 11 files\n") and "SST-2.tsv: 6 rows by" in err
    if target == "out":
        text = (tmp_path / target / "SST-2.tsv").read_text()
    else:
        with zipfile.ZipFile(tmp_path / target) as archive:
            assert sorted(archive.namelist()) == sorted(f"{name}.tsv" for name in FILES)
            text = archive.read("SST-2.tsv").decode()
    assert main(["predict", str(tmp_path / "runs" / "sst2"), str(data / "SST-2" / "test.tsv"), "--json"]) == 0
    labels = [json.loads(line)["label"] for line in capsys.readouterr().out.splitlines()]
    assert read(text)[1] == [str(TASKS["sst2"].labels.index(label)) for label in labels]


def test_the_real_test_sets_have_the_official_size(glue_dir: Path, tmp_path: Path) -> None:
    wanted = plan({}, glue_dir, True)
    assert wanted.tables, "CRAFT_GLUE_DIR holds no test set"
    for test in TEST_SETS:
        if test.name in wanted.tables:
            assert len(wanted.tables[test.name].rows) == test.rows
