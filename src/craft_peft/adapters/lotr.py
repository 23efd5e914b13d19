r"""LoTR: two trained factors that a group of weight matrices shares, and one small trained core a matrix.

.. math:: W'_l = W_l + s \cdot U C_l V^\top, \qquad s = \alpha / r

:math:`U` (out, r) and :math:`V` (in, r) are shared by the group, :math:`C_l` (r, r) belongs to one matrix: together a
tensor of the group's updates in Tucker-2 form. A group of T matrices trains :math:`r (d_{out} + d_{in}) + T r^2`
numbers.

Reference:
    LoTR: Low Tensor Rank Weight Adaptation, arXiv 2402.01376; the defaults are those of its code, github daskol/lotr.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..slices import mode_product
from ..tucker import hosvd
from ..weights import ReadWeights, StackShape
from .base import FactoredStackAdapter

LotrStart = Literal["normal", "svd"]
"""Where the factors start: at random with cores of zero, or at the decomposition of the pretrained weights."""


class LotrAdapter(FactoredStackAdapter):
    r"""LoTR for one group of matrices of one shape.

    The ``"svd"`` start takes factors :math:`U^0, V^0` and cores :math:`C^0_l` from the pretrained weights, so that
    :math:`s\,U^0 C^0_l V^{0\top}` is the weight's projection on the factors (at full rank, the weight). What is added
    is measured from there, and the trained tensors hold the change :math:`E` from the start,

    .. math:: \Delta W_l = s (U C_l V^\top - U^0 C^0_l V^{0\top})
              = s \begin{bmatrix} E_U & U^0 \end{bmatrix}
                \begin{bmatrix} C_l & 0 \\ E_{C,l} & C^0_l \end{bmatrix}
                \begin{bmatrix} V & E_V \end{bmatrix}^\top ,

    which is exactly 0 at the start and free of cancellation, at twice the rank's cost.

    Args:
        shape: the sizes of the group, all of one shape.
        r: the rank, at most the larger side of the matrices.
        start: where the factors start.
        init_std: the standard deviation of the factors of the ``"normal"`` start; None for ``1 / sqrt(d)``.
        init_weights: False starts from random cores (and changes) instead, for tests.
        scaling: the factor s.
        dropout: dropout on the input of the added part.

    Example:
        >>> adapter = LotrAdapter(StackShape.uniform(layers=6, d_out=16, d_in=12), r=4)
        >>> sum(parameter.numel() for parameter in adapter.parameters())
        208
        >>> bool((adapter.delta_weight(3) == 0).all())
        True
    """

    out_factor: nn.Parameter
    core: Float[Tensor, "layers r r"]
    in_factor: nn.Parameter
    start_out_factor: Float[Tensor, "d_out r"] | None
    start_core: Float[Tensor, "layers r r"] | None
    start_in_factor: Float[Tensor, "d_in r"] | None

    def __init__(
        self,
        shape: StackShape,
        r: int,
        *,
        start: LotrStart = "normal",
        init_std: float | None = 1.0,
        init_weights: bool = True,
        scaling: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(shape, scaling=scaling, dropout=dropout)
        self.r = r
        sizes = {"out_factor": (shape.d_out, r), "core": (shape.layers, r, r), "in_factor": (shape.d_in, r)}
        for name, size in sizes.items():
            from_weights = start == "svd"
            factor_std = size[0] ** -0.5 if init_std is None else init_std
            spread = 0.0 if from_weights or name == "core" else factor_std
            if not init_weights and spread == 0:
                spread = 1 / (2 * r**0.5)
            self.register_parameter(name, nn.Parameter(torch.randn(size) * spread))
            self.register_buffer(f"start_{name}", torch.zeros(size) if from_weights else None)

    def initialise(self, read_weights: ReadWeights) -> None:
        """Take the start from the weights, if it is to come from there: the cost of `craft_peft.tucker.hosvd`."""
        if self.start_core is None:
            return
        d_out, d_in = self.shape.matrix
        tucker = hosvd(read_weights(), (self.shape.layers, min(self.r, d_out), min(self.r, d_in)))
        layer_factor, out_factor, in_factor = tucker.factors
        core = mode_product(tucker.core, layer_factor, 0) / self.scaling
        # A side that is smaller than the rank has no more directions: the rest stays 0.
        self._fill("out_factor", out_factor, (d_out, self.r))
        self._fill("core", core, (self.shape.layers, self.r, self.r))
        self._fill("in_factor", in_factor, (d_in, self.r))

    @property
    def derived_from(self) -> tuple[object, ...] | None:
        """Rank and scaling choose the start, if that comes from the weights."""
        return None if self.start_core is None else (self.r, self.scaling)

    def _fill(self, name: str, values: Tensor, size: tuple[int, ...]) -> None:
        filled = values.new_zeros(size)
        filled[tuple(slice(length) for length in values.shape)] = values
        # A new tensor, not a copy into the old one: that may be on the meta device after an empty start.
        setattr(self, f"start_{name}", filled.to(getattr(self, name).dtype))

    def layer_cores(self) -> Float[Tensor, "layers r_out r_in"]:
        """The cores; with a start from the weights, the blocks of the expanded form."""
        if self.start_core is None:
            return self.core.clone()
        top = torch.cat([self.start_core + self.core, torch.zeros_like(self.core)], 2)
        return torch.cat([top, torch.cat([self.core, self.start_core], 2)], 1)

    def whole_factors(self) -> tuple[Float[Tensor, "d_out r_out"], Float[Tensor, "d_in r_in"]]:
        """The shared factors; with a start from the weights, side by side with their start and change."""
        if self.start_out_factor is None or self.start_in_factor is None:
            return self.out_factor, self.in_factor
        now = self.start_in_factor + self.in_factor
        return torch.cat([self.out_factor, self.start_out_factor], 1), torch.cat([now, self.in_factor], 1)

    def extra_repr(self) -> str:
        """Sizes and rank, for `print(model)`."""
        return f"{super().extra_repr()}, r={self.r}"
