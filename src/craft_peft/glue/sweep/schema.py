"""Checks what a TOML file says, key by key; an error names the line, what is allowed, and the nearest name."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from ...errors import CraftError, did_you_mean

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class Kind:
    """What a value may be.

    Args:
        meaning: In words, for errors.
        read: Makes the value that is kept of the one in the file; any `ValueError` or `TypeError` means it may not be.
    """

    meaning: str
    read: Callable[[Any], Any]


def _is(*types: type) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        # To Python, true is a whole number.
        if (isinstance(value, bool) and bool not in types) or not isinstance(value, types):
            raise TypeError
        return value

    return read


def _whole(least: int) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        if _is(int)(value) < least:
            raise ValueError
        return value

    return read


def _several(read: Callable[[Any], Any]) -> Callable[[Any], tuple]:
    def read_all(value: Any) -> tuple:
        found = tuple(read(entry) for entry in _is(list)(value))
        if not found or len(set(found)) < len(found):
            raise ValueError
        return found

    return read_all


def _ranks(value: Any) -> tuple[int, ...]:
    return tuple(map(_whole(1), value)) if isinstance(value, list) and value else (_whole(1)(value),)


def _ratio(value: Any) -> float:
    found = float(Fraction(value)) if isinstance(value, str) else float(_is(int, float)(value))
    if not 0 < found < float("inf"):
        raise ValueError
    return found


TEXT = Kind('a text such as "roberta-base"', _is(str))
TEXTS = Kind('a list of different texts such as ["query", "value"]', _several(_is(str)))
NUMBER = Kind("a number", lambda value: float(_is(int, float)(value)))
SHARE = Kind("a number of at least 0 and below 1", lambda value: _below_one(float(_is(int, float)(value))))
COUNT = Kind("a whole number above 0", _whole(1))
SEED = Kind("a whole number of at least 0", _whole(0))
SEEDS = Kind("a list of different whole numbers such as [0, 1, 2]", _several(_whole(0)))
RANKS = Kind("a whole number above 0, or a list of them such as [12, 100, 100]", _ranks)
FACTORS = Kind('a list of different numbers above 0, or fractions such as "1/3"', _several(_ratio))
TABLE = Kind("a table", _is(dict))
TABLES = Kind("one table or more, each under a heading in double brackets", _is(list))


def _below_one(value: float) -> float:
    if not 0 <= value < 1:
        raise ValueError
    return value


class Document:
    """A TOML file.

    Args:
        path: The file.

    Raises:
        CraftError: No such file, not UTF-8, or not TOML (names the line).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.text = path.read_text(encoding="utf-8")
            self.values = tomllib.loads(self.text)
        except OSError as error:
            raise CraftError(f"Cannot read {path}: {error.strerror}. Give an experiment file (.toml).") from error
        except ValueError as error:  # of both the encoding and the syntax
            raise CraftError(f"{path} is not valid TOML: {error}.") from error

    def read(self, values: Mapping[str, Any], kinds: Mapping[str, Kind], *place: str) -> dict[str, Any]:
        """Checks a table.

        Args:
            values: The table.
            kinds: The keys that it may have.
            place: The keys that lead to it.

        Returns:
            The values that are there, as they are kept.

        Raises:
            CraftError: A key that is not known, or a value of another kind.
        """
        read = {}
        for key, value in values.items():
            self.choose(key, kinds, "key", *place, key)
            try:
                read[key] = kinds[key].read(value)
            except (TypeError, ValueError, ZeroDivisionError):
                raise self.error(f"found {value!r}; it must be {kinds[key].meaning}.", *place, key) from None
        return read

    def choose(self, name: str, known: Iterable[str], what: str, *place: str) -> str:
        """The name, if it is known; else an error with the nearest one and all of them."""
        names = list(known)
        if name in names:
            return name
        raise self.error(f"unknown {what} `{name}`.{did_you_mean(name, names)} Allowed: {', '.join(names)}.", *place)

    def error(self, message: str, *place: str) -> CraftError:
        """An error that begins with file, line and key."""
        line = find_line(self.text, place)
        where = f", line {line}" if line else ""
        return CraftError(f"{self.path}{where}, `{'.'.join(place)}`: {message}")


def find_line(text: str, place: tuple[str, ...]) -> int | None:
    """The line that a key stands on, or the heading of its table: as near as can be told without a parser of our own.

    Example:
        >>> lines = ["seeds = [0]", '[methods."lora r=8"]', 'method = "lora"', "rank = 8"]
        >>> find_line(chr(10).join(lines), ("methods", "lora r=8", "rank"))
        4
    """
    heading: list[str] = []
    found = None
    for number, line in enumerate(text.splitlines(), 1):
        if match := re.match(r"\s*\[+\s*([^\]]+?)\s*\]+\s*(#.*)?$", line):
            heading = _keys(match.group(1))
            path = heading
        elif match := re.match(r"""\s*((?:"[^"]*"|'[^']*'|[\w.-])+)\s*=""", line):
            path = [*heading, *_keys(match.group(1))]
        else:
            continue
        if tuple(path) == place[: len(path)] and len(path) >= (found or (0, 0))[0]:
            # Of equal headings (one a block) the first: a later one may be meant, but no earlier one.
            found = (len(path), number) if found is None or len(path) > found[0] else found
    return found[1] if found else None


def _keys(text: str) -> list[str]:
    return [part.strip("\"'") for part in re.findall(r""""[^"]*"|'[^']*'|[\w-]+""", text)]
