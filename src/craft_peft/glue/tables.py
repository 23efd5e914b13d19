"""Tables of text on disk (TSV, CSV, JSON lines) as rows that remember their line, for errors that can be acted upon."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CraftError

FORMATS = (".csv", ".tsv", ".jsonl")
SHOWN = 3


@dataclass(frozen=True)
class Row:
    """One row: the line it starts on, and its fields by column."""

    line: int
    fields: dict[str, str]


@dataclass(frozen=True)
class Table:
    """A file that was read.

    Args:
        path: The file.
        columns: Column names in the order of the file.
        rows: Its rows.
        broken: Lines of rows with a wrong number of fields that were left out.
        blank: Blank lines, which are not among the rows; the end of the last row begins none.
        nested: Columns of JSON lines that hold lists or objects, left out, each with the first line that does.
    """

    path: Path
    columns: tuple[str, ...]
    rows: list[Row]
    broken: tuple[int, ...] = ()
    blank: tuple[int, ...] = ()
    nested: Mapping[str, int] = field(default_factory=dict)

    def every_row(self) -> list[Row]:
        """The rows and the blank lines in the order of the file; a blank line is a row of empty fields."""
        blank = [Row(line, dict.fromkeys(self.columns, "")) for line in self.blank]
        return sorted([*self.rows, *blank], key=lambda row: row.line)

    def require(self, columns: tuple[str, ...]) -> None:
        """Raises a `CraftError` that lists the columns found, unless all of `columns` are there."""
        for column in columns:
            if column in self.nested:
                raise CraftError(
                    f"{self.path}, line {self.nested[column]}: `{column}` holds a list or an object. Give a text, a "
                    "number, true, false or null."
                )
        missing = [column for column in columns if column not in self.columns]
        if missing:
            raise CraftError(
                f"{self.path} has no column {_quoted(missing)}. Columns found: {_quoted(self.columns)}. "
                f"Name the columns to use, or correct the first line of the file.{_hint(self.columns)}"
            )


def read_table(path: Path, header: tuple[str, ...] = (), keep_broken_out: bool = False) -> Table:
    r"""Reads a table; the ending of the file's name decides how.

    `.csv` has commas and CSV quoting; `.tsv` has tabs, and quotes in it are literal text (so are GLUE's files);
    `.jsonl` has one JSON object a line. The encoding is UTF-8, with or without a byte order mark.

    Args:
        path: The file.
        header: Column names of a file without a header line.
        keep_broken_out: Leave rows with a wrong number of fields out and list their lines, instead of refusing them.

    Returns:
        The table.

    Raises:
        CraftError: A file that is missing, empty, not UTF-8 or of another format, or a row with a wrong number of
            fields; names file and line.

    Example:
        >>> import pathlib, tempfile
        >>> from craft_peft.glue.tables import read_table
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "train.csv"
        ...     _ = path.write_text('text,label\n"one, two",good\n')
        ...     read_table(path).rows
        [Row(line=2, fields={'text': 'one, two', 'label': 'good'})]
    """
    ending = path.suffix.lower()
    if path.is_file() and ending not in FORMATS:
        raise CraftError(f"{path} is not one of {', '.join(FORMATS)}. Save the table in one of these formats.")
    text = read_text(path)
    if ending == ".jsonl":
        return _json_table(path, text)
    records = _csv_records(path, text) if ending == ".csv" else _tab_records(text)
    return _record_table(path, records, header, keep_broken_out)


def read_text(path: Path) -> str:
    """Reads a UTF-8 file.

    Args:
        path: The file.

    Returns:
        Its text, without a byte order mark.

    Raises:
        CraftError: The file is missing, a folder, empty, or not UTF-8 (names the line).
    """
    if not path.exists():
        raise CraftError(f"There is no file {path}. Give the path of an existing file.")
    if path.is_dir():
        raise CraftError(f"{path} is a folder; a file is required here.")
    return decode(path, path.read_bytes())


def decode(name: str | Path, data: bytes) -> str:
    """Decodes UTF-8, as `read_text`; `name` is for errors."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise CraftError(
            f"{name}, line {line}: byte 0x{data[error.start]:02x} is not valid UTF-8. Save the file as UTF-8."
        ) from error
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise CraftError(f"{name}, line {line}: it holds a null byte, so is no text in UTF-8. Save the file as UTF-8.")
    if not text.strip():
        raise CraftError(f"{name} is empty. It must hold at least one row.")
    # Spreadsheets for the Mac still end lines as its first system did.
    return text if "\n" in text else text.replace("\r", "\n")


def split_lines(text: str) -> list[str]:
    r"""The lines of a text, blank ones too; what follows the last line's end is no line.

    Only `\n` and `\r\n` end a line: `str.splitlines` would also cut at U+2028 or U+0085, which do occur in texts.

    Example:
        >>> split_lines("one\r\n\ntwo\u2028three\n")
        ['one', '', 'two\u2028three']
    """
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]


def describe_half_character(text: str) -> str | None:
    r"""What is wrong with a text that has half a character of UTF-16 in it, as JSON can write one; else None.

    Example:
        >>> describe_half_character("a" + chr(0xD83D))
        'holds half a character (`\\ud83d`), which no text in UTF-8 can. Correct or remove it.'
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        return f"holds half a character (`{half}`), which no text in UTF-8 can. Correct or remove it."
    return None


def name_lines(lines: Sequence[int]) -> str:
    """Line numbers for a message; of many the first.

    Example:
        >>> name_lines([4]), name_lines([2, 3, 5, 8, 9])
        ('line 4', 'lines 2, 3, 5 and 2 more')
    """
    shown = ", ".join(str(line) for line in lines[:SHOWN])
    more = f" and {len(lines) - SHOWN:,} more" if len(lines) > SHOWN else ""
    return f"line{'s' if len(lines) > 1 else ''} {shown}{more}"


def _tab_records(text: str) -> Iterator[tuple[int, list[str]]]:
    for line, record in enumerate(split_lines(text), start=1):
        yield line, record.split("\t") if record else []


def _csv_records(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline="\n"), strict=True)
    start = 1
    try:
        for record in reader:
            yield start, record
            start = reader.line_num + 1
    except csv.Error as error:
        raise CraftError(
            f"{path}, line {start}: not valid CSV ({error}). Put fields that hold a comma, a quote or a line break in "
            'double quotes, and write a quote inside them as "".'
        ) from error


def _record_table(
    path: Path, records: Iterator[tuple[int, list[str]]], header: tuple[str, ...], keep_broken_out: bool
) -> Table:
    columns = header or tuple(next(record for _, record in records if record))
    twice = sorted({column for column in columns if columns.count(column) > 1})
    if twice:
        raise CraftError(f"{path}, line 1: column {_quoted(twice)} appears more than once. Give each its own name.")
    rows, broken, blank = [], [], []
    for line, record in records:
        if not record:
            blank.append(line)
        elif len(record) == len(columns):
            rows.append(Row(line, dict(zip(columns, record, strict=True))))
        elif keep_broken_out:
            broken.append(line)
        else:
            raise CraftError(
                f"{path}, line {line}: {len(record)} fields, but the table has {len(columns)} columns "
                f"({_quoted(columns)}). Correct or remove this row.{_hint(columns)}"
            )
    if not rows:
        raise CraftError(f"{path} holds a header and no row. It must hold at least one row.")
    return Table(path, columns, rows, tuple(broken), tuple(blank))


def _hint(columns: tuple[str, ...]) -> str:
    """What to say of a header line that is one column, and holds what other programs write between columns."""
    written = [
        name for mark, name in ((";", "semicolons"), ("\t", "tabs"), (",", "commas")) if mark in "".join(columns)
    ]
    if len(columns) > 1 or not written:
        return ""
    return f" Its columns seem to have {written[0]} between them: save it with commas (.csv) or tabs (.tsv)."


def _json_table(path: Path, text: str) -> Table:
    rows: list[Row] = []
    columns: dict[str, None] = {}
    nested: dict[str, int] = {}
    blank = []
    for line, record in enumerate(split_lines(text), start=1):
        if not record.strip():
            blank.append(line)
            continue
        values = _json_values(path, line, record)
        for key, value in values.items():
            if isinstance(value, list | dict):
                nested.setdefault(key, line)
        fields = {key: _json_field(value) for key, value in values.items()}
        if rows and fields.keys() != columns.keys():
            raise CraftError(
                f"{path}, line {line}: the fields are {_quoted(fields)}, but the first row has {_quoted(columns)}. "
                "Give every object the same fields."
            )
        columns = columns or dict.fromkeys(fields)
        rows.append(Row(line, fields))
    return Table(path, tuple(name for name in columns if name not in nested), rows, (), tuple(blank), nested)


def _json_values(path: Path, line: int, record: str) -> dict[str, Any]:
    def without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        if twice:
            raise CraftError(f"{path}, line {line}: {_quoted(twice)} appears more than once. Give each its own name.")
        return dict(pairs)

    try:
        value = json.loads(record, object_pairs_hook=without_doubles)
    except (ValueError, RecursionError) as error:  # plain ValueErrors: numbers of thousands of digits
        raise CraftError(f"{path}, line {line}: not valid JSON ({error}). Write one JSON object a line.") from error
    if not isinstance(value, dict):
        raise CraftError(f"{path}, line {line}: found {type(value).__name__}, one JSON object a line is required.")
    for name, text in value.items():
        if isinstance(text, str) and (half := describe_half_character(text)):
            raise CraftError(f"{path}, line {line}: `{name}` {half}")
    return value


def _json_field(value: Any) -> str:
    if isinstance(value, str):
        return value
    # A missing value reads as an empty field, like in CSV; anything else keeps its JSON spelling (true, 3, 0.5).
    return "" if value is None else json.dumps(value)


def _quoted(names: Any) -> str:
    return ", ".join(f"`{name}`" for name in names)
