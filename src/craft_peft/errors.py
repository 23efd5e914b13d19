"""The one exception type of this package, and what its messages share."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class CraftError(ValueError):
    """Input that cannot be used: says what was found, what is required and what to do.

    Every error that a user of `craft_peft` can cause is a `CraftError`, so that a program (the command line, a
    training service) can tell a mistake in its input from a defect in the code. It is a `ValueError`, so that code
    written for PEFT, which raises `ValueError`, keeps working.

    Example:
        >>> from craft_peft import CraftConfig, CraftError
        >>> try:
        ...     CraftConfig(ranks=(4, 0, 8))
        ... except CraftError as error:
        ...     print(type(error).__mro__[1].__name__)
        ValueError
    """


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question with the name that comes closest to a mistyped one, with a space before it; or nothing.

    Example:
        >>> did_you_mean("Lorra", ["lora", "vera"]), did_you_mean("x", ["lora", "vera"])
        (' Did you mean `lora`?', '')
    """
    near = get_close_matches(name.lower(), list(known), n=1, cutoff=0.5)
    return f" Did you mean `{near[0]}`?" if near else ""
