"""Bases from data: what the inputs or gradients of each layer look like on a few batches, before training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..adapters.base import StackAdapter
from ..errors import CraftError
from ..slices import Slices
from .layer import StackedLinear, StackSlot
from .stacks import Stack


def fit_bases(model: PeftModel, batches: Iterable[Mapping[str, Any]], adapter_name: str = "default") -> None:
    r"""Compute the bases of an adapter with ``basis="activations"`` or ``"gradients"``, once, before it is trained.

    For "activations" they are the leading directions of the weights with each input channel multiplied by its root
    mean square over the batches, :math:`W_l \operatorname{diag}(\sqrt{E[x^2]})`; for "gradients", those of the gradient
    of the summed losses with respect to the weights. The core is the pretrained weights' projection on them. The
    adapter is off while the batches pass, the model is in eval mode, and no weight changes.

    Args:
        model: with the adapter just added.
        batches: keyword arguments of the model's forward; for "gradients" with labels, so that it returns a loss. In
            distributed training give every process the same batches.
        adapter_name: which adapter.

    Raises:
        CraftError: no such adapter, no batches, no loss where it is needed, or another basis.

    Cost:
        One forward pass a batch, for gradients a backward pass and one matrix of the weight's size a layer; then one
        decomposition a stack.

    Example:
        >>> from peft import get_peft_model
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> from craft_peft import CraftConfig
        >>> base = BertForSequenceClassification(BertConfig(
        ...     hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16, vocab_size=50))
        >>> model = get_peft_model(base, CraftConfig(ranks=(3, 4, 4), basis="activations"))
        >>> fit_bases(model, [{"input_ids": torch.arange(12).reshape(2, 6)}])

    References:
        The scaling of input channels: ASVD, arXiv 2312.05821, section 3.2. Bases from a gradient: LoRA-GA, arXiv
        2407.05000, section 3.2.
    """
    stacks = _stacks_of(model, adapter_name)
    source = stacks[0][0].directions_from
    if source is None:
        raise CraftError(
            f"The bases of the adapter '{adapter_name}' are not computed from batches. Use "
            "`CraftConfig(basis='activations')` or 'gradients', or leave `fit_bases` out."
        )
    measure, was_training, count = _MEASURES[source](), model.training, 0
    with ExitStack() as hooks, model.eval().disable_adapter():
        for _, stack in stacks:
            for module in stack.modules:
                hooks.enter_context(module.register_forward_hook(measure.see))
        for count, batch in enumerate(batches, start=1):  # noqa: B007
            measure.after(model(**{k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in batch.items()}))
    model.train(was_training)
    if count == 0:
        raise CraftError("`fit_bases` got no batches; a few are needed, as keyword arguments of the model's forward.")
    for adapter, stack in stacks:
        weights = stack.read_weights()
        adapter.set_bases(weights, _Directions(measure, stack.modules, weights))


def wants_batches(model: nn.Module, adapter_name: str = "default") -> bool:
    """Whether an adapter's bases are computed from batches, by `fit_bases`."""
    layers = (layer for layer in model.modules() if isinstance(layer, StackedLinear) and adapter_name in layer.slots)
    return any(layer.slots[adapter_name].adapter.directions_from is not None for layer in layers)


class _Activations:
    """Weights with their input channels scaled by the root mean square of what comes in."""

    def __init__(self) -> None:
        self._squares: dict[nn.Module, Tensor] = {}

    def see(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        squares = args[0].detach().double().square().flatten(0, -2).sum(0)
        self._squares[module] = self._squares.get(module, 0) + squares

    def after(self, output: Any) -> None:
        """Nothing is left to do when a batch has passed."""

    def directions(self, module: nn.Module, weight: Tensor) -> Tensor:
        # The number of tokens is the same for all channels and so has no influence on the directions.
        return weight * self._squares[module].sqrt()


class _Gradients:
    """The gradient of the loss with respect to each weight, without asking the weight for one: it may be quantised."""

    def __init__(self) -> None:
        self._anchor = torch.zeros((), requires_grad=True)
        self._sums: dict[nn.Module, Tensor] = {}

    def see(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = args[0].detach()

        def add(gradient: Tensor) -> None:
            product = gradient.flatten(0, -2).float().T @ x.flatten(0, -2).float()
            self._sums[module] = self._sums.get(module, 0) + product

        output = output + self._anchor.to(output)  # all else may be frozen, and then no gradient would pass
        output.register_hook(add)
        return output

    def after(self, output: Any) -> None:
        if getattr(output, "loss", None) is None:
            raise CraftError("basis='gradients' needs batches with labels, for which the model returns a loss.")
        torch.autograd.grad(output.loss, self._anchor)

    def directions(self, module: nn.Module, weight: Tensor) -> Tensor:
        return self._sums[module]


_MEASURES: dict[str, type[_Activations] | type[_Gradients]] = {"activations": _Activations, "gradients": _Gradients}


@dataclass(frozen=True)
class _Directions:
    """The matrices of a stack whose directions are the bases, each made when it is asked for."""

    measure: _Activations | _Gradients
    modules: tuple[nn.Module, ...]
    weights: Slices

    def __len__(self) -> int:
        return len(self.modules)

    def __getitem__(self, layer: int) -> Tensor:
        return self.measure.directions(self.modules[layer], self.weights[layer])


def _stacks_of(model: PeftModel, adapter_name: str) -> list[tuple[StackAdapter, Stack]]:
    """Every stack's adapter of that name, with the modules that it adapts."""
    members: dict[StackAdapter, list[tuple[str, nn.Module]]] = {}
    for key, layer in model.get_base_model().named_modules():
        if isinstance(layer, StackedLinear) and adapter_name in layer.slots:
            slot = cast(StackSlot, layer.slots[adapter_name])
            members.setdefault(slot.adapter, []).append((key, layer.get_base_layer()))
    if not members:
        raise CraftError(
            f"There is no adapter of this package called '{adapter_name}'. The model's adapters are "
            f"{', '.join(model.peft_config)}."
        )
    return [(adapter, Stack(*map(tuple, zip(*found, strict=True)))) for adapter, found in members.items()]
