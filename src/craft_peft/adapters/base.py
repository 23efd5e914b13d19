r"""One interface for all tensor methods: what is added to the weight of layer l of a stack?

A *stack* is a set of weights: those of one projection over the layers, all of one shape ``(out, in)``, or, for methods
that share more, all target matrices of one shape, or simply all. An adapter belongs to one whole stack: what its layers
share, it holds once.

.. math:: W'_l = W_l + \Delta W_l, \qquad l = 0, \dots, L - 1

A new method is one subclass here: it says how it starts (`initialise`) and what :math:`\Delta W_l` is; and, if its
layers need parts of one computation, what that is (`prepare`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import reduce
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import CraftError
from ..fused import adapted_linear, thin_dtype
from ..sharing import compute_once
from ..slices import Slices
from ..weights import ReadWeights, StackShape, as_bits


class StackAdapter(nn.Module, ABC):
    """What is added to the weights of one stack, held once for all its layers.

    Trained tensors are parameters; what is frozen (bases taken from the pretrained weights) are buffers. The frozen
    part is either computed from the weights (`initialise`) or loaded with a state dict. To save a decomposition that
    loading would overwrite, `defer` postpones it until the tensors are first needed.

    A method whose frozen tensors mean something beside the weights they were computed from alone has a buffer
    ``fingerprint``, the bits (`as_bits`) of numbers that begin with their `weights_fingerprint`; `watch_loading` then
    tells when another is loaded.

    Whoever casts a model may cast the trained tensors and not the frozen ones, or the other way round. What is small
    is therefore computed in the widest of their dtypes, and in float32 at least (`working_dtype`).

    Args:
        shape: the sizes of the stack.
        scaling: the factor s on everything that is added.
        dropout: the probability of dropping an input of the added part while training.
    """

    def __init__(self, shape: StackShape, *, scaling: float = 1.0, dropout: float = 0.0) -> None:
        super().__init__()
        self.shape = shape
        self.scaling = scaling
        self.dropout = dropout
        self._deferred: Callable[[], None] | None = None
        self._watcher: Callable[[Tensor], None] | None = None
        self.registered_in: tuple[nn.ModuleDict, str] = (nn.ModuleDict(), "")

    @abstractmethod
    def initialise(self, read_weights: ReadWeights) -> None:
        """Fill every frozen tensor, from the pretrained weights if the method needs them (it reads them then)."""

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

    def _without_autocast(self) -> AbstractContextManager[Any]:
        # Within a call, FSDP 1 puts plain tensors in the place of the parameters.
        tensors = chain(self.parameters(), (value for value in vars(self).values() if isinstance(value, Tensor)))
        device = next(tensors).device.type
        return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()

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

    @property
    def derived_from(self) -> tuple[object, ...] | None:
        """What the frozen tensors depend on beside the weights, as values to compare; None if there are none."""
        return None

    def take_frozen(self, twin: StackAdapter) -> None:
        """Copy the frozen tensors of an adapter of the same class, stack and `derived_from`, instead of computing them.

        So that a copy of an adapter by its config and its parameters (which is how others copy adapters) is that
        adapter, also where the frozen tensors cannot be computed again: from batches, or from weights that have since
        been cast or quantised.
        """
        twin.make_ready()
        self._deferred = None
        for name, frozen in twin.named_buffers(recurse=False):
            setattr(self, name, frozen.detach().clone())

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

    def defer(self, fill: Callable[[], None]) -> None:
        """Call this to fill the frozen tensors when they are first used, unless they are loaded before."""
        self._deferred = fill

    @property
    def is_deferred(self) -> bool:
        """Whether the frozen tensors are still to be filled."""
        return self._deferred is not None

    def watch_loading(self, watcher: Callable[[Tensor], None]) -> None:
        """Call this with the saved fingerprint whenever frozen tensors are loaded together with one."""
        self._watcher = watcher

    def _meet_fingerprint(self, saved: Tensor) -> None:
        if self._watcher is not None:
            self._watcher(saved)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "fingerprint":
            # transformers' own loading sets tensors one by one, with this mark, and calls no `load_state_dict`.
            if getattr(value, "_is_hf_initialized", False):
                self._meet_fingerprint(value)
            value = as_bits(value)
        super().__setattr__(name, value)

    @contextmanager
    def still_deferred(self) -> Iterator[None]:
        """Within it a deferred `initialise` stays deferred: for reading names and shapes, not values."""
        held, self._deferred = self._deferred, None
        try:
            yield
        finally:
            self._deferred = held

    def make_ready(self) -> None:
        """Run a deferred `initialise`, if there is one. Cheap otherwise; called before every use."""
        while self._deferred is not None:  # what was deferred may turn out to need something else first
            deferred, self._deferred = self._deferred, None
            try:
                # Whoever asks first may do so in a mode of his own. What is made here stays.
                with torch.inference_mode(False), torch.no_grad(), self._without_autocast():
                    deferred()
            except CraftError:
                self._deferred = deferred  # the next use is an error again, not a use of tensors that hold nothing
                raise

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if not any(parameter.is_meta for parameter in self.parameters()):  # those are still to be loaded
            self.make_ready()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any) -> None:
        self._check_shapes(state_dict, prefix)
        saved = [name for name, _ in self.named_buffers(recurse=False) if name not in self._non_persistent_buffers_set]
        if all(prefix + name in state_dict for name in saved):
            self._deferred = None  # everything frozen comes with the state: nothing is left to compute
            if "fingerprint" in saved:
                self._meet_fingerprint(state_dict[f"{prefix}fingerprint"])
        if (key := f"{prefix}fingerprint") in state_dict:
            state_dict = {**state_dict, key: as_bits(state_dict[key])}
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _check_shapes(self, state_dict: dict[str, Tensor], prefix: str) -> None:
        """Refuse saved tensors of other shapes before any is loaded; torch would name each, but not the reason."""
        for name, own in [*self.named_parameters(recurse=False), *self.named_buffers(recurse=False)]:
            saved = state_dict.get(prefix + name)
            if saved is not None and saved.shape != own.shape:
                raise CraftError(
                    f"The saved adapter does not fit this base model: '{prefix}{name}' was saved with the shape "
                    f"{tuple(saved.shape)} and needs {tuple(own.shape)} for {self.shape}. Load it on the base model "
                    "that it was trained on."
                )

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

    def _in_one_dtype(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        middle = self._scaled_middle(layer)
        out_factor, in_factor = self.factors()
        return out_factor.to(middle.dtype), middle, in_factor.to(middle.dtype)

    def delta_output(self, layer: int, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out"]:
        """``x @ delta_weight(layer).T``, through the thin factors: ``(d_in + d_out) * r`` products a token."""
        middle = self._scaled_middle(layer)
        out_factor, in_factor = self.factors()
        thin = thin_dtype(x.dtype)
        hidden = F.linear(F.linear(x.to(thin), in_factor.T.to(thin)), middle.to(thin))
        return F.linear(hidden, out_factor.to(thin)).to(x.dtype)

    @property
    def fuses(self) -> bool:
        """Yes, unless the factors are of those that are trained."""
        return "out_factor" in self._buffers and "in_factor" in self._buffers

    def adapted_output(self, layer: int, x: Float[Tensor, "... d_in"], base: nn.Linear) -> Float[Tensor, "... d_out"]:
        """In one step of the graph, see `craft_peft.fused`."""
        middle = self._scaled_middle(layer)  # first: it fills the factors if they were deferred
        out_factor, in_factor = self.factors()
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return adapted_linear(x, base.weight, base.bias, out_factor, middle, in_factor)


class FrozenBasesAdapter(FactoredStackAdapter):
    r"""A factored adapter whose bases are frozen, so that many of them on the same bases can be held and used together.

    What is its own is only what it trained. That can be handed in: a store of many adapters needs one adapter, for the
    bases, and the trained tensors of the others.
    """

    @property
    @abstractmethod
    def bases(self) -> dict[str, Tensor]:
        """The frozen tensors that give the trained ones their meaning, by name."""

    @abstractmethod
    def trained(self) -> dict[str, Tensor]:
        """The trained tensors by name, zeros for one that this adapter may have and has not."""

    @abstractmethod
    def middles_of(self, trained: Mapping[str, Tensor]) -> Float[Tensor, "layers r_out r_in"]:
        """The matrices :math:`K_l` of all layers, without the scaling, in one computation from `trained` tensors."""

    @abstractmethod
    def turn_rows(
        self, layer: int, hidden: Float[Tensor, "rows tokens r_in"], trained: Mapping[str, Tensor]
    ) -> Float[Tensor, "rows tokens r_out"] | None:
        """``hidden[i] @ K_l.T`` of another adapter for each row, without forming its K: for few tokens; or None.

        Args:
            layer: the index in the stack.
            hidden: the rows of a batch, each times `in_factor`.
            trained: for each row the `trained` tensors of its adapter.
        """

    @abstractmethod
    def with_middles(self, middles: Float[Tensor, "layers r_out r_in"]) -> FrozenBasesAdapter:
        """An adapter on these very bases (not copies) with the given, frozen matrices :math:`K_l`, of scaling 1."""

    @abstractmethod
    def check_same_bases(self, saved: Tensor) -> None:
        """Refuse a saved fingerprint of other bases than these.

        Raises:
            CraftError: they differ; says in what.
        """


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype in which small tensors are computed together: the widest of theirs, float32 at least.

    Example:
        >>> working_dtype(torch.zeros(1, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.float16))
        torch.float32
    """
    return reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)


@contextmanager
def still_deferred(model: nn.Module) -> Iterator[None]:
    """Within it every deferred `initialise` of a model's adapters stays deferred: for reading names and shapes."""
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, StackAdapter):
                stack.enter_context(module.still_deferred())
        yield
