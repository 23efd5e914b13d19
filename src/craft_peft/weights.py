"""The pretrained weights of a stack, as an adapter meets them: sizes, how it reads them, their fingerprint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .errors import CraftError


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


ReadWeights = Callable[[], Sequence[Tensor]]
"""Gives the pretrained weights of a stack, one ``(d_out, d_in)`` tensor a layer, to an adapter that needs them."""

FINGERPRINT_NUMBERS = 4
"""How many numbers of each layer's weight `weights_fingerprint` holds."""


def stack_weights(weights: Sequence[Tensor]) -> Float[Tensor, "layers d_out d_in"]:
    """The weights of a stack as one tensor, on the device of the first, without a gradient.

    Example:
        >>> stack_weights([torch.zeros(3, 4), torch.ones(3, 4)]).shape
        torch.Size([2, 3, 4])
    """
    return torch.stack([weight.detach().to(weights[0].device) for weight in weights])


def weights_fingerprint(weights: Sequence[Tensor]) -> Float[Tensor, " numbers"]:
    """Norm and three fixed entries of each layer's weight: tells base models apart in one pass over the weights.

    Example:
        >>> weights_fingerprint([torch.eye(2)])
        tensor([1.4142, 1.0000, 0.0000, 1.0000])
    """
    rows = []
    for weight in weights:
        norm = torch.linalg.vector_norm(weight.detach(), dtype=torch.float64)
        rows.append(torch.cat([norm.reshape(1), fixed_entries(weight).double()]))
    return torch.cat([row.to(rows[0].device) for row in rows]).float()


def fixed_entries(weight: Float[Tensor, "d_out d_in"]) -> Float[Tensor, " numbers"]:
    """The first, the middle and the last entry of a weight: reading them costs nothing.

    Example:
        >>> fixed_entries(torch.arange(6.0).reshape(2, 3))
        tensor([0., 2., 5.])
    """
    places = torch.linspace(0, weight.numel() - 1, FINGERPRINT_NUMBERS - 1, dtype=torch.float64).long()
    places = places.to(weight.device)
    return weight.detach()[places // weight.shape[1], places % weight.shape[1]]
