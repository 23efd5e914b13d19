"""What saved adapters tell: how much of the weights their core holds, and how far their transforms moved.

A run folder holds the adapter itself. A published result may hold the figures instead, as field `adapter_figures`:
`{STACK: {"energy": SHARE, "moved": {"layer": X, "out": Y, "in": Z}}}`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from ...adapters.craft import TRANSFORMS
from ...weights import FINGERPRINT_NUMBERS
from .grouping import Grid
from .reading import LeftOut

WEIGHTS = "adapter_model.safetensors"
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


@dataclass(frozen=True)
class Insight:
    """The stacks of one run.

    Args:
        label: The method.
        task: The task.
        seed: The seed.
        stacks: In the order of their names.
    """

    label: str
    task: str
    seed: int
    stacks: tuple[Stack, ...]


def read_insights(grid: Grid) -> tuple[list[Insight], list[LeftOut]]:
    """Reads the adapter of every run that has one with transforms.

    Args:
        grid: The results.

    Returns:
        One entry a run, by method, task and seed; and adapters that cannot be read.
    """
    insights: list[Insight] = []
    left_out: list[LeftOut] = []
    for variant in grid.variants:
        for (task, seed), run in sorted(variant.runs.items()):
            weights = run.folder / WEIGHTS if run.folder else None
            stacks: tuple[Stack, ...] = ()
            try:
                stacks = read_stacks(weights) if weights and weights.is_file() else _kept(run.fields)
            except (SafetensorError, OSError, RuntimeError, ValueError, TypeError, AttributeError) as error:
                left_out.append(LeftOut(weights or run.path, f"no figures of its adapter: {error}"))
            if stacks:
                insights.append(Insight(variant.label, task, seed, stacks))
    return insights, left_out


def read_stacks(path: Path) -> tuple[Stack, ...]:
    """Reads the stacks of a saved adapter that has transforms.

    Args:
        path: Its `adapter_model.safetensors`.

    Returns:
        One entry a stack; none for an adapter without transforms or cores.
    """
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    with safe_open(path, "pt") as file:
        for key in file.keys():  # noqa: SIM118 - no dictionary
            owner, _, name = key.rpartition(".")
            if name in (*TRANSFORMS, "core", "fingerprint"):
                tensors.setdefault(owner, {})[name] = file.get_tensor(key).float()
    return tuple(_stack(owner, found) for owner, found in sorted(tensors.items()) if len(found) > 1)


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
    norms = fingerprint[: layers * FINGERPRINT_NUMBERS : FINGERPRINT_NUMBERS].double()
    whole = norms.square().sum().item()
    return core.double().square().sum().item() / whole if whole > 0 else None


def _kept(fields: dict[str, Any]) -> tuple[Stack, ...]:
    figures = fields.get("adapter_figures") or {}
    return tuple(
        Stack(str(name), _share(kept.get("energy")), {mode: float(kept["moved"][mode]) for mode in _modes(kept)})
        for name, kept in sorted(figures.items())
    )


def _share(value: Any) -> float | None:
    return None if value is None else float(value)


def _modes(kept: dict[str, Any]) -> Iterable[str]:
    return [mode for mode in MODES if mode in kept.get("moved", {})]
