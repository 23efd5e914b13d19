"""Which modules of a model an adapter is put on."""

from __future__ import annotations

from collections.abc import Collection
from copy import copy
from difflib import get_close_matches

import peft
from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, AuxiliaryTrainingWrapper
from torch import nn

from ..errors import CraftError
from .config import StackConfig
from .layer import StackedLinear
from .stacks import is_linear

QUERY_AND_VALUE = {
    **TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    # PEFT's table adds the feed-forward layers here; a stack is a projection of the attention.
    "phi": ["q_proj", "v_proj"],
    # Missing in PEFT's table.
    "distilbert": ["q_lin", "v_lin"],
    "modernbert": ["Wqkv"],
    "vit": ["query", "value", "q_proj", "v_proj"],  # before and since transformers 5
    "whisper": ["q_proj", "v_proj"],
}
"""Default target modules by model type."""


def set_default_targets(config: StackConfig, model: nn.Module) -> None:
    """Fill in `target_modules` where the user gave none: query and value, under their names in the model's type.

    Raises:
        CraftError: a model type without defaults.
    """
    if config.target_modules is None:
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        if model_type not in QUERY_AND_VALUE:
            raise CraftError(
                f"The model type {model_type!r} has no default target modules: name them with `target_modules`. "
                f"{describe_linear_modules(model)}"
            )
        names = QUERY_AND_VALUE[model_type]
        config.target_modules = names if isinstance(names, str) else set(names)


def find_targets(
    config: StackConfig, model: nn.Module, saved: Collection[str] | None = None
) -> list[tuple[str, nn.Module]]:
    """Path and linear module of every target.

    Args:
        config: names the targets; 'all-linear' in it is replaced by what it stands for.
        model: the base model, adapted or not.
        saved: the paths of modules that a saved adapter has tensors for; they are used instead of the config's.

    Raises:
        CraftError: nothing matches, or an adapter is merged into a target.
    """
    _maybe_include_all_linear_layers(config, model)
    targets: list[tuple[str, nn.Module]] = []
    inside: tuple[str, ...] = ()
    for key, module in model.named_modules():
        if saved is not None:
            key = key.removeprefix("_orig_mod.")  # of a compiled model, as PEFT does
        if not key or key.startswith(inside):
            continue
        if isinstance(module, BaseTunerLayer):
            inside = (*inside, key + ".")
        if check_target_module_exists(config, key) if saved is None else key in saved:
            if getattr(module, "merged", False):
                raise CraftError(
                    f"The adapter(s) {module.merged_adapters} are merged into '{key}', so its weight is not the "
                    "pretrained one. Call `unmerge_adapter()` before you add another adapter."
                )
            targets.append((key, module.get_base_layer() if isinstance(module, StackedLinear) else module))
    if not targets:
        everywhere = copy(config)
        everywhere.exclude_modules = everywhere.modules_to_save = None
        left_out = [key for key, _ in model.named_modules() if key and check_target_module_exists(everywhere, key)]
        raise explain_no_match(config.target_modules, left_out, model)
    return targets


class NoTargetError(CraftError, getattr(peft, "NoMatchingPeftModuleError", ValueError)):  # type: ignore[misc]
    """Target modules that match nothing; PEFT's own error for it, which peft 0.20 does not have yet, is a base."""


def explain_no_match(target_modules: Collection[str] | None, left_out: list[str], model: nn.Module) -> NoTargetError:
    """The error for target modules that match nothing: names what was left out, and what there is to match."""
    found = _linear_names(model)
    wanted = [target_modules] if isinstance(target_modules, str) else sorted(target_modules or ())
    close = [match for name in wanted for match in get_close_matches(name, found, n=1)]
    if left_out:
        named = ", ".join(repr(key) for key in left_out[:3]) + (", ..." if len(left_out) > 3 else "")
        hint = f" `exclude_modules` and `modules_to_save` leave out {named}."
    else:
        hint = f" Did you mean {', '.join(repr(name) for name in close)}?" if close else ""
    return NoTargetError(
        f"`target_modules={wanted}` matches no module of {type(model).__name__}.{hint} {describe_linear_modules(model)}"
    )


def describe_linear_modules(model: nn.Module) -> str:
    """A sentence with the names that `target_modules` can hold."""
    names = ", ".join(repr(name) for name in sorted(_linear_names(model)))
    return f"Its linear modules are called {names or '(there are none)'}."


def _linear_names(model: nn.Module) -> set[str]:
    names: set[str] = set()
    inside: tuple[str, ...] = ()
    for key, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):  # a head that is saved, with its copies
            inside = (*inside, key + ".")
        elif is_linear(module) and not key.startswith(inside):
            names.add(key.removesuffix(".base_layer").rpartition(".")[2])
    return names
