"""Many adapters of one base model in one process: held side by side, switched, mixed in a batch, kept on disk."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from copy import copy
from functools import partial
from pathlib import Path
from threading import RLock
from typing import Any, Literal, cast, get_args
from urllib.parse import quote

from peft import PeftConfig, PeftModel
from torch import Tensor, nn

from ..errors import CraftError
from .bank_files import (
    adapter_state,
    check_beside_bank,
    collect_shelves,
    live_state,
    read_adapter,
    sort_state,
    write_adapter,
)
from .config import StackConfig
from .requests import Request, Use, block_of, blocks_of
from .rows import BASE, Choice
from .shelf import Place, StackShelf, bytes_of, readable
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
        self._lock = RLock()  # held to change or read what follows, not while a model computes
        self._configs: dict[str, StackConfig] = {}
        self._on_disk: dict[str, Path] = {}
        self._resident: OrderedDict[str, Place] = OrderedDict()  # the least recently used first
        self._free: list[int] = []
        self._places = 0
        self._choice: Choice | None = None
        self._tuner.bank = self

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the lock, which no copy can have."""
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """With another lock."""
        vars(self).update(state, _lock=RLock())

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
        with self._lock:
            adapters = len(self._resident) * self.bytes_per_adapter
            reserved = sum(shelf.bytes_reserved for shelf in self._shelves) - adapters
            heads = sum(bytes_of(place.heads) for place in self._resident.values())
        return {"adapters": adapters, "heads": heads, "reserved": reserved}

    def __repr__(self) -> str:
        sizes = self.resident_bytes
        return (
            f"{type(self).__name__}({len(self)} adapters, {len(self._resident)} resident as {self.keep}: "
            f"{len(self._resident)} x {readable(self.bytes_per_adapter)}, heads {readable(sizes['heads'])})"
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
        config, state = read_adapter(folder)
        with self._lock:
            self._refuse_taken(name)
            self._admit(name, config, state)
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
        model = self.model if model is None else model
        adapter_name = model.active_adapter if adapter_name is None else adapter_name
        if adapter_name not in model.peft_config:
            raise CraftError(f"There is no adapter '{adapter_name}'. The model has {', '.join(model.peft_config)}.")
        tuner = _tuner_of(model)
        state = live_state(tuner.model, tuner.served_modules().wrappers, adapter_name)
        with self._lock:
            self._refuse_taken(name)
            self._admit(name, copy(model.peft_config[adapter_name]), state)

    def save(self, name: str, folder: str | Path) -> None:
        """Write an adapter as `save_pretrained` does: the folder loads in PEFT, and in a bank."""
        with self._lock:
            self._refuse_unknown(name)
            (held,) = self._make_resident([name])
            config = self._configs[name]
            if self.keep == "middles":
                config = config.weighted_sum()
            state = adapter_state(self._shelves, held.place, held.heads, config)
        write_adapter(folder, config, state)

    def evict(self, name: str) -> None:
        """Free the memory of an adapter; the bank keeps its name and reads it again when it is asked for.

        Raises:
            CraftError: it is not on disk, and the bank has no `folder` to save it in.
        """
        with self._lock:
            self._refuse_unknown(name)
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
            del self._resident[name]

    def remove(self, name: str) -> None:
        """Forget an adapter; files stay."""
        with self._lock:
            self._refuse_unknown(name)
            blocks = blocks_of(self._tuner.model)
            if any(choice is not None and choice.name == name for choice in [self.choice, *(b.choice for b in blocks)]):
                raise CraftError(f"The adapter '{name}' is in use. Call `bank.use(None)` first.")
            self._resident.pop(name, None)
            del self._configs[name]
            self._on_disk.pop(name, None)

    # -----------------------------------------------------------------------------------------------------------------
    # Use
    # -----------------------------------------------------------------------------------------------------------------

    def use(self, name: str | None) -> ExitStack:
        """Send all rows through one adapter: for the calls of a block, or for all until the next `use`.

        ``with bank.use(name):`` is for the calls of this thread or task in the block; tasks and `asyncio.to_thread`
        inherit it, threads do not. By itself ``bank.use(name)`` is for all calls of the model that are in no such
        block. Calls with `adapter_names` are not concerned.

        Args:
            name: an adapter of the bank, "__base__" for none, or None for the model's own active adapter.

        Raises:
            CraftError: an unknown name, or adapters that are merged into the base weights.
        """
        choice = None if name is None else self._choose(name)
        block = Request(self._tuner.served_modules().modules, choice=choice, block=True)
        return Use(block, partial(self._use_everywhere, choice))

    @property
    def choice(self) -> Choice | None:
        """What the calls use that are in no ``with bank.use(...)`` and name no adapter; None for the model's own."""
        return self._choice

    def _choose(self, name: str) -> Choice:
        served = self._tuner.served_modules()
        if any(layer.merged for layer, _ in served.layers):
            raise CraftError(
                "The bank cannot be used while adapters are merged into the base weights. Call `unmerge_adapter` first."
            )
        if name == BASE:
            return Choice(name, {})
        with self._lock:
            self._refuse_unknown(name)
            (held,) = self._make_resident([name])
            lent = [shelf.slots(held.place) for shelf in self._shelves]
        parts: dict[nn.Module, Any] = {w: held.heads.get(path, {}) for path, (w, _) in served.wrappers.items()}
        for shelf, (slots, _) in zip(self._shelves, lent, strict=True):
            parts |= {layer: (slot,) for layer, slot in zip(shelf.layers, slots, strict=True)}
        return Choice(name, parts, keep=lent)

    def _use_everywhere(self, choice: Choice | None) -> Callable[[], Any]:
        """Set what the calls use that say nothing else, here or in this thread's block; returns how to undo it."""
        block = block_of(self._tuner.model)
        with self._lock:
            if block is not None:
                before, block.choice = block.choice, choice
                return partial(setattr, block, "choice", before)
            before, self._choice = self._choice, choice
            served = self._tuner.served_modules()
            for module in served.modules - {served.model}:  # for calls of parts of the model, which are no requests
                vars(module)["instead"] = None if choice is None else choice.part(module)
        return partial(self._use_everywhere, before)

    def hold(self, names: Iterable[str]) -> dict[str, Place]:
        """Those of the names that it has, in memory, read from disk if need be, for as long as the result is kept."""
        with self._lock:
            wanted = [name for name in dict.fromkeys(names) if name in self._configs]
            places = self._make_resident(wanted)
            for shelf in self._shelves:
                shelf.follow_bases()
        return dict(zip(wanted, places, strict=True))

    def place_of(self, layer: nn.Module) -> tuple[StackShelf, int] | None:
        """The shelf of a layer's stack, and the layer's index in it; None for a layer that the adapters do not have."""
        return self._layers.get(layer)

    # -----------------------------------------------------------------------------------------------------------------
    # Memory
    # -----------------------------------------------------------------------------------------------------------------

    def _make_resident(self, names: Collection[str]) -> list[Place]:
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
        self._make_room(self.bytes_per_adapter + bytes_of(heads), spare=needed)
        if not self._free:
            self._places += 1
            self._free.append(self._places)
        held = Place(self._free.pop(), self._free)
        held.heads = heads
        for shelf, (tensors, scaling) in zip(self._shelves, trained, strict=True):
            shelf.put(held.place, tensors, scaling)
        self._configs[name] = cast(StackConfig, config)
        self._resident[name] = held

    def _make_room(self, size: int, spare: Collection[str]) -> None:
        for name in [name for name in self._resident if name not in spare]:
            if self._has_room(size):
                return
            self.evict(name)
        if not self._has_room(size):
            raise CraftError(
                f"The bank has no room for {readable(size)} more: max_resident={self.max_resident}, "
                f"max_bytes={self.max_bytes}, and all {len(self._resident)} resident adapters are needed at once. "
                "Allow more, or put fewer adapters into one batch."
            )

    def _has_room(self, size: int) -> bool:
        held = self.resident_bytes
        fits = self.max_bytes is None or held["adapters"] + held["heads"] + size <= self.max_bytes
        return fits and (self.max_resident is None or len(self._resident) < self.max_resident)

    def refuse_name(self, name: str) -> None:
        """Refuse a name that an adapter of the bank has."""
        if name == BASE or name in self:
            raise CraftError(f"The bank has an adapter '{name}' already. Choose another name, or remove it first.")

    def _refuse_taken(self, name: str) -> None:
        self.refuse_name(name)
        if name in self._tuner.peft_config:
            raise CraftError(f"The model itself has an adapter '{name}'. Choose another name for that of the bank.")

    def _refuse_unknown(self, name: str) -> None:
        if name not in self:
            some = ", ".join(self.names[:5]) + (", ..." if len(self) > 5 else "")
            raise CraftError(f"There is no adapter '{name}' in the bank. It has {some or 'none'}.")


def _tuner_of(model: PeftModel) -> StackTuner:
    tuner = getattr(model, "base_model", None)
    if not isinstance(tuner, StackTuner):
        raise CraftError(
            f"A bank needs a PEFT model with an adapter of this package, and was given a {type(model).__name__} "
            f"({type(tuner).__name__}). Make one with `PeftModel.from_pretrained(base, folder)` from one of them."
        )
    return tuner
