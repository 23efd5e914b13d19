"""Mistakes at the command line: each ends in one line that names what was found and what to do, and leaves nothing.

A row is what is wrong, the file that is given (its name and bytes), the words after the command that would be right,
and the message. `{file}` is that file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from test_cli_arguments import python_names

from craft_peft.cli.main import main

GOOD = b"text,label\n" + b"the film was good,good\nthe film was bad,bad\n" * 20
LINES = GOOD.splitlines(keepends=True)


@dataclass(frozen=True)
class Mistake:
    """One row of the table."""

    what: str
    message: str
    words: str = ""
    file: str = "table.csv"
    content: bytes = GOOD
    command: str = "train --model {encoder} --data {file} --output {output} --epochs 1"

    def __str__(self) -> str:
        return self.what


def option(words: str, message: str, **fields: str) -> Mistake:
    return Mistake(words, message, words, **fields)


def table(what: str, content: bytes, message: str, file: str = "table.csv", words: str = "") -> Mistake:
    return Mistake(what, message, words, file, content)


TABLES = [
    table("empty", b"", r"table\.csv is empty\. It must hold at least one row"),
    table("blank lines", b"\n\n \n", r"is empty"),
    table("only a byte order mark", b"\xef\xbb\xbf", r"is empty"),
    table("only a header", LINES[0], r"holds a header and no row"),
    table(
        "no header", b"".join(LINES[1:]), r"has no column `text`, `label`. Columns found: `the film was good`, `good`"
    ),
    table("another separator", GOOD.replace(b",", b";"), r"has no column `text`, `label`. Columns found: `text;label`"),
    table("tabs in a .csv", GOOD.replace(b",", b"\t"), r"has no column `text`, `label`"),
    table("commas in a .tsv", GOOD, r"has no column `text`, `label`. Columns found: `text,label`", "table.tsv"),
    table("column twice", b"text,text,label\na,b,good\n", r"line 1: column `text` appears more than once"),
    table(
        "column of another case", b"Text,Label\na,good\nb,bad\n", r"has no column `text`, `label`. .*`Text`, `Label`"
    ),
    table("too few fields", GOOD + b"short\n", r"line 42: 1 fields, but the table has 2 columns"),
    table("too many fields", GOOD + b"a,b,good\n", r"line 42: 3 fields, but the table has 2 columns"),
    table("a quote that does not end", GOOD + b'"a,good\n', r"line 42: not valid CSV .unexpected end of data"),
    table("a quote in the middle", GOOD + b'"a" b,good\n', r"line 42: not valid CSV"),
    table("no label", GOOD + b"a,\n", r"line 42: column `label` is empty"),
    table("a label of spaces", GOOD + b"a,  \n", r"line 42: column `label` is empty"),
    table("one label", b"text,label\n" + b"a,good\n" * 20, r"the only label in column `label` is `good`"),
    table("latin-1", GOOD + "Café,good\n".encode("latin-1"), r"line 42: byte 0xe9 is not valid UTF-8\. Save the file"),
    table("utf-16", GOOD.decode().encode("utf-16"), r"line 1: byte 0xff is not valid UTF-8"),
    table("utf-16 without its mark", GOOD.decode().encode("utf-16-le"), r"line 1: it holds a null byte"),
    table("half an emoji", GOOD + "😀".encode()[:2] + b",good\n", r"line 42: byte 0xf0 is not valid UTF-8"),
    table("a null byte", GOOD + b"a\0b,good\n", r"line 42: it holds a null byte"),
    table("a picture", b"\x89PNG\r\n\x1a\n" + bytes(range(256)), r"line 1: byte 0x89 is not valid UTF-8"),
    table("zeros", bytes(10_000), r"line 1: it holds a null byte"),
    table("a field of 10 MB", GOOD + b"a" * 10_000_000 + b",good\n", r"line 42: .*field larger than field limit"),
    table("a quote that swallows 10 MB", GOOD + b'"' + GOOD * 12_000, r"line 42: not valid CSV"),
    table("a spreadsheet", b"PK\x03\x04", r"\.xlsx is not one of \.csv, \.tsv, \.jsonl", "table.xlsx"),
    table("no ending", GOOD, r"is not one of \.csv, \.tsv, \.jsonl", "table"),
    table("JSON, not lines", b"[\n1\n]\n", r"line 1: not valid JSON", "table.jsonl"),
    table("a list a line", b'["a", "good"]\n', r"line 1: found list, one JSON object a line", "table.jsonl"),
    table("a JSON line cut short", b'{"text": "a", "lab\n', r"line 1: not valid JSON", "table.jsonl"),
    table(
        "JSON lines of other fields",
        b'{"text": "a", "label": 1}\n{"text": "b"}\n',
        r"line 2: the fields are `text`, but the first row has `text`, `label`",
        "table.jsonl",
    ),
    table("JSON nested too deep", b"[" * 100_000, r"line 1: not valid JSON", "table.jsonl"),
    table(
        "a key twice", b'{"text": "a", "text": "b", "label": 1}\n', r"line 1: .*`text`.*more than once", "table.jsonl"
    ),
    table("null as a label", b'{"text": "a", "label": null}\n', r"line 1: column `label` is empty", "table.jsonl"),
    table(
        "a text that is a list",
        b'{"text": ["a"], "label": 1}\n{"text": "b", "label": 0}\n',
        r"line 1: `text` holds a list or an object",
        "table.jsonl",
    ),
    table(
        "words for a regression", GOOD, r"line 2: `good` in column `label` is not a number", words="--kind regression"
    ),
    table(
        "an infinite score",
        b"text,label\na,0.5\nb,inf\n",
        r"line 3: `inf` in column `label` is not a number",
        words="--kind regression",
    ),
    table("too few rows to hold any out", b"".join(LINES[:3]), r"Both parts need rows"),
]

DEV = "--dev-data {file} --data {train}"
DEVELOPMENT = [
    table(
        "a label that training lacks", GOOD + b"a,ugly\n", r"line 42: unknown label `ugly`.*`bad`, `good`", words=DEV
    ),
    table("a label of another case", GOOD + b"a,Good\n", r"line 42: unknown label `Good`", words=DEV),
    table("labels as numbers", b"text,label\na,1\nb,0\n", r"line 2: unknown label `1`", words=DEV),
    table("other columns", GOOD.replace(b"text", b"body"), r"has no column `text`. Columns found: `body`", words=DEV),
    table("no rows", LINES[0], r"holds a header and no row", words=DEV),
    option("--dev-data {absent}", r"There is no file .*absent"),
    option("--dev-data {folder}", r"is a folder; a file is required"),
]

OPTIONS = [
    option("--data {absent}", r"There is no file .*absent"),
    option("--data {folder}", r"folder is a folder; a file is required"),
    option("--output {file}", r"The output .* is a file\. Give a folder"),
    option("--output {folder}", r"holds files that are not a run of craft-peft; they are left alone"),
    option("--output {file}/run", r"Not a directory: .*table\.csv/run\. Give another place"),
    option(
        "--model {absent}", r"There is no model folder .*absent\.csv`\. Give an existing folder, or a name on the Hub"
    ),
    option("--model {folder}", r"Could not read a model's config from .*Give a folder that holds config\.json"),
    option("--method crft", r"Unknown method `crft`\. Did you mean `craft`\?"),
    option("--method {emoji}", r"Unknown method `😀`"),
    option("--task rtee", r"Unknown task `rtee`\. Did you mean `rte`\?"),
    option("--task rte --data {folder}", r"neither a folder RTE nor a file dev\.tsv"),
    option("--text-columns text,body", r"has no column `body`"),
    option("--text-columns a,b,c", r"3 text columns were named \(a, b, c\); give one or two"),
    option("--text-columns text,text", r"`text`, `text`, `label`: one is named twice"),
    option("--label-column text", r"`text`, `text`: one is named twice"),
    option("--label-column {emoji}", r"has no column `😀`"),
    option("--kind ranking", r"Unknown kind `ranking`\. Use one of auto, classification, regression"),
    option("--rows 0", r"`--rows 0` cannot be used"),
    option("--rows 1000", r"`--rows 1000` cannot be used: .*36 training rows"),
    option("--rows few", r"argument --rows: invalid int value: 'few'"),
    option("--hold-out 1", r"share to hold out is 1\.0; it must lie between 0 and 1"),
    option("--hold-out -0.1", r"share to hold out is -0\.1"),
    option("--ranks 2,4", r"`--ranks 2,4` does not fit method `craft`, which takes 3 whole number"),
    option(
        "--ranks 2,4,1000",
        r"number 3 of `--ranks`, 1000, keeps more input directions than .* \(16\)\. Use `--ranks 2,4,16`",
    ),
    option("--ranks two", r"'two' is not a list of whole numbers such as 12,100,100 or 8"),
    option("--ranks 0,4,4", r"`--ranks 0,4,4` does not fit .* of at least 1"),
    option("--ranks 2,4,4 --budget 500", r"Both `--ranks 2,4,4` and `--budget 500` were given: .* Give one of them"),
    option("--budget 1", r"`--budget 1` is below the smallest setting .* Give at least `--budget 12`"),
    option("--budget -5", r"`--budget -5` is no number of parameters: it must be 1 or more"),
    option("--option tying", r"'tying' is not of the form NAME=VALUE"),
    option("--option tying=loose", r"`--option tying=loose` is unknown\. Use one of shared, diagonal, free"),
    option("--option alfa=2", r"Method `craft` does not take these options: .*'alfa'"),
    option("--option alpha=NaN", r"`--option alpha=nan` has the wrong type"),
    option("--target-modules querry", r"`--target-modules querry` matches no module .*Did you mean 'query'\?"),
    option(
        "--target-modules {emoji}",
        r"`--target-modules 😀` matches no module .*'classifier', 'dense', 'key', 'query', 'value'",
    ),
    option("--epochs 0", r"`--epochs 0` cannot be used: it must be a whole number above 0"),
    option("--epochs -1", r"`--epochs -1` cannot be used: it must be a whole number above 0"),
    option("--epochs 1.5", r"argument --epochs: invalid int value: '1\.5'"),
    option("--batch-size 0", r"`--batch-size 0` cannot be used: it must be a whole number above 0"),
    option("--max-length 0", r"`--max-length 0` cannot be used: it must be a whole number of at least 4"),
    option(
        "--max-length 100000",
        r"`--max-length 100000` is longer than the 128 positions .* Use at most `--max-length 128`",
    ),
    option("--learning-rate -1", r"`--learning-rate -1\.0` cannot be used: it must be a number above 0"),
    option("--learning-rate nan", r"`--learning-rate nan` cannot be used: it must be a number above 0"),
    option("--learning-rate inf", r"`--learning-rate inf` cannot be used: it must be a number above 0"),
    option("--warmup-ratio 2", r"`--warmup-ratio 2\.0` cannot be used: it must be at least 0 and below 1"),
    option("--weight-decay -1", r"`--weight-decay -1\.0` cannot be used: it must be a number of at least 0"),
    option("--clip 0", r"`--clip 0\.0` cannot be used: it must be a number above 0"),
    option("--head-start cold", r"Unknown head start `cold`\. Use one of random, prior, fitted"),
    option("--precision float16", r"Unknown precision `float16`\. Use one of auto, float32, bf16"),
    option("--seed -1", r"`--seed -1` cannot be used\. Give a whole number from 0 to 4294967295"),
    option("--seed 99999999999999999999", r"`--seed 99999999999999999999` cannot be used"),
    option("--report-to tensorbord", r"Unknown logger `tensorbord`\. Did you mean `tensorboard`\?"),
    option("--resume --overwrite", r"Both `--resume` and `--overwrite` were given"),
    option("--start-from {folder}", r"is not a run of craft-peft .*Give its output folder"),
    option("--start-from {absent}", r"There is no folder"),
    option("--epochs", r"argument --epochs: expected one argument"),
    option("--epocs 3", r"unrecognized arguments: --epocs 3"),
]

OTHERS = [
    Mistake("no command", r"arguments are required: command", command=""),
    Mistake("an unknown command", r"invalid choice: 'tarin'", command="tarin"),
    Mistake("evaluate: no such run", r"There is no folder", command="evaluate {absent}"),
    Mistake("evaluate: not a run", r"is not a run of craft-peft .it has no run\.json", command="evaluate {folder}"),
    Mistake("predict: not a run", r"is not a run of craft-peft", command="predict {folder} --text a"),
    Mistake("export: not a run", r"is not a run of craft-peft", command="export {folder} --output {output}"),
    Mistake("inspect: no such model", r"There is no model folder .*absent", command="inspect --model {absent}"),
    Mistake(
        "inspect: ranks",
        r"`--ranks 2,4` has to be 'paper' or three whole numbers",
        command="inspect --model {encoder} --ranks 2,4",
    ),
    Mistake(
        "params: budget", r"`--budget 0` is no number of parameters", command="params --model {encoder} --budget 0"
    ),
    Mistake("report: nothing there", r"There is no folder .*absent", command="report {absent}"),
    Mistake(
        "report: no results",
        r"folder holds no result that can be used\. Give a folder",
        command="report {folder} --to {output}",
    ),
    Mistake("sweep: no file", r"Cannot read .*No such file or directory", command="sweep {absent}"),
    Mistake(
        "sweep: not TOML",
        r"table\.toml is not valid TOML: .*line 1",
        command="sweep {file}",
        file="table.toml",
        content=b"a = = 1",
    ),
    Mistake(
        "sweep: nothing in it",
        r"`model` is missing: it must be a text",
        command="sweep {file}",
        file="table.toml",
        content=b"",
    ),
    Mistake(
        "sweep: unknown key",
        r"table\.toml, line 2, `seds`: unknown key `seds`\. Did you mean `seeds`\?",
        command="sweep {file}",
        file="table.toml",
        content=b'model = "m"\nseds = [0]\n',
    ),
]
ALL = [*TABLES, *DEVELOPMENT, *OPTIONS, *OTHERS]


@pytest.mark.parametrize("mistake", ALL, ids=str)
def test_a_mistake(mistake: Mistake, workshop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, folder, output = tmp_path / mistake.file, tmp_path / "folder", tmp_path / "output"
    file.write_bytes(mistake.content)
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    places = {"encoder": workshop / "encoder", "train": workshop / "train.csv", "absent": tmp_path / "absent.csv"}
    places |= {"file": file, "folder": folder, "output": output, "emoji": "😀"}
    words = [word.format(**places) for word in f"{mistake.command} {mistake.words}".split()]
    before = sorted(tmp_path.rglob("*"))
    try:
        status = main(words)
    except SystemExit as exit:  # argparse's own
        status = exit.code
    err = capsys.readouterr().err
    last = err.strip().splitlines()[-1]
    assert status == 2 and "Traceback" not in err
    assert re.search(mistake.message, last), last
    assert re.match(r"(craft-peft[\w -]*: )?error: ", last) and len(last) < 2000
    assert python_names(last, words[0] if words else "") == []
    assert sorted(tmp_path.rglob("*")) == before, "it left something behind"


def test_python_names_are_seen() -> None:
    assert python_names("`target_modules=['q']` and `hold_out`, not column `rows` or --rows=3", "train") != []
    assert python_names("--target-modules=q and `--hold-out`, not column `rows` or --rows=3", "train") == []


def test_there_are_as_many_as_promised() -> None:
    assert len({mistake.what for mistake in ALL}) == len(ALL) >= 60
