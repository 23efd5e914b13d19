"""Bases from data: what the inputs or gradients of each layer look like on a few batches, before training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..adapters.base import StackAdapter
from ..errors import CraftError
from ..slices import Slices
from .layer import StackedLinear, StackSlot
from .positions import Positions
from .quantization import adapter_place
from .stacks import Stack


def fit_bases(
    model: PeftModel,
    batches: Iterable[Mapping[str, Any]],
    adapter_name: str = "default",
    mask_of: Callable[[Mapping[str, Any]], Tensor] | None = None,
) -> None:
    r"""Compute the bases of an adapter with ``basis="activations"`` or ``"gradients"``, once, before it is trained.

    For "activations" they are the leading directions of the weights with each input channel multiplied by its root
    mean square over the batches, :math:`W_l \operatorname{diag}(\sqrt{E[x^2]})`; for "gradients", those of the gradient
    of the summed losses with respect to the weights. The core is the pretrained weights' projection on them. The
    adapter is off while the batches pass, the model is in eval mode, and no weight changes.

    Padding does not count: positions outside the batch's ``attention_mask``; in the decoder of an encoder-decoder
    those outside its ``decoder_attention_mask`` or, without one, where the label is -100.

    Args:
        model: with the adapter just added.
        batches: keyword arguments of the model's forward; for "gradients" with labels, so that it returns a loss. In
            distributed training give every process the same batches.
        adapter_name: which adapter.
        mask_of: gives for a batch which positions of the layers' inputs count, ``(rows, positions)``, where its
            attention mask does not tell: in audio, say, where a position is many numbers of the input.

    Raises:
        CraftError: no such adapter, no batches, no loss where it is needed, another basis, or a target module that no
            batch reached.

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
    modules = {module: key for _, stack in stacks for key, module in zip(stack.keys, stack.modules, strict=True)}
    positions = Positions(model.get_base_model(), modules, mask_of)
    measure, device, count = _MEASURES[source](positions), adapter_place(next(iter(modules)))[0], 0
    with ExitStack() as hooks, _in_eval_mode(model), model.disable_adapter():
        for module in modules:
            hooks.enter_context(module.register_forward_hook(measure.see))
        for count, batch in enumerate(batches, start=1):  # noqa: B007
            batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
            with positions.of_batch(batch):
                measure.after(model(**batch))
    if count == 0:
        raise CraftError("`fit_bases` got no batches; a few are needed, as keyword arguments of the model's forward.")
    _check_reached([key for module, key in modules.items() if module not in measure.found])
    for adapter, stack in stacks:
        weights = stack.read_weights()
        adapter.set_bases(weights, _Directions(measure, stack.modules, weights))


def wants_batches(model: nn.Module, adapter_name: str = "default") -> bool:
    """Whether an adapter's bases are computed from batches, by `fit_bases`."""
    layers = (layer for layer in model.modules() if isinstance(layer, StackedLinear) and adapter_name in layer.slots)
    return any(layer.slots[adapter_name].adapter.directions_from is not None for layer in layers)


def _check_reached(missed: list[str]) -> None:
    if missed:
        named = ", ".join(repr(key) for key in missed[:3]) + (f" and {len(missed) - 3} more" if missed[3:] else "")
        raise CraftError(
            f"No batch reached the target module{'s' * (len(missed) > 1)} {named}, so there is nothing to compute the "
            "bases from. Give `fit_bases` batches that use every target, or leave such modules out with "
            "`exclude_modules`."
        )


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


class _Activations:
    """Weights with their input channels scaled by the root mean square of what comes in."""

    def __init__(self, positions: Positions) -> None:
        self._positions = positions
        self.found: dict[nn.Module, Tensor] = {}

    def see(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        rows = self._positions.counted(module, args[0])(args[0].detach())
        if len(rows):
            self.found[module] = self.found.get(module, 0) + rows.double().square().sum(0)

    def after(self, output: Any) -> None:
        """Nothing is left to do when a batch has passed."""

    def directions(self, module: nn.Module, weight: Tensor) -> Tensor:
        # The number of tokens is the same for all channels and so has no influence on the directions.
        return weight * self.found[module].sqrt()


class _Gradients:
    """The gradient of the loss with respect to each weight, without asking the weight for one: it may be quantised."""

    def __init__(self, positions: Positions) -> None:
        self._positions = positions
        self._anchor = torch.zeros((), requires_grad=True)
        self.found: dict[nn.Module, Tensor] = {}

    def see(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        counted, x = self._positions.counted(module, args[0]), args[0].detach()

        def add(gradient: Tensor) -> None:
            self.found[module] = self.found.get(module, 0) + counted(gradient).float().T @ counted(x).float()

        output = output + self._anchor.to(output)  # all else may be frozen, and then no gradient would pass
        output.register_hook(add)
        return output

    def after(self, output: Any) -> None:
        if getattr(output, "loss", None) is None:
            raise CraftError("basis='gradients' needs batches with labels, for which the model returns a loss.")
        torch.autograd.grad(output.loss, self._anchor)

    def directions(self, module: nn.Module, weight: Tensor) -> Tensor:
        return self.found[module]


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
