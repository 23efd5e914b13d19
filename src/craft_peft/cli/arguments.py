"""Types of command-line arguments that several commands have."""

from __future__ import annotations

import argparse
import json
import re
from typing import Any


def words(text: str) -> tuple[str, ...]:
    """Names between commas.

    Example:
        >>> words("query, value")
        ('query', 'value')
    """
    return tuple(part.strip() for part in text.split(","))


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
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 12,100,100 or 8") from None


def named_value(text: str) -> tuple[str, Any]:
    """A name and a value: numbers, lists, true and false as in JSON, all else as a string.

    Example:
        >>> named_value("tying=free"), named_value("trained_modes=[1, 2]")
        (('tying', 'free'), ('trained_modes', [1, 2]))
    """
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE, such as tying=free")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def name_options(message: str) -> str:
    """A message of the library, which names arguments as Python does, with the options of the command line.

    Example:
        >>> name_options('Say `kind="classification"`.')
        'Say `--kind classification`.'
    """
    return re.sub(
        r'`(\w+)="(\w+)"`', lambda found: f"`--{found[1].replace('_', '-')} {found[2]}`", message, flags=re.ASCII
    )
