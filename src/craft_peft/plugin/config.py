"""What a user asks for: one config class a method, all with PEFT's usual fields."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, get_args

from peft import PeftConfig, PeftType

from ..adapters.base import StackAdapter, StackShape
from ..adapters.craft import CraftAdapter
from ..errors import CraftError
from ..tucker import Decomposition

PAPER_RANKS = (24, 100, 100)
"""(layer, out, in) ranks of the CRAFT paper, on 24 layers."""

MODES = ("layer", "out", "in")


@dataclass
class StackConfig(PeftConfig):
    """The fields that every method of this package has; they mean what they mean in `peft.LoraConfig`.

    A subclass is one method: it adds its own fields and builds its adapter (`build_adapter`).
    """

    target_modules: list[str] | set[str] | str | None = field(
        default=None,
        metadata={
            "help": "Names (or name endings) of the linear modules to adapt, a regular expression, or 'all-linear'. "
            "Default: query and value under their names in this model type."
        },
    )
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Names, name endings or a regular expression of modules to leave alone."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Adapt only these layer indices; stacks then hold only these layers."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "The name of the layer list, such as 'layers'; with `layers_to_transform`."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained in full and saved with the adapter, such as a new head."}
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None,
        metadata={
            "help": "Tokens whose embeddings are trained and saved too, such as those just added: their indices, or a "
            "dict from the name of an embedding to indices."
        },
    )
    bias: str = field(
        default="none",
        metadata={"help": "Which biases to train: 'none', 'all', or those of the adapted modules ('<method>_only')."},
    )
    alpha: float = field(default=1.0, metadata={"help": "The factor on everything that the adapter adds."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout on the input of the added part, in training."})
    init_weights: bool = field(
        default=True,
        metadata={"help": "True starts exactly at the base model. False starts away from it, for tests of plumbing."},
    )
    craft_peft_version: str | None = field(
        default=None, metadata={"help": "The version of craft-peft that wrote this config. Leave empty to fill in."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        # A config that was read from a file comes with a version. Its adapter is about to be loaded, so what the file
        # holds need not be computed first (`StackAdapter.defer`).
        self._read_from_file = self.craft_peft_version is not None
        if self.craft_peft_version is None:
            self.craft_peft_version = version("craft-peft")
        self.target_modules = set(self.target_modules) if isinstance(self.target_modules, list) else self.target_modules
        self.exclude_modules = (
            set(self.exclude_modules) if isinstance(self.exclude_modules, list) else self.exclude_modules
        )
        self._check_fields()

    def _check_fields(self) -> None:
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise CraftError(
                "`layers_to_transform` cannot be used when `target_modules` is a string: select the layers in the "
                "regular expression, or give `target_modules` as a list of names."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise CraftError("`layers_pattern` is set without `layers_to_transform`: say which layers as well.")
        only = f"{self.peft_type.value.lower()}_only" if self.peft_type else "craft_only"
        if self.bias not in ("none", "all", only):
            raise CraftError(f"bias={self.bias!r} is unknown. Use 'none', 'all' or {only!r}.")
        if not 0 <= self.dropout < 1:
            raise CraftError(f"dropout={self.dropout} is outside [0, 1).")

    def to_dict(self) -> dict[str, Any]:
        """The fields as a file holds them, so that a config equals what was read back: JSON has lists, no tuples."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in super().to_dict().items()}

    @abstractmethod
    def build_adapter(self, name: str, shape: StackShape) -> StackAdapter:
        """The adapter of one stack, before `initialise`.

        Args:
            name: the name of the stack, for messages.
            shape: its sizes.
        """

    def explain_defaults(self, name: str, shape: StackShape) -> list[str]:
        """What a default became for one stack, in sentences, where a user may not expect it."""
        return []

    @property
    def saves_what_it_derived(self) -> bool:
        """Whether a saved adapter holds everything that `initialise` computes from the base weights."""
        return True


@dataclass
class CraftConfig(StackConfig):
    """CRAFT (arXiv 2602.17510): frozen Tucker factors of the pretrained weights, one trained square matrix a mode.

    The adapter of n stacks has ``n * (r1^2 + r2^2 + r3^2)`` trained numbers, whatever the width and depth of the
    model. The fields are documented in their ``help`` metadata.

    Raises:
        CraftError: a field outside its range; when the model is wrapped, also a rank above the size of its mode.

    Example:
        >>> CraftConfig(task_type="SEQ_CLS", target_modules=["query", "value"]).ranks
        'paper'
        >>> CraftConfig(ranks=(12, 100, 100)).resolve_ranks("query", StackShape(12, 768, 768))
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
        default="hosvd",
        metadata={
            "help": "'hosvd' (the paper), 'st-hosvd' (sequentially truncated) or 'hooi' (alternating; keeps most of "
            "the weights' energy)."
        },
    )
    save_factors: bool = field(
        default=True,
        metadata={
            "help": "Save the frozen core and factors with the adapter. False gives a file of the transforms alone "
            "(165 KB); the factors are then computed again on load, from exactly the same base weights."
        },
    )

    def __post_init__(self) -> None:
        self.peft_type = PeftType["CRAFT"]  # registered on import of the package
        if isinstance(self.ranks, list):  # as JSON has them
            self.ranks = tuple(self.ranks)
        self.trained_modes = tuple(self.trained_modes)
        super().__post_init__()

    def _check_fields(self) -> None:
        super()._check_fields()
        if self.ranks != "paper":
            if not isinstance(self.ranks, tuple) or len(self.ranks) != 3:
                raise CraftError(
                    f"ranks={self.ranks!r} has to be 'paper' or three whole numbers (layer, out, in), such as "
                    "(12, 100, 100)."
                )
            for mode, rank in enumerate(self.ranks):
                if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
                    raise CraftError(
                        f"ranks[{mode}]={rank!r}, the {MODES[mode]} rank, has to be a whole number of at least 1."
                    )
        if not self.trained_modes or not set(self.trained_modes) <= {0, 1, 2}:
            raise CraftError(
                f"trained_modes={self.trained_modes!r} has to name at least one of the modes 0 (layers), 1 (out) and "
                "2 (in)."
            )
        if self.decomposition not in get_args(Decomposition):
            raise CraftError(
                f"decomposition={self.decomposition!r} is unknown. Use one of {', '.join(get_args(Decomposition))}."
            )

    def resolve_ranks(self, name: str, shape: StackShape) -> tuple[int, int, int]:
        """The ranks for one stack.

        Args:
            name: the name of the stack, for messages.
            shape: its sizes.

        Raises:
            CraftError: a rank above the size of its mode, with the ranks to use instead.
        """
        sizes = (shape.layers, shape.d_out, shape.d_in)
        wanted = PAPER_RANKS if isinstance(self.ranks, str) else self.ranks
        largest = (min(wanted[0], sizes[0]), min(wanted[1], sizes[1]), min(wanted[2], sizes[2]))
        if isinstance(self.ranks, str):
            return largest
        what = ("layer directions", "output directions", "input directions")
        have = ("layers", "outputs", "inputs")
        for mode, (rank, size) in enumerate(zip(self.ranks, sizes, strict=True)):
            if rank > size:
                raise CraftError(
                    f"`ranks[{mode}]={rank}` keeps more {what[mode]} than stack '{name}' has {have[mode]} ({size}). "
                    f"Use `ranks={largest}` to keep them all."
                )
        return largest

    def explain_defaults(self, name: str, shape: StackShape) -> list[str]:
        """Says so if a stack is too small for the paper's ranks."""
        ranks = self.resolve_ranks(name, shape)
        if self.ranks != "paper" or ranks == PAPER_RANKS:
            return []
        return [
            f"ranks='paper' became {ranks} for stack '{name}': the paper's {PAPER_RANKS}, each at most the size of its "
            f"mode (here {shape.layers} layers, {shape.d_out} outputs, {shape.d_in} inputs)."
        ]

    def build_adapter(self, name: str, shape: StackShape) -> CraftAdapter:
        """The CRAFT adapter of one stack, before its decomposition."""
        return CraftAdapter(
            shape,
            self.resolve_ranks(name, shape),
            decomposition=self.decomposition,
            trained_modes=self.trained_modes,
            init_weights=self.init_weights,
            save_factors=self.save_factors,
            scaling=self.alpha,
            dropout=self.dropout,
        )

    @property
    def saves_what_it_derived(self) -> bool:
        """True unless the factors are left out of the file."""
        return self.save_factors
