r"""The leading left singular vectors of a wide matrix that is read a block of columns at a time.

Two ways, with one choice between them by cost. `exact_directions` adds up the Gram matrix :math:`A A^\top` in float64
and takes its eigenvectors. `krylov_directions` multiplies :math:`A A^\top` with a few blocks of vectors, in the
matrix's own precision, and takes the best directions in the space that these span (block Krylov, Rayleigh-Ritz).

References:
    Musco, Musco, "Randomized block Krylov methods for stronger and faster approximate singular value decomposition",
    NeurIPS 2015, alg. 2. Halko, Martinsson, Tropp, "Finding structure with randomness", SIAM Review 53 (2011): why
    the start is random.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import ceil

import torch
from jaxtyping import Float
from torch import Tensor

from .slices import BlockedMatrix

FindDirections = Callable[[BlockedMatrix, int], Tensor]
"""Gives so many leading left singular vectors of a matrix."""

KRYLOV_STEPS = 6
"""Products with the matrix and its transpose. See `krylov_directions` for what they reach."""

_STRIPE = 256  # rows of a Gram matrix that are added at a time: what is right of the diagonal is left out
_TILE = 16  # columns: products with other numbers of columns take longer
_EIGH = 13.0  # an eigendecomposition of n rows takes as long as 13 n^3 products and sums of the same precision
_PLAIN_RANGE = (1e-30, 1e30)  # largest entries with which products of three matrices stay within float32


def exact_directions(matrix: BlockedMatrix, rank: int) -> Float[Tensor, "rows rank"]:
    """The `rank` leading left singular vectors, in float64, each with its largest entry positive.

    Cost:
        One pass: ``rows^2 * columns / 2`` products and sums in float64, one eigendecomposition of ``rows^3``, and
        memory for ``rows^2`` numbers. With fewer columns than rows: all columns at once, and a QR decomposition.

    Example:
        >>> blocks = [torch.tensor([[0.0, 0.0], [3.0, 3.0]]), torch.zeros(2, 1)]
        >>> exact_directions(BlockedMatrix(2, 3, lambda: blocks, 3.0, torch.device("cpu")), rank=1).abs().tolist()
        [[0.0], [1.0]]
    """
    if matrix.rows <= matrix.columns:
        return _canonical(_leading_eigenvectors(_gram(matrix), rank))
    # `map` lets a block go before the next one is read.
    whole = torch.cat(list(map(partial(_as_double, scale=matrix.scale), matrix.read())), dim=1)
    basis, triangle = torch.linalg.qr(whole)  # a Gram matrix of a vocabulary would not fit in memory
    vectors = basis @ torch.linalg.svd(triangle).U[:, :rank]
    if rank > matrix.columns:  # what is left are directions in which the matrix is 0: any that are orthogonal
        padded = torch.cat([vectors, torch.eye(matrix.rows, rank - matrix.columns).to(vectors)], dim=1)
        vectors = torch.cat([vectors, torch.linalg.qr(padded).Q[:, matrix.columns :]], dim=1)
    return _canonical(vectors)


def krylov_directions(matrix: BlockedMatrix, rank: int) -> Float[Tensor, "rows rank"]:
    r"""Nearly the `rank` leading left singular vectors: the best in a Krylov space from a fixed random start.

    .. math:: \operatorname{span}\,[X, G X, G^2 X, \dots], \qquad G = A A^\top,

    with blocks :math:`X` of about half the rank: of two spaces of one size, the one of narrow blocks and
    more steps holds more (flat spectra need the steps). Products are in the precision of the blocks, at least float32;
    what is orthogonal and what is summed is in float64. The same blocks give the same directions.

    Args:
        matrix: at least as many rows as `krylov_size` says.
        rank: at most that size.

    Cost:
        `KRYLOV_STEPS` passes of ``4 * rows * columns * width`` products and sums, for ``rows * size`` numbers of
        memory, several times.
    """
    width = krylov_size(rank) // KRYLOV_STEPS
    generator = torch.Generator().manual_seed(0)  # on the CPU: the same numbers for every device
    vectors = torch.randn(matrix.rows, width, generator=generator, dtype=torch.float64).to(matrix.device)
    basis = images = vectors[:, :0]
    for _ in range(KRYLOV_STEPS):
        vectors = _orthonormal_beside(basis, vectors)
        basis = torch.cat([basis, vectors], dim=1)
        vectors = _gram_product(matrix, vectors)
        images = torch.cat([images, vectors], dim=1)
    projected = basis.T @ images
    return _canonical(basis @ _leading_eigenvectors((projected + projected.T) / 2, rank))


def cheaper_directions(matrix: BlockedMatrix, rank: int) -> Float[Tensor, "rows rank"]:
    """By whichever of the two ways costs less for these sizes."""
    return (krylov_directions if _krylov_pays(matrix.rows, matrix.columns, rank) else exact_directions)(matrix, rank)


def passes(rows: int, columns: int, rank: int, randomized: bool) -> int:
    """How often `cheaper_directions`, or else `exact_directions`, reads a matrix."""
    return KRYLOV_STEPS if randomized and _krylov_pays(rows, columns, rank) else 1


def krylov_size(rank: int) -> int:
    """How many dimensions the space has in which `krylov_directions` looks for so many directions."""
    return KRYLOV_STEPS * _TILE * max(2, ceil(0.47 * rank / _TILE))


def exact_cost(rows: int, columns: int) -> float:
    """Products and sums of `exact_directions`, counted as of float32: float64 takes twice as long."""
    small, large = sorted((rows, columns))
    if rows > columns:
        return 2 * (4 * small**2 * large + 2 * _EIGH * small**3)
    return 2 * (small**2 * large + _EIGH * small**3)


def cheaper_cost(rows: int, columns: int, rank: int) -> float:
    """Products and sums of `cheaper_directions`, in the same unit."""
    return _krylov_cost(rows, columns, rank) if _krylov_pays(rows, columns, rank) else exact_cost(rows, columns)


def _krylov_pays(rows: int, columns: int, rank: int) -> bool:
    # A space of half of all dimensions or more is not worth its orthogonalisation.
    fits = 2 * krylov_size(rank) <= min(rows, columns)
    return fits and _krylov_cost(rows, columns, rank) < exact_cost(rows, columns)


def _krylov_cost(rows: int, columns: int, rank: int) -> float:
    size = krylov_size(rank)
    return 4.0 * rows * columns * size + 2 * (6 * rows * size**2 + _EIGH * size**3)


def _as_double(block: Tensor, scale: float) -> Tensor:
    return block.to(torch.float64, copy=True).div_(scale)


def _gram(matrix: BlockedMatrix) -> Tensor:
    """The products of all pairs of rows, in float64; what is above the diagonal stripes is copied from below."""
    gram = torch.zeros(matrix.rows, matrix.rows, dtype=torch.float64, device=matrix.device)
    for block in matrix.read():
        block = _as_double(block, matrix.scale)
        for start in range(0, matrix.rows, _STRIPE):
            stop = start + _STRIPE
            gram[start:stop, :stop].addmm_(block[start:stop], block[:stop].T)
        del block  # before the next one is read
    return gram.tril() + gram.tril(-1).T


def _gram_product(matrix: BlockedMatrix, vectors: Tensor) -> Tensor:
    """The product of the Gram matrix with some vectors, without the Gram matrix."""
    product, narrow = torch.zeros_like(vectors), vectors
    for block in matrix.read():
        block = block.to(torch.promote_types(block.dtype, torch.float32))
        narrow, scale = narrow.to(block.dtype), matrix.scale
        if not _PLAIN_RANGE[0] < scale < _PLAIN_RANGE[1]:
            block, scale = block / scale, 1.0
        inner = block.T @ narrow / scale
        product += (block @ inner).double() / scale
        del block, inner  # before the next one is read
    return product


def _orthonormal_beside(basis: Tensor, vectors: Tensor) -> Tensor:
    """Orthonormal vectors that span, beside an orthonormal basis, what the given vectors add to it."""
    for _ in range(2):  # once leaves what rounding of nearly dependent vectors left
        vectors = vectors - basis @ (basis.T @ vectors)
    vectors = torch.linalg.qr(vectors).Q
    if torch.linalg.vector_norm(basis.T @ vectors) > 1e-11:  # they add nothing in some direction: any other does
        vectors = torch.linalg.qr(torch.cat([basis, vectors], dim=1)).Q[:, basis.shape[1] :]
    return vectors


def _leading_eigenvectors(symmetric: Tensor, rank: int) -> Tensor:
    return torch.linalg.eigh(symmetric).eigenvectors[:, -rank:].flip(1)


def _canonical(vectors: Tensor) -> Tensor:
    """Each column with its largest entry positive."""
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * largest.sign()
