"""The config of LoTR."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from peft import PeftType

from ..adapters.lotr import LotrAdapter, LotrStart
from ..errors import CraftError
from ..weights import StackShape
from .config import StackConfig, check_positive, check_whole_number
from .stacks import Together

LotrGroup = Literal["all", "per_projection"]
"""Which matrices share factors: all of one shape, or those of one projection."""


@dataclass
class LotrConfig(StackConfig):
    """LoTR (arXiv 2402.01376): trained factors shared by a group of matrices, one small trained core a matrix.

    ``delta W_l = (alpha / r) * out_factor @ core_l @ in_factor.T``. A group of T matrices trains
    ``r * (d_out + d_in) + T * r^2`` numbers. The fields are documented in their ``help`` metadata.

    Raises:
        CraftError: a field outside its range; when the model is wrapped, also a rank above both sides of a matrix.

    Example:
        >>> config = LotrConfig(r=8)
        >>> adapter = config.build_adapter("query + value", StackShape.uniform(24, 768, 768))
        >>> sum(parameter.numel() for parameter in adapter.parameters())
        13824
    """

    r: int = field(default=8, metadata={"help": "The rank of factors and cores."})
    group: LotrGroup = field(
        default="all",
        metadata={
            "help": "Which matrices share factors: 'all' target matrices of one shape (the official default), or those "
            "of one projection ('per_projection')."
        },
    )
    init: LotrStart = field(
        default="normal",
        metadata={
            "help": "'normal' starts from random factors and cores of zero; 'svd' from the Tucker decomposition of the "
            "pretrained weights, from which the change is then measured. Both start exactly at the base model."
        },
    )
    init_std: float | None = field(
        default=1.0,
        metadata={
            "help": "Standard deviation of the factors that start at random; the official 1. None is 1 / sqrt(d) for a "
            "side of size d, so that their columns have unit length whatever the width."
        },
    )
    alpha: float = field(
        default=1.0, metadata={"help": "What the adapter adds is multiplied by alpha / r; 1 as in the official code."}
    )

    def __post_init__(self) -> None:
        self.peft_type = PeftType["LOTR"]
        super().__post_init__()

    def _check_fields(self) -> None:
        super()._check_fields()
        check_whole_number("r", self.r)
        for pattern, r in self.rank_pattern.items():
            check_whole_number(f"rank_pattern[{pattern!r}]", r)
        if self.init_std is not None:
            check_positive("init_std", self.init_std)
        if self.init == "svd" and self.alpha == 0:
            raise CraftError("alpha=0 cannot be used with init='svd': no core times 0 gives the weight. Use alpha=1.")

    @property
    def together(self) -> Together:
        """All matrices of one shape, or those of one projection."""
        return "shape" if self.group == "all" else "projection"

    def build_adapter(self, name: str, shape: StackShape, ranks: Any = None) -> LotrAdapter:
        """The LoTR adapter of one group."""
        r = self.r if ranks is None else ranks
        if r > max(shape.matrix):
            raise CraftError(
                f"`r={r}` is above both sides of the {shape.d_out} x {shape.d_in} weights of stack '{name}', so that "
                f"it adds numbers but no directions. Use at most `r={max(shape.matrix)}`."
            )
        return LotrAdapter(
            shape,
            r,
            start=self.init,
            init_std=self.init_std,
            init_weights=self.init_weights,
            scaling=self.alpha / r,
            dropout=self.dropout,
        )
