"""The label column of a table: which cells are numbers, which are one class, and whether it holds classes or scores."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import NamedTuple

from ..errors import CraftError
from .tables import Table, name_lines

KINDS = ("auto", "classification", "regression")

NEARLY_ALL = 0.75
"""From this share on, a column of numbers that are not all whole is one of scores, and its words are mistakes."""

SHOWN = 4

NO_CLASS = re.compile(
    r"[+-]?(s?nan(\(\w*\))?|inf(inity)?|∞|\d\.#\w+)"  # what C, Python and Windows print for no number and infinity
    r"|<?na>?|n/a|nat|null|#(n/?a|null!|num!|value!|div/0!|ref!|name\?)"  # what data frames and spreadsheets do
    r"|[+-]?[\d.]*,\d+",  # a decimal comma
    re.IGNORECASE,
)
"""Cells that are a class only when the user says so: a number that is missing, failed, or written with a comma."""


class Label(NamedTuple):
    """A cell of the label column, without the spaces around it, and the line that its row starts on."""

    line: int
    cell: str


def as_number(cell: str) -> Decimal | None:
    """The number that a cell is, exactly, or None: not finite, or not written as a number.

    Example:
        >>> as_number("1.0") == as_number("1"), as_number("nan"), as_number("1_0")
        (True, None, None)
    """
    try:
        # `float` would take two large numbers for one; both would read an underscore, which numbers have in code alone.
        return Decimal(cell) if "_" not in cell and math.isfinite(float(cell)) else None
    except (ValueError, InvalidOperation):
        return None


def list_cells(labels: Sequence[Label]) -> str:
    """Cells by how they are written, each with its lines; of many the first.

    Example:
        >>> list_cells([Label(2, "nan"), Label(3, "n/a"), Label(7, "nan")])
        '`nan` (lines 2, 7), `n/a` (line 3)'
    """
    lines: dict[str, list[int]] = {}
    for line, cell in labels:
        lines.setdefault(cell, []).append(line)
    shown = [f"`{cell}` ({name_lines(found)})" for cell, found in [*lines.items()][:SHOWN]]
    return ", ".join(shown) + (f" and {len(lines) - SHOWN} more" if len(lines) > SHOWN else "")


@dataclass(frozen=True)
class LabelColumn:
    """The label column of a table.

    Args:
        table: The table.
        name: The column.
    """

    table: Table
    name: str

    def read(self) -> list[Label]:
        """Reads its cells.

        Raises:
            CraftError: Rows without a label; names their lines.
        """
        labels = [Label(row.line, row.fields[self.name].strip()) for row in self.table.rows]
        empty = [label.line for label in labels if not label.cell]
        if empty:
            raise CraftError(
                f"{self.table.path}, {name_lines(empty)}: column `{self.name}` is empty. Give every row a label, or "
                "remove the row."
            )
        return labels

    def read_scores(self) -> list[float]:
        """Reads finite numbers.

        Raises:
            CraftError: Cells that are none; names their lines.
        """
        labels = self.read()
        wrong = [label for label in labels if as_number(label.cell) is None]
        if wrong:
            raise self._error(wrong, "{} is not a number.", "A regression needs a finite number in every row.")
        return [float(label.cell) for label in labels]

    def read_classes(self, names: Sequence[str], notes: list[str]) -> list[int]:
        """Reads classes: of each cell the one that is written like it, else the one that equals it as a number.

        Args:
            names: How the classes are written, in the order of their numbers.
            notes: Takes a sentence about cells that are written otherwise.

        Returns:
            The number of the class, for each row.

        Raises:
            CraftError: Cells that are no class; names their lines.
        """
        labels = self.read()
        # Runs of version 0.1.0 may have `1` and `1.0` as two classes: each stays what it was trained to be.
        number = {_meaning(name): place for place, name in reversed([*enumerate(names)])}
        number |= {name: place for place, name in enumerate(names)}
        found = {cell: number.get(cell, number.get(_meaning(cell), -1)) for _, cell in labels}
        wrong = [label for label in labels if found[label.cell] < 0]
        if wrong:
            known = ", ".join(f"`{name}`" for name in names)
            advice = "Correct the row, or check that the task is the right one."
            if not _is_whole(wrong[0].cell) and all(as_number(name) is not None for name in names):
                advice += " Scores need a run that is trained as a regression."
            raise self._error(wrong, "unknown label {}.", f"Known labels: {known}. {advice}")
        other = [label for label in labels if label.cell != names[found[label.cell]]]
        if other:
            places = sorted({found[label.cell] for label in other})
            classes = ", ".join(f"`{names[place]}`" for place in places[:SHOWN])
            notes.append(
                f"{self.table.path}: labels that are equal as numbers are one class: {list_cells(other)} count as "
                f"{classes}{' and others' if len(places) > SHOWN else ''}."
            )
        return [found[label.cell] for label in labels]

    def find_classes(self, kind: str, notes: list[str]) -> tuple[str, ...]:
        """Finds out whether the cells are classes or scores, and which classes there are.

        Args:
            kind: One of `KINDS`.
            notes: Takes a sentence that says which cells decided.

        Returns:
            How the classes are written, in the order of their numbers; none for a regression.

        Raises:
            CraftError: An unknown kind, a single class, or cells of which only the user can say what they are.
        """
        if kind not in KINDS:
            raise CraftError(f"Unknown kind `{kind}`. Use one of {', '.join(KINDS)}.")
        labels = self.read()
        classes = _classes(labels)
        if kind == "auto":
            kind, reason = self._decide(labels)
            count = f" of {len(classes):,} classes" if kind == "classification" else ""
            notes.append(f"Read as a {kind}{count}, since {reason}; `kind=...` can say otherwise.")
        if kind == "regression":
            return ()
        if len(classes) < 2:
            raise CraftError(
                f"{self.table.path}: the only label in column `{self.name}` is `{classes[0]}`. A classification needs "
                "at least two."
            )
        return classes

    def _decide(self, labels: Sequence[Label]) -> tuple[str, str]:
        """The kind, and the cells that decided."""
        words = [label for label in labels if as_number(label.cell) is None]
        parts = [label for label in labels if not _is_whole(label.cell)]
        nearly_all = len(labels) - len(words) >= NEARLY_ALL * len(labels)
        doubtful = [word for word in words if (nearly_all and parts) or _is_no_class(word.cell, nearly_all)]
        if doubtful:
            point = " (numbers take a decimal point)" if any("," in cell for _, cell in doubtful) else ""
            raise self._error(
                doubtful,
                "{} is not a number, and no class by itself.",
                f"{len(labels) - len(words):,} of {len(labels):,} labels are numbers. Correct or remove the rows"
                f'{point}, or say with `kind="classification"` that every label is a class.',
            )
        if words:
            return "classification", f"these labels are no numbers: {list_cells(words)}"
        if parts:
            return "regression", f"all labels are numbers and not all are whole: {list_cells(parts)}"
        return "classification", f"all labels are whole numbers: {list_cells(labels)}"

    def _error(self, labels: Sequence[Label], what: str, advice: str) -> CraftError:
        first, *rest = labels
        found = what.format(f"`{first.cell}` in column `{self.name}`")
        more = f" The same: {list_cells(rest)}." if rest else ""
        return CraftError(f"{self.table.path}, line {first.line}: {found}{more} {advice}")


def _meaning(cell: str) -> Decimal | str:
    number = as_number(cell)
    return cell if number is None else number


def _is_whole(cell: str) -> bool:
    number = as_number(cell)
    return number is None or number == number.to_integral_value()


def _is_no_class(word: str, among_numbers: bool) -> bool:
    # `none` and signs are classes among words (a stance, a thumb up), and a missing value among numbers.
    missing = word.lower() == "none" or not any(character.isalnum() for character in word)
    return NO_CLASS.fullmatch(word) is not None or (among_numbers and missing)


def _classes(labels: Sequence[Label]) -> tuple[str, ...]:
    """Names of the classes in order: one for all cells that are equal as numbers, the shortest that occurs."""
    names: dict[Decimal | str, str] = {}
    for cell in sorted({label.cell for label in labels}, key=lambda cell: (len(cell), cell)):
        names.setdefault(_meaning(cell), cell)
    if all(isinstance(value, Decimal) and _is_whole(name) for value, name in names.items()):
        return tuple(name for _, name in sorted(names.items()))
    return tuple(sorted(names.values()))
