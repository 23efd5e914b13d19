"""The table of methods: what the laws need to know of each. A new method is one more row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from craft_peft import CraftConfig
from craft_peft.adapters.base import StackAdapter, StackShape
from craft_peft.adapters.craft import CraftAdapter
from craft_peft.plugin.config import StackConfig


@dataclass(frozen=True)
class Method:
    """One method.

    Args:
        name: its name in PEFT, lower case.
        label: what the row is called in the tests.
        config: makes a config from keyword arguments, with ranks that fit the small models of the tests.
        count: trained numbers of one stack, by the formula of the paper.
        naive_delta: what is added to layer l's weight, written with loops from the paper's equation.
    """

    name: str
    label: str
    config: Callable[..., StackConfig]
    count: Callable[[StackShape], int]
    naive_delta: Callable[[StackAdapter, int], Tensor]

    def adapter(self, shape: StackShape, seed: int = 0, dtype: torch.dtype = torch.float64, **fields) -> StackAdapter:
        """An initialised adapter on random weights, away from its start if `init_weights=False` is among the fields."""
        torch.manual_seed(seed)
        adapter = self.config(**fields).build_adapter("query", shape).to(dtype)
        adapter.initialise(lambda: [torch.randn(matrix, dtype=dtype) for matrix in shape.matrices])
        return adapter


def _craft_config(**fields) -> CraftConfig:
    return CraftConfig(**{"ranks": (2, 4, 3), **fields})


CRAFT_COUNTS = {
    "shared": lambda shape: 2**2 + 4**2 + 3**2,
    "diagonal": lambda shape: 2**2 + 4**2 + 3**2 + shape.layers * (4 + 3),
    "free": lambda shape: shape.layers * 4 * 3,
}


def _craft_naive_delta(adapter: CraftAdapter, layer: int) -> Tensor:
    """T(J) - T(I) of one layer, entry by entry: the difference of the moving and the fixed part of the paper's form."""

    def tucker_entry(j1: Tensor, j2: Tensor, j3: Tensor, out: int, in_: int) -> float:
        layer_factor, out_factor, in_factor = adapter.layer_factor @ j1, adapter.out_factor @ j2, adapter.in_factor @ j3
        total = 0.0
        for a in range(adapter.ranks[0]):
            for b in range(adapter.ranks[1]):
                for c in range(adapter.ranks[2]):
                    core = float(adapter.core[a, b, c])
                    total += core * float(layer_factor[layer, a] * out_factor[out, b] * in_factor[in_, c])
        return total

    if adapter.tying == "free":
        return adapter.scaling * adapter.out_factor @ adapter.middles[layer].detach() @ adapter.in_factor.T
    moved = list(adapter.transforms().values())
    if adapter.tying == "diagonal":  # a layer's diagonals turn the shared transforms into transforms of its own
        moved[1] = torch.diag(1 + adapter.out_diagonals[layer].detach()) @ moved[1]
        moved[2] = torch.diag(1 + adapter.in_diagonals[layer].detach()) @ moved[2]
    fixed = [torch.eye(rank, dtype=adapter.core.dtype) for rank in adapter.ranks]
    return torch.tensor(
        [
            [
                adapter.scaling * (tucker_entry(*moved, out, in_) - tucker_entry(*fixed, out, in_))
                for in_ in range(adapter.shape.d_in)
            ]
            for out in range(adapter.shape.d_out)
        ],
        dtype=adapter.core.dtype,
    )


METHODS = [
    Method(
        name="craft",
        label="craft" if (tying, basis) == ("shared", "weights") else f"craft, {tying}, {basis}",
        config=partial(_craft_config, tying=tying, basis=basis),
        count=CRAFT_COUNTS[tying],
        naive_delta=_craft_naive_delta,
    )
    for tying, basis in [("shared", "weights"), ("diagonal", "weights"), ("free", "random")]
]
