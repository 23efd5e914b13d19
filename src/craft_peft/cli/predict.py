"""`craft-peft predict`: labels with probabilities, or values, for texts."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from ..errors import CraftError
from .arguments import Several, named_value, words

EXAMPLE = """\
examples:
  A text, or a pair of texts for a model of pairs:
    craft-peft predict runs/reviews --text "A joy from start to finish."
    craft-peft predict runs/rte --text "It rains in Rome." --text-pair "Rome is wet."

  A table (.csv, .tsv, .jsonl: the text columns of training), a text file with one text a line (pairs: a tab
  between the two), or standard input in the same form. Every row has its answer, in order, empty ones too:
    craft-peft predict runs/rte glue_data/RTE/test.tsv --json > predicted.jsonl
    echo "A joy from start to finish." | craft-peft predict runs/reviews

  All test sets of GLUE, for the server: a run a task below a folder, or named one by one:
    craft-peft predict runs --glue-submission submission.zip --data glue_data
    craft-peft predict --glue-submission submission.zip --data glue_data --fill-missing \\
      --task-run rte=runs/rte-seed0 --task-run stsb=runs/stsb-seed3
"""

OTHER_TABLES = (".json", ".ndjson", ".parquet", ".ods", ".xls", ".xlsx")
"""Endings of tables that cannot be read, and whose lines are no texts."""

LINE_END = re.compile(r"[\n\v\f\r\x1c-\x1e\x85\u2028\u2029]")


def register(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command to the parser."""
    parser = subparsers.add_parser(
        "predict",
        help="classify texts with a finished run",
        description="Print the label and the probabilities of each text, or the value for a regression.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "folder", nargs="?", metavar="DIR", help="output folder of a training run; with --glue-submission of many"
    )
    parser.add_argument("file", nargs="?", metavar="FILE", help="table or text file; - or nothing: standard input")
    parser.add_argument("--text", action="append", metavar="TEXT", help="a text; may be repeated")
    parser.add_argument(
        "--text-pair", dest="pairs", action="append", metavar="TEXT", help="the second text of each pair"
    )
    parser.add_argument(
        "--text-columns", action=Several, read=words, metavar="NAME", help="(default: those of training)"
    )
    parser.add_argument("--model", metavar="NAME_OR_FOLDER", help="base model, if it is no longer where it was")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    glue = parser.add_argument_group("submission to GLUE")
    glue.add_argument(
        "--glue-submission", metavar="OUT", help="predict all test sets of GLUE into this .zip, or new folder"
    )
    glue.add_argument("--data", metavar="PATH", help="folder of the GLUE download, with the test sets")
    glue.add_argument(
        "--task-run",
        dest="named",
        action=Several,
        read=named_value,
        add=True,
        formed=True,
        metavar="TASK=DIR",
        help="the run for a task, and more of them",
    )
    glue.add_argument(
        "--fill-missing",
        dest="fill",
        action="store_true",
        help="fill the files of tasks without a run with the most frequent class of train; the server needs all files",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    if arguments.glue_submission:
        return _submit(arguments)
    _refuse_submission_options(arguments)

    from ..glue.inference import predict
    from ..glue.models import load_trained

    if arguments.text and arguments.file:
        raise CraftError("Both --text and a file were given. Give one of them.")
    if arguments.pairs and not arguments.text:
        raise CraftError("--text-pair was given without --text. Give the first text of the pair with --text.")
    trained = load_trained(arguments.folder, arguments.model)
    columns = arguments.text_columns or trained.task.text_columns
    texts = arguments.text
    rows = _given(texts, arguments.pairs) if texts else _read(arguments.file or "-", columns)
    pairs = [row[1] for row in rows] if len(rows[0]) == 2 else None
    predictions = predict(trained, [row[0] for row in rows], pairs)
    for row, prediction in zip(rows, predictions, strict=True):
        if arguments.json:
            given = dict(zip(("text", "text_pair"), row, strict=False))
            print(_one_line(json.dumps(given | prediction.fields(), ensure_ascii=False)))
        else:
            print(_one_line("\t".join((str(prediction), *row))))
    return 0


def _one_line(answer: str) -> str:
    """An answer on one line, with what some reader takes for the end of one written as in JSON."""
    return LINE_END.sub(lambda found: json.dumps(found[0])[1:-1], answer)


def _submit(arguments: argparse.Namespace) -> int:
    from functools import partial

    from ..glue.models import load_trained
    from ..glue.submission import check_target, find_runs, plan, predict_submission, write_submission

    given = [name for name in ("file", "text", "pairs", "text_columns", "json") if getattr(arguments, name)]
    if given:
        what = f"`{option.option_strings[0]}`" if (option := arguments.options.get(given[0])) else "a file of texts"
        raise CraftError(f"--glue-submission predicts GLUE's test sets; {what} has no meaning with it.")
    if arguments.data is None:
        raise CraftError("--glue-submission needs the test sets. Give the folder of the GLUE download with --data.")
    if arguments.folder is None and not arguments.named:
        raise CraftError("No run was given. Give a folder of runs, or `--task-run TASK=DIR` for each task.")
    target = Path(arguments.glue_submission)
    check_target(target)
    named = {task: str(path) for task, path in arguments.named}
    runs = find_runs(Path(arguments.folder) if arguments.folder else None, named)
    wanted = plan(runs, Path(arguments.data), arguments.fill)
    load = partial(load_trained, model=arguments.model)
    files = predict_submission(wanted, lambda sentence: print(sentence, file=sys.stderr), load)
    write_submission(files, target)
    print(f"Written: {target}, {len(files)} files")
    return 0


def _refuse_submission_options(arguments: argparse.Namespace) -> None:
    options = {"--data": arguments.data, "--task-run": arguments.named, "--fill-missing": arguments.fill}
    for option, value in options.items():
        if value:
            raise CraftError(
                f"{option} was given without --glue-submission. Give a file of texts, or --glue-submission."
            )
    if arguments.folder is None:
        raise CraftError("No run was given. Give the output folder of a training run.")


def _given(texts: list[str], pairs: list[str] | None) -> list[tuple[str, ...]]:
    if pairs is None:
        return [(text,) for text in texts]
    if len(pairs) != len(texts):
        raise CraftError(f"{len(texts)} --text and {len(pairs)} --text-pair were given; give as many of each.")
    return list(zip(texts, pairs, strict=True))


def _read(file: str, columns: tuple[str, ...]) -> list[tuple[str, ...]]:
    from ..glue.tables import FORMATS, decode, name_lines, read_table, read_text

    if file == "-":
        if sys.stdin.isatty():
            raise CraftError("No text was given. Give --text, a file, or texts on standard input.")
        file = "standard input"
        rows = _lines(file, decode(file, _standard_input()), columns)
    elif (path := Path(file)).suffix.lower() in (*FORMATS, *OTHER_TABLES):
        table = read_table(path)
        table.require(columns)
        rows = [(row.line, tuple(row.fields[column] for column in columns)) for row in table.every_row()]
    else:
        rows = _lines(file, read_text(path), columns)
    empty = [line for line, texts in rows if not any(text.strip() for text in texts)]
    if empty:
        print(f"note: {file}, {name_lines(empty)}: no text; answered like every other row.", file=sys.stderr)
    return [texts for _, texts in rows]


def _standard_input() -> bytes:
    stream = getattr(sys.stdin, "buffer", None)  # a program that puts another stream in its place may have text alone
    return sys.stdin.read().encode("utf-8", "surrogatepass") if stream is None else stream.read()


def _lines(name: str, text: str, columns: tuple[str, ...]) -> list[tuple[int, tuple[str, ...]]]:
    from ..glue.tables import split_lines

    rows = []
    for number, line in enumerate(split_lines(text), start=1):
        row = tuple(line.split("\t")) if len(columns) == 2 and line else (line,) * len(columns)
        if len(row) != len(columns):
            raise CraftError(
                f"{name}, line {number}: {len(row)} texts, but the model was trained on pairs. Put two texts on each "
                "line, with a tab between them."
            )
        rows.append((number, row))
    return rows
