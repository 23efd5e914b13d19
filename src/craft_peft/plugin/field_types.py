"""Does every field of a config hold what its annotation says? Files from elsewhere may hold anything."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ..errors import CraftError


def check_types(config: Any) -> None:
    """Refuse a dataclass instance with a field of another type than its annotation.

    Raises:
        CraftError: names the field, its value and its type.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass
        ... class Sizes:
        ...     ranks: list[int]
        >>> check_types(Sizes([1, 2]))
        >>> check_types(Sizes([1, "2"]))
        Traceback (most recent call last):
            ...
        craft_peft.errors.CraftError: ranks=[1, '2'] has the wrong type: list[int] is needed.
    """
    for name, hint in _field_hints(type(config)).items():
        value = getattr(config, name)
        if not conforms(value, hint):
            shown = repr(value)
            shown = shown if len(shown) <= 100 else f"{shown[:100]}..."
            if get_origin(hint) is Literal:
                raise CraftError(f"{name}={shown} is unknown. Use one of {', '.join(map(str, get_args(hint)))}.")
            raise CraftError(f"{name}={shown} has the wrong type: {_describe(hint)} is needed.")


def conforms(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type. Whole numbers pass for floats; NaN, infinity and truth values do not.

    Example:
        >>> conforms(1, float), conforms(True, int), conforms(["a"], list[str] | None), conforms(float("nan"), float)
        (True, False, True, False)
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, UnionType):
        return any(conforms(value, argument) for argument in arguments)
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in arguments)
    if hint is None or hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, origin) and all(
            conforms(part, argument) for pair in value.items() for part, argument in zip(pair, arguments, strict=True)
        )
    if origin is tuple:
        return isinstance(value, tuple) and _conform_in_turn(value, arguments)
    if isinstance(origin, type) and issubclass(origin, Collection):
        return (
            isinstance(value, origin)
            and not isinstance(value, str)
            and all(conforms(part, arguments[0]) for part in value)
        )
    return isinstance(value, origin or hint)


def _conform_in_turn(values: Sequence[Any], hints: Sequence[Any]) -> bool:
    if len(hints) == 2 and hints[1] is Ellipsis:
        return all(conforms(value, hints[0]) for value in values)
    return len(values) == len(hints) and all(conforms(v, hint) for v, hint in zip(values, hints, strict=True))


def _field_hints(kind: type) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


def _describe(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint).replace("typing.", "")
