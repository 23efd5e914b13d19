"""What each adapted layer adds to the rows of a batch that use different adapters.

Adapters on the same frozen bases are applied together: all rows go through ``x @ in_factor`` and ``@ out_factor.T``
once, with one small matrix a row between them. Their matrices K are formed for all layers at once, when it pays: a
single pass with few tokens a row goes through the transforms themselves. Other adapters each get their own rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from ..adapters.base import FrozenBasesAdapter, StackAdapter
from ..fused import add_thin, thin_dtype

BASE = "__base__"
"""PEFT's name for a row that uses no adapter."""

FEW_TOKENS = 32
"""Up to so many tokens a row, sending them through the transforms once costs less than forming K (at rank 100)."""


class Shelf(Protocol):
    """Adapters of one stack beside each other: tensors whose first index is the adapter's place."""

    bases: FrozenBasesAdapter
    tensors: dict[str, Tensor]
    scalings: Tensor


class Held(Protocol):
    """An adapter in memory: who has this object keeps it there."""

    @property
    def place(self) -> int:
        """Its index on every shelf; 0 holds zeros."""

    @property
    def heads(self) -> Mapping[str, Mapping[str, Tensor]]:
        """By path of a saved module its tensors."""


@dataclass(frozen=True, eq=False)
class Choice:
    """What a bank puts in the place of a model's active adapters, for all rows.

    Args:
        name: of the adapter.
        parts: by module: the slots of an adapted layer, the tensors of a saved head.
        keep: what must not be used otherwise in the meantime.
    """

    name: str
    parts: Mapping[nn.Module, Any]
    keep: Any = None

    def part(self, module: nn.Module) -> Any:
        """What the module uses; nothing if the adapter has nothing there."""
        return self.parts.get(module, ())


class Store(Protocol):
    """What a model and its requests need of an `AdapterBank`."""

    def __contains__(self, name: object) -> bool:
        """Whether it has an adapter of that name."""

    def __len__(self) -> int:
        """How many adapters it has."""

    def refuse_name(self, name: str) -> None:
        """Refuse a name that one of its adapters has, for an adapter of the model."""

    def hold(self, names: Iterable[str]) -> Mapping[str, Held]:
        """Those of the names that it has, in memory for as long as the result is kept."""

    @property
    def choice(self) -> Choice | None:
        """What all calls use in the place of the model's active adapters, unless they say otherwise."""

    def place_of(self, layer: nn.Module) -> tuple[Shelf, int] | None:
        """The shelf of a layer's stack, and the layer's index in it."""


class MixedBatch:
    """One adapter for each row of a batch, by name; valid while no adapter of the model itself changes.

    Args:
        names: one a row; `BASE` or a name that a layer does not have adds nothing there.
        store: where names that a layer does not have as an adapter of its own are looked up.
    """

    def __init__(self, names: Sequence[str], store: Store | None = None) -> None:
        self.names = names
        self.held: Mapping[str, Held] = store.hold(names) if store is not None else {}
        self._store = store if self.held else None
        self._slots = [self.held[name].place if name in self.held else 0 for name in names]
        self._groups: dict[Any, _Group] = {}
        self._plans: dict[nn.Module, tuple[list[tuple[_Group, int]], list[tuple[nn.Module, Tensor]]]] = {}

    def add(self, layer: nn.Module, result: Tensor, x: Tensor) -> Tensor:
        """The output of an adapted layer's base plus what the adapters add to its rows."""
        if layer not in self._plans:
            self._plans[layer] = self._plan(layer, x.device)
        together, apart = self._plans[layer]
        for group, place in together:
            result = group.add(place, result, x)
        for slot, rows in apart:
            result = result.index_add(0, rows, slot.delta_output(x[rows]).to(result.dtype))
        return result

    def _plan(
        self, layer: nn.Module, device: torch.device
    ) -> tuple[list[tuple[_Group, int]], list[tuple[nn.Module, Tensor]]]:
        together = []
        found = self._store.place_of(layer) if self._store is not None else None
        if found is not None:
            shelf, place = found
            if shelf not in self._groups:
                self._groups[shelf] = _Group(shelf.bases, shelf.tensors, shelf.scalings, self._slots)
            together.append((self._groups[shelf], place))
        slots: Any = layer.slots
        clusters = _clusters([(name, slots[name]) for name in dict.fromkeys(self.names) if name in slots])
        alone = []
        for cluster in clusters:
            if len(cluster) == 1:
                name, slot = cluster[0]
                rows = [row for row, wanted in enumerate(self.names) if wanted == name]
                alone.append((slot, torch.tensor(rows, device=device)))
            else:
                key = tuple(slot.adapter for _, slot in cluster)
                if key not in self._groups:
                    self._groups[key] = _group_of(dict(cluster), self.names)
                together.append((self._groups[key], cluster[0][1].layer))
        return together, alone


class _Group:
    """Rows whose adapters have the same bases, in one stack.

    Args:
        bases: an adapter that has them.
        tensors: the trained tensors of adapters, each with a first dimension more: the adapter.
        scalings: of these adapters.
        index: for each row of the batch the adapter.
    """

    def __init__(
        self, bases: FrozenBasesAdapter, tensors: Mapping[str, Tensor], scalings: Tensor, index: Sequence[int]
    ) -> None:
        self._bases, self._tensors, self._scalings = bases, tensors, scalings
        self._index = index
        self._rows = torch.tensor(index, device=scalings.device)
        self._factors: tuple[Tensor, Tensor] | None = None
        self._own: dict[str, Tensor] | None = None  # the trained tensors of each row's adapter
        self._matrices: dict[int, Tensor] = {}  # by layer, for each row its K
        self._formed: Tensor | None = None
        self._passed: set[int] = set()

    def add(self, layer: int, result: Tensor, x: Tensor) -> Tensor:
        """The result plus what each row's adapter adds in a layer of the stack."""
        out_factor, in_factor = self._factors_for(x)
        hidden = x.reshape(len(x), -1, x.shape[-1]).to(in_factor.dtype) @ in_factor
        # A row of zeros adds exactly nothing.
        return add_thin(result, self._turn(layer, hidden).to(thin_dtype(result.dtype)), out_factor.T)

    def _turn(self, layer: int, hidden: Tensor) -> Tensor:
        if self._formed is None and hidden.shape[1] <= FEW_TOKENS and layer not in self._passed:
            self._passed.add(layer)  # asked a second time, as in each step of `generate`, formed matrices pay
            if self._own is None:
                self._own = {name: tensor[self._rows] for name, tensor in self._tensors.items() if name != "middles"}
            with torch.autocast(hidden.device.type, enabled=False):
                turned = self._bases.turn_rows(layer, hidden.to(self._bases.in_factor.dtype), self._own)
                if turned is not None:
                    return (turned * self._scalings[self._rows, None, None]).to(hidden.dtype)
        return hidden @ self._middles(layer, hidden.dtype).mT

    def _middles(self, layer: int, dtype: torch.dtype) -> Tensor:
        if layer not in self._matrices or self._matrices[layer].dtype != dtype:
            scalings = self._scalings[self._rows, None, None]
            if "middles" in self._tensors:
                rows = self._tensors["middles"][:, layer].index_select(0, self._rows)
            else:
                if self._formed is None:
                    self._formed, self._place = self._form()
                rows = self._formed[:, layer].index_select(0, self._place)
            self._matrices[layer] = (rows * scalings).to(dtype)
        return self._matrices[layer]

    def _form(self) -> tuple[Tensor, Tensor]:
        """K of every layer of the adapters in use, and which of them each row uses.

        One adapter after the other: for all of them at once the intermediate results would not fit into a cache.
        """
        used = list(dict.fromkeys(self._index))
        with torch.autocast(self._scalings.device.type, enabled=False):
            formed = [self._bases.middles_of({name: t[i] for name, t in self._tensors.items()}) for i in used]
        place = {adapter: number for number, adapter in enumerate(used)}
        return torch.stack(formed), self._rows.new_tensor([place[adapter] for adapter in self._index])

    def _factors_for(self, x: Tensor) -> tuple[Tensor, Tensor]:
        kind = (x.device, thin_dtype(x.dtype))
        if self._factors is None or (self._factors[0].device, self._factors[0].dtype) != kind:
            self._factors = (self._bases.out_factor.to(*kind), self._bases.in_factor.to(*kind))
        return self._factors


def _group_of(slots: Mapping[str, Any], names: Sequence[str]) -> _Group:
    """Adapters of the model itself, with zeros for the rows of others."""
    adapters = [slot.adapter for slot in slots.values()]
    trained = [adapter.trained() for adapter in adapters]
    tensors = {
        name: torch.stack([*(t[name] for t in trained), torch.zeros_like(trained[0][name])]) for name in trained[0]
    }
    scalings = adapters[0].in_factor.new_tensor([*(adapter.scaling for adapter in adapters), 1.0])
    place = {name: number for number, name in enumerate(slots)}
    return _Group(adapters[0], tensors, scalings, [place.get(name, len(adapters)) for name in names])


def _clusters(slots: Iterable[tuple[str, Any]]) -> list[list[tuple[str, Any]]]:
    """The adapters of a layer, those together that have the same bases."""
    clusters: list[list[tuple[str, Any]]] = []
    for name, slot in slots:
        for cluster in clusters:
            first = cluster[0][1]
            if first.layer == slot.layer and _same_bases(first.adapter, slot.adapter):
                cluster.append((name, slot))
                break
        else:
            clusters.append([(name, slot)])
    return clusters


_compared: WeakKeyDictionary[StackAdapter, WeakKeyDictionary[StackAdapter, tuple[list[Any], bool]]]
_compared = WeakKeyDictionary()


def _same_bases(first: StackAdapter, second: StackAdapter) -> bool:
    """Whether two adapters can be applied together; compares their bases once, and again when they were changed."""
    if not (_in_one_piece(first) and _in_one_piece(second)):
        return False
    assert isinstance(first, FrozenBasesAdapter) and isinstance(second, FrozenBasesAdapter)
    first.make_ready()
    second.make_ready()
    pairs = list(zip(first.bases.values(), second.bases.values(), strict=True))
    known = _compared.setdefault(first, WeakKeyDictionary())
    if second not in known or not _are(known[second][0], pairs):
        shapes = [{name: t.shape for name, t in adapter.trained().items()} for adapter in (first, second)]
        equal = shapes[0] == shapes[1] and all(a.shape == b.shape and torch.equal(a, b.to(a)) for a, b in pairs)
        known[second] = ([(ref(t), _version(t)) for pair in pairs for t in pair], equal)
    return known[second][1]


def _in_one_piece(adapter: StackAdapter) -> bool:
    """An adapter on frozen bases whose tensors no engine for several processes has wrapped, split or replaced."""
    holder, name = adapter.registered_in
    return (
        isinstance(adapter, FrozenBasesAdapter)
        and name in holder
        and holder[name] is adapter
        and all(type(p) is nn.Parameter and not hasattr(p, "ds_id") for p in adapter.parameters())
    )


def _are(remembered: list[Any], pairs: list[tuple[Tensor, Tensor]]) -> bool:
    tensors = [tensor for pair in pairs for tensor in pair]
    return all(r() is t and v == _version(t) for (r, v), t in zip(remembered, tensors, strict=True))


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
