r"""Fastfood: a fixed random linear map from few numbers to many, in ``N log n`` operations and without its matrix.

.. math:: F x = \hat H\, G\, \Pi\, \hat H\, B\, x

:math:`\hat H` is the orthonormal Walsh-Hadamard matrix of the next power of two, :math:`B` random signs, :math:`\Pi` a
random permutation and :math:`G` a diagonal of standard normal numbers. As many such blocks as the output needs stand
below each other. An output has the mean square of the (padded) input: :math:`E (F x)_i^2 = \|x\|^2 / n`.

The random numbers come from a hash of a seed and their place, so they are the same on every device and with every
version of torch, whose own generators promise neither. They are made again from the seed and never saved.

Reference:
    Le, Sarlos, Smola, "Fastfood: Computing Hilbert Space Expansions in loglinear time", ICML 2013, eq. 5.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from hashlib import sha256

import torch
from jaxtyping import Float, Int
from torch import Tensor

_RADIX = 64  # one product with a 64 x 64 matrix takes six bits of the transform at once


@dataclass(frozen=True)
class Fastfood:
    """The random parts of the map, a row a block.

    Args:
        signs: B, 1 or -1.
        places: the permutation: what comes to each place.
        gains: G.

    Example:
        >>> fastfood = Fastfood.from_seed(0, inputs=3, outputs=10)
        >>> fastfood.signs.shape, fastfood(torch.ones(2, 3), outputs=10).shape
        (torch.Size([3, 4]), torch.Size([2, 10]))
    """

    signs: Float[Tensor, "blocks size"]
    places: Int[Tensor, "blocks size"]
    gains: Float[Tensor, "blocks size"]

    @classmethod
    def from_seed(cls, seed: int, inputs: int, outputs: int) -> Fastfood:
        """The map from `inputs` to `outputs` numbers that belongs to a seed."""
        size = 1 << (inputs - 1).bit_length()
        shape = (-(-outputs // size), size)
        return cls(
            signs=(random_bits(seed, "signs", shape) & 1).double() * 2 - 1,
            places=random_bits(seed, "places", shape).argsort(dim=1, stable=True),
            gains=_standard_normal(seed, shape),
        )

    def to(self, like: Tensor) -> Fastfood:
        """On the device and in the dtype of a tensor; this very map if it is there already."""
        if (self.gains.device, self.gains.dtype) == (like.device, like.dtype):
            return self
        return Fastfood(self.signs.to(like), self.places.to(like.device), self.gains.to(like))

    def __call__(self, x: Float[Tensor, "rows inputs"], outputs: int) -> Float[Tensor, "rows outputs"]:
        """Map each row."""
        padded = torch.nn.functional.pad(x, (0, self.signs.shape[1] - x.shape[1]))
        mixed = hadamard(padded[:, None] * self.signs)
        permuted = mixed.gather(2, self.places.expand_as(mixed))
        return hadamard(permuted * self.gains).flatten(1)[:, :outputs]


def hadamard(x: Float[Tensor, "... size"]) -> Float[Tensor, "... size"]:
    """The orthonormal Walsh-Hadamard transform of the last dimension, whose size is a power of two.

    Example:
        >>> hadamard(torch.tensor([1.0, 0.0, 0.0, 0.0]))
        tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """
    shape, left = x.shape, x.shape[-1]
    # The matrix is a Kronecker product of small ones: one product a factor, each time over the next bits.
    while left > 1:
        radix = min(left, _RADIX)
        left = left // radix  # not in place: torch.jit.trace has tensors for sizes, and `radix` may be this one
        done = shape[-1] // (left * radix)
        matrix = _hadamard_matrix(radix).to(x)
        x = x.reshape(-1, radix) @ matrix if done == 1 else matrix @ x.reshape(-1, radix, done)
    return x.reshape(shape)


def _hadamard_matrix(size: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)]) * math.sqrt(0.5)
    return matrix


def random_permutation(seed: int, size: int) -> Int[Tensor, " size"]:
    """A permutation of so many places that belongs to a seed.

    Example:
        >>> random_permutation(0, 5).sort().values
        tensor([0, 1, 2, 3, 4])
    """
    return random_bits(seed, "shuffle", (size,)).argsort(stable=True)


def _standard_normal(seed: int, shape: tuple[int, ...]) -> Tensor:
    """By the transform of Box and Muller (1958)."""
    radius, angle = ((random_bits(seed, name, shape).double() + 0.5) / 2**53 for name in ("radius", "angle"))
    return (-2 * radius.log()).sqrt() * (2 * math.pi * angle).cos()


def random_bits(seed: int, stream: str, shape: tuple[int, ...]) -> Int[Tensor, ...]:
    """Whole numbers from 0 to 2^53 - 1: the generator splitmix64, started at a hash of seed and stream.

    Args:
        seed: any whole number.
        stream: a name; different names give independent numbers.
        shape: of the result.

    Example:
        >>> random_bits(0, "signs", (2, 3)).shape
        torch.Size([2, 3])
    """
    start = int.from_bytes(sha256(f"{seed}/{stream}".encode()).digest()[:8], "little")
    mixed = torch.arange(1, math.prod(shape) + 1, device="cpu") * _signed(0x9E3779B97F4A7C15) + _signed(start)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ _shifted(mixed, shift)) * _signed(factor)
    return _shifted(mixed ^ _shifted(mixed, 31), 11).reshape(shape)


def _signed(bits: int) -> int:
    """The 64 bits as torch's whole numbers have them, which wrap around in products as unsigned ones do."""
    return bits - (1 << 64) if bits >> 63 else bits


def _shifted(numbers: Tensor, places: int) -> Tensor:
    """Shifted to the right with zeros coming in, not copies of the sign."""
    return (numbers >> places) & ((1 << (64 - places)) - 1)
