"""Looks methods up in their table, and makes their PEFT configs."""

from __future__ import annotations

import dataclasses

from peft import PeftConfig, TaskType

from ..errors import CraftError, did_you_mean
from .method_row import Method, MethodOptions
from .method_table import METHODS


def make_peft_config(name: str, options: MethodOptions) -> PeftConfig | None:
    """Makes the PEFT config of a method.

    Args:
        name: A key of `METHODS`.
        options: The user's choices; a budget has to be turned into ranks first (`craft_peft.glue.budgets`).

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
    if method.config is None:
        given = {**vars(options), "method_options": options.extra}
        found = ", ".join(f"`{key}={value}`" for key, value in given.items() if key != "extra" and value)
        if found:
            raise CraftError(
                f"Method `{name}` adds nothing to the model, so that ranks, a budget, target modules and adapter "
                f"options have no meaning for it (found {found}). Leave them out, or choose another method."
            )
        return None
    setting, ranks = method.setting, method.setting.default if options.ranks is None else options.ranks
    if ranks is not None and (len(ranks) != len(setting.names) or min(ranks) < 1):
        raise CraftError(
            f"ranks={ranks} does not fit method `{name}`, which takes {len(setting.names)} whole number(s) of at least "
            f"1 ({', '.join(setting.names)}), as `ranks={setting.default or (8,) * len(setting.names)}`."
        )
    fields = {"task_type": TaskType.SEQ_CLS, **({} if ranks is None else method.fields(*ranks)), **options.extra}
    if options.target_modules is not None:
        fields["target_modules"] = list(options.target_modules)
    known = [field.name for field in dataclasses.fields(method.config) if field.init]
    if unknown := [key for key in fields if key not in known]:
        raise CraftError(
            f"Method `{name}` does not take these options: {', '.join(map(repr, unknown))}."
            f"{did_you_mean(unknown[0], known)} The options are the fields of {method.config.__name__}."
        )
    try:
        return method.config(**fields)
    except TypeError as error:
        raise CraftError(f"Method `{name}` does not take these options: {error}.") from error


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
    raise CraftError(f"Unknown method `{name}`.{did_you_mean(name, METHODS)} The methods are: {', '.join(METHODS)}.")
