"""The table of methods that the runner can train; nothing outside this table asks for a method's name."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig, PeftConfig, TaskType

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


@dataclass(frozen=True)
class MethodOptions:
    """What a user may choose about a method.

    Args:
        ranks: One whole number or more, as the method takes them; None for its default.
        target_modules: Names of the modules to adapt; None for PEFT's default for the model type.
        extra: Further fields of the method's PEFT config.
    """

    ranks: tuple[int, ...] | None = None
    target_modules: tuple[str, ...] | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """A way to adapt a model.

    Args:
        summary: One line for help texts.
        recipe: Its default recipe.
        make_config: Makes the PEFT config, or None when the method adds nothing to the model.
        trains_base: Whether the pretrained weights are trained as well.
        scale_rate: The factor on the recipe's learning rate at other ranks than the method's default.
    """

    summary: str
    recipe: Recipe
    make_config: Callable[[MethodOptions], PeftConfig] | None = None
    trains_base: bool = False
    scale_rate: Callable[[tuple[int, ...]], float] = lambda ranks: 1.0


def _peft_fields(options: MethodOptions) -> dict[str, Any]:
    fields = {"task_type": TaskType.SEQ_CLS, **options.extra}
    if options.target_modules is not None:
        fields["target_modules"] = list(options.target_modules)
    return fields


def _craft_config(options: MethodOptions) -> PeftConfig:
    from .. import CraftConfig

    fields = _peft_fields(options)
    if options.ranks is not None:
        fields["ranks"] = options.ranks
    return CraftConfig(**fields)


def _craft_rate(ranks: tuple[int, ...]) -> float:
    # A step of Adam moves a transform by up to rate x rank in spectral norm; the recipe's rate belongs to rank 100.
    return 100 / max((1, *ranks[1:]))


def _lora_config(options: MethodOptions) -> PeftConfig:
    ranks = options.ranks or (8,)
    if len(ranks) != 1 or ranks[0] < 1:
        raise CraftError(
            f"ranks={ranks} does not fit LoRA, which takes one positive rank. Use for example `--ranks 8`."
        )
    # alpha = r (scaling 1) is the LoRA paper's setting for GLUE, and the one that the rate below belongs to.
    return LoraConfig(**{"r": ranks[0], "lora_alpha": ranks[0], **_peft_fields(options)})


METHODS: dict[str, Method] = {
    "craft": Method(
        summary="CRAFT: transforms of a frozen Tucker core, shared by all layers",
        recipe=Recipe(learning_rate=1e-3),
        make_config=_craft_config,
        scale_rate=_craft_rate,
    ),
    "lora": Method(
        summary="LoRA from PEFT, r = 8 on query and value",
        recipe=Recipe(learning_rate=4e-4),
        make_config=_lora_config,
    ),
    "head": Method(summary="the classification head alone, on the frozen model", recipe=Recipe()),
    "full": Method(
        summary="full fine-tuning",
        recipe=Recipe(learning_rate=2e-5),
        trains_base=True,
    ),
}


def make_peft_config(name: str, options: MethodOptions) -> PeftConfig | None:
    """Makes the PEFT config of a method.

    Args:
        name: A key of `METHODS`.
        options: The user's choices.

    Returns:
        The config, or None for a method that adds nothing to the model.

    Raises:
        CraftError: No such method, or options that it does not take.

    Example:
        >>> from craft_peft.glue.methods import MethodOptions, make_peft_config
        >>> make_peft_config("lora", MethodOptions(ranks=(4,))).r
        4
    """
    method = find_method(name)
    if method.make_config is None:
        if options != MethodOptions():
            raise CraftError(
                f"Method `{name}` adds nothing to the model, so that ranks, target modules and adapter options have "
                f"no meaning for it (found {options}). Leave them out, or choose another method."
            )
        return None
    try:
        return method.make_config(options)
    except TypeError as error:
        raise CraftError(f"Method `{name}` does not take these options: {error}. Found {options}.") from error


def find_method(name: str) -> Method:
    """Looks up a method.

    Args:
        name: A key of `METHODS`.

    Returns:
        Its row.

    Raises:
        CraftError: No such method; names the nearest one and all of them.

    Example:
        >>> from craft_peft.glue.methods import find_method
        >>> find_method("lora").recipe.learning_rate
        0.0004
    """
    if name in METHODS:
        return METHODS[name]
    near = difflib.get_close_matches(name.lower(), METHODS, n=1, cutoff=0.5)
    hint = f" Did you mean `{near[0]}`?" if near else ""
    raise CraftError(f"Unknown method `{name}`.{hint} The methods are: {', '.join(METHODS)}.")
