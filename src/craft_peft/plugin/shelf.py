"""The trained tensors of many adapters of one stack, beside each other in one growing tensor each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.base import FrozenBasesAdapter
from .layer import StackedLinear, StackSlot


class Lent:
    """Something to be used again when nobody has this object any more.

    Args:
        what: it.
        back_to: where it goes then.
    """

    def __init__(self, what: Any, back_to: list[Any]) -> None:
        self.what, self._back_to = what, back_to

    def __del__(self) -> None:
        self._back_to.append(self.what)


class Place(Lent):
    """An adapter of a bank in memory: its index on every shelf, and its saved modules, by path their tensors.

    A request that has it may use the place to its end, even if the bank has let the adapter go.
    """

    heads: dict[str, dict[str, Tensor]]

    @property
    def place(self) -> int:
        """The index."""
        return int(self.what)


class StackShelf:
    """The adapters of one stack in an `AdapterBank`.

    Place 0 holds zeros, which add nothing.

    Args:
        paths: of the stack's layers in the base model.
        layers: these layers.
        bases: an adapter of the model; its frozen bases are used, not copied.
        keep_middles: hold the matrices K of all layers, instead of the tensors that they are computed from.
    """

    @torch.inference_mode(False)  # what is kept can then be written, and used, in whatever mode a request is in
    def __init__(
        self,
        paths: tuple[str, ...],
        layers: tuple[StackedLinear, ...],
        bases: FrozenBasesAdapter,
        *,
        keep_middles: bool,
    ) -> None:
        self.paths, self.layers, self.bases, self.keep_middles = paths, layers, bases, keep_middles
        zeros = {name: tensor.new_zeros(tensor.shape) for name, tensor in bases.trained().items()}
        if keep_middles:
            zeros = {"middles": bases.middles_of(zeros)}
        self.tensors = {name: tensor.detach()[None] for name, tensor in zeros.items()}
        self.scalings = bases.in_factor.new_ones(1)
        self._windows: list[tuple[FrozenBasesAdapter, tuple[StackSlot, ...]]] = []  # made once, and lent

    @property
    def bytes_of_one(self) -> int:
        """The memory of one adapter."""
        return sum(tensor[0].nbytes for tensor in self.tensors.values())

    @property
    def bytes_reserved(self) -> int:
        """The memory of all places, used or not."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @torch.inference_mode(False)
    def put(self, place: int, trained: Mapping[str, Tensor], scaling: float) -> None:
        """Store an adapter at a place; room is made for twice as many where there is none."""
        self.follow_bases()
        if place >= len(self.scalings):
            self._grow(2 * place)
        if self.keep_middles:
            trained, scaling = {"middles": scaling * self.bases.middles_of(trained)}, 1.0
        self.scalings[place] = scaling
        for name, tensor in self.tensors.items():
            tensor[place] = trained[name]

    def take(self, place: int) -> dict[str, Tensor]:
        """A copy of what is stored at a place."""
        return {name: tensor[place].clone() for name, tensor in self.tensors.items()}

    @torch.inference_mode(False)
    def slots(self, place: int) -> tuple[tuple[StackSlot, ...], Lent]:
        """For every layer a slot with the adapter of a place, its K formed; and what has to be kept meanwhile."""
        self.follow_bases()
        formed = self.bases.middles_of({name: tensor[place] for name, tensor in self.tensors.items()})
        middles = self.scalings[place] * formed
        window, slots = self._windows.pop() if self._windows else (None, ())
        if window is None or window.in_factor is not self.bases.in_factor:
            window = self.bases.with_middles(middles)
            window.registered_in = (nn.ModuleDict({"window": window}), "window")
            slots = tuple(StackSlot(window, layer, persistent=False).eval() for layer in range(len(self.layers)))
        window.middles = nn.Parameter(middles, requires_grad=False)
        return slots, Lent((window, slots), self._windows)

    @torch.inference_mode(False)
    def follow_bases(self) -> None:
        """Go where the bases have gone, with `model.to(...)`."""
        place = self.bases.in_factor
        if self.scalings.device != place.device or self.scalings.dtype != place.dtype:
            self.scalings = self.scalings.to(place)
            self.tensors = {name: tensor.to(place) for name, tensor in self.tensors.items()}

    def _grow(self, places: int) -> None:
        def grown(tensor: Tensor) -> Tensor:
            larger = tensor.new_empty((places, *tensor.shape[1:]))
            larger[: len(tensor)] = tensor
            return larger

        self.scalings = grown(self.scalings)
        for name in self.tensors:
            self.tensors[name] = grown(self.tensors[name])


def bytes_of(heads: Mapping[str, Mapping[str, Tensor]]) -> int:
    """The memory of saved modules."""
    return sum(tensor.nbytes for head in heads.values() for tensor in head.values())


def readable(size: float) -> str:
    """A number of bytes in words."""
    for unit in ("GB", "MB", "kB"):
        if size >= (scale := {"GB": 1e9, "MB": 1e6, "kB": 1e3}[unit]):
            return f"{size / scale:.1f} {unit}"
    return f"{size:.0f} bytes"
