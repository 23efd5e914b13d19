"""The trained tensors of many adapters of one stack, beside each other in one growing tensor each."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ..adapters.base import FrozenBasesAdapter
from .layer import StackedLinear, StackSlot


class StackShelf:
    """The adapters of one stack in an `AdapterBank`.

    Place 0 holds zeros, which add nothing.

    Args:
        paths: of the stack's layers in the base model.
        layers: these layers.
        bases: an adapter of the model; its frozen bases are used, not copied.
        keep_middles: hold the matrices K of all layers, instead of the tensors that they are computed from.
    """

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
        self._window: FrozenBasesAdapter | None = None
        self._slots: tuple[StackSlot, ...] = ()

    @property
    def bytes_of_one(self) -> int:
        """The memory of one adapter."""
        return sum(tensor[0].nbytes for tensor in self.tensors.values())

    @property
    def bytes_reserved(self) -> int:
        """The memory of all places, used or not."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

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

    def slots(self, place: int) -> tuple[StackSlot, ...]:
        """For every layer a slot with the adapter of a place, its K formed; valid until the next call."""
        self.follow_bases()
        formed = self.bases.middles_of({name: tensor[place] for name, tensor in self.tensors.items()})
        middles = self.scalings[place] * formed
        if self._window is None or self._window.in_factor is not self.bases.in_factor:
            self._window = self.bases.with_middles(middles)
            self._window.registered_in = (nn.ModuleDict({"window": self._window}), "window")
            layers = range(len(self.layers))
            self._slots = tuple(StackSlot(self._window, layer, persistent=False).eval() for layer in layers)
        self._window.middles = nn.Parameter(middles, requires_grad=False)
        return self._slots

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
