r"""SuperLoRA: the updates of all target matrices as one vector, cut into groups that are small tensor products.

The target matrices, in the order of the layers, are laid end to end as one vector, which may be permuted and is cut
into groups. Each group is

.. math:: g = s \cdot F\Bigl(\operatorname{vec}\Bigl(\bigotimes_{k=1}^{K}
          \bigl(C_k \times_1 A_{k1} \times_2 \cdots \times_M A_{kM}\bigr)\Bigr)_{[:n]}\Bigr), \qquad s = \alpha / r

with M the order of the folded tensor, K the number of Kronecker splits, :math:`C_k` a core (the identity, so that the
product is that of LoRA and CP, or dense) and :math:`F` the identity or a fixed random map from n numbers to more.

Reference:
    SuperLoRA: Parameter-Efficient Unified Adaptation of Multi-Layer Attention Modules, arXiv 2403.11887. The map F is
    that of `craft_peft.fastfood`.
"""

from __future__ import annotations

import math
from functools import reduce
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import CraftError
from ..fastfood import Fastfood, random_permutation
from ..folding import Folding, Kind
from ..fused import thin_dtype
from ..weights import ReadWeights, StackShape
from .base import StackAdapter, working_dtype


class SuperLoraAdapter(StackAdapter):
    r"""SuperLoRA for all target matrices, whose shapes may differ.

    Exactly one tensor of the first split of a group starts at zero (a dense core, else the first factor), so that what
    is added is 0 and its gradient is not. The other factors of the first split start normal with standard deviation
    ``1 / sqrt(size)``, the later splits so that their products have entries of mean square 1.

    What is added to all layers is built in one computation (`prepare`), once a forward pass. Where every group is one
    matrix, folded as it is, two thin products take its place, as in LoRA.

    Args:
        shape: the sizes of the matrices.
        r: the rank: all cores that are not fixed by an identity mode have it in every mode.
        folding: groups and tensors.
        shuffle_seed: the seed of a permutation of the vector; None for none.
        projection_seed: the seed of F.
        init_std: another standard deviation for the factors of the first split.
        init_weights: False starts the tensor that would be zero at random instead, for tests.
        scaling: the factor s.
        dropout: dropout on the input of the added part.

    Raises:
        CraftError: a folding that does not fit the matrices, or a rank above the smallest folded size.

    Example:
        >>> adapter = SuperLoraAdapter(StackShape(((16, 12), (8, 12))), r=2, folding=Folding(order=3))
        >>> sum(parameter.numel() for parameter in adapter.parameters())
        48
        >>> adapter.delta_weight(1).shape, bool((adapter.delta_weight(1) == 0).all())
        (torch.Size([8, 12]), True)
    """

    def __init__(
        self,
        shape: StackShape,
        r: int,
        folding: Folding,
        *,
        shuffle_seed: int | None = None,
        projection_seed: int = 0,
        init_std: float | None = None,
        init_weights: bool = True,
        scaling: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(shape, scaling=scaling, dropout=dropout)
        self.r = r
        self.folding = folding
        self.kinds = folding.kinds(shape.matrices, shape.blocks)
        self.shuffle_seed = shuffle_seed
        self.projection_seed = projection_seed
        self._make_random_parts()
        self._check_rank()
        for number, kind in enumerate(self.kinds):
            for split, sizes in enumerate(kind.sizes):
                self._add_tensors(f"{number}_{split}", len(kind.places), sizes, split == 0, init_std, init_weights)
        self._thin = self._places_of_thin_products()

    def _check_rank(self) -> None:
        free = [mode for mode in range(self.folding.order) if mode not in self.folding.identity_modes]
        sizes = {split[mode]: split for kind in self.kinds for split in kind.sizes for mode in free}
        smallest = min(sizes)
        if self.r > smallest:
            raise CraftError(
                f"r={self.r} is above {smallest}, the smallest size of a folded tensor {sizes[smallest]}, so that it "
                f"adds numbers but no directions. Use r={smallest} or less, a lower order, fewer splits, or larger "
                "groups."
            )

    def _add_tensors(
        self, label: str, groups: int, sizes: tuple[int, ...], first: bool, init_std: float | None, init_weights: bool
    ) -> None:
        """The factors and the core of one split, those of all groups of a kind in one tensor each."""
        dense = self.folding.core == "dense"
        later_std = 1.0 if dense else self.r ** (-0.5 / len(sizes))
        for mode, size in enumerate(sizes):
            if mode not in self.folding.identity_modes:
                std = (init_std or size**-0.5) if first else later_std
                std = 0.0 if first and mode == 0 and not dense and init_weights else std
                self.register_parameter(f"factor_{label}_{mode}", nn.Parameter(torch.randn(groups, size, self.r) * std))
        if dense:
            ranks = [size if mode in self.folding.identity_modes else self.r for mode, size in enumerate(sizes)]
            std = 0.0 if first and init_weights else self.r ** (-0.5 * len(sizes)) if not first else 1.0
            self.register_parameter(f"core_{label}", nn.Parameter(torch.randn(groups, *ranks) * std))

    def initialise(self, read_weights: ReadWeights) -> None:
        """Nothing is taken from the weights."""

    def prepare(self) -> tuple[Tensor, ...]:
        r""":math:`\Delta W` of all layers, or their thin pairs. Cost: r products per entry and split, and that of F."""
        if self._thin is not None:
            numbers = range(len(self.kinds))
            sides = [[self._wide(f"factor_{number}_0_{side}") for number in numbers] for side in (0, 1)]
            return tuple(factors[number][row] for factors in sides for number, row in self._thin)
        groups = [self._groups(number, kind) for number, kind in enumerate(self.kinds)]
        if len(groups) == 1:
            vector = groups[0].flatten()
        else:
            rows = {
                place: row
                for kind, of_kind in zip(self.kinds, groups, strict=True)
                for place, row in zip(kind.places, of_kind, strict=True)
            }
            vector = torch.cat([rows[place] for place in range(len(rows))])
        entries = [math.prod(matrix) for matrix in self.shape.matrices]
        parts = self._permute(vector[: sum(entries)]).split(entries)  # one split: its gradient is put together at once
        return tuple(part.view(matrix) for part, matrix in zip(parts, self.shape.matrices, strict=True))

    def _groups(self, number: int, kind: Kind) -> Float[Tensor, "groups entries"]:
        splits = [self._tensor(f"{number}_{split}", split == 0) for split in range(self.folding.splits)]
        folded = reduce(_kronecker, splits).flatten(1)[:, : kind.needed]
        return self._project(number, folded)

    def _tensor(self, label: str, first: bool) -> Tensor:
        r"""The product of core and factors of one split, of all groups of a kind: ``(groups, d_1, ..., d_M)``."""
        order, dense = self.folding.order, self.folding.core == "dense"
        # As torch.einsum numbers dimensions: 0 is the group, then the ranks, then the sizes.
        ranks = [1 + mode if dense else 1 for mode in range(order)]
        sizes = [1 + order + mode for mode in range(order)]
        ranks = [sizes[mode] if mode in self.folding.identity_modes else rank for mode, rank in enumerate(ranks)]
        operands: list[Any] = [self._wide(f"core_{label}"), [0, *ranks]] if dense else []
        for mode in range(order):
            if mode not in self.folding.identity_modes:
                operands += [self._wide(f"factor_{label}_{mode}"), [0, sizes[mode], ranks[mode]]]
        if first:
            operands[0] = self.scaling * operands[0]
        return torch.einsum(*operands, [0, *sizes])

    def _make_random_parts(self) -> None:
        """From the seeds; neither parameters nor buffers, so that they are in no file and nothing overwrites them."""
        self._fastfoods: list[Fastfood] = []
        self._permutation: Tensor | None = None
        if self.folding.ratio is not None:
            self._fastfoods = [Fastfood.from_seed(self.projection_seed, k.needed, k.entries) for k in self.kinds]
        if self.shuffle_seed is not None:
            self._permutation = random_permutation(self.shuffle_seed, sum(map(math.prod, self.shape.matrices)))

    def _project(self, number: int, folded: Float[Tensor, "groups needed"]) -> Float[Tensor, "groups entries"]:
        if not self._fastfoods:
            return folded
        with torch.inference_mode(False):  # it is kept, and training may come after
            fastfood = self._fastfoods[number].to(folded)
        if not torch.compiler.is_compiling():  # a compiled graph must not change what it was compiled for
            self._fastfoods[number] = fastfood
        return fastfood(folded, self.kinds[number].entries)

    def _permute(self, vector: Float[Tensor, " entries"]) -> Float[Tensor, " entries"]:
        if self._permutation is None:
            return vector
        with torch.inference_mode(False):
            permutation = self._permutation.to(vector.device)
        if not torch.compiler.is_compiling():
            self._permutation = permutation
        return vector[permutation]

    def delta_weight(self, layer: int) -> Float[Tensor, "d_out d_in"]:
        """The layer's part of the vector."""
        if self._thin is not None:
            left, right = self._thin_pair(layer)
            return self.scaling * left @ right.T
        return self.prepared(layer)

    def delta_output(self, layer: int, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out"]:
        """``x @ delta_weight(layer).T``, through two thin matrices where there are such."""
        if self._thin is None:
            return super().delta_output(layer, x)
        x_thin = x.to(thin_dtype(x.dtype))
        left, right = (tensor.to(x_thin) for tensor in self._thin_pair(layer))
        return F.linear(self.scaling * F.linear(x_thin, right.T), left).to(x.dtype)

    def thin_factors(self, layer: int) -> tuple[Float[Tensor, "d_out rank"], Float[Tensor, "rank d_in"]]:
        """The two thin matrices where there are such."""
        if self._thin is None:
            return super().thin_factors(layer)
        left, right = self._thin_pair(layer)
        return self.scaling * left, right.T

    def _places_of_thin_products(self) -> list[tuple[int, int]] | None:
        """Kind and row of each layer's factors, if every group is one matrix and a product of two factors; or None."""
        folding = self.folding
        if folding.core != "identity" or folding.splits > 1 or folding.ratio is not None:
            return None
        if folding.order != 2 or self.shuffle_seed is not None:
            return None
        places = {
            place: (number, row, kind.sizes[0])
            for number, kind in enumerate(self.kinds)
            for row, place in enumerate(kind.places)
        }
        if [sizes for *_, sizes in (places[place] for place in range(len(places)))] != list(self.shape.matrices):
            return None
        return [places[place][:2] for place in range(len(places))]

    def _thin_pair(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.prepared(layer), self.prepared(self.shape.layers + layer)

    def _wide(self, name: str) -> Tensor:
        """A trained tensor in float32 at least; a new one."""
        parameter = getattr(self, name)
        return parameter.to(working_dtype(parameter), copy=True)

    def extra_repr(self) -> str:
        """Sizes, rank and folding, for `print(model)`."""
        return f"{super().extra_repr()}, r={self.r}, {self.folding}"


def _kronecker(first: Float[Tensor, "groups ..."], second: Float[Tensor, "groups ..."]) -> Float[Tensor, "groups ..."]:
    """The Kronecker product of two tensors of one order, for each group."""
    order = first.ndim - 1
    spread = first.reshape(len(first), *(size for length in first.shape[1:] for size in (length, 1)))
    inner = second.reshape(len(second), *(size for length in second.shape[1:] for size in (1, length)))
    sizes = [first.shape[mode] * second.shape[mode] for mode in range(1, order + 1)]
    return (spread * inner).reshape(len(first), *sizes)
