r"""CRAFT: train one small square matrix a mode of the Tucker decomposition of a stack of pretrained weights.

.. math::
    W &\approx C \times_0 L \times_1 U \times_2 V \quad\text{(frozen)}, \qquad
    W'_l = W_l + s \cdot U K_l V^\top, \\
    K_l &= J_2\, C_l(J_1)\, J_3^\top - C_l(I), \qquad C_l(J) = \sum_a (L J)_{la}\, C_a .

:math:`J_1, J_2, J_3` (of ranks r1, r2, r3) are trained and shared by all layers; they start at the identity, where
:math:`K_l = 0` exactly. A stack trains :math:`r_1^2 + r_2^2 + r_3^2` numbers, whatever its width and depth.

That is the first rung of a ladder, from most tied to least (`Tying`), on bases from several sources (`Basis`):

- ``"shared"``, the paper: as above.
- ``"diagonal"``: :math:`K_l = A_l J_2 C_l(J_1) J_3^\top B_l - C_l(I)` with trained diagonal matrices
  :math:`A_l, B_l` of each layer, the identity at the start: :math:`L (r_2 + r_3)` numbers more.
- ``"free"``: a trained :math:`K_l` of each layer, 0 at the start: :math:`L r_2 r_3` numbers. That is LoRA-XS
  (arXiv 2405.17604) with bases that the layers share.

Reference:
    CRAFT: Cross-layer Rank Adaptation via Frozen Tucker, arXiv 2602.17510: the residual form of the adapted weight,
    ``W - T(I)`` fixed and ``T(J)`` trained, written so that the pretrained weight is never touched.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, cast

import torch
from jaxtyping import Float, Int32
from torch import Tensor, nn

from ..errors import CraftError
from ..slices import Slices
from ..tucker import Decomposition, Tucker, hosvd, project
from ..weights import (
    FINGERPRINT_NUMBERS,
    ReadWeights,
    StackShape,
    as_bits,
    as_numbers,
    decomposed,
    weights_fingerprint,
)
from .base import FrozenBasesAdapter, StackAdapter, working_dtype

TRANSFORMS = ("layer_transform", "out_transform", "in_transform")
"""The trained matrices, in the order of the modes (0: layers, 1: out, 2: in)."""

DIAGONALS = ("out_diagonals", "in_diagonals")
"""What each layer trains beside the transforms with ``tying="diagonal"``."""

FACTORS = ("layer_factor", "out_factor", "in_factor")
"""The frozen bases, in the order of the modes; their products with the weights are the core."""

Tying = Literal["shared", "diagonal", "free"]
"""What the layers share: the transforms; these, with a diagonal of each layer's own on both sides; the bases alone."""

Basis = Literal["weights", "random", "activations", "gradients"]
"""What the bases are taken from: the pretrained weights (the paper), nothing, weights times the size of each input
channel, or gradients. The core always is the weights' projection on them."""


class CraftAdapter(FrozenBasesAdapter):
    r"""CRAFT for one stack.

    The trained tensors hold :math:`E = J - I`, so that they start at 0 and weight decay pulls to the pretrained
    weight, not to 0. In :math:`E` the middle matrix is free of cancellation and exactly 0 at the start,

    .. math:: K_l = D_l + E_2 S_l + (S_l + E_2 S_l) E_3^\top, \quad D_l = C_l(E_1), \quad S_l = C_l(I) + D_l .

    The diagonals of ``tying="diagonal"`` continue the chain in the same way.

    Args:
        shape: the sizes of the stack.
        ranks: (layer, out, in) ranks, each from 1 to the size of its mode.
        decomposition: how core and factors are found, see `craft_peft.tucker.hosvd`.
        trained_modes: the modes (0, 1, 2) whose transform is trained; the others stay at the identity. With
            ``tying="free"`` there are no transforms.
        tying: what the layers share.
        basis: what the bases are taken from. For "activations" and "gradients" somebody has to call `set_bases`.
        basis_seed: for ``basis="random"``.
        init_weights: False starts from random transforms instead of the identity (for tests).
        save_factors: whether core and factors are part of the state dict. If not, they have to be computed again from
            the same weights, and loading refuses weights with another fingerprint.
        scaling: the factor s.
        dropout: dropout on the input of the added part.

    Raises:
        CraftError: at the first use, if bases from activations or gradients were never set; in `initialise`, for
            weights with NaN or infinity; in `load_state_dict`, for a state without factors that was trained on other
            weights.

    Example:
        >>> adapter = CraftAdapter(StackShape.uniform(layers=6, d_out=16, d_in=12), ranks=(6, 4, 4))
        >>> adapter.initialise(lambda: [torch.randn(16, 12) for _ in range(6)])
        >>> sum(parameter.numel() for parameter in adapter.parameters())
        68
        >>> bool((adapter.delta_weight(3) == 0).all())
        True
    """

    core: Float[Tensor, "layer_rank out_rank in_rank"]
    layer_factor: Float[Tensor, "layers layer_rank"]
    fingerprint: Int32[Tensor, " numbers"]
    layer_transform: nn.Parameter | None
    out_transform: nn.Parameter | None
    in_transform: nn.Parameter | None
    out_diagonals: nn.Parameter | None
    in_diagonals: nn.Parameter | None
    middles: nn.Parameter | None

    def __init__(
        self,
        shape: StackShape,
        ranks: tuple[int, int, int],
        *,
        decomposition: Decomposition = "auto",
        trained_modes: Collection[int] = (0, 1, 2),
        tying: Tying = "shared",
        basis: Basis = "weights",
        basis_seed: int = 0,
        init_weights: bool = True,
        save_factors: bool = True,
        scaling: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(shape, scaling=scaling, dropout=dropout)
        self.ranks = ranks
        self.decomposition = decomposition
        self.tying = tying
        self.basis = basis
        self.basis_seed = basis_seed
        self.save_factors = save_factors
        self.register_buffer("core", torch.zeros(ranks), persistent=save_factors)
        for name, size, rank in zip(FACTORS, (shape.layers, *shape.matrix), ranks, strict=True):
            self.register_buffer(name, torch.zeros(size, rank), persistent=save_factors)
        self.register_buffer("fingerprint", as_bits(torch.zeros(shape.layers * FINGERPRINT_NUMBERS + sum(ranks))))
        for name, sizes in _trained_sizes(shape, ranks, trained_modes, tying).items():
            if sizes is None:
                self.register_parameter(name, None)
            else:
                start = torch.zeros(sizes) if init_weights else torch.randn(sizes) / (2 * sizes[-1] ** 0.5)
                self.register_parameter(name, nn.Parameter(start))

    def initialise(self, read_weights: ReadWeights) -> None:
        """Decompose the stack and fill core, factors and fingerprint. Costs what `craft_peft.tucker.hosvd` costs."""
        if self.directions_from is not None:
            self._deferred = self._miss_bases
            return
        weights = read_weights()
        if self.basis == "random":
            generator = torch.Generator().manual_seed(self.basis_seed)
            sizes = (self.shape.layers, *self.shape.matrix)
            gaussian = (torch.randn(n, r, generator=generator) for n, r in zip(sizes, self.ranks, strict=True))
            factors = tuple(torch.linalg.qr(matrix)[0].to(weights[0].device) for matrix in gaussian)
            self._set(weights, project(weights, factors))
        else:

            def compute() -> Tucker:
                return hosvd(weights, self.ranks, self.decomposition)

            self._set(weights, decomposed(weights, self.ranks, self.decomposition, compute))

    @property
    def directions_from(self) -> str | None:
        """The `basis`, if it is one that is computed from batches."""
        return self.basis if self.basis in ("activations", "gradients") else None

    @property
    def derived_from(self) -> tuple[object, ...]:
        """All that chooses the bases, and whether a file is going to hold them."""
        return self.ranks, self.decomposition, self.basis, self.basis_seed, self.save_factors

    def set_bases(self, weights: Slices, directions: Slices) -> None:
        """Take the bases from the decomposition of other matrices than the weights, and the core from the weights."""
        factors = hosvd(directions, self.ranks, self.decomposition).factors
        self._deferred = None
        self._set(weights, project(weights, factors))

    def _set(self, weights: Slices, tucker: Tucker) -> None:
        if self.middles is None and not tucker.core.any():
            raise CraftError(
                "The weights of the stack are all zero, so its core is too, and whatever multiplies it adds nothing, "
                "for ever. Leave these modules out with `exclude_modules`, or use tying='free', which adds to the core."
            )
        fingerprint = as_bits(torch.cat([weights_fingerprint(weights), _basis_fingerprint(tucker)]))
        frozen = zip(("core", *FACTORS, "fingerprint"), (tucker.core, *tucker.factors, fingerprint), strict=True)
        for name, tensor in frozen:
            # A new tensor, not a copy into the old one: that may be on the meta device after an empty start.
            setattr(self, name, tensor.to(getattr(self, name).dtype))

    def _miss_bases(self) -> None:
        raise CraftError(
            f"The adapter has basis='{self.basis}', and its bases were not computed yet. Call "
            "`craft_peft.fit_bases(model, batches)` with a few batches before you use or train it."
        )

    def become_weighted_sum(self, adapters: Sequence[StackAdapter], weights: Sequence[float | int]) -> None:
        """The sum of the middle matrices, for ``tying="free"`` and adapters with the very same bases."""
        summands = [cast(CraftAdapter, adapter) for adapter in adapters]
        first = summands[0]
        first.make_ready()
        for adapter in summands[1:]:
            adapter.make_ready()
            if any(not _equal(getattr(first, name), getattr(adapter, name)) for name in ("out_factor", "in_factor")):
                raise CraftError(
                    "The adapters have different bases (other ranks, another decomposition or other base weights), and "
                    "so have no sum among adapters on one basis. Keep them apart and make them active together "
                    "(`base_model.set_adapter([...])`), or export each to LoRA and add those."
                )
        self.take_frozen(first)
        assert self.middles is not None, "the config of a sum has tying='free'"
        with torch.no_grad():
            for layer in range(self.shape.layers):
                parts = (w * a._scaled_middle(layer) for w, a in zip(weights, summands, strict=True))
                self.middles[layer] = sum(parts) / self.scaling

    def layer_cores(self) -> Float[Tensor, "layers r_out r_in"]:
        """The `middles_of` what is trained."""
        if self.middles is not None:
            return self.middles.clone()
        tensors = ((name, getattr(self, name)) for name in (*TRANSFORMS, *DIAGONALS))
        return self.middles_of({name: tensor for name, tensor in tensors if tensor is not None})

    def transforms(self) -> dict[str, Float[Tensor, "rank rank"]]:
        """The matrices J (identity plus what was trained) by name; the identity for a mode that is not trained."""
        found = {}
        for name, rank in zip(TRANSFORMS, self.ranks, strict=True):
            offset = getattr(self, name)
            identity = torch.eye(rank, device=self.core.device, dtype=self.core.dtype)
            found[name] = identity if offset is None else identity + offset.detach()
        return found

    def extra_repr(self) -> str:
        """Sizes and ranks, for `print(model)`."""
        return f"{super().extra_repr()}, ranks={self.ranks}"

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any) -> None:
        fingerprint = state_dict.get(prefix + "fingerprint")
        if fingerprint is not None and f"{prefix}core" not in state_dict:
            self._check_shapes(state_dict, prefix)
            self.make_ready()
            self._check_computed_bases(fingerprint)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _meet_fingerprint(self, saved: Tensor) -> None:
        if self.save_factors:
            super()._meet_fingerprint(saved)
        else:
            self.make_ready()
            self._check_computed_bases(saved)

    def _check_computed_bases(self, saved: Tensor) -> None:
        """Refuse a state whose transforms were trained in other bases than those computed from the present weights."""
        try:
            self.check_same_bases(saved)
        except CraftError as error:
            raise CraftError(
                f"{error} It was saved with save_factors=False, so its transforms would mean something else. Load it "
                "on the very same base model, in the dtype that this had when the adapter was made, or save it again "
                "with save_factors=True where it was trained."
            ) from None

    # Many adapters on the same bases: what `craft_peft.plugin.bank` and mixed batches ask for.

    @property
    def bases(self) -> dict[str, Tensor]:
        """Core and factors."""
        return {name: getattr(self, name) for name in ("core", *FACTORS)}

    def trained(self) -> dict[str, Tensor]:
        """Every tensor of this tying; zeros for a mode that is not trained."""
        sizes = _trained_sizes(self.shape, self.ranks, (0, 1, 2), self.tying)
        own = ((name, getattr(self, name), size) for name, size in sizes.items() if size is not None)
        return {name: self.core.new_zeros(size) if tensor is None else tensor for name, tensor, size in own}

    def middles_of(self, trained: Mapping[str, Tensor]) -> Float[Tensor, "layers r_out r_in"]:
        r"""All :math:`K_l` at once, in the expanded form; a transform that is not given is the identity.

        Cost ``L r2 r3 (2 r1 + r2 + r3)``, nothing beside a batch.
        """
        if "middles" in trained:
            return trained["middles"]
        core, layer_factor, trained = self._in_one_dtype_with(trained)
        # As (out, layers, in): the products with the transforms are then one product each, not one a layer. And each is
        # of two matrices: PyTorch may sum a product of more modes in another order where no gradient is wanted.
        start, moved = _mixed(layer_factor, core).transpose(0, 1).contiguous(), None
        if "layer_transform" in trained:
            moved = _mixed(layer_factor @ trained["layer_transform"], core).transpose(0, 1).contiguous()
            start = start + moved
        if "out_transform" in trained:
            start, moved = _continued(start, moved, torch.tensordot(trained["out_transform"], start, dims=1))
        if "in_transform" in trained:
            start, moved = _continued(start, moved, (start.flatten(0, 1) @ trained["in_transform"].T).view_as(start))
        if "out_diagonals" in trained:
            start, moved = _continued(start, moved, trained["out_diagonals"].T[:, :, None] * start)
            start, moved = _continued(start, moved, start * trained["in_diagonals"])
        return (torch.zeros_like(start) if moved is None else moved).transpose(0, 1)

    def _in_one_dtype_with(self, trained: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Core and layer factor, and trained tensors."""
        dtype = working_dtype(self.core, self.layer_factor, *trained.values())
        return (
            self.core.to(dtype),
            self.layer_factor.to(dtype),
            {name: tensor.to(dtype) for name, tensor in trained.items()},
        )

    def turn_rows(
        self, layer: int, hidden: Float[Tensor, "rows tokens r_in"], trained: Mapping[str, Tensor]
    ) -> Float[Tensor, "rows tokens r_out"] | None:
        r"""With :math:`e = E_3^\top z`: :math:`K_l z = D_l z + S_l e + E_2 (C_l(I) z + D_l z + S_l e)`."""
        if set(trained) != set(TRANSFORMS):
            return None
        core, layer_factor, trained = self._in_one_dtype_with(trained)
        tokens, weights, hidden = hidden.shape[1], layer_factor[layer], hidden.to(core.dtype)
        fixed, moving = _mixed(weights, core), _mixed(weights @ trained["layer_transform"], core)
        both = torch.cat([hidden, hidden @ trained["in_transform"]], dim=1)
        through_fixed, through_moving = both @ fixed.T, both @ moving.mT
        moved = through_moving[:, :tokens] + through_moving[:, tokens:] + through_fixed[:, tokens:]
        return moved + (through_fixed[:, :tokens] + moved) @ trained["out_transform"].mT

    def with_middles(self, middles: Float[Tensor, "layers r_out r_in"]) -> CraftAdapter:
        """With ``tying="free"``."""
        with torch.device("meta"):
            adapter = CraftAdapter(self.shape, self.ranks, tying="free")
        for name in ("core", *FACTORS, "fingerprint"):
            setattr(adapter, name, getattr(self, name))
        adapter.middles = nn.Parameter(middles, requires_grad=False)
        return adapter.eval()

    def check_same_bases(self, saved: Tensor) -> None:
        """Compare fingerprints: of the weights to 1e-5, of each basis vector to 1e-3."""
        own = self.fingerprint
        if saved.shape != own.shape:
            raise CraftError("The adapter's number of layers or its ranks are not those here.")
        own = as_numbers(own)
        weights, basis, saved = self.shape.layers * FINGERPRINT_NUMBERS, sum(self.ranks), as_numbers(saved).to(own)
        if not torch.allclose(saved[:weights], own[:weights], rtol=1e-5, atol=0):
            raise CraftError("The base weights are not those that the adapter was trained with.")
        if not torch.allclose(saved[-basis:], own[-basis:], rtol=0, atol=1e-3):
            raise CraftError("The bases computed from the weights are not those that the adapter was trained with.")


def _mixed(
    weights: Float[Tensor, "*some r_layer"], core: Float[Tensor, "r_layer r_out r_in"]
) -> Float[Tensor, "*some r_out r_in"]:
    """Weighted sums of the core's slices."""
    return (weights @ core.flatten(1)).unflatten(-1, core.shape[1:])


def _continued(start: Tensor, moved: Tensor | None, turned: Tensor) -> tuple[Tensor, Tensor]:
    """One transform more in the chain: what it adds goes to the matrices and to how far they are from the start."""
    return start + turned, turned if moved is None else moved + turned


def _equal(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and torch.equal(first, second.to(first))


def _trained_sizes(
    shape: StackShape, ranks: tuple[int, int, int], trained_modes: Collection[int], tying: Tying
) -> dict[str, tuple[int, ...] | None]:
    """The shapes of the trained tensors by name, None for those that this adapter does not have."""
    layers, (_, out_rank, in_rank) = shape.layers, ranks
    sizes: dict[str, tuple[int, ...] | None] = {
        name: (rank, rank) if mode in trained_modes and tying != "free" else None
        for mode, (name, rank) in enumerate(zip(TRANSFORMS, ranks, strict=True))
    }
    sizes["out_diagonals"] = (layers, out_rank) if tying == "diagonal" else None
    sizes["in_diagonals"] = (layers, in_rank) if tying == "diagonal" else None
    sizes["middles"] = (layers, out_rank, in_rank) if tying == "free" else None
    return sizes


def _basis_fingerprint(tucker: Tucker) -> Tensor:
    """One number a basis vector, its product with a fixed vector: changes when a sign flips or two vectors turn."""
    numbers = []
    for factor in tucker.factors:
        probe = torch.cos(torch.arange(factor.shape[0], dtype=torch.float64, device=factor.device))
        numbers.append(probe @ factor.double())
    return torch.cat(numbers).float()
