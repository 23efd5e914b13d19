"""Which target modules of a model form one stack, in which order, and whether they can be stacked."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..adapters.base import StackShape
from ..errors import CraftError


@dataclass(frozen=True)
class Stack:
    """The modules of one projection over the layers.

    Args:
        pattern: the modules' common path, with ``*`` for the layer index.
        keys: their paths in the model, in the order of the layers.
        modules: the linear modules themselves.
    """

    pattern: str
    keys: tuple[str, ...]
    modules: tuple[nn.Module, ...]

    @property
    def name(self) -> str:
        """The projection, such as ``query``."""
        return self.pattern.rpartition(".")[2]

    @property
    def shape(self) -> StackShape:
        """Number of layers, and the sizes of their weights as ``(out, in)``."""
        return StackShape(len(self.modules), *weight_shape(self.modules[0]))

    def read_weights(self) -> list[Tensor]:
        """The pretrained weights as ``(out, in)``, a tensor a layer: views, not copies.

        Raises:
            CraftError: a weight on the meta device, quantised, or with NaN or infinity; names the module.
        """
        weights = []
        for key, module in zip(self.keys, self.modules, strict=True):
            weight = oriented(module, cast(Tensor, module.weight).detach())
            if weight.is_meta:
                raise CraftError(
                    f"The weight of '{key}' is on the meta device, so it holds no numbers to decompose. Load the base "
                    "model with its weights first (for example without `init_empty_weights`)."
                )
            if not weight.is_floating_point():
                raise CraftError(
                    f"The weight of '{key}' is stored as {weight.dtype}, which cannot be decomposed. Load the base "
                    "model in float32, bfloat16 or float16."
                )
            if not torch.isfinite(weight).all():
                raise CraftError(
                    f"The weight of '{key}' holds NaN or infinity. Load the base model again, or leave that module out "
                    "with `exclude_modules`."
                )
            weights.append(weight)
        return weights


def oriented(module: nn.Module, matrix: Tensor) -> Tensor:
    """A matrix of a linear module turned from the module's layout into ``(out, in)``, or back: its own inverse."""
    return matrix.T if isinstance(module, Conv1D) else matrix


def weight_shape(module: nn.Module) -> tuple[int, int]:
    """The sizes ``(out, in)`` of a linear module's weight.

    Example:
        >>> weight_shape(nn.Linear(3, 5))
        (5, 3)
    """
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    d_in, d_out = cast(Tensor, module.weight).shape
    return d_out, d_in


def collect_stacks(targets: Iterable[tuple[str, nn.Module]]) -> list[Stack]:
    """Group target modules into stacks: modules whose paths differ only in the layer index are one stack.

    Args:
        targets: path and module of every target, in the order of the model.

    Returns:
        The stacks, in the order of their first module.

    Raises:
        CraftError: a target that is not linear, or targets of one projection with different shapes.

    Example:
        >>> model = nn.ModuleDict({"layer": nn.ModuleList(nn.ModuleDict({"query": nn.Linear(4, 4)}) for _ in range(3))})
        >>> stacks = collect_stacks((k, m) for k, m in model.named_modules() if k.endswith("query"))
        >>> [(stack.pattern, stack.shape.layers) for stack in stacks]
        [('layer.*.query', 3)]
    """
    groups: dict[str, list[tuple[str, nn.Module]]] = {}
    for key, module in targets:
        if not isinstance(module, nn.Linear | Conv1D):
            raise CraftError(
                f"The target module '{key}' is a {type(module).__name__}, not a linear layer. `target_modules` has to "
                "name torch.nn.Linear or transformers' Conv1D modules."
            )
        pattern = ".".join("*" if part.isdigit() else part for part in key.split("."))
        groups.setdefault(pattern, []).append((key, module))
    return [_one_stack(pattern, members) for pattern, members in groups.items()]


def _one_stack(pattern: str, members: Sequence[tuple[str, nn.Module]]) -> Stack:
    first_key, first = members[0]
    for key, module in members:
        if weight_shape(module) != weight_shape(first):
            raise CraftError(
                f"The modules '{pattern}' cannot form one stack: '{first_key}' has the shape {weight_shape(first)} and "
                f"'{key}' has {weight_shape(module)}, as (out, in). Adapt those of one shape at a time, by "
                "`layers_to_transform` or `exclude_modules`."
            )
    keys, modules = zip(*members, strict=True)
    return Stack(pattern, keys, modules)


def explain_no_match(target_modules: Collection[str] | None, excluded: Sequence[str], model: nn.Module) -> CraftError:
    """The error for target modules that match nothing: names what was left out, and what there is to match."""
    found = _linear_names(model)
    wanted = [target_modules] if isinstance(target_modules, str) else sorted(target_modules or ())
    close = [match for name in wanted for match in get_close_matches(name, found, n=1)]
    if excluded:
        named = ", ".join(repr(key) for key in excluded[:3]) + (", ..." if len(excluded) > 3 else "")
        hint = f" `exclude_modules` and `modules_to_save` leave out {named}."
    else:
        hint = f" Did you mean {', '.join(repr(name) for name in close)}?" if close else ""
    return CraftError(
        f"`target_modules={wanted}` matches no module of {type(model).__name__}.{hint} {describe_linear_modules(model)}"
    )


def describe_linear_modules(model: nn.Module) -> str:
    """A sentence with the names that `target_modules` can hold."""
    names = ", ".join(repr(name) for name in sorted(_linear_names(model)))
    return f"Its linear modules are called {names or '(there are none)'}."


def _linear_names(model: nn.Module) -> set[str]:
    return {key.rpartition(".")[2] for key, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
