"""The config of SuperLoRA, with constructors for the methods that it contains."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from peft import PeftType

from ..adapters.superlora import SuperLoraAdapter
from ..errors import CraftError
from ..folding import Folding
from ..weights import StackShape
from .config import StackConfig, check_choice, check_positive, check_whole_number
from .stacks import Together

MOST_SIZES = 64


@dataclass
class SuperLoraConfig(StackConfig):
    """SuperLoRA (arXiv 2403.11887): all updates as one vector, cut into groups that are small tensor products.

    A group with folded sizes d_1, ..., d_M trains ``r * (d_1 + ... + d_M)`` numbers, and ``r^M`` more for a dense core.
    The fields are documented in their ``help`` metadata; `lora`, `lokr`, `lonkr`, `lorta` and `lotr` make the named
    cases.

    Raises:
        CraftError: a field outside its range; when the model is wrapped, also a folding or a rank that does not fit.

    Example:
        >>> shape = StackShape.uniform(24, 768, 768)
        >>> for config in (SuperLoraConfig(r=8), SuperLoraConfig.lora(r=8)):
        ...     adapter = config.build_adapter("query + value", shape)
        ...     print(sum(parameter.numel() for parameter in adapter.parameters()))
        6336
        294912
    """

    r: int = field(default=8, metadata={"help": "The rank: of every mode of every core."})
    groups: int | Literal["weight", "layer", "all"] = field(
        default="all",
        metadata={
            "help": "Into how many groups the vector of all updates is cut: one a target matrix ('weight'), one a "
            "layer of the model ('layer'), one ('all'), or a number; a boundary may then cut a matrix."
        },
    )
    order: int = field(
        default=3,
        metadata={"help": "The order M of the tensor that a group is folded into: 2 is a matrix, as in LoRA."},
    )
    splits: int = field(
        default=1, metadata={"help": "The number K of tensors whose Kronecker product a group is; 2 as in LoKr."}
    )
    core: Literal["auto", "identity", "dense"] = field(
        default="auto",
        metadata={
            "help": "'identity' (a sum of r tensors of rank one), 'dense' (r^M more numbers), or 'auto': identity for "
            "order 2, else dense."
        },
    )
    sizes: Any = field(
        default="equal",
        metadata={
            "help": "The sizes of the folded tensor: 'equal' as they can be, 'weights' for those of the matrices "
            "themselves, or M whole numbers (M for each split, if there are several)."
        },
    )
    identity_modes: tuple[int, ...] = field(
        default=(),
        metadata={"help": "Modes, from 0, whose factor is a fixed identity; the dense core has their full size."},
    )
    cut_weights: bool = field(
        default=False, metadata={"help": "Allow a number of groups above the number of target matrices."}
    )
    projection: Literal["none", "fastfood"] = field(
        default="none",
        metadata={"help": "'fastfood' makes each group from fewer numbers, by a fixed random map."},
    )
    projection_ratio: float = field(
        default=0.5,
        metadata={"help": "With a projection: how many numbers a group is made from, for each of its entries; to 1."},
    )
    projection_seed: int = field(default=0, metadata={"help": "The seed of the projection's random numbers."})
    shuffle: bool = field(
        default=False, metadata={"help": "Permute the vector of all updates before it is cut into groups."}
    )
    shuffle_seed: int = field(default=0, metadata={"help": "The seed of that permutation."})
    init_std: float | None = field(
        default=None,
        metadata={"help": "Standard deviation of the factors that start at random; None for 1 / sqrt(size) of each."},
    )
    alpha: float = field(default=8.0, metadata={"help": "What the adapter adds is multiplied by alpha / r."})

    def __post_init__(self) -> None:
        self.peft_type = PeftType["SUPERLORA"]
        super().__post_init__()

    def _canonicalise(self) -> None:
        self.identity_modes = tuple(self.identity_modes)
        if isinstance(self.sizes, list):
            self.sizes = tuple(tuple(size) if isinstance(size, list) else size for size in self.sizes)

    @classmethod
    def lora(cls, r: int = 8, **fields: Any) -> SuperLoraConfig:
        """LoRA: one group a matrix, ``B @ A``."""
        return cls(**{"r": r, "groups": "weight", "order": 2, "sizes": "weights", **fields})

    @classmethod
    def lokr(cls, r: int = 8, **fields: Any) -> SuperLoraConfig:
        """LoKr: one group a matrix, the Kronecker product of two ``B @ A``."""
        return cls.lora(**{"r": r, "splits": 2, **fields})

    @classmethod
    def lonkr(cls, r: int = 4, splits: int = 3, **fields: Any) -> SuperLoraConfig:
        """LoNKr: as LoKr, with more than two splits."""
        return cls.lora(**{"r": r, "splits": splits, **fields})

    @classmethod
    def lorta(cls, r: int = 8, order: int = 3, **fields: Any) -> SuperLoraConfig:
        """LoRTA: all matrices folded into one tensor of order 3 or more, with a dense core."""
        return cls(**{"r": r, "order": order, "core": "dense", **fields})

    @classmethod
    def lotr(cls, r: int = 8, **fields: Any) -> SuperLoraConfig:
        """LoTR for matrices of one shape: the tensor (matrices, out, in), an identity for the first factor."""
        case = {"groups": "all", "order": 3, "core": "dense", "sizes": "weights", "identity_modes": (0,)}
        return cls(**{"r": r, **case, "alpha": 1.0, "init_std": 1.0, **fields})

    def _check_fields(self) -> None:
        super()._check_fields()
        check_whole_number("r", self.r)
        for pattern, r in self.rank_pattern.items():
            check_whole_number(f"rank_pattern[{pattern!r}]", r)
        if isinstance(self.groups, str):
            check_choice("groups", self.groups, ("weight", "layer", "all"))
        else:
            check_whole_number("groups", self.groups)
        check_whole_number("order", self.order)
        if self.order < 2:
            raise CraftError(
                f"order={self.order} has to be at least 2: order 2 folds a group into a matrix (r * (a + b) numbers), "
                "order 3 and above into a tensor with a core."
            )
        check_whole_number("splits", self.splits)
        if self.order * self.splits > MOST_SIZES:
            raise CraftError(
                f"order={self.order} and splits={self.splits} fold a group into {self.order * self.splits} sizes. Use "
                f"at most {MOST_SIZES}: with a 2 for each, no model has so many numbers."
            )
        self._check_sizes()
        self._check_identity_modes()
        if not 0 < self.projection_ratio <= 1:
            raise CraftError(
                f"projection_ratio={self.projection_ratio} is outside (0, 1]: it is how many numbers a group is made "
                "from, for each of its entries. Use for example 0.5."
            )
        if self.init_std is not None:
            check_positive("init_std", self.init_std)

    def _check_sizes(self) -> None:
        if isinstance(self.sizes, str):
            check_choice("sizes", self.sizes, ("equal", "weights"))
            return
        splits = self._size_tuples()
        fits = isinstance(splits, tuple) and len(splits) == self.splits
        if not fits or not all(_are_sizes(split, self.order) for split in splits):
            wanted = f"{self.order} whole numbers" + (f" for each of {self.splits} splits" if self.splits > 1 else "")
            raise CraftError(f"sizes={self.sizes!r} has to be 'equal', 'weights' or {wanted}, as order and splits say.")

    def _size_tuples(self) -> Any:
        """The sizes as one tuple for each split; names stay as they are."""
        flat = isinstance(self.sizes, tuple) and not any(isinstance(size, tuple) for size in self.sizes)
        return (self.sizes,) if flat else self.sizes

    def _check_identity_modes(self) -> None:
        if not self.identity_modes:
            return
        if not set(self.identity_modes) < set(range(self.order)):
            raise CraftError(
                f"identity_modes={self.identity_modes} has to name some, not all, of the modes 0 to {self.order - 1}."
            )
        if self._core() != "dense":
            raise CraftError("identity_modes need core='dense': with an identity core the ranks of all modes are one.")

    def _core(self) -> Literal["identity", "dense"]:
        return ("identity" if self.order == 2 else "dense") if self.core == "auto" else self.core

    @property
    def together(self) -> Together:
        """All target matrices, whatever their shapes."""
        return "all"

    def build_adapter(self, name: str, shape: StackShape, ranks: Any = None) -> SuperLoraAdapter:
        """The SuperLoRA adapter of all target matrices (or of those with one rank, by `rank_pattern`)."""
        r = self.r if ranks is None else ranks
        folding = Folding(
            groups=self.groups,
            order=self.order,
            splits=self.splits,
            core=self._core(),
            sizes=self._size_tuples(),
            identity_modes=self.identity_modes,
            ratio=self.projection_ratio if self.projection == "fastfood" else None,
            cut_weights=self.cut_weights,
        )
        return SuperLoraAdapter(
            shape,
            r,
            folding,
            shuffle_seed=self.shuffle_seed if self.shuffle else None,
            projection_seed=self.projection_seed,
            init_std=self.init_std,
            init_weights=self.init_weights,
            scaling=self.alpha / r,
            dropout=self.dropout,
        )


def _are_sizes(value: Any, order: int) -> bool:
    whole = isinstance(value, tuple) and all(isinstance(size, int) and not isinstance(size, bool) for size in value)
    return whole and len(value) == order and all(size >= 1 for size in value)
