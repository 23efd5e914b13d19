"""Tables and texts as people have them: one answer for each row, one class for each label, and guesses that are told.

Three laws over formats: rows in are answers out; labels that are equal as numbers are one class; a cell that is
neither a number nor a word of a class is named with its line, and so are the cells that decided a guess.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
from tiny_encoder import draw_nothing, write_encoder, write_reviews, write_scores
from tokenizers import Tokenizer

from craft_peft import CraftError
from craft_peft.cli.main import main
from craft_peft.glue import models
from craft_peft.glue.data import read_own
from craft_peft.glue.inference import Prediction, predict
from craft_peft.glue.labels import LabelColumn
from craft_peft.glue.models import TrainedModel
from craft_peft.glue.tables import Row, Table, read_table

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*words: object) -> tuple[int, str, str]:
        status = main([str(word) for word in words])
        return (status, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reviews, scored pairs, and an encoder whose tokenizer adds no token, as GPT's: an empty text has none."""
    folder = tmp_path_factory.mktemp("workshop")
    write_encoder(folder / "encoder")
    file = folder / "encoder" / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"post_processor": None}))
    assert Tokenizer.from_file(str(file)).encode("").ids == []
    write_reviews(folder / "train.csv", 32)
    write_scores(folder / "scores.tsv", 32)
    return folder


@pytest.fixture(scope="module")
def runs(workshop: Path) -> dict[int, TrainedModel]:
    """A run on texts and one on pairs, by the number of texts a row."""
    with pytest.MonkeyPatch.context() as patch:
        draw_nothing(patch)
        return train_runs(workshop)


def train_runs(workshop: Path) -> dict[int, TrainedModel]:
    tables = {1: ("train.csv", "text", "label"), 2: ("scores.tsv", "first,second", "score")}
    for count, (file, columns, label) in tables.items():
        words = ["train", "--data", workshop / file, "--text-columns", columns, "--label-column", label]
        words += ["--output", workshop / f"run{count}", "--method", "head", "--model", workshop / "encoder"]
        assert main([str(word) for word in [*words, "--epochs", 1, "--head-start", "random"]]) == 0
    return {count: models.load_trained(workshop / f"run{count}") for count in tables}


# Texts of one line, then those that a format can hold only if it has quotes; empty ones first, last and in between.
TEXTS = ["", "good", "", "the film, good", 'so "good"', " ", "nan", "NA", "null", "1.0", "-", "#", "a;b", "\\n", "=1"]
TEXTS += ["was\u2028so\x85bad\x0c", "'", "\N{PILE OF POO}", "text", "", "", "bad"]
BREAKS = ["two\nlines", "two\r\nlines", "\n", "\tgood", '"\n"', "the\rplot"]
COLUMNS = {1: ["text"], 2: ["first", "second"]}

Rows = list[tuple[str, ...]]
Writer = Callable[[list[str], Rows, str], str]


def tabs(columns: list[str], rows: Rows, end: str) -> str:
    return "".join("\t".join(row) + end for row in [columns, *rows])


def text_lines(columns: list[str], rows: Rows, end: str) -> str:
    return "".join(("\t".join(row) if any(row) else "") + end for row in rows)


def quoted(columns: list[str], rows: Rows, end: str) -> str:
    file = io.StringIO(newline="")
    csv.writer(file, quoting=csv.QUOTE_ALL, lineterminator=end).writerows([columns, *rows])
    return file.getvalue()


def sheet(columns: list[str], rows: Rows, end: str) -> str:
    """As spreadsheets write it: an empty row of a single column is an empty line."""
    return "".join(quoted(list(row), [], end) if any(row) else end for row in [columns, *rows])


def objects(columns: list[str], rows: Rows, end: str) -> str:
    return "".join(json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False) + end for row in rows)


def nulls(columns: list[str], rows: Rows, end: str) -> str:
    return "".join(
        json.dumps({name: text or None for name, text in zip(columns, row, strict=True)}) + end for row in rows
    )


def objects_between_empty_lines(columns: list[str], rows: Rows, end: str) -> str:
    return "".join(objects(columns, [row], end) if any(row) else end for row in rows)


# What writes the rows, the name of its file, and whether it has quotes.
FORMATS: list[tuple[Writer, str, bool]] = [
    (text_lines, "rows.txt", False),
    (text_lines, "rows", False),
    (text_lines, "-", False),
    (tabs, "rows.tsv", False),
    (quoted, "rows.csv", True),
    (sheet, "ROWS.CSV", True),
    (objects, "rows.jsonl", True),
    (nulls, "rows.jsonl", True),
    (objects_between_empty_lines, "rows.jsonl", True),
]


@pytest.fixture(scope="module")
def alone(runs: dict[int, TrainedModel]) -> Callable[[tuple[str, ...]], Prediction]:
    """The answer for a row that is predicted without others."""
    return cache(lambda row: predict(runs[len(row)], [row[0]], list(row[1:]) or None)[0])


class TestRowsInAreAnswersOut:
    @pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["\\n", "\\r\\n"])
    @pytest.mark.parametrize("count", COLUMNS)
    @pytest.mark.parametrize(("write", "name", "quotes"), FORMATS, ids=lambda value: getattr(value, "__name__", None))
    def test_every_row_has_its_answer(
        self,
        runs: dict[int, TrainedModel],
        alone: Callable[[tuple[str, ...]], Prediction],
        tmp_path: Path,
        command: Command,
        monkeypatch: pytest.MonkeyPatch,
        write: Writer,
        name: str,
        quotes: bool,
        count: int,
        end: str,
    ) -> None:
        texts = [*TEXTS, *(BREAKS if quotes else []), ""]
        rows = list(zip(texts, *[[*texts[:3], *reversed(texts[3:])]] * (count - 1), strict=True))
        file = tmp_path / name if name != "-" else "-"
        content = write(COLUMNS[count], rows, end).encode()
        if name == "-":
            monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
        else:
            (tmp_path / name).write_bytes(content)
        monkeypatch.setattr(models, "load_trained", lambda *_: runs[count])
        words = ["predict", "run", file, "--text-columns", ",".join(COLUMNS[count])]
        status, out, err = command(*words, "--json")
        assert status == 0
        answers = [json.loads(line) for line in out.splitlines()]
        assert [tuple(answer.values())[:count] for answer in answers] == rows
        for row, answer in zip(rows, answers, strict=True):
            assert answer.get("value") == pytest.approx(alone(row).value, abs=1e-5)
            assert answer.get("probabilities", {}) == pytest.approx(alone(row).probabilities, abs=1e-5)
        assert "no text; answered like every other row" in err

    @pytest.mark.parametrize("more", [[], ["--json"]], ids=["plain", "json"])
    def test_an_answer_is_one_line(
        self, runs: dict[int, TrainedModel], command: Command, monkeypatch: pytest.MonkeyPatch, more: list[str]
    ) -> None:
        monkeypatch.setattr(models, "load_trained", lambda *_: runs[1])
        texts = ["one\ntwo", "one\r\ntwo", "\N{LINE SEPARATOR}", "\x85", "\v\f", "\x1c"]
        out = command("predict", "run", *[word for text in texts for word in ("--text", text)], *more)[1]
        assert len(out.splitlines()) == len(texts)
        assert r"one\ntwo" in out and r"\u2028" in out

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("t.txt", b"\n\n", "t.txt is empty"),
            ("t.txt", b"good\ncaf\xe9\n", "t.txt, line 2: byte 0xe9 is not valid UTF-8"),
            ("-", b"good\ncaf\xe9\n", "standard input, line 2: byte 0xe9 is not valid UTF-8"),
            ("t.csv", b"text\ngood\rbad\ngood\n", "line 2: not valid CSV (new-line character seen in unquoted field"),
            ("t.csv", b"text;id\ngood;1\n", "no column `text`. Columns found: `text;id`"),
            (
                "t.csv",
                b"text;score\ngood;0,5\n",
                "Its columns seem to have semicolons between them: save it with commas",
            ),
            ("t.csv", b"text\tid\ngood\t1\n", "Its columns seem to have tabs between them"),
            ("t.tsv", b"text,id\ngood,1\n", "Its columns seem to have commas between them"),
            (
                "t.jsonl",
                b'{"text": "good"}\n{"text": "a\\ud83d"}\n',
                r"line 2: `text` holds half a character (`\ud83d`)",
            ),
            ("t.json", b'[{"text": "good"}]', "is not one of .csv, .tsv, .jsonl"),
            ("t.ndjson", b'{"text": "good"}\n', "is not one of .csv, .tsv, .jsonl"),
            ("t.xlsx", b"PK", "is not one of .csv, .tsv, .jsonl"),
        ],
    )
    def test_or_one_error(
        self,
        runs: dict[int, TrainedModel],
        tmp_path: Path,
        command: Command,
        monkeypatch: pytest.MonkeyPatch,
        name: str,
        content: bytes,
        message: str,
    ) -> None:
        monkeypatch.setattr(models, "load_trained", lambda *_: runs[1])
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
        (tmp_path / name).write_bytes(content) if name != "-" else None
        status, out, err = command("predict", "run", tmp_path / name if name != "-" else name)
        assert (status, out) == (2, "") and message in err

    def test_lines_of_the_first_macintosh(
        self, runs: dict[int, TrainedModel], tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(models, "load_trained", lambda *_: runs[1])
        (tmp_path / "t.txt").write_bytes(b"good\r\rbad\r")
        assert [line.rpartition("\t")[2] for line in command("predict", "run", tmp_path / "t.txt")[1].splitlines()] == [
            "good",
            "",
            "bad",
        ]

    def test_from_python(self, runs: dict[int, TrainedModel]) -> None:
        assert predict(runs[1], []) == []
        with pytest.raises(CraftError, match=r"a list of texts is required. Put it in a list: `\[text\]`"):
            predict(runs[1], "good")
        with pytest.raises(CraftError, match=r"Text 2 of 2 holds half a character \(`\\ud83d`\)"):
            predict(runs[2], ["a", "b"], ["c", "\ud83d"])


def csv_cells(cells: Sequence[object]) -> str:
    return quoted(["text", "label"], [(f"t{number}", str(cell)) for number, cell in enumerate(cells)], "\n")


def tsv_cells(cells: Sequence[object]) -> str:
    return tabs(["text", "label"], [(f"t{number}", str(cell)) for number, cell in enumerate(cells)], "\n")


def json_numbers(cells: Sequence[object]) -> str:
    return "".join(f'{{"text": "t{number}", "label": {cell}}}\n' for number, cell in enumerate(cells))


def json_strings(cells: Sequence[object]) -> str:
    return "".join(f'{{"text": "t{number}", "label": "{cell}"}}\n' for number, cell in enumerate(cells))


TABLES = {"a.csv": csv_cells, "a.tsv": tsv_cells, "numbers.jsonl": json_numbers, "strings.jsonl": json_strings}


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, Sequence[object]], Path]:
    """Writes a table with these cells as its labels, the first of them in line 2 (1 of JSON lines)."""

    def to(name: str, cells: Sequence[object]) -> Path:
        path = tmp_path / name
        path.write_text(TABLES[name](cells))
        return path

    return to


WritesTable = Callable[[str, Sequence[object]], Path]

# Cells, and the classes of the rows; where JSON has no such number, as a string.
EQUAL = [
    (["0", "1.0", "0.0", "1"], ("0", "1"), [0, 1, 0, 1]),
    (["1.0", "2.0", "2.0"], ("1.0", "2.0"), [0, 1, 1]),
    (["-1", "1", "-1.00", "1e0", "0", "-0.0"], ("-1", "0", "1"), [0, 2, 0, 2, 1, 1]),
    (["10", "9", "1e1", "90E-1"], ("9", "10"), [1, 0, 1, 0]),
    (["90071992547409931", "90071992547409932"], ("90071992547409931", "90071992547409932"), [0, 1]),
    (["true", "1", "false", "0", "1.0"], ("0", "1", "false", "true"), [3, 1, 2, 0, 1]),
]
WRITTEN_ONLY = [
    (["01", "1", "+1", "2"], ("1", "2"), [0, 0, 0, 1]),
    (["1_0", "10", "1_1"], ("10", "1_0", "1_1"), [1, 0, 2]),
    (["0x1", "1", "one", "True", "true"], ("0x1", "1", "True", "one", "true"), [0, 1, 3, 2, 4]),
]


class TestEqualNumbersAreOneClass:
    @pytest.mark.parametrize(
        ("name", "cells", "names", "numbers"),
        [(name, *case) for case in EQUAL for name in TABLES]
        + [(name, *case) for case in WRITTEN_ONLY for name in TABLES if name != "numbers.jsonl"],
    )
    def test_of_one_table(
        self, write: WritesTable, name: str, cells: list[str], names: tuple[str, ...], numbers: list[int]
    ) -> None:
        path = write(name, cells)
        data = read_own(path, path)
        assert data.task.labels == names and data.train["label"][:] == numbers
        told = [note for note in data.notes if "labels that are equal as numbers are one class" in note]
        assert len(told) == 2 * any(cell not in names for cell in cells)
        if name != "numbers.jsonl":  # read, they are written anew: 1e0 is 1.0
            assert all(f"`{cell}` (line" in told[0] for cell in cells if cell not in names)

    @pytest.mark.parametrize(("train", "dev"), [*pairwise([*TABLES, *TABLES])][: len(TABLES)])
    def test_of_training_and_development(self, write: WritesTable, tmp_path: Path, train: str, dev: str) -> None:
        write(dev, ["1.0", "0", "2e0"]).rename(tmp_path / f"dev{Path(dev).suffix}")
        data = read_own(write(train, ["0.0", "1", "2"]), tmp_path / f"dev{Path(dev).suffix}")
        assert data.task.labels == ("0.0", "1", "2") and data.dev["dev"]["label"][:] == [1, 0, 2]
        assert "`1.0` (line" in data.notes[-1] and "count as `0.0`, `1`, `2`" in data.notes[-1]

    def test_a_run_that_was_trained_to_tell_them_apart_does(self, write: WritesTable) -> None:
        notes: list[str] = []
        column = LabelColumn(read_table(write("a.csv", ["1.0", "1", "0", "0.0", "1.00"])), "label")
        assert column.read_classes(("0", "0.0", "1", "1.0"), notes) == [3, 2, 0, 1, 2]
        assert "`1.00` (line 6) count as `1`" in notes[0]

    def test_a_class_alone(self, write: WritesTable) -> None:
        with pytest.raises(CraftError, match="the only label in column `label` is `1`"):
            read_own(write("a.csv", ["1", "1.0", "1"]), None)


SCORES = ["0.0", "2.5", "5", "3.5", "1.0", "4.5", "0.5"]
STARS = ["1", "5", "4", "3", "2", "1", "1"]
MOODS = ["bad", "good", "fine"]
NO_NUMBERS = "nan NaN NAN -nan inf -inf +Infinity INF nan(ind) 1.#INF -1.#QNAN n/a N/A NA #N/A #DIV/0! <NA>"
NO_NUMBERS = [*NO_NUMBERS.split(), "null", "NULL", "NaT", "0,5", "-1,25", ",5", "1.234,5"]
AMONG_NUMBERS = ["None", "none", "?", "-", ".", "--"]
WORDS = ["five", "1.5 points", "50%", "1_0", "yes", "0x1F"]


def column_of(cells: Sequence[object]) -> LabelColumn:
    """These cells as the labels of a CSV, the first in line 2."""
    rows = [Row(line, {"label": str(cell)}) for line, cell in enumerate(cells, start=2)]
    return LabelColumn(Table(Path("a.csv"), ("label",), rows), "label")


class TestGuesses:
    @pytest.mark.parametrize(
        ("cell", "among"),
        [(cell, (SCORES, STARS, MOODS, [])) for cell in NO_NUMBERS]
        + [(cell, (SCORES, STARS)) for cell in AMONG_NUMBERS]
        + [(cell, (SCORES,)) for cell in WORDS],
    )
    def test_a_cell_that_is_no_class_by_itself(self, cell: str, among: Sequence[list[str]]) -> None:
        for others in among:
            column = column_of([*others, cell, *others, f" {cell} "])
            first, second = len(others) + 2, 2 * len(others) + 3
            with pytest.raises(CraftError) as caught:
                column.find_classes("auto", [])
            message = str(caught.value)
            assert f"line {first}: `{cell}` in column `label` is not a number" in message
            assert f"The same: `{cell}` (line {second})." in message and '`kind="classification"`' in message
            assert ("numbers take a decimal point" in message) == ("," in cell)
            wrong = f"line {first}: `{cell}`" if others != MOODS else "line 2: `bad`"
            with pytest.raises(CraftError, match=rf"{re.escape(wrong)} in column `label` is not a number"):
                column.read_scores()
            if others:
                assert cell in column.find_classes("classification", [])

    @pytest.mark.parametrize("cell", [*AMONG_NUMBERS, *WORDS])
    def test_a_word_that_is_a_class(self, cell: str) -> None:
        assert cell in column_of([*MOODS, cell]).find_classes("auto", [])

    def test_the_told_case(self, write: WritesTable) -> None:
        path = write("a.csv", ["nan" if row == 17 else row % 11 / 2 for row in range(200)])
        with pytest.raises(CraftError, match=r"a\.csv, line 19: `nan` .* 199 of 200 labels are numbers"):
            read_own(path, None)

    @pytest.mark.parametrize(
        ("cells", "kind", "reason"),
        [
            ([1, 2, 0.5, 3], "regression", "all labels are numbers and not all are whole: `0.5` (line 4)"),
            ([1, 2, 1], "classification of 2 classes", "all labels are whole numbers: `1` (lines 2, 4), `2` (line 3)"),
            ([1, 2, "x", 1], "classification of 3 classes", "these labels are no numbers: `x` (line 4)"),
            (
                [0.5, 1, "x", "y"],
                "classification of 4 classes",
                "these labels are no numbers: `x` (line 4), `y` (line 5)",
            ),
            (["none", "pro", "+"], "classification of 3 classes", "`none` (line 2), `pro` (line 3), `+` (line 4)"),
            ([*"abcdef", *"aaaa"], "classification of 6 classes", "`a` (lines 2, 8, 9 and 2 more), `b` (line 3)"),
            ([*"abcdef"], "classification of 6 classes", "`d` (line 5) and 2 more"),
            (["1", "1", "1", "five"], "classification of 2 classes", "these labels are no numbers: `five` (line 5)"),
        ],
    )
    def test_the_cells_that_decided_are_told(self, cells: list[object], kind: str, reason: str) -> None:
        notes: list[str] = []
        column_of(cells).find_classes("auto", notes)
        (note,) = notes
        assert note.startswith(f"Read as a {kind}, since ") and reason in note

    def test_all_wrong_rows_are_told(self, write: WritesTable, tmp_path: Path) -> None:
        path = write("a.csv", ["good", "", "bad", " ", ""])
        with pytest.raises(CraftError, match=r"lines 3, 5, 6: column `label` is empty"):
            read_own(path, None)
        dev = tmp_path / "dev.csv"
        dev.write_text(csv_cells(["good", "ugly", "odd", "ugly"]))
        with pytest.raises(CraftError, match=r"line 3: unknown label `ugly` .*: `odd` \(line 4\), `ugly` \(line 5\)\."):
            read_own(write("a.csv", ["good", "bad"]), dev)

    def test_scores_that_are_whole_in_training_alone(self, write: WritesTable, tmp_path: Path) -> None:
        (tmp_path / "dev.tsv").write_text(tsv_cells([1, 2.5]))
        with pytest.raises(CraftError, match=r"unknown label `2\.5` .* trained as a regression"):
            read_own(write("a.csv", [1, 2, 3]), tmp_path / "dev.tsv")

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("a.csv", "text,label\n\na,x\n\nb,y\n\n"),
            ("a.tsv", "text\tlabel\r\n\r\na\tx\r\n\r\nb\ty\r\n\r\n"),
            (
                "a.jsonl",
                '{"text": "c", "label": "x"}\n\n{"text": "a", "label": "x"}\n  \n{"text": "b", "label": "y"}\n\n',
            ),
        ],
    )
    def test_blank_lines_are_left_out_of_training_and_told(self, tmp_path: Path, name: str, content: str) -> None:
        (tmp_path / name).write_bytes(content.encode())
        data = read_own(tmp_path / name, tmp_path / name)
        assert data.train["text"][-2:] == ["a", "b"]
        assert data.notes[1].endswith("blank lines are no rows, and left out (lines 2, 4, 6).")

    def test_an_empty_row_of_a_spreadsheet_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_text("text,label\na,x\nb,y\n,\n,\n")
        with pytest.raises(CraftError, match=r"lines 4, 5: column `label` is empty"):
            read_own(tmp_path / "a.csv", None)


class TestCommandLine:
    def test_the_error_names_the_option(self, workshop: Path, write: WritesTable, command: Command) -> None:
        path = write("a.csv", [*SCORES, "N/A"])
        words = ["train", "--model", workshop / "encoder", "--output", workshop / "new", "--data", path]
        status, out, err = command(*words)
        assert (status, out) == (2, "") and not (workshop / "new").exists()
        assert "a.csv, line 9: `N/A` in column" in err and "`--kind classification`" in err and 'kind="' not in err

    def test_evaluate_tells_what_it_was_measured_on(
        self, runs: dict[int, TrainedModel], workshop: Path, command: Command
    ) -> None:
        (workshop / "dev.csv").write_text("text,label\nso good,good\n\nso bad,bad\n")
        status, out, err = command("evaluate", workshop / "run1", "--data", workshop / "dev.csv", "--json")
        assert status == 0 and json.loads(out)["score"] in (0, 0.5, 1)
        assert "note: " in err and "blank lines are no rows, and left out (line 3)" in err
