"""Which target modules of a model form one stack, and in which order."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any, Literal

from peft.tuners.tuners_utils import _get_in_out_features
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from ..errors import CraftError
from ..weights import StackShape, StackWeights
from .base_weights import BaseWeights
from .progress import Progress
from .quantization import adapter_place, backend_of, read_weight

logger = logging.getLogger(__name__)

Together = Literal["projection", "shape", "all"]
"""Which modules form one stack: those of one projection and shape, all of one shape, or all."""


@dataclass(frozen=True)
class Stack:
    """Modules that share an adapter: most often those of one projection over the layers.

    Args:
        keys: their paths in the model, in its order.
        modules: the linear modules themselves.
        ranks: what `rank_pattern` gives them instead of the config's ranks, or None.
    """

    keys: tuple[str, ...]
    modules: tuple[nn.Module, ...]
    ranks: Any = None

    @property
    def pattern(self) -> str:
        """The modules' common path, with ``*`` for the layer index."""
        return " + ".join(dict.fromkeys(path_pattern(key) for key in self.keys))

    @property
    def name(self) -> str:
        """The projection, such as ``query``."""
        return " + ".join(dict.fromkeys(key.rpartition(".")[2] for key in self.keys))

    @property
    def shape(self) -> StackShape:
        """The sizes of the weights as ``(out, in)``."""
        blocks = tuple(len(list(inside)) for _, inside in groupby(self.keys, layer_path))
        return StackShape(tuple(weight_shape(module) for module in self.modules), blocks)

    @property
    def is_empty(self) -> bool:
        """Whether a weight is on the meta device, where it has a shape and no numbers."""
        return any(adapter_place(module)[0].type == "meta" for module in self.modules)

    def read_weights(self, progress: Progress | None = None) -> StackWeights:
        """The pretrained weights as ``(out, in)``, a tensor a layer, each read when it is asked for.

        They are views of plain weights, copies of others.

        Args:
            progress: where to show how far a decomposition of these weights has come.

        Raises:
            CraftError: when a weight is read that is on the meta device, whose back end cannot dequantise it, or that
                holds NaN or infinity; names the module.
        """
        return BaseWeights(self.keys, self.read_weight, progress or Progress())

    def read_weight(self, layer: int) -> Tensor:
        """One of `read_weights`, which may hold NaN or infinity."""
        key, module = self.keys[layer], self.modules[layer]
        if adapter_place(module)[0].type == "meta":
            raise CraftError(
                f"The weight of '{key}' is on the meta device, so it holds no numbers to decompose. Load the base "
                "model with its weights first (for example without `init_empty_weights`)."
            )
        return oriented(module, read_weight(module, f"'{key}'"))


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
    d_in, d_out = _get_in_out_features(module)
    return d_out, d_in


def is_linear(module: nn.Module) -> bool:
    """Whether a module can be adapted: `torch.nn.Linear`, transformers' `Conv1D`, or what PEFT knows as quantised."""
    return isinstance(module, nn.Linear | Conv1D) or getattr(backend_of(module), "layer_type", None) == "linear"


def path_pattern(key: str) -> str:
    """A module's path with ``*`` for every index in it.

    Example:
        >>> path_pattern("encoder.layer.3.attention.query")
        'encoder.layer.*.attention.query'
    """
    return ".".join("*" if part.isdigit() else part for part in key.split("."))


def layer_path(key: str) -> str:
    """The path of the layer of the model that a module lies in: up to the first index, or all of it.

    Example:
        >>> layer_path("encoder.layer.3.attention.query")
        'encoder.layer.3'
    """
    before, *after = re.split(r"(?<=\.)(\d+)(?=\.|$)", key, maxsplit=1)
    return before + after[0] if after else key


def collect_stacks(
    targets: Iterable[tuple[str, nn.Module]],
    together: Together = "projection",
    ranks_of: Callable[[str], Any] = lambda key: None,
) -> list[Stack]:
    """Group target modules into stacks.

    Modules of one projection are those whose paths differ only in the layer index. Where their shapes alternate, those
    of each shape form a stack, and a message says so.

    Args:
        targets: path and module of every target, in the order of the model.
        together: which modules form one stack.
        ranks_of: the ranks that a module has instead of the config's, or None; only modules with the same form a stack.

    Returns:
        The stacks, in the order of their first module.

    Raises:
        CraftError: a target that is not linear, or that is never called.

    Example:
        >>> model = nn.ModuleDict({"layer": nn.ModuleList(nn.ModuleDict({"query": nn.Linear(4, 4)}) for _ in range(3))})
        >>> stacks = collect_stacks((k, m) for k, m in model.named_modules() if k.endswith("query"))
        >>> [(stack.pattern, stack.shape.layers) for stack in stacks]
        [('layer.*.query', 3)]
    """
    groups: dict[Any, list[tuple[str, nn.Module]]] = {}
    for key, module in targets:
        if not is_linear(module):
            raise CraftError(
                f"The target module '{key}' is a {type(module).__name__}, not a linear layer. `target_modules` has to "
                "name torch.nn.Linear or transformers' Conv1D modules, or quantised ones that PEFT knows."
            )
        if isinstance(module, NonDynamicallyQuantizableLinear):
            raise CraftError(
                f"The target module '{key}' is the output projection of a torch.nn.MultiheadAttention, which uses its "
                "weight without calling it, so that an adapter on it would do nothing. Leave it out with "
                "`exclude_modules`."
            )
        apart = {
            "projection": (path_pattern(key), weight_shape(module)),
            "shape": weight_shape(module),
            "all": None,
        }[together]
        groups.setdefault((ranks_of(key), apart), []).append((key, module))
    stacks = []
    for (ranks, _), members in groups.items():
        keys, modules = zip(*members, strict=True)
        stacks.append(Stack(keys, modules, ranks))
    if together == "projection":
        _say_where_shapes_alternate(stacks)
    return stacks


def _say_where_shapes_alternate(stacks: list[Stack]) -> None:
    by_pattern: dict[tuple[str, Any], list[Stack]] = {}
    for stack in stacks:
        by_pattern.setdefault((stack.pattern, stack.ranks), []).append(stack)
    for (pattern, _), parts in by_pattern.items():
        if len(parts) > 1:
            say_once(
                f"The modules '{pattern}' have {len(parts)} shapes, so they form {len(parts)} stacks with an adapter "
                f"each: {', '.join(str(part.shape) for part in parts)}."
            )


@cache
def say_once(sentence: str) -> None:
    """Log a message; not again in this process."""
    logger.warning(sentence)
