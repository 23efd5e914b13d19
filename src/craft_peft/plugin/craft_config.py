"""The config of CRAFT."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from peft import PeftType

from ..adapters.craft import Basis, CraftAdapter, Tying
from ..errors import CraftError
from ..tucker import Decomposition
from ..weights import StackShape
from .config import StackConfig

PAPER_RANKS = (24, 100, 100)
"""(layer, out, in) ranks of the CRAFT paper, on 24 layers."""

MODES = ("layer", "out", "in")


@dataclass
class CraftConfig(StackConfig):
    """CRAFT (arXiv 2602.17510): frozen Tucker factors of the pretrained weights, one trained square matrix a mode.

    The adapter of n stacks has ``n * (r1^2 + r2^2 + r3^2)`` trained numbers, whatever the width and depth of the
    model; with ``tying="diagonal"`` ``L * (r2 + r3)`` more a stack of L layers, with ``"free"`` ``L * r2 * r3`` in all.
    The fields are documented in their ``help`` metadata.

    Raises:
        CraftError: a field outside its range; when the model is wrapped, also a rank above the size of its mode.

    Example:
        >>> CraftConfig(task_type="SEQ_CLS", target_modules=["query", "value"]).ranks
        'paper'
        >>> CraftConfig(ranks=(12, 100, 100)).resolve_ranks("query", StackShape.uniform(12, 768, 768))
        (12, 100, 100)
    """

    ranks: str | Sequence[int] = field(
        default="paper",
        metadata={
            "help": "(layer, out, in) ranks, each at most the size of its mode. 'paper' is (24, 100, 100), each at "
            "most the size of its mode: (12, 100, 100) for 12 layers."
        },
    )
    trained_modes: Sequence[int] = field(
        default=(0, 1, 2),
        metadata={"help": "The modes whose transform is trained: 0 (layers), 1 (out), 2 (in)."},
    )
    decomposition: Decomposition = field(
        default="auto",
        metadata={
            "help": "'hosvd' (the paper, exact), 'st-hosvd' (sequentially truncated), 'randomized' (the same by a "
            "randomised search, for large models), 'auto' (by the sizes: 'hosvd' up to 24 x 768 x 768, else "
            "'randomized') or 'hooi' (alternating; keeps most of the weights' energy)."
        },
    )
    tying: Tying = field(
        default="shared",
        metadata={
            "help": "What the layers share: 'shared' (the paper), the transforms; 'diagonal', these, with a trained "
            "diagonal of each layer's own on both sides; 'free', only the bases: a trained (r2, r3) matrix a layer."
        },
    )
    basis: Basis = field(
        default="weights",
        metadata={
            "help": "What the bases are taken from: 'weights' (the paper), 'random', or 'activations' or 'gradients' "
            "of a few batches, for which `craft_peft.fit_bases(model, batches)` has to be called before training."
        },
    )
    basis_seed: int = field(default=0, metadata={"help": "The seed of basis='random'."})
    save_factors: bool = field(
        default=True,
        metadata={
            "help": "Save the frozen core and factors with the adapter. False gives a file of the transforms alone "
            "(165 KB); the factors are then computed again on load, from exactly the same base weights."
        },
    )

    def __post_init__(self) -> None:
        self.peft_type = PeftType["CRAFT"]  # registered on import of the package
        super().__post_init__()

    def _canonicalise(self) -> None:
        self.ranks = _as_tuple(self.ranks)
        self.rank_pattern = {pattern: _as_tuple(ranks) for pattern, ranks in self.rank_pattern.items()}
        self.trained_modes = tuple(self.trained_modes)

    def _check_fields(self) -> None:
        super()._check_fields()
        _check_ranks("ranks", self.ranks)
        for pattern, ranks in self.rank_pattern.items():
            _check_ranks(f"rank_pattern[{pattern!r}]", ranks)
        if not self.trained_modes or not set(self.trained_modes) <= {0, 1, 2}:
            raise CraftError(
                f"trained_modes={self.trained_modes!r} has to name at least one of the modes 0 (layers), 1 (out) and "
                "2 (in)."
            )
        if self.tying == "free" and self.trained_modes != (0, 1, 2):
            raise CraftError(
                f"trained_modes={self.trained_modes} has no meaning with tying='free', which has no transforms. Leave "
                "it out, or use another tying."
            )
        if self.basis in ("activations", "gradients") and not self.save_factors:
            raise CraftError(
                f"basis={self.basis!r} needs save_factors=True: bases from batches cannot be computed again on load."
            )

    def resolve_ranks(self, name: str, shape: StackShape, ranks: Any = None) -> tuple[int, int, int]:
        """The ranks for one stack.

        Args:
            name: the name of the stack, for messages.
            shape: its sizes.
            ranks: what it has instead of the config's ranks.

        Raises:
            CraftError: a rank above the size of its mode, with the ranks to use instead.
        """
        sizes = (shape.layers, shape.d_out, shape.d_in)
        ranks = self.ranks if ranks is None else ranks
        wanted = PAPER_RANKS if isinstance(ranks, str) else ranks
        largest = (min(wanted[0], sizes[0]), min(wanted[1], sizes[1]), min(wanted[2], sizes[2]))
        if isinstance(ranks, str):
            return largest
        what = ("layer directions", "output directions", "input directions")
        have = ("layers", "outputs", "inputs")
        for mode, (rank, size) in enumerate(zip(wanted, sizes, strict=True)):
            if rank > size:
                raise CraftError(
                    f"`ranks[{mode}]={rank}` keeps more {what[mode]} than stack '{name}' has {have[mode]} ({size}). "
                    f"Use `ranks={largest}` to keep them all."
                )
        return largest

    def explain_defaults(self, name: str, shape: StackShape, ranks: Any = None) -> list[str]:
        """Says so if a stack is too small for the paper's ranks."""
        found = self.resolve_ranks(name, shape, ranks)
        if (self.ranks if ranks is None else ranks) != "paper" or found == PAPER_RANKS:
            return []
        return [
            f"ranks='paper' became {found} for stack '{name}': the paper's {PAPER_RANKS}, each at most the size of its "
            f"mode (here {shape.layers} layers, {shape.d_out} outputs, {shape.d_in} inputs)."
        ]

    def build_adapter(self, name: str, shape: StackShape, ranks: Any = None) -> CraftAdapter:
        """The CRAFT adapter of one stack, before its decomposition."""
        return CraftAdapter(
            shape,
            self.resolve_ranks(name, shape, ranks),
            decomposition=self.decomposition,
            trained_modes=self.trained_modes,
            tying=self.tying,
            basis=self.basis,
            basis_seed=self.basis_seed,
            init_weights=self.init_weights,
            save_factors=self.save_factors,
            scaling=self.alpha,
            dropout=self.dropout,
        )

    def weighted_sum(self) -> CraftConfig:
        """A free middle matrix a layer on the same bases: the sum of shared ones is no shared one."""
        return replace(self, tying="free", trained_modes=(0, 1, 2), alpha=1.0)

    @property
    def saves_what_it_derived(self) -> bool:
        """True unless the factors are left out of the file."""
        return self.save_factors


def _as_tuple(ranks: Any) -> Any:
    return tuple(ranks) if isinstance(ranks, list) else ranks


def _check_ranks(field_name: str, ranks: Any) -> None:
    if ranks == "paper":
        return
    if not isinstance(ranks, tuple) or len(ranks) != 3:
        raise CraftError(
            f"{field_name}={ranks!r} has to be 'paper' or three whole numbers (layer, out, in), such as (12, 100, 100)."
        )
    for mode, rank in enumerate(ranks):
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise CraftError(
                f"{field_name}[{mode}]={rank!r}, the {MODES[mode]} rank, has to be a whole number of at least 1."
            )
