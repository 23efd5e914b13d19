r"""Tucker decomposition of a tensor: the algebra under CRAFT, on `torch` alone.

A tensor :math:`X` of shape :math:`(n_0, n_1, \dots)` is written as a small core times one factor a mode,

.. math:: X \approx C \times_0 U_0 \times_1 U_1 \times_2 \cdots, \qquad U_k^\top U_k = I,

with :math:`C` of shape :math:`(r_0, r_1, \dots)` and :math:`U_k` of shape :math:`(n_k, r_k)`. Modes are counted
from 0. CRAFT applies it to the stack ``(layers, out, in)`` of one projection's weights.

References:
    De Lathauwer, De Moor, Vandewalle, "A multilinear singular value decomposition", SIAM J. Matrix Anal. Appl. 21
    (2000): HOSVD, eq. 13. The same authors, "On the best rank-1 and rank-(R1, ..., RN) approximation", same volume:
    HOOI, alg. 4.2. Vannieuwenhoven, Vandebril, Meerbergen, "A new truncation strategy for the higher-order singular
    value decomposition", SIAM J. Sci. Comput. 34 (2012): ST-HOSVD, alg. 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from .errors import CraftError

Decomposition = Literal["hosvd", "st-hosvd", "hooi"]
"""The ways to decompose: plain (each mode by itself), sequentially truncated, or alternating until it fits better."""

_HOOI_SWEEPS = 2  # on a real encoder's weights, further sweeps changed the explained energy by less than 0.1 %


@dataclass(frozen=True)
class Tucker:
    """A tensor as a core and one factor with orthonormal columns a mode.

    Args:
        core: shape ``(r_0, r_1, ...)``.
        factors: one matrix ``(n_k, r_k)`` a mode.

    Example:
        >>> tucker = hosvd(torch.eye(3).reshape(1, 3, 3), ranks=(1, 2, 2))
        >>> tucker.shape, tucker.ranks
        ((1, 3, 3), (1, 2, 2))
    """

    core: Float[Tensor, ...]
    factors: tuple[Float[Tensor, "_ _"], ...]

    @property
    def ranks(self) -> tuple[int, ...]:
        """The sizes of the core."""
        return tuple(self.core.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes of the tensor that this stands for."""
        return tuple(factor.shape[0] for factor in self.factors)

    def reconstruct(self) -> Float[Tensor, ...]:
        """The tensor ``core x_0 factors[0] x_1 factors[1] ...`` in full.

        Example:
            >>> tensor = torch.arange(24.0).reshape(2, 3, 4)
            >>> bool(torch.allclose(hosvd(tensor, (2, 3, 4)).reconstruct(), tensor, atol=1e-5))
            True
        """
        tensor = self.core
        for mode, factor in enumerate(self.factors):
            tensor = mode_product(tensor, factor, mode)
        return tensor


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


def hosvd(tensor: Float[Tensor, ...], ranks: Sequence[int], method: Decomposition = "hosvd") -> Tucker:
    """Decompose a tensor by (truncated) higher-order singular value decomposition.

    Factor `k` holds the leading left singular vectors of ``unfold(tensor, k)``; the core is the tensor projected on
    the factors. Computed in float64, from the Gram matrices of the unfoldings (the tensor is scaled by its largest
    entry first, so that no square over- or underflows), and returned in float32 (float64 for a float64 tensor).
    The same input gives the same output: the largest entry of each column of a factor is positive.

    Args:
        tensor: any order, any floating type, finite.
        ranks: how many directions to keep a mode, from 1 to the size of the mode.
        method: ``"hosvd"`` (De Lathauwer et al. 2000; the CRAFT paper's choice), ``"st-hosvd"`` (each mode from what
            the modes before it left; cheaper, fits a little better), or ``"hooi"`` (two alternating sweeps from HOSVD;
            fits best).

    Returns:
        Core and factors. If all ranks are the sizes, it stands for the tensor exactly.

    Raises:
        CraftError: a rank outside its range, a wrong number of ranks, an unknown method, an entry that is not finite.

    Cost:
        One Gram product of ``n_k^2 * (all other sizes)`` and one eigendecomposition of ``n_k^3`` a mode, in float64
        (a mode that is larger than all others together: one QR decomposition of ``n_k * (all other sizes)^2``); HOOI
        repeats it on the projected, much smaller tensors.

    Example:
        >>> tucker = hosvd(torch.randn(6, 8, 10, generator=torch.Generator().manual_seed(0)), ranks=(2, 3, 4))
        >>> tuple(tucker.core.shape), [tuple(factor.shape) for factor in tucker.factors]
        ((2, 3, 4), [(6, 2), (8, 3), (10, 4)])
    """
    _check_ranks(tensor, ranks)
    if method not in get_args(Decomposition):
        raise CraftError(f"The decomposition {method!r} is unknown. Use one of {', '.join(get_args(Decomposition))}.")
    scale = tensor.detach().abs().amax().double()  # NaN or infinite if any entry is
    if not torch.isfinite(scale):
        raise CraftError("The tensor to decompose holds NaN or infinity. Check the weights that it was made from.")
    scale = scale.clamp_min(torch.finfo(torch.float64).tiny)
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    tensor = tensor.detach().double() / scale
    factors = _sequential_factors(tensor, ranks) if method == "st-hosvd" else _separate_factors(tensor, ranks)
    if method == "hooi":
        for _ in range(_HOOI_SWEEPS):
            for mode, rank in enumerate(ranks):
                factors[mode] = _leading_directions(_project(tensor, factors, skip=mode), mode, rank)
    core = _project(tensor, factors) * scale
    # Contiguous, as they come back from a file: products with another memory layout round differently.
    return Tucker(core.to(dtype).contiguous(), tuple(factor.to(dtype).contiguous() for factor in factors))


def project(tensor: Float[Tensor, ...], factors: Sequence[Float[Tensor, "_ _"]]) -> Tucker:
    """The decomposition with given factors: its core is the tensor's projection on them, the best for these factors.

    Args:
        tensor: any order, any floating type.
        factors: one matrix ``(n_k, r_k)`` with orthonormal columns a mode.

    Example:
        >>> tensor = torch.arange(8.0).reshape(2, 2, 2)
        >>> project(tensor, [torch.eye(2), torch.eye(2)[:, :1], torch.eye(2)]).core.tolist()
        [[[0.0, 1.0]], [[4.0, 5.0]]]
    """
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    core = _project(tensor.detach().double(), [factor.double() for factor in factors])
    return Tucker(core.to(dtype).contiguous(), tuple(factor.to(dtype).contiguous() for factor in factors))


def explained_energy(tensor: Float[Tensor, ...], tucker: Tucker, mode: int | None = None) -> Float[Tensor, ...]:
    r"""How much of the tensor a decomposition holds: :math:`1 - \|X - \hat X\|^2 / \|X\|^2`, from 0 to 1.

    For orthonormal factors and a projected core this is :math:`\|C\|^2 / \|X\|^2` in total. A tensor (or slice) of
    zeros counts as held in full.

    Args:
        tensor: what was decomposed.
        tucker: its decomposition.
        mode: give the energy of each slice of this mode (0: of each layer), instead of the total.

    Returns:
        A float64 scalar, or a vector of the size of `mode`.

    Example:
        >>> tensor = torch.diag(torch.tensor([3.0, 4.0])).reshape(1, 2, 2)
        >>> round(explained_energy(tensor, hosvd(tensor, (1, 1, 1))).item(), 6)
        0.64
    """
    # Slice by slice of the first mode: the difference never needs a second float64 copy of the whole tensor.
    total, missing = [], []
    for index, row in enumerate(tucker.factors[0].double()):
        slice_ = tensor[index].double()
        fitted = torch.tensordot(row, tucker.core.double(), dims=1)
        for other, factor in enumerate(tucker.factors[1:]):
            fitted = mode_product(fitted, factor.double(), other)
        total.append(slice_.square())
        missing.append((slice_ - fitted).square())
    keep = [] if mode is None else [mode]
    summed = [torch.stack([_sum_but(part, keep) for part in parts]) for parts in (total, missing)]
    if mode != 0:
        summed = [part.sum(0) for part in summed]
    energy, rest = summed
    return torch.where(energy > 0, 1 - rest / energy.clamp_min(torch.finfo(torch.float64).tiny), 1.0)


def _sum_but(slice_: Tensor, keep: Sequence[int]) -> Tensor:
    """Sum a slice of mode 0 over all its modes but those in `keep`, counted as in the whole tensor."""
    dims = [dim for dim in range(slice_.ndim) if dim + 1 not in keep]
    return slice_.sum(dims) if dims else slice_


def _check_ranks(tensor: Tensor, ranks: Sequence[int]) -> None:
    if len(ranks) != tensor.ndim:
        raise CraftError(f"ranks={tuple(ranks)} has {len(ranks)} entries for a tensor of {tensor.ndim} modes.")
    for mode, (rank, size) in enumerate(zip(ranks, tensor.shape, strict=True)):
        if not 1 <= rank <= size:
            raise CraftError(f"ranks[{mode}]={rank} is outside 1..{size}, the size of mode {mode}.")


def _separate_factors(tensor: Tensor, ranks: Sequence[int]) -> list[Tensor]:
    return [_leading_directions(tensor, mode, rank) for mode, rank in enumerate(ranks)]


def _sequential_factors(tensor: Tensor, ranks: Sequence[int]) -> list[Tensor]:
    factors = []
    for mode, rank in enumerate(ranks):
        factors.append(_leading_directions(tensor, mode, rank))
        tensor = mode_product(tensor, factors[-1].T, mode)
    return factors


def _project(tensor: Tensor, factors: Sequence[Tensor], skip: int | None = None) -> Tensor:
    for mode, factor in enumerate(factors):
        if mode != skip:
            tensor = mode_product(tensor, factor.T, mode)
    return tensor


def _leading_directions(tensor: Tensor, mode: int, rank: int) -> Tensor:
    """The `rank` leading left singular vectors of an unfolding, each with its largest entry positive."""
    matrix = unfold(tensor, mode)
    size, others = matrix.shape
    if size <= others:
        vectors = torch.linalg.eigh(matrix @ matrix.T).eigenvectors[:, -rank:].flip(1)
    else:  # a Gram matrix of a vocabulary would not fit in memory
        basis, triangle = torch.linalg.qr(matrix)
        vectors = basis @ torch.linalg.svd(triangle).U[:, :rank]
    if rank > others:  # what is left are directions in which the tensor is 0: any that are orthogonal
        padded = torch.cat([vectors, torch.eye(size, rank - others).to(matrix)], dim=1)
        vectors = torch.cat([vectors, torch.linalg.qr(padded).Q[:, others:]], dim=1)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * largest.sign()
