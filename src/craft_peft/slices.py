"""A tensor that is read a slice of its first mode at a time, and what one does with a mode of it.

A stack of pretrained weights is such a tensor: its slices are the layers' weights, which may be quantised, elsewhere
or split over processes, and need not fit in memory a second time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from .errors import CraftError

HELD_NUMBERS = 2**23
"""Up to how many numbers a truncated tensor is held: half a slice of 4096 x 4096."""


@runtime_checkable
class Slices(Protocol):
    """The slices of a tensor along its first mode, all of one shape; a tensor itself is one, and so is a list of them.

    Nothing is used but the length and an index from 0: what is not in memory may be read when it is asked for.
    """

    def __len__(self) -> int:
        """How many slices."""
        ...

    def __getitem__(self, index: int, /) -> Tensor:
        """One of them."""
        ...


@dataclass(frozen=True)
class BlockedMatrix:
    """A matrix in blocks of columns, of which one is in memory at a time.

    Args:
        rows: of the matrix and of every block.
        columns: of all blocks together.
        read: gives the blocks, in an order that does not change; called anew for every pass.
        scale: about the largest absolute entry; whoever computes with blocks divides them by it.
        device: where the blocks are.
    """

    rows: int
    columns: int
    read: Callable[[], Iterable[Float[Tensor, "rows _"]]]
    scale: float
    device: torch.device


@dataclass(frozen=True)
class SlicedTensor:
    """A tensor given by its slices, of which one is in memory at a time.

    Args:
        slices: along the first mode.
        shape: of the whole tensor.
        scale: about the largest absolute entry; what is squared is divided by it.
        dtype: at least float32: of what is computed from it in the end.
        precision: of projections on the way, the same or float64.
        device: that of the first slice, to which the others are brought.
        unfolds_at_once: whether it is small enough to be copied as a whole.
    """

    slices: Slices
    shape: tuple[int, ...]
    scale: float
    dtype: torch.dtype
    precision: torch.dtype
    device: torch.device
    unfolds_at_once: bool = False

    @classmethod
    def of(cls, slices: Slices) -> SlicedTensor:
        """With what one pass over the slices tells, for projections in float64.

        Raises:
            CraftError: NaN or infinity in it.
        """
        largest = []
        for index in range(len(slices)):
            slice_ = slices[index].detach()
            if index == 0:
                shape, dtype, device = (len(slices), *slice_.shape), slice_.dtype, slice_.device
            largest.append(torch.stack(slice_.aminmax()).to(device, torch.float64).abs())
            del slice_  # before the next one is read
        scale = torch.stack(largest).amax()  # NaN or infinite if any entry is
        if not torch.isfinite(scale):
            raise CraftError("The tensor to decompose holds NaN or infinity. Check the weights that it was made from.")
        return cls(slices, shape, scale.item() or 1.0, torch.promote_types(dtype, torch.float32), torch.float64, device)

    def read(self, index: int) -> Tensor:
        """One slice as it is."""
        return self.slices[index].detach().to(self.device)

    def unfolded(self, mode: int) -> BlockedMatrix:
        """`unfold` of the tensor, in blocks of about the size of a slice unless it is small."""
        size = self.shape[mode]
        if self.unfolds_at_once:
            whole = unfold(self.whole(), mode)
            return BlockedMatrix(size, whole.shape[1], lambda: iter([whole]), self.scale, self.device)
        read = self._slabs if mode == 0 else lambda: (unfold(self.read(i), mode - 1) for i in range(self.shape[0]))
        return BlockedMatrix(size, prod(self.shape) // size, read, self.scale, self.device)

    def whole(self) -> Tensor:
        """All slices as one tensor."""
        if isinstance(self.slices, Tensor):
            return self.slices
        return torch.stack([self.read(index) for index in range(self.shape[0])])

    def _slabs(self) -> Iterator[Tensor]:
        """The same few rows of all slices, side by side, and so on: together as large as one slice."""
        rows, step = _rows_and_step(self.shape)
        for start in range(0, rows, step):
            slab = torch.empty(0)
            for index in range(self.shape[0]):
                part = torch.atleast_1d(self.read(index))[start : start + step].reshape(-1)
                if index == 0:
                    slab = part.new_empty(self.shape[0], len(part))
                slab[index] = part
                del part  # it may keep all of its slice in memory
            yield slab

    def projected(self, factors: Sequence[Tensor], skip: int | None = None) -> Float[Tensor, ...]:
        """The tensor times the transposed factors in all modes but `skip`."""
        factors = [factor.to(self.precision) for factor in factors]
        found = []
        for index in range(self.shape[0]):
            slice_ = self.read(index).to(self.precision)
            for mode, factor in enumerate(factors[1:], start=1):
                if mode != skip:
                    slice_ = mode_product(slice_, factor.T, mode - 1)
            found.append(slice_)
        tensor = torch.stack(found)
        return tensor if skip == 0 else mode_product(tensor, factors[0].T, 0)

    def truncated(self, factor: Float[Tensor, "size rank"], mode: int) -> SlicedTensor:
        """The tensor times a transposed factor in one mode after the first: in memory if `is_held`."""
        shape = (*self.shape[:mode], factor.shape[1], *self.shape[mode + 1 :])
        turned = _TurnedSlices(self, factor.T.to(self.precision), mode)
        if not is_held(shape, mode):
            return replace(self, slices=turned, shape=shape)
        slices = factor.new_empty(shape, dtype=self.precision)
        for index in range(self.shape[0]):
            slices[index] = turned[index]
        return replace(self, slices=slices, shape=shape, unfolds_at_once=True)


@dataclass(frozen=True)
class _TurnedSlices:
    """Slices times a matrix in one mode, computed when they are read."""

    stack: SlicedTensor
    matrix: Tensor
    mode: int

    def __len__(self) -> int:
        return self.stack.shape[0]

    def __getitem__(self, index: int, /) -> Tensor:
        return mode_product(self.stack.read(index).to(self.stack.precision), self.matrix, self.mode - 1)


def is_held(shape: Sequence[int], mode: int) -> bool:
    """Whether a tensor is kept in memory that was truncated in the modes from the second to `mode`.

    If not, it is computed from the slices in every pass. Truncated in all of them, it is about as large as the result.
    """
    return prod(shape) <= HELD_NUMBERS or mode == len(shape) - 1


def slabs_of(shape: Sequence[int]) -> int:
    """In how many blocks `SlicedTensor.unfolded(0)` comes; for each, every slice is read."""
    rows, step = _rows_and_step(shape)
    return -(-rows // step)


def _rows_and_step(shape: Sequence[int]) -> tuple[int, int]:
    rows = shape[1] if len(shape) > 1 else 1
    return rows, max(1, rows // shape[0])


def unfold(tensor: Float[Tensor, ...], mode: int) -> Float[Tensor, "size rest"]:
    """The tensor as a matrix: mode `mode` in the rows, the other modes in their order in the columns.

    Args:
        tensor: any order.
        mode: counted from 0.

    Example:
        >>> unfold(torch.zeros(2, 3, 4), mode=1).shape
        torch.Size([3, 8])
    """
    return tensor.movedim(mode, 0).reshape(tensor.shape[mode], -1)


def mode_product(tensor: Float[Tensor, ...], matrix: Float[Tensor, "new old"], mode: int) -> Float[Tensor, ...]:
    """The product ``tensor x_mode matrix``: every fibre of that mode is multiplied by the matrix.

    Args:
        tensor: of size ``old`` in `mode`.
        matrix: ``(new, old)``.
        mode: counted from 0.

    Example:
        >>> mode_product(torch.ones(2, 3, 4), torch.ones(5, 3), mode=1).shape
        torch.Size([2, 5, 4])
    """
    return torch.tensordot(matrix, tensor, dims=([1], [mode])).movedim(0, mode)
