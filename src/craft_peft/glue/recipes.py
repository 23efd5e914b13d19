"""The numbers that decide how a run is optimised."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import CraftError


def _positive(value: int | float) -> bool:
    return value > 0 and math.isfinite(value)


def _not_negative(value: int | float) -> bool:
    return value >= 0 and math.isfinite(value)


_RANGES: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    ("learning_rate", _positive, "a number above 0"),
    ("head_learning_rate", _not_negative, "a number of at least 0"),
    ("warmup_ratio", lambda value: 0 <= value < 1, "at least 0 and below 1"),
    ("weight_decay", _not_negative, "a number of at least 0"),
    ("head_weight_decay", _not_negative, "a number of at least 0"),
    ("clip", _positive, "a number above 0"),
    ("batch_size", _positive, "a whole number above 0"),
    ("max_length", lambda value: value >= 4, "a whole number of at least 4"),
    ("epochs", _positive, "a whole number above 0"),
)


@dataclass(frozen=True)
class Recipe:
    """Every number that decides how a run is optimised.

    Args:
        learning_rate: Peak rate of the adapter (of the encoder when that is trained).
        head_learning_rate: Peak rate of the classification head.
        warmup_ratio: Share of all steps in which the rate rises from 0 to its peak; it then falls linearly to 0.
        head_start: Key of `craft_peft.glue.heads.HEAD_STARTS`: where the head starts.
        weight_decay: On the adapter.
        head_weight_decay: On the head.
        beta2: Decay of AdamW's second moment.
        epsilon: AdamW's epsilon.
        clip: Largest gradient norm.
        batch_size: Rows a step.
        max_length: Tokens a row; longer texts are cut.
        epochs: Passes over the training set; None takes the task's.
    """

    learning_rate: float = 1e-3
    head_learning_rate: float = 1e-3
    warmup_ratio: float = 0.06
    head_start: str = "fitted"
    weight_decay: float = 0.0
    head_weight_decay: float = 0.0
    beta2: float = 0.999
    epsilon: float = 1e-8
    clip: float = 1.0
    batch_size: int = 32
    max_length: int = 128
    epochs: int | None = None

    def __post_init__(self) -> None:
        for name, allowed, meaning in _RANGES:
            value = getattr(self, name)
            if value is not None and not allowed(value):
                raise CraftError(f"{name}={value} cannot be used: it must be {meaning}.")
