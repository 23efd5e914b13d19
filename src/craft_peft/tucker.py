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
from dataclasses import dataclass, replace
from math import prod
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from .directions import FindDirections, cheaper_cost, cheaper_directions, exact_cost, exact_directions, passes
from .errors import CraftError
from .slices import SlicedTensor, Slices, is_held, mode_product, slabs_of

Decomposition = Literal["auto", "hosvd", "st-hosvd", "randomized", "hooi"]
"""The ways to decompose, see `hosvd`: by cost, each mode by itself, each from what the modes before it left, the same
with a randomised search for directions, or alternating until it fits better."""

EXACT_COST = 8e10
"""Up to how many products and sums (`decomposition_cost`) "auto" is "hosvd": about a second on two cores."""

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


def hosvd(tensor: Slices, ranks: Sequence[int], method: Decomposition = "auto") -> Tucker:
    """Decompose a tensor by (truncated) higher-order singular value decomposition, reading it a slice at a time.

    Factor `k` holds leading left singular vectors of ``unfold(tensor, k)``; the core is the tensor projected on the
    factors. Returned in float32 (float64 for a float64 tensor). The same input gives the same output: the largest
    entry of each column of a factor is positive, and nothing is drawn at random but from a fixed seed.

    Args:
        tensor: any order, any floating type, finite; or its slices along the first mode, which are then read one by
            one and let go (`craft_peft.slices.Slices`).
        ranks: how many directions to keep a mode, from 1 to the size of the mode.
        method: ``"hosvd"`` (De Lathauwer et al. 2000; the CRAFT paper's choice) is exact, in float64, from the Gram
            matrices of the unfoldings. ``"st-hosvd"``: each mode from what the modes before it left (the first mode is
            the last); cheaper, fits a little better. ``"randomized"``: the same, with directions from a block Krylov
            space where that is cheaper. ``"auto"``: "hosvd" up to a second of work on two cores (24 x 768 x 768),
            "randomized" above; it depends on the sizes alone. ``"hooi"``: two alternating sweeps from "auto"; fits
            best.

    Returns:
        Core and factors. If all ranks are the sizes, it stands for the tensor exactly.

    Raises:
        CraftError: a rank outside its range, a wrong number of ranks, an unknown method, an entry that is not finite.

    Cost:
        See `craft_peft.directions`; in memory one slice in float64, a Gram matrix of ``n_k^2``, and small factors.
        How often each slice is read tells `reads_of_each_slice`: 8 times for "randomized" (14 times where a truncated
        tensor would not be small), 3 times for "st-hosvd", and for "hosvd" 4 times, and as often as there are slices in
        order to compare each with each by parts.

    Example:
        >>> tucker = hosvd(torch.randn(6, 8, 10, generator=torch.Generator().manual_seed(0)), ranks=(2, 3, 4))
        >>> tuple(tucker.core.shape), [tuple(factor.shape) for factor in tucker.factors]
        ((2, 3, 4), [(6, 2), (8, 3), (10, 4)])

    References:
        The randomised kind: Minster, Saibaba, Kilmer, "Randomized algorithms for low-rank tensor decompositions in the
        Tucker format", SIAM J. Math. Data Sci. 2 (2020), alg. 3.2.
    """
    if method not in get_args(Decomposition):
        raise CraftError(f"The decomposition {method!r} is unknown. Use one of {', '.join(get_args(Decomposition))}.")
    stack = SlicedTensor.of(tensor)
    _check_ranks(stack.shape, ranks)
    start = _start_of(method, stack.shape, ranks)
    find: FindDirections = exact_directions
    if start == "randomized":
        # Nothing is more exact than the directions; and float64 takes twice the time and memory.
        find, stack = cheaper_directions, replace(stack, precision=stack.dtype)
    core, factors = (_separately if start == "hosvd" else _sequentially)(stack, ranks, find)
    if method == "hooi":
        for _ in range(_HOOI_SWEEPS):
            for mode, rank in enumerate(ranks):
                others = stack.projected(factors, skip=mode)
                factors[mode] = find(SlicedTensor.of(others).unfolded(mode), rank)
        core = mode_product(others.double(), factors[-1].T, len(ranks) - 1)
    return _rounded(core, factors, stack.dtype)


def project(tensor: Slices, factors: Sequence[Float[Tensor, "_ _"]]) -> Tucker:
    """The decomposition with given factors: its core is the tensor's projection on them, the best for these factors.

    Args:
        tensor: any order, any floating type; or its slices, as for `hosvd`.
        factors: one matrix ``(n_k, r_k)`` with orthonormal columns a mode.

    Example:
        >>> tensor = torch.arange(8.0).reshape(2, 2, 2)
        >>> project(tensor, [torch.eye(2), torch.eye(2)[:, :1], torch.eye(2)]).core.tolist()
        [[[0.0, 1.0]], [[4.0, 5.0]]]
    """
    stack = SlicedTensor.of(tensor)
    factors = [factor.double() for factor in factors]
    return _rounded(stack.projected(factors), factors, stack.dtype)


def decomposition_cost(shape: Sequence[int], ranks: Sequence[int], method: Decomposition) -> float:
    """About how many products and sums `hosvd` costs, counted as of float32 (float64 takes twice as long).

    Example:
        >>> decomposition_cost((12, 768, 768), (12, 100, 100), "hosvd") < 1e11
        True
    """
    start = _start_of(method, shape, ranks)
    sizes, total = list(shape), 0.0
    for mode in _sequence(len(sizes)):
        rows, columns = sizes[mode], prod(sizes) // sizes[mode]
        cheaper = cheaper_cost(rows, columns, ranks[mode])
        total += cheaper if start == "randomized" else exact_cost(rows, columns)
        if start != "hosvd":
            sizes[mode] = ranks[mode]
    return total


def explained_energy(tensor: Slices, tucker: Tucker, mode: int | None = None) -> Float[Tensor, ...]:
    r"""How much of the tensor a decomposition holds: :math:`1 - \|X - \hat X\|^2 / \|X\|^2`, from 0 to 1.

    For orthonormal factors and a projected core this is :math:`\|C\|^2 / \|X\|^2` in total. A tensor (or slice) of
    zeros counts as held in full.

    Args:
        tensor: what was decomposed, or its slices.
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
    keep = [] if mode is None else [mode]
    total, missing = [], []
    for index, row in enumerate(tucker.factors[0].double()):
        slice_ = tensor[index].detach().to(row.device).double()
        fitted = torch.tensordot(row, tucker.core.double(), dims=1)
        for other, factor in enumerate(tucker.factors[1:]):
            fitted = mode_product(fitted, factor.double(), other)
        total.append(_sum_but(slice_.square(), keep))
        missing.append(_sum_but((slice_ - fitted).square(), keep))
    summed = [torch.stack(parts) for parts in (total, missing)]
    if mode != 0:
        summed = [part.sum(0) for part in summed]
    energy, rest = summed
    return torch.where(energy > 0, 1 - rest / energy.clamp_min(torch.finfo(torch.float64).tiny), 1.0)


def _sum_but(slice_: Tensor, keep: Sequence[int]) -> Tensor:
    """Sum a slice of mode 0 over all its modes but those in `keep`, counted as in the whole tensor."""
    dims = [dim for dim in range(slice_.ndim) if dim + 1 not in keep]
    return slice_.sum(dims) if dims else slice_


def reads_of_each_slice(shape: Sequence[int], ranks: Sequence[int], method: Decomposition) -> int:
    """How often `hosvd` reads each slice; where it reads parts of slices, each time counts.

    Example:
        >>> reads_of_each_slice((12, 768, 768), (12, 100, 100), "st-hosvd")
        3
    """
    start = _start_of(method, shape, ranks)
    if start == "hosvd":
        reads = 1 + slabs_of(shape) + len(shape)
    else:
        reads, sizes = 2, list(shape)  # for the scale, and to hold what is left of it
        for mode in _sequence(len(shape)):
            reads += passes(sizes[mode], prod(sizes) // sizes[mode], ranks[mode], randomized=start == "randomized")
            sizes[mode] = ranks[mode]
            if mode and is_held(sizes, mode):
                break
    return reads + (_HOOI_SWEEPS * len(shape) if method == "hooi" else 0)


def _check_ranks(shape: Sequence[int], ranks: Sequence[int]) -> None:
    if len(ranks) != len(shape):
        raise CraftError(f"ranks={tuple(ranks)} has {len(ranks)} entries for a tensor of {len(shape)} modes.")
    for mode, (rank, size) in enumerate(zip(ranks, shape, strict=True)):
        if not 1 <= rank <= size:
            raise CraftError(f"ranks[{mode}]={rank} is outside 1..{size}, the size of mode {mode}.")


def _start_of(method: Decomposition, shape: Sequence[int], ranks: Sequence[int]) -> Decomposition:
    """What "auto" is for these sizes, and what "hooi" starts from."""
    if method not in ("auto", "hooi"):
        return method
    return "hosvd" if decomposition_cost(shape, ranks, "hosvd") <= EXACT_COST else "randomized"


def _sequence(modes: int) -> list[int]:
    """The order of sequential truncation: the first mode last, so that whole slices are read for one mode alone."""
    return [*range(1, modes), 0]


def _separately(stack: SlicedTensor, ranks: Sequence[int], find: FindDirections) -> tuple[Tensor, list[Tensor]]:
    factors = [find(stack.unfolded(mode), rank) for mode, rank in enumerate(ranks)]
    return stack.projected(factors), factors


def _sequentially(stack: SlicedTensor, ranks: Sequence[int], find: FindDirections) -> tuple[Tensor, list[Tensor]]:
    factors: dict[int, Tensor] = {}
    for mode in _sequence(len(ranks)):
        factors[mode] = find(stack.unfolded(mode), ranks[mode])
        if mode:
            stack = stack.truncated(factors[mode], mode)
    return mode_product(stack.whole().double(), factors[0].T, 0), [factors[mode] for mode in range(len(ranks))]


def _rounded(core: Tensor, factors: Sequence[Tensor], dtype: torch.dtype) -> Tucker:
    # Contiguous, as they come back from a file: products with another memory layout round differently.
    return Tucker(core.to(dtype).contiguous(), tuple(factor.to(dtype).contiguous() for factor in factors))
