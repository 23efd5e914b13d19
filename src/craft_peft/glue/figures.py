"""What a saved adapter with transforms tells: how much of the weights its core holds, how far its transforms moved.

They are read from the adapter's own file. A published result, which comes without it, holds the figures as its field
`adapter_figures`: `{STACK: {"energy": SHARE, "moved": {"layer": X, "out": Y, "in": Z}}}`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from ..adapters.craft import TRANSFORMS
from ..errors import CraftError
from ..weights import FINGERPRINT_NUMBERS, as_numbers

FIELD = "adapter_figures"
MODES = ("layer", "out", "in")


@dataclass(frozen=True)
class Stack:
    """One stack of a trained adapter.

    Args:
        name: The module's name.
        energy: Share of the weights' squared norm that the core holds, or None where the core was not saved.
        moved: The norm of J - I relative to that of I, by mode.
        matrices: J - I by mode, where the adapter itself was there.
    """

    name: str
    energy: float | None
    moved: dict[str, float]
    matrices: dict[str, np.ndarray] = field(default_factory=dict, compare=False)


def read_stacks(folder: Path) -> tuple[Stack, ...]:
    """Reads the stacks of a saved adapter that has transforms or cores.

    Args:
        folder: Of the adapter.

    Returns:
        One entry a stack; none where there is no adapter, or one of another kind.

    Raises:
        CraftError: The file is damaged or cannot be read.
    """
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        return ()
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    try:
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 - no dictionary
                owner, _, name = key.rpartition(".")
                if name in (*TRANSFORMS, "core", "fingerprint"):
                    tensors.setdefault(owner, {})[name] = file.get_tensor(key).float()
        return tuple(_stack(owner, found) for owner, found in sorted(tensors.items()) if len(found) > 1)
    except (SafetensorError, OSError, RuntimeError, TypeError) as error:  # the last two: tensors of other shapes
        raise CraftError(
            f"{path} is no adapter that can be read ({error}). Remove the folder, and train it again."
        ) from error


def _stack(owner: str, tensors: dict[str, torch.Tensor]) -> Stack:
    # The adapter keeps E = J - I, which is what is asked for here.
    matrices = {mode: tensors[name].numpy() for mode, name in zip(MODES, TRANSFORMS, strict=True) if name in tensors}
    moved = {mode: float(np.linalg.norm(matrix) / math.sqrt(len(matrix))) for mode, matrix in matrices.items()}
    return Stack(owner.rpartition(".")[0].rpartition(".")[2], _energy(tensors), moved, matrices)


def _energy(tensors: dict[str, torch.Tensor]) -> float | None:
    """The core's squared norm relative to the weights', whose norms the fingerprint begins with."""
    core, fingerprint = tensors.get("core"), tensors.get("fingerprint")
    if core is None or fingerprint is None:
        return None
    layers = (len(fingerprint) - sum(core.shape)) // FINGERPRINT_NUMBERS
    norms = as_numbers(fingerprint)[: layers * FINGERPRINT_NUMBERS : FINGERPRINT_NUMBERS].double()
    whole = norms.square().sum().item()
    return core.double().square().sum().item() / whole if whole > 0 else None


def as_field(stacks: Iterable[Stack]) -> dict[str, Any]:
    """The figures as fields of a result: none where there are no stacks.

    Example:
        >>> as_field([Stack("query", 0.5, {"out": 0.125})])
        {'adapter_figures': {'query': {'energy': 0.5, 'moved': {'out': 0.125}}}}
    """
    figures = {stack.name: {"energy": stack.energy, "moved": stack.moved} for stack in stacks}
    return {FIELD: figures} if figures else {}


def from_field(fields: dict[str, Any]) -> tuple[Stack, ...]:
    """The inverse of `as_field`.

    Raises:
        CraftError: The field has another form.
    """
    try:
        return tuple(
            Stack(
                str(name),
                None if kept.get("energy") is None else float(kept["energy"]),
                {mode: float(kept["moved"][mode]) for mode in MODES if mode in kept.get("moved", {})},
            )
            for name, kept in sorted((fields.get(FIELD) or {}).items())
        )
    except (AttributeError, TypeError, ValueError) as error:
        raise CraftError(f"its field `{FIELD}` is not what a sweep writes there ({error})") from error
