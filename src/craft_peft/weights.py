"""The pretrained weights of a stack, as an adapter meets them: sizes, how it reads them, their fingerprint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .errors import CraftError
from .slices import Slices


@dataclass(frozen=True)
class StackShape:
    """The sizes ``(d_out, d_in)`` of the matrices of a stack, in the order of the layers.

    In the stacks of most methods they are all the same; `layers`, `d_out` and `d_in` then describe them.

    Args:
        matrices: the sizes.
        blocks: how many of them, in their order, lie in each layer of the model; by default one in each.

    Example:
        >>> shape = StackShape.uniform(layers=12, d_out=768, d_in=512)
        >>> shape.layers, shape.d_out, shape.d_in, len(shape.matrices)
        (12, 768, 512, 12)
    """

    matrices: tuple[tuple[int, int], ...]
    blocks: tuple[int, ...] = ()

    @classmethod
    def uniform(cls, layers: int, d_out: int, d_in: int) -> StackShape:
        """`layers` matrices of one shape."""
        return cls(((d_out, d_in),) * layers)

    @property
    def layers(self) -> int:
        """How many matrices."""
        return len(self.matrices)

    @property
    def matrix(self) -> tuple[int, int]:
        """The shape that all matrices have; methods that share factors over the layers ask for it."""
        if len(set(self.matrices)) != 1:
            raise CraftError(
                f"The matrices of this stack have the shapes {sorted(set(self.matrices))}; one shape is needed."
            )
        return self.matrices[0]

    def __str__(self) -> str:
        sizes = ", ".join(f"{d_out} x {d_in}" for d_out, d_in in dict.fromkeys(self.matrices))
        return f"{self.layers} layers of {sizes} weights"

    @property
    def d_out(self) -> int:
        """The output size of every matrix."""
        return self.matrix[0]

    @property
    def d_in(self) -> int:
        """The input size of every matrix."""
        return self.matrix[1]


class StackWeights:
    """The pretrained weights of a stack, each read when it is asked for, and let go again.

    When a weight is read first, it is checked, and its part of the fingerprint is kept.

    Args:
        names: what to call the layers in an error, such as the paths of their modules.
        read: gives the weight of a layer, ``(d_out, d_in)``.

    Raises:
        CraftError: when a weight with NaN or infinity is read; names it.

    Example:
        >>> weights = StackWeights(["first", "second"], lambda layer: layer * torch.eye(2))
        >>> len(weights), weights[1].tolist()
        (2, [[1.0, 0.0], [0.0, 1.0]])
    """

    def __init__(self, names: Sequence[str], read: Callable[[int], Tensor]) -> None:
        self.names = names
        self._read = read
        self._fingerprints: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, layer: int) -> Tensor:
        if not 0 <= layer < len(self):
            raise IndexError(layer)
        weight = self._read(layer).detach()
        if layer not in self._fingerprints:
            self._fingerprints[layer] = _fingerprint_of(weight, self.names[layer])
        return weight

    def fingerprint(self, layer: int) -> Float[Tensor, " numbers"]:
        """The part of a layer in `weights_fingerprint`; reads the weight if it was not read yet."""
        if layer not in self._fingerprints:
            self[layer]
        return self._fingerprints[layer]

    def decomposed(self, ranks: Sequence[int], method: str, compute: Callable[[], Any]) -> Any:
        """What `compute` makes of these weights, or what it once made of them, if that is remembered.

        Args:
            ranks: of the decomposition.
            method: how it is computed.
            compute: reads the weights.
        """
        return compute()


ReadWeights = Callable[[], Slices]
"""Gives the pretrained weights of a stack, one ``(d_out, d_in)`` tensor a layer, to an adapter that needs them."""

_SAFE_NORMS = (1e-12, 1e18)  # of weights whose squares stay within float32

FINGERPRINT_NUMBERS = 4
"""How many numbers of each layer's weight `weights_fingerprint` holds."""


def decomposed(weights: Slices, ranks: Sequence[int], method: str, compute: Callable[[], Any]) -> Any:
    """What `compute` makes of weights, or what `StackWeights.decomposed` remembers."""
    return weights.decomposed(ranks, method, compute) if isinstance(weights, StackWeights) else compute()


def weights_fingerprint(weights: Slices) -> Float[Tensor, " numbers"]:
    """Norm and three fixed entries of each layer's weight: tells base models apart in one pass over the weights.

    Raises:
        CraftError: a weight with NaN or infinity.

    Example:
        >>> weights_fingerprint([torch.eye(2)])
        tensor([1.4142, 1.0000, 0.0000, 1.0000])
    """
    if not isinstance(weights, StackWeights):
        weights = StackWeights([f"layer {layer}" for layer in range(len(weights))], weights.__getitem__)
    rows = [weights.fingerprint(layer) for layer in range(len(weights))]
    return torch.cat([row.to(rows[0].device) for row in rows]).float()


def _fingerprint_of(weight: Tensor, name: str) -> Tensor:
    # Rows in their own precision: ten times as fast as in float64, where their squares neither over- nor underflow.
    rows = torch.linalg.vector_norm(weight, dim=1, dtype=torch.promote_types(weight.dtype, torch.float32))
    norm = torch.linalg.vector_norm(rows, dtype=torch.float64)  # NaN or infinite if any entry is
    if not _SAFE_NORMS[0] < norm < _SAFE_NORMS[1]:
        norm = torch.linalg.vector_norm(weight, dtype=torch.float64)
    if not torch.isfinite(norm) and not torch.isfinite(weight).all():  # a norm in float64 may be too large itself
        raise CraftError(
            f"The weight of '{name}' holds NaN or infinity. Load the base model again, or leave that module out "
            "with `exclude_modules`."
        )
    return torch.cat([norm.reshape(1), fixed_entries(weight).double()])


def as_bits(fingerprint: Tensor) -> Tensor:
    """The bits of a fingerprint's float32 numbers as int32; of bits, themselves.

    It is kept and saved so: whoever casts the floating-point tensors of a model or of a state dict leaves it whole.

    Example:
        >>> as_bits(torch.ones(1)), as_numbers(as_bits(torch.ones(1)))
        (tensor([1065353216], dtype=torch.int32), tensor([1.]))
    """
    return fingerprint.float().view(torch.int32) if fingerprint.is_floating_point() else fingerprint


def as_numbers(fingerprint: Tensor) -> Float[Tensor, " numbers"]:
    """The numbers of a saved fingerprint: of its bits, or as version 0.1.0 saved them."""
    return fingerprint.float() if fingerprint.is_floating_point() else fingerprint.view(torch.float32)


def fixed_entries(weight: Float[Tensor, "d_out d_in"]) -> Float[Tensor, " numbers"]:
    """The first, the middle and the last entry of a weight: reading them costs nothing.

    Example:
        >>> fixed_entries(torch.arange(6.0).reshape(2, 3))
        tensor([0., 2., 5.])
    """
    places = torch.linspace(0, weight.numel() - 1, FINGERPRINT_NUMBERS - 1, dtype=torch.float64).long()
    places = places.to(weight.device)
    return weight.detach()[places // weight.shape[1], places % weight.shape[1]]


def bytes_of(tensor: Tensor) -> Any:
    """The numbers of a tensor as they are in memory, in the order of the indices: what a hash takes.

    Example:
        >>> bytes_of(torch.ones(1)).tobytes().hex()
        '0000803f'
    """
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
