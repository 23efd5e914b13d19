"""The table of methods: what the laws need to know of each. A new method is one more row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import naive_superlora
import torch
from torch import Tensor

from craft_peft import CraftConfig, LotrConfig, SuperLoraConfig
from craft_peft.adapters.base import StackAdapter
from craft_peft.adapters.craft import CraftAdapter
from craft_peft.adapters.lotr import LotrAdapter
from craft_peft.plugin.config import StackConfig
from craft_peft.weights import StackShape


@dataclass(frozen=True)
class Method:
    """One method.

    Args:
        name: its name in PEFT, lower case.
        config: makes a config from keyword arguments, with ranks that fit the small models of the tests.
        count: trained numbers for the target matrices, given those of each projection, by the formula of the paper.
        naive_delta: what is added to layer l's weight, written with loops from the paper's equation.
        setting: what tells this row from others of the same method.
        exceptions: laws that do not hold for it, by name, and why.
    """

    name: str
    config: Callable[..., StackConfig]
    count: Callable[[Sequence[StackShape]], int]
    naive_delta: Callable[[StackAdapter, int], Tensor]
    setting: str = ""
    exceptions: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name}-{self.setting}" if self.setting else self.name

    def adapter(self, shape: StackShape, seed: int = 0, dtype: torch.dtype = torch.float64, **fields) -> StackAdapter:
        """An initialised adapter on random weights, away from its start if `init_weights=False` is among the fields."""
        torch.manual_seed(seed)
        adapter = self.config(**fields).build_adapter("query", shape).to(dtype)
        adapter.initialise(lambda: [torch.randn(matrix, dtype=dtype) for matrix in shape.matrices])
        return adapter


def _craft_config(**fields) -> CraftConfig:
    return CraftConfig(**{"ranks": (2, 4, 3), **fields})


CRAFT_COUNTS = {  # of one stack
    "shared": lambda shape: 2**2 + 4**2 + 3**2,
    "diagonal": lambda shape: 2**2 + 4**2 + 3**2 + shape.layers * (4 + 3),
    "free": lambda shape: shape.layers * 4 * 3,
}


def _craft_count(projections: Sequence[StackShape], *, tying: str) -> int:
    return sum(CRAFT_COUNTS[tying](shape) for shape in projections)


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


def _lotr_config(**fields) -> LotrConfig:
    return LotrConfig(**{"r": 3, "init_std": 0.5, **fields})


def _lotr_svd_config(**fields) -> LotrConfig:
    return _lotr_config(**{"init": "svd", "group": "per_projection", **fields})


def _lotr_count(projections: Sequence[StackShape], *, groups: int, r: int = 3) -> int:
    matrices = sum(shape.layers for shape in projections)
    return groups * r * sum(projections[0].matrix) + matrices * r**2


def _lotr_naive_delta(adapter: LotrAdapter, layer: int) -> Tensor:
    """What the three matrices stand for now, less what they stood for at the start, entry by entry."""

    def entry(out_factor: Tensor, core: Tensor, in_factor: Tensor, out: int, in_: int) -> float:
        rank = adapter.r
        return sum(float(out_factor[out, a] * core[a, b] * in_factor[in_, b]) for a in range(rank) for b in range(rank))

    now = [tensor.detach() for tensor in (adapter.out_factor, adapter.core[layer], adapter.in_factor)]
    start = [torch.zeros_like(tensor) for tensor in now]
    if adapter.start_core is not None:
        start = [adapter.start_out_factor, adapter.start_core[layer], adapter.start_in_factor]
        now = [change + tensor for change, tensor in zip(now, start, strict=True)]
    d_out, d_in = adapter.shape.matrix
    difference = [[entry(*now, out, in_) - entry(*start, out, in_) for in_ in range(d_in)] for out in range(d_out)]
    return adapter.scaling * torch.tensor(difference, dtype=adapter.core.dtype)


def _superlora(setting: str, count: Callable[[Sequence[StackShape]], int], **case) -> Method:
    def config(**fields) -> SuperLoraConfig:
        return SuperLoraConfig(**{"r": 2, "alpha": 2.0, **case, **fields})

    return Method("superlora", config, count, naive_superlora.naive_delta, setting)


METHODS = [
    *(
        Method(
            "craft",
            partial(_craft_config, tying=tying, basis=basis),
            partial(_craft_count, tying=tying),
            _craft_naive_delta,
            setting=setting,
        )
        for setting, tying, basis in [
            ("", "shared", "weights"),
            ("diagonal", "diagonal", "weights"),
            ("free on random bases", "free", "random"),
        ]
    ),
    Method("lotr", _lotr_config, lambda projections: _lotr_count(projections, groups=1), _lotr_naive_delta),
    Method(
        "lotr",
        _lotr_svd_config,
        lambda projections: _lotr_count(projections, groups=len(projections)),
        _lotr_naive_delta,
        setting="svd start a projection",
        exceptions={"scales_with_alpha": "its cores start where alpha / r times them is the weight, whatever alpha is"},
    ),
    # 6 matrices of 16 x 16 are 1536 = 8 * 12 * 16 entries.
    _superlora("one group", lambda projections: 2 * (8 + 12 + 16) + 2**3),
    _superlora(
        "as lora",
        lambda projections: sum(2 * sum(matrix) for shape in projections for matrix in shape.matrices),
        groups="weight",
        order=2,
        sizes="weights",
    ),
    # Half of 1536 / 2 are 384 = (4 * 6) * (4 * 4) numbers a group.
    _superlora(
        "two groups of two splits, projected and shuffled",
        lambda projections: 2 * 2 * ((4 + 4) + (6 + 4)),
        groups=2,
        order=2,
        splits=2,
        projection="fastfood",
        shuffle=True,
    ),
]
