"""Options of several values, with spaces or commas between them, and how their words are read."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from typing import Any


class Several(argparse.Action):
    """An option of several values: `--names a b`, `--names a,b`.

    Args:
        read: The values in one word.
        add: Whether the option may be repeated; otherwise the last one counts, as for other options.
        formed: Whether each word must have a form (NAME=VALUE) that tells it from a positional argument.
        kwargs: As for every action.
    """

    def __init__(
        self, *args: Any, read: Callable[[str], Sequence[Any]], add: bool = False, formed: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(*args, **{"default": () if add else None, "nargs": "+"} | kwargs)
        self.read, self.add, self.formed = read, add, formed

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, words: Any, *_: Any) -> None:
        """Keep the words until all are known: the last may be positional arguments."""
        namespace.several = [*getattr(namespace, "several", ()), (self, words)]

    def takes(self, word: str) -> bool:
        """Whether a word can only be a value of this option."""
        return self.formed and "=" in word


class Parser(argparse.ArgumentParser):
    """A parser that lets positional arguments follow an option of several values.

    `argparse` gives such an option every word up to the next option. The last of them, but never its first, go to the
    positional arguments that were not given elsewhere: those after one word mean what they mean after other options.

    Example:
        >>> parser = Parser()
        >>> _ = parser.add_argument("folder"), parser.add_argument("--names", action=Several, read=words)
        >>> for line in ("--names a b runs/x", "runs/x --names a,b c"):
        ...     found = parser.parse_args(line.split())
        ...     found.folder, found.names
        ('runs/x', ('a', 'b'))
        ('runs/x', ('a', 'b', 'c'))
    """

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse words, as every parser does."""
        positionals = [action for action in self._get_positional_actions() if action.nargs in (None, "?")]
        for action in positionals:
            action.required = False  # the options of several values may hold it
        found, rest = super().parse_known_args(args, namespace)
        free = [action for action in positionals if getattr(found, action.dest) is None]
        several: list[tuple[Several, list[str]]] = found.__dict__.pop("several", [])
        for option, given in reversed(several):
            count = 0
            while count < min(len(free), len(given) - 1) and not option.takes(given[-1 - count]):
                count += 1
            for action, word in zip(free, given[len(given) - count :], strict=False):
                setattr(found, action.dest, word)
            del free[:count], given[len(given) - count :]
        self._read(several, found)
        found.options = {action.dest: action for action in self._actions if action.option_strings}
        if missing := [str(action.metavar or action.dest) for action in free if action.nargs is None]:
            self.error(f"the following arguments are required: {', '.join(missing)}")
        return found, rest

    def _read(self, several: list[tuple[Several, list[str]]], found: argparse.Namespace) -> None:
        values: dict[Several, list[Any]] = {}
        for option, given in several:
            earlier = values.get(option, []) if option.add else []
            try:
                values[option] = [*earlier, *(value for word in given for value in option.read(word))]
            except argparse.ArgumentTypeError as error:
                self.error(str(argparse.ArgumentError(option, str(error))))
        for option, read in values.items():
            setattr(found, option.dest, tuple(read))


def words(text: str) -> tuple[str, ...]:
    """Names between commas.

    Example:
        >>> words("query, value"), words("query,")
        (('query', 'value'), ('query',))
    """
    found = tuple(part.strip() for part in text.split(",") if part.strip())
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} holds no name; give one or more, as a,b or a b")
    return found


def words_or_none(text: str) -> tuple[str, ...]:
    """Names between commas; `none` is no name.

    Example:
        >>> words_or_none("tensorboard,wandb"), words_or_none("none")
        (('tensorboard', 'wandb'), ())
    """
    return () if text == "none" else words(text)


def whole_numbers(text: str) -> tuple[int, ...]:
    """Whole numbers between commas.

    Example:
        >>> whole_numbers("12,100,100")
        (12, 100, 100)
    """
    try:
        return tuple(int(part) for part in words(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 12,100,100 or 8") from None


def path(text: str) -> tuple[str]:
    """A path, which may hold a comma.

    Example:
        >>> path("runs, old")
        ('runs, old',)
    """
    return (text,)


def named_value(text: str) -> tuple[tuple[str, Any]]:
    """A name and a value: numbers, lists, true and false as in JSON, all else as a string.

    Example:
        >>> named_value("tying=free"), named_value("trained_modes=[1, 2]")
        ((('tying', 'free'),), (('trained_modes', [1, 2]),))
    """
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE, such as tying=free")
    try:
        return ((name, json.loads(value)),)
    except json.JSONDecodeError:
        return ((name, value),)
