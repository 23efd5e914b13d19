"""What a user asks for: the fields that every method has. One config class a method, in a file of its own."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peft import PeftConfig

from ..adapters.base import StackAdapter
from ..errors import CraftError
from ..weights import StackShape
from .adapter_files import checksum_in
from .field_types import check_types
from .stacks import Together


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
    rank_pattern: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "Other ranks for some target modules: from a name, name ending or regular expression to ranks. "
            "Only modules with the same ranks form a stack."
        },
    )
    base_quantization: str | None = field(
        default=None,
        metadata={"help": "How the base model was quantised when the adapter was made. Leave empty to fill in."},
    )
    craft_peft_version: str | None = field(
        default=None, metadata={"help": "The version of craft-peft that wrote this config. Leave empty to fill in."}
    )

    tensors_sha256: str | None = field(
        default=None,
        metadata={"help": "The checksum of the tensors saved beside this config. Filled in when they are saved."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.__dataclass_fields__:
            setattr(self, name, _plain(getattr(self, name)))
        self._canonicalise()
        # A config that was read from a file comes with a version. Its adapter is about to be loaded, so what the file
        # holds need not be computed first (`StackAdapter.defer`).
        self._read_from_file = self.craft_peft_version is not None
        if self.craft_peft_version is None:
            self.craft_peft_version = version("craft-peft")
        self.target_modules = set(self.target_modules) if isinstance(self.target_modules, list) else self.target_modules
        self.exclude_modules = (
            set(self.exclude_modules) if isinstance(self.exclude_modules, list) else self.exclude_modules
        )
        try:
            self._check_fields()
        except (TypeError, AttributeError):  # of a field of another type than this one
            check_types(self)
            raise
        check_types(self)

    def _canonicalise(self) -> None:
        """Give fields their one form, from any in which users and files have them; sequences come as lists."""

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As in PEFT, which saves the tensors first: with their checksum."""
        self.tensors_sha256 = checksum_in(Path(save_directory))
        super().save_pretrained(save_directory, **kwargs)

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

    @property
    def together(self) -> Together:
        """Which target modules form one stack."""
        return "projection"

    def matching_pattern(self, key: str) -> str | None:
        """The first pattern of `rank_pattern` that the path of a module matches."""
        matches = (pattern for pattern in self.rank_pattern if re.match(rf"(.*\.)?({pattern})$", key))
        return next(matches, None)

    def ranks_of(self, key: str) -> Any:
        """What `rank_pattern` says of the module of that path, or None."""
        pattern = self.matching_pattern(key)
        return None if pattern is None else self.rank_pattern[pattern]

    @abstractmethod
    def build_adapter(self, name: str, shape: StackShape, ranks: Any = None) -> StackAdapter:
        """The adapter of one stack, before `initialise`.

        Args:
            name: the name of the stack, for messages.
            shape: its sizes.
            ranks: what it has instead of the config's ranks, by `rank_pattern`.
        """

    def explain_defaults(self, name: str, shape: StackShape, ranks: Any = None) -> list[str]:
        """What a default became for one stack, in sentences, where a user may not expect it."""
        return []

    def weighted_sum(self) -> StackConfig:
        """The config of an adapter that can be a weighted sum of adapters with this config.

        Raises:
            CraftError: the method has none.
        """
        raise CraftError(
            f"A sum of {self.peft_type.value} adapters is not an adapter of that form. Keep them apart and make them "
            "active together (`base_model.set_adapter([...])`), or export each to LoRA and add those."
        )

    @property
    def saves_what_it_derived(self) -> bool:
        """Whether a saved adapter holds everything that `initialise` computes from the base weights."""
        return True


def _plain(value: Any) -> Any:
    """Plain Python for what comes from numpy, YAML tools or searches: they are written as JSON, and compared."""
    if callable(getattr(value, "tolist", None)):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {_plain(key): _plain(part) for key, part in value.items()}
    if isinstance(value, set | frozenset):
        return {_plain(part) for part in value}
    return [_plain(part) for part in value] if isinstance(value, Sequence) and not isinstance(value, str) else value


def check_whole_number(field_name: str, value: Any) -> None:
    """Refuse a field that is not a whole number of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CraftError(f"{field_name}={value!r} has to be a whole number of at least 1.")


def check_positive(field_name: str, value: float) -> None:
    """Refuse a field that is not above 0."""
    if not value > 0:
        raise CraftError(f"{field_name}={value} has to be above 0.")


def check_choice(field_name: str, value: Any, choices: Sequence[str]) -> None:
    """Refuse a field that is none of its choices."""
    if value not in choices:
        raise CraftError(f"{field_name}={value!r} is unknown. Use one of {', '.join(choices)}.")
