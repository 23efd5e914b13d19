"""Types of command-line arguments that several commands have."""

from __future__ import annotations

import argparse


def words(text: str) -> tuple[str, ...]:
    """Names between commas.

    Example:
        >>> words("query, value")
        ('query', 'value')
    """
    return tuple(part.strip() for part in text.split(","))


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
