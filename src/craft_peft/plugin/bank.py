"""Many adapters of one base model in one process: held side by side, switched, mixed in a batch, kept on disk."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from copy import copy
from functools import partial
from pathlib import Path
from typing import Literal, cast, get_args
from urllib.parse import quote

from peft import PeftConfig, PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from ..errors import CraftError
from .bank_files import (
    Heads,
    adapter_state,
    check_beside_bank,
    collect_shelves,
    live_state,
    read_adapter,
    sort_state,
    write_adapter,
)
from .config import StackConfig
from .mixed_batches import through_head
from .rows import BASE
from .shelf import StackShelf
from .tensor_names import current_names
from .tuner import StackTuner

Keep = Literal["transforms", "middles"]
"""What is held of an adapter: what it trained, or the small matrix K of every layer, computed from that beforehand."""


class AdapterBank:
    r"""Hundreds to thousands of adapters of one base model, each only what it trained; the bases are held once.

    The bank is attached to a PEFT model, whose own adapter gives the bases. Its adapters are known to the model by
    name: ``model(..., adapter_names=[...])`` and ``model.generate(..., adapter_names=[...])`` mix them in a batch, one
    name a row, beside the model's own adapters and ``"__base__"``; `use` switches all rows. The base weights are never
    touched. Saved heads (`modules_to_save`) are kept for each adapter and used with it.

    An adapter costs ``4 * (r1^2 + r2^2 + r3^2)`` bytes a stack as transforms, ``4 * L * r2 * r3`` as middles: for query
    and value of RoBERTa-base at the paper's ranks 161 kB and 960 kB. A head comes on top of that.

    Args:
        model: a PEFT model with an adapter on frozen bases, such as CRAFT.
        keep: "transforms" holds the least; "middles" holds the matrices K, so that nothing has to be computed to switch
            or mix, and takes adapters of any `tying`.
        max_resident: at most so many adapters are in memory; the least recently used goes, and comes back from disk
            when it is asked for.
        max_bytes: likewise for the bytes of adapters and heads.
        folder: where adapters are saved that have to go and are not on disk.
        bases_of: the model's adapter that gives the bases; default: its active one.

    Raises:
        CraftError: a model without such an adapter, with a bank, or with an adapter of trained biases or tokens.

    Example:
        >>> import tempfile, torch
        >>> from peft import get_peft_model
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> from craft_peft import AdapterBank, CraftConfig
        >>> sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
        >>> base = BertForSequenceClassification(BertConfig(vocab_size=99, **sizes))
        >>> model = get_peft_model(base, CraftConfig(task_type="SEQ_CLS", ranks=(3, 8, 8))).eval()
        >>> bank = AdapterBank(model)
        >>> bank.add("alice")  # as it is now; usually `bank.load(folder)`
        >>> bank.add("bob")
        >>> rows = torch.randint(0, 99, (3, 5))
        >>> model(rows, adapter_names=["alice", "bob", "__base__"]).logits.shape
        torch.Size([3, 2])
        >>> with bank.use("bob"):
        ...     print(model(rows).logits.shape)
        torch.Size([3, 2])
        >>> bank
        AdapterBank(2 adapters, 2 resident as transforms: 2 x 1.1 kB, heads 272 bytes)
    """

    def __init__(
        self,
        model: PeftModel,
        *,
        keep: Keep = "transforms",
        max_resident: int | None = None,
        max_bytes: int | None = None,
        folder: str | Path | None = None,
        bases_of: str | None = None,
    ) -> None:
        if keep not in get_args(Keep):
            raise CraftError(f"keep={keep!r} is unknown. Use one of {', '.join(get_args(Keep))}.")
        for limit, value in (("max_resident", max_resident), ("max_bytes", max_bytes)):
            if value is not None and value < 1:
                raise CraftError(f"{limit}={value} has to be at least 1, or None for no limit.")
        self.model = model
        self.keep = keep
        self.max_resident, self.max_bytes = max_resident, max_bytes
        self.folder = None if folder is None else Path(folder)
        self._tuner = _tuner_of(model)
        if self._tuner.bank is not None:
            raise CraftError("The model has a bank already. Use that one: `model.base_model.bank`.")
        check_beside_bank(self._tuner.peft_config)
        self._shelves = collect_shelves(
            self._tuner.model, bases_of or model.active_adapter, keep_middles=keep == "middles"
        )
        self._layers: dict[nn.Module, tuple[StackShelf, int]] = {
            layer: (shelf, i) for shelf in self._shelves for i, layer in enumerate(shelf.layers)
        }
        self._configs: dict[str, StackConfig] = {}
        self._on_disk: dict[str, Path] = {}
        self._resident: OrderedDict[str, int] = OrderedDict()  # the place of each, the least recently used first
        self._heads: dict[str, Heads] = {}
        self._free: list[int] = []
        self._used: str | None = None
        self._tuner.bank = self

    # -----------------------------------------------------------------------------------------------------------------
    # What is in it
    # -----------------------------------------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """All adapters, in memory or on disk."""
        return list(self._configs)

    @property
    def resident(self) -> list[str]:
        """The adapters in memory, the least recently used first."""
        return list(self._resident)

    def __contains__(self, name: object) -> bool:
        return name in self._configs

    def __len__(self) -> int:
        return len(self._configs)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    @property
    def bytes_per_adapter(self) -> int:
        """The memory of one adapter, without its head."""
        return sum(shelf.bytes_of_one for shelf in self._shelves)

    @property
    def resident_bytes(self) -> dict[str, int]:
        """The memory of the resident adapters, of their heads, and of the places kept for more."""
        adapters = len(self._resident) * self.bytes_per_adapter
        reserved = sum(shelf.bytes_reserved for shelf in self._shelves) - adapters
        return {"adapters": adapters, "heads": sum(map(_bytes, self._heads.values())), "reserved": reserved}

    def __repr__(self) -> str:
        sizes = self.resident_bytes
        return (
            f"{type(self).__name__}({len(self)} adapters, {len(self._resident)} resident as {self.keep}: "
            f"{len(self._resident)} x {_readable(self.bytes_per_adapter)}, heads {_readable(sizes['heads'])})"
        )

    # -----------------------------------------------------------------------------------------------------------------
    # In and out
    # -----------------------------------------------------------------------------------------------------------------

    def load(self, folder: str | Path, name: str | None = None) -> None:
        """Take in an adapter that `save_pretrained` wrote, with its factors or without.

        Args:
            folder: of the adapter; it has to stay there if the bank has a limit.
            name: default: the folder's name.

        Raises:
            CraftError: an adapter that cannot join, or a name that is taken.
        """
        name = Path(folder).name if name is None else name
        self._refuse_taken(name)
        self._admit(name, *read_adapter(folder))
        self._on_disk[name] = Path(folder)

    def add(self, name: str, model: PeftModel | None = None, adapter_name: str | None = None) -> None:
        """Take in a copy of a live adapter, as it is now.

        Args:
            name: under which the bank will know it.
            model: whose; default: the bank's.
            adapter_name: which; default: the active one.

        Raises:
            CraftError: an adapter that cannot join, or a name that is taken.
        """
        self._refuse_taken(name)
        model = self.model if model is None else model
        adapter_name = model.active_adapter if adapter_name is None else adapter_name
        if adapter_name not in model.peft_config:
            raise CraftError(f"There is no adapter '{adapter_name}'. The model has {', '.join(model.peft_config)}.")
        tuner = _tuner_of(model)
        state = live_state(tuner.model, tuner.served_modules().wrappers, adapter_name)
        self._admit(name, copy(model.peft_config[adapter_name]), state)

    def save(self, name: str, folder: str | Path) -> None:
        """Write an adapter as `save_pretrained` does: the folder loads in PEFT, and in a bank."""
        self._refuse_unknown([name])
        (place,) = self._make_resident([name])
        config = self._configs[name]
        if self.keep == "middles":
            config = config.weighted_sum()
        write_adapter(folder, config, adapter_state(self._shelves, place, self._heads[name], config))

    def evict(self, name: str) -> None:
        """Free the memory of an adapter; the bank keeps its name and reads it again when it is asked for.

        Raises:
            CraftError: it is not on disk, and the bank has no `folder` to save it in.
        """
        self._refuse_unknown([name])
        if name not in self._resident:
            return
        if name not in self._on_disk:
            if self.folder is None:
                raise CraftError(
                    f"The adapter '{name}' was never saved, so that its memory cannot be freed. Save it "
                    "(`bank.save(name, folder)`, then `remove` and `load` it), or make the bank with `folder=...`."
                )
            self.save(name, self.folder / quote(name, safe=""))
            self._on_disk[name] = self.folder / quote(name, safe="")
        self._release(name)

    def remove(self, name: str) -> None:
        """Forget an adapter; files stay."""
        self._refuse_unknown([name])
        if name == self._used:
            raise CraftError(f"The adapter '{name}' is in use. Call `bank.use(None)` first.")
        if name in self._resident:
            self._release(name)
        del self._configs[name]
        self._on_disk.pop(name, None)

    # -----------------------------------------------------------------------------------------------------------------
    # Use
    # -----------------------------------------------------------------------------------------------------------------

    def use(self, name: str | None) -> ExitStack:
        """Send all rows through one adapter, until the next call; as a context, until it ends.

        Calls with `adapter_names` are not concerned.

        Args:
            name: an adapter of the bank, "__base__" for none, or None to go back to the model's own active adapter.

        Raises:
            CraftError: an unknown name, or adapters that are merged into the base weights.
        """
        before = self._used
        self._switch(name)
        restore = ExitStack()
        restore.callback(self._switch, before)
        return restore

    def _switch(self, name: str | None) -> None:
        if name is not None and name != BASE:
            self._refuse_unknown([name])
        served = self._tuner.served_modules()
        if name is not None and any(layer.merged for layer, _ in served.layers):
            raise CraftError(
                "The bank cannot be used while adapters are merged into the base weights. Call `unmerge_adapter` first."
            )
        place = None if name in (None, BASE) else self._make_resident([name])[0]
        slots = {} if place is None else {s: dict(zip(s.layers, s.slots(place), strict=True)) for s in self._shelves}
        for layer, _ in served.layers:
            shelf, _ = self._layers.get(layer, (None, 0))
            own = () if shelf is None or place is None else (slots[shelf][layer],)
            layer.instead = None if name is None else own
        for path, (wrapper, _) in served.wrappers.items():
            vars(wrapper).pop("forward", None)
            if name is not None and isinstance(wrapper, ModulesToSaveWrapper):
                head = {} if name == BASE else self.head_of(name, path)
                vars(wrapper)["forward"] = partial(through_head, wrapper, head)
        self._used = name

    def place_of(self, layer: nn.Module) -> tuple[StackShelf, int] | None:
        """The shelf of a layer's stack, and the layer's index in it; None for a layer that the adapters do not have."""
        return self._layers.get(layer)

    def slots_of(self, names: Sequence[str]) -> list[int]:
        """The place of each name on the shelves, read from disk if need be; 0 for names that are not in the bank."""
        wanted = [name for name in dict.fromkeys(names) if name in self]
        places = dict(zip(wanted, self._make_resident(wanted), strict=True))
        for shelf in self._shelves:
            shelf.follow_bases()
        return [places.get(name, 0) for name in names]

    def head_of(self, name: str, path: str) -> dict[str, Tensor]:
        """The tensors of an adapter's saved module; none if it saved none there."""
        return self._heads[name].get(path, {})

    # -----------------------------------------------------------------------------------------------------------------
    # Memory
    # -----------------------------------------------------------------------------------------------------------------

    def _make_resident(self, names: Collection[str]) -> list[int]:
        for name in names:
            if name in self._resident:
                self._resident.move_to_end(name)
        for name in names:
            if name not in self._resident:
                self._admit(name, *read_adapter(self._on_disk[name]), needed=names)
        return [self._resident[name] for name in names]

    def _admit(self, name: str, config: PeftConfig, state: Mapping[str, Tensor], needed: Collection[str] = ()) -> None:
        try:
            state = current_names(state, self.model)
            trained, heads = sort_state(self._shelves, self._tuner.served_modules().wrappers, config, state)
        except CraftError as error:
            raise CraftError(f"The adapter '{name}' cannot join the bank. {error}") from None
        self._make_room(self.bytes_per_adapter + _bytes(heads), spare=needed)
        place = self._free.pop() if self._free else 1 + len(self._resident)
        for shelf, (tensors, scaling) in zip(self._shelves, trained, strict=True):
            shelf.put(place, tensors, scaling)
        self._configs[name] = cast(StackConfig, config)
        self._heads[name] = heads
        self._resident[name] = place

    def _make_room(self, size: int, spare: Collection[str]) -> None:
        for name in [name for name in self._resident if name not in spare]:
            if self._has_room(size):
                return
            self.evict(name)
        if not self._has_room(size):
            raise CraftError(
                f"The bank has no room for {_readable(size)} more: max_resident={self.max_resident}, "
                f"max_bytes={self.max_bytes}, and all {len(self._resident)} resident adapters are needed at once. "
                "Allow more, or put fewer adapters into one batch."
            )

    def _has_room(self, size: int) -> bool:
        held = self.resident_bytes
        fits = self.max_bytes is None or held["adapters"] + held["heads"] + size <= self.max_bytes
        return fits and (self.max_resident is None or len(self._resident) < self.max_resident)

    def _release(self, name: str) -> None:
        self._free.append(self._resident.pop(name))
        del self._heads[name]

    # -----------------------------------------------------------------------------------------------------------------
    # Checks
    # -----------------------------------------------------------------------------------------------------------------

    def refuse_name(self, name: str) -> None:
        """Refuse a name that an adapter of the bank has."""
        if name == BASE or name in self:
            raise CraftError(f"The bank has an adapter '{name}' already. Choose another name, or remove it first.")

    def _refuse_taken(self, name: str) -> None:
        self.refuse_name(name)
        if name in self._tuner.peft_config:
            raise CraftError(f"The model itself has an adapter '{name}'. Choose another name for that of the bank.")

    def _refuse_unknown(self, names: Collection[str]) -> None:
        unknown = [name for name in names if name not in self]
        if unknown:
            some = ", ".join(self.names[:5]) + (", ..." if len(self) > 5 else "")
            raise CraftError(f"There is no adapter '{unknown[0]}' in the bank. It has {some or 'none'}.")


def _tuner_of(model: PeftModel) -> StackTuner:
    tuner = getattr(model, "base_model", None)
    if not isinstance(tuner, StackTuner):
        raise CraftError(
            f"A bank needs a PEFT model with an adapter of this package, and was given a {type(model).__name__} "
            f"({type(tuner).__name__}). Make one with `PeftModel.from_pretrained(base, folder)` from one of them."
        )
    return tuner


def _bytes(heads: Heads) -> int:
    return sum(tensor.nbytes for head in heads.values() for tensor in head.values())


def _readable(size: float) -> str:
    for unit in ("GB", "MB", "kB"):
        if size >= (scale := {"GB": 1e9, "MB": 1e6, "kB": 1e3}[unit]):
            return f"{size / scale:.1f} {unit}"
    return f"{size:.0f} bytes"
