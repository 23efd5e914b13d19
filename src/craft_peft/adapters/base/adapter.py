r"""One interface for all tensor methods: what is added to the weight of layer l of a stack?

A *stack* is a set of weights: those of one projection over the layers, all of one shape ``(out, in)``, or, for methods
that share more, all target matrices of one shape, or simply all. An adapter belongs to one whole stack: what its layers
share, it holds once.

.. math:: W'_l = W_l + \Delta W_l, \qquad l = 0, \dots, L - 1

A new method is one subclass here: it says how it starts (`initialise`) and what :math:`\Delta W_l` is; and, if its
layers need parts of one computation, what that is (`prepare`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import reduce

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import CraftError
from ...fused import adapted_linear, autocasts, thin_dtype
from ...sharing import compute_once
from ...slices import Slices
from ...weights import StackShape
from .deferred import DeferredState


class StackAdapter(DeferredState):
    """What is added to the weights of one stack, held once for all its layers.

    Whoever casts a model may cast the trained tensors and not the frozen ones, or the other way round. What is small
    is therefore computed in the widest of their dtypes, and in float32 at least (`working_dtype`).

    Args:
        shape: the sizes of the stack.
        scaling: the factor s on everything that is added.
        dropout: the probability of dropping an input of the added part while training.
    """

    def __init__(self, shape: StackShape, *, scaling: float = 1.0, dropout: float = 0.0) -> None:
        super().__init__(shape)
        self.scaling = scaling
        self.dropout = dropout
        self.registered_in: tuple[nn.ModuleDict, str] = (nn.ModuleDict(), "")

    @abstractmethod
    def delta_weight(self, layer: int) -> Float[Tensor, "d_out d_in"]:
        r"""The matrix :math:`\Delta W_l`, of shape ``(d_out, d_in)``, in float32 at least."""

    def delta_output(self, layer: int, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out"]:
        r"""What is added to the output of layer `layer`: :math:`x \Delta W_l^\top`, in the dtype of `x`.

        Args:
            layer: the index in the stack, from 0.
            x: the input of the layer.
        """
        return F.linear(x, self.delta_weight(layer).to(x))

    def prepare(self) -> tuple[Tensor, ...]:
        """What all layers need of the trained tensors, in one computation: new tensors, one per layer or more.

        What a method returns here its `delta_weight` and `delta_output` get with `prepared`, computed once per forward
        pass, whatever autocast does to the rest. No layer may use a trained tensor by itself: its gradient would come
        in parts, one per layer, and an optimizer that steps in a gradient hook would step on each. Nor may a tensor
        returned here share memory with a trained one, which engines for several processes free after each layer.
        """
        raise NotImplementedError(f"{type(self).__name__} computes nothing for all its layers together")

    def prepared(self, place: int) -> Tensor:
        """The tensor at a place of those of `prepare`, see `craft_peft.sharing`."""
        return compute_once(self, self._prepare)[place]

    def _prepare(self) -> tuple[Tensor, ...]:
        self.make_ready()
        with self._without_autocast():
            return self.prepare()

    def forward(
        self, layer: int, x: Float[Tensor, "... d_in"], base: nn.Linear | None = None
    ) -> Float[Tensor, "... d_out"]:
        """`delta_output` as a call of the module: engines that shard parameters gather them around such calls.

        Args:
            layer: the index in the stack.
            x: the input of the layer.
            base: the pretrained layer, for `adapted_output` instead; only if `fuses`.
        """
        return self.delta_output(layer, x) if base is None else self.adapted_output(layer, x, base)

    @property
    def fuses(self) -> bool:
        """Whether there is an `adapted_output` that keeps less for the backward pass than base and delta do apart."""
        return False

    def adapted_output(self, layer: int, x: Float[Tensor, "... d_in"], base: nn.Linear) -> Float[Tensor, "... d_out"]:
        """The output of the adapted layer, ``base(x) + delta_output(layer, x)``; the base is frozen."""
        return base(x) + self.delta_output(layer, x)

    @property
    def weight(self) -> Tensor | None:
        """The first trained tensor, under the name by which PEFT's FSDP policy tells what to wrap by itself."""
        return next((parameter for parameter in self._parameters.values() if parameter is not None), None)

    def thin_factors(self, layer: int) -> tuple[Float[Tensor, "d_out rank"], Float[Tensor, "rank d_in"]]:
        """Two matrices whose product is `delta_weight(layer)`, of the smallest rank that it has (up to rounding)."""
        delta = self.delta_weight(layer)
        left, values, right = torch.linalg.svd(delta.double(), full_matrices=False)
        noise = values[0] * max(delta.shape) * torch.finfo(delta.dtype).eps
        rank = max(1, int((values > noise).sum()))
        return (left[:, :rank] * values[:rank]).to(delta.dtype), right[:rank].to(delta.dtype)

    @property
    def directions_from(self) -> str | None:
        """What `set_bases` has to be given directions of: "activations", "gradients", or None if it takes none."""
        return None

    def set_bases(self, weights: Slices, directions: Slices) -> None:
        """Take bases from the directions of other matrices than the pretrained weights.

        Args:
            weights: the pretrained weights, one ``(d_out, d_in)`` tensor a layer.
            directions: matrices of the same sizes.

        Raises:
            CraftError: this adapter takes none.
        """
        raise CraftError(f"{type(self).__name__} takes no bases from elsewhere.")

    def become_weighted_sum(self, adapters: Sequence[StackAdapter], weights: Sequence[float | int]) -> None:
        r"""Set all tensors so that :math:`\Delta W_l = \sum_i w_i \Delta W_l^i` over adapters of the same stack.

        Args:
            adapters: of this class.
            weights: one a adapter.

        Raises:
            CraftError: this adapter cannot hold that sum.
        """
        raise CraftError(f"{type(self).__name__} cannot hold a sum of adapters.")

    def extra_repr(self) -> str:
        """The sizes, for `print(model)`."""
        return f"{self.shape}, scaling={self.scaling}"


class FactoredStackAdapter(StackAdapter):
    r"""An adapter whose matrices share their column and row space over the layers.

    .. math:: \Delta W_l = s \cdot U K_l V^\top

    with `out_factor` :math:`U` ``(d_out, r_out)``, `in_factor` :math:`V` ``(d_in, r_in)`` and one small
    :math:`K_l` ``(r_out, r_in)`` a layer. The product with an input goes through three thin matrices: for the backward
    pass it keeps ``x @ in_factor`` (tokens x r_in), neither ``x`` nor a matrix of the size of the weight.
    """

    out_factor: Float[Tensor, "d_out r_out"]
    in_factor: Float[Tensor, "d_in r_in"]

    @abstractmethod
    def layer_cores(self) -> Float[Tensor, "layers r_out r_in"]:
        """The small matrices :math:`K_l` of all layers, without the scaling, in one computation; a new tensor."""

    def whole_factors(self) -> tuple[Float[Tensor, "d_out r_out"], Float[Tensor, "d_in r_in"]]:
        """The matrices :math:`U` and :math:`V`, if they are trained or made of what is trained."""
        return self.out_factor, self.in_factor

    def prepare(self) -> tuple[Tensor, ...]:
        """All of `layer_cores`, and behind them the factors if they are trained."""
        cores, factors = self.layer_cores(), () if self.fuses else self.whole_factors()
        dtype = working_dtype(cores, *factors)
        return (*cores.to(dtype).unbind(), *(factor.to(dtype, copy=True) for factor in factors))

    def middle(self, layer: int) -> Float[Tensor, "r_out r_in"]:
        """The small matrix :math:`K_l` of a layer, without the scaling."""
        return self.prepared(layer)

    def factors(self) -> tuple[Float[Tensor, "d_out r_out"], Float[Tensor, "d_in r_in"]]:
        """The matrices :math:`U` and :math:`V`."""
        return (self.out_factor, self.in_factor) if self.fuses else (self.prepared(-2), self.prepared(-1))

    def _scaled_middle(self, layer: int) -> Float[Tensor, "r_out r_in"]:
        self.make_ready()
        middle = self.middle(layer)
        return middle if self.scaling == 1 else self.scaling * middle

    def delta_weight(self, layer: int) -> Float[Tensor, "d_out d_in"]:
        """``scaling * out_factor @ middle(layer) @ in_factor.T``."""
        out_factor, middle, in_factor = self._in_one_dtype(layer)
        return out_factor @ middle @ in_factor.T

    def thin_factors(self, layer: int) -> tuple[Float[Tensor, "d_out rank"], Float[Tensor, "rank d_in"]]:
        """``(out_factor @ K_l, in_factor.T)`` or ``(out_factor, K_l @ in_factor.T)``, as the smaller rank asks."""
        out_factor, middle, in_factor = self._in_one_dtype(layer)
        if middle.shape[1] <= middle.shape[0]:
            return out_factor @ middle, in_factor.T
        return out_factor, middle @ in_factor.T

    def _parts(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        middle = self._scaled_middle(layer)  # first: it fills the factors if they were deferred
        out_factor, in_factor = self.factors()
        return out_factor, middle, in_factor

    def _in_one_dtype(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        out_factor, middle, in_factor = self._parts(layer)
        return out_factor.to(middle.dtype), middle, in_factor.to(middle.dtype)

    def delta_output(self, layer: int, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out"]:
        """``x @ delta_weight(layer).T``, through the thin factors: ``(d_in + d_out) * r`` products a token."""
        x_thin = x.to(thin_dtype(x.dtype))
        out_factor, middle, in_factor = (tensor.to(x_thin) for tensor in self._parts(layer))
        return F.linear(F.linear(F.linear(x_thin, in_factor.T), middle), out_factor).to(x.dtype)

    @property
    def fuses(self) -> bool:
        """Yes, unless the factors are of those that are trained."""
        return "out_factor" in self._buffers and "in_factor" in self._buffers

    def adapted_output(self, layer: int, x: Float[Tensor, "... d_in"], base: nn.Linear) -> Float[Tensor, "... d_out"]:
        """In one step of the graph, see `craft_peft.fused`."""
        # The layers of a stack may be on several devices, and the adapter is on the first one's.
        out_factor, middle, in_factor = (tensor.to(x.device) for tensor in self._parts(layer))
        if autocasts(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return adapted_linear(x, base.weight, base.bias, out_factor, middle, in_factor)


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype in which small tensors are computed together: the widest of theirs, float32 at least.

    Example:
        >>> working_dtype(torch.zeros(1, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.float16))
        torch.float32
    """
    return reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)
