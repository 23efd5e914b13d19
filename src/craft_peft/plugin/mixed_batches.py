"""Batches whose rows use different adapters: PEFT's `adapter_names=[...]`, one name a row, "__base__" for none."""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, cast

import torch
from peft import PeftConfig
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import CraftError
from .layer import StackedLinear
from .requests import Modules, Request, compiled, is_off, refuse_while_off, request_of
from .rows import BASE, MixedBatch, Store


@dataclass(frozen=True)
class ServedModules:
    """The modules of a model that ask what their request uses, each with whether it lies in an encoder.

    Args:
        model: the base model with adapted layers.
        layers: its adapted layers.
        wrappers: its modules that PEFT saves with an adapter, such as heads, by path.
    """

    model: nn.Module
    layers: tuple[tuple[StackedLinear, bool], ...]
    wrappers: Mapping[str, tuple[AuxiliaryTrainingWrapper, bool]]

    @classmethod
    def of(cls, model: nn.Module) -> ServedModules:
        """Looked up in one walk over the model, which takes longer than a small batch."""
        encoder = None
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and hasattr(model, "get_encoder"):
            encoder = model.get_encoder()
        inside = set(encoder.modules()) if isinstance(encoder, nn.Module) else set()
        found = [(key, module, module in inside) for key, module in model.named_modules()]
        wrappers = {key: (m, within) for key, m, within in found if isinstance(m, AuxiliaryTrainingWrapper)}
        for path, (wrapper, _) in wrappers.items():
            _let_ask(wrapper, path)
        return cls(
            model,
            tuple((module, within) for _, module, within in found if isinstance(module, StackedLinear)),
            wrappers,
        )

    @cached_property
    def modules(self) -> Modules:
        """The model and all that ask."""
        return frozenset([self.model, *(layer for layer, _ in self.layers), *(w for w, _ in self.wrappers.values())])

    @cached_property
    def in_encoder(self) -> Modules:
        """Those of an encoder, whose rows beam search does not repeat."""
        return frozenset(module for module, within in (*self.layers, *self.wrappers.values()) if within)


def request_for(
    served: ServedModules,
    adapter_names: Sequence[str] | None,
    known: Mapping[str, PeftConfig],
    bank: Store | None = None,
    times: int = 1,
    off: bool = False,
) -> Request:
    """The request that a call of the model is.

    Args:
        served: the modules of the model.
        adapter_names: one a row of every batch; None for what the call's thread or task, or else the whole model uses.
        known: the adapters that the model itself has, with their configs.
        bank: others that it can use.
        times: the rows of a decoder are repeated so often, see `times_repeated`.
        off: the adapters are switched off.

    Raises:
        CraftError: names in training mode; a name that is unknown, or whose rows would get biases of another adapter; a
            call that says too little, see `request_of`.
    """
    if adapter_names is None:
        around = request_of(served.model)
        choice = around.choice if around is not None else bank.choice if bank is not None else None
        return Request(served.modules, choice=choice, off=off)
    refuse_while_off(served.model)
    if served.model.training:
        raise CraftError("Cannot pass `adapter_names` when the model is in training mode. Call `model.eval()` first.")
    _refuse_unknown(adapter_names, known, bank, () if bank is None else bank)
    _refuse_biases_of_others(adapter_names, known)
    whole = repeated = MixedBatch(list(adapter_names), bank)
    _refuse_unknown(adapter_names, known, bank, whole.held)  # another thread may have removed one
    if times > 1:
        repeated = MixedBatch([name for name in adapter_names for _ in range(times)], bank)
    return Request(served.modules, batch_of=lambda module: whole if module in served.in_encoder else repeated, off=off)


def times_repeated(arguments: Mapping[str, Any]) -> int:
    """How often `generate` repeats each row for a decoder, by its arguments: for beams, or for sequences to return.

    Example:
        >>> times_repeated({"num_beams": 3}), times_repeated({"num_return_sequences": 2}), times_repeated({})
        (3, 2, 1)
    """
    settings = vars(arguments["generation_config"]) if arguments.get("generation_config") is not None else {}
    settings = {**settings, **arguments}  # as in transformers
    return max(settings.get("num_beams") or 1, settings.get("num_return_sequences") or 1)


def _refuse_unknown(names: Sequence[str], known: Collection[str], bank: Store | None, found: Container[str]) -> None:
    unknown = sorted(name for name in set(names) - {BASE, *known} if name not in found)
    if unknown:
        others = f" and a bank of {len(bank)} others" if bank is not None else ""
        raise CraftError(
            f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}. The model has {', '.join(known)}"
            f"{others}."
        )


def _refuse_biases_of_others(adapter_names: Sequence[str], known: Mapping[str, PeftConfig]) -> None:
    """Trained biases are the base model's own parameters: every row gets them."""
    for name, config in known.items():
        bias, others = getattr(config, "bias", "none"), sorted(set(adapter_names) - {name})
        if bias != "none" and others:
            raise CraftError(
                f"The adapter '{name}' was trained with bias={bias!r}, and such biases are in the base model, so that "
                f"rows of {', '.join(map(repr, others))} would get them, too. Call it without `adapter_names`, or load "
                "the other adapters into a model of their own."
            )


class _Asking(AuxiliaryTrainingWrapper):
    """PEFT's place for what an adapter trains of a module, which asks what its request uses."""

    path = ""  # in the base model
    instead: Mapping[str, Tensor] | None = None  # as in `StackedLinear`

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module as each row's adapter has it, or the bank's, or the active one."""
        if torch.compiler.is_dynamo_compiling() and compiled.has_to_ask:
            return self._forward_untraced(*args, **kwargs)
        request = request_of(self)
        if is_off(self, request):
            return self.original_module(*args, **kwargs)
        if request is not None and request.batch_of is not None:
            return _through_heads(self, request.batch_of(self), *args, **kwargs)
        instead = self.instead if request is None else request.instead(self)
        if instead is not None:
            return _through_head(self, instead, *args, **kwargs)
        if self.disable_adapters:
            return self._forward_in_spite(*args, **kwargs)
        return super().forward(*args, **kwargs)

    @torch.compiler.disable
    def _forward_untraced(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    def _forward_in_spite(self, *args: Any, **kwargs: Any) -> Any:
        """With the active adapter, which is switched off for others."""
        raise CraftError(
            "Another thread or task switched the adapters off (`disable_adapter`) during this call, and trained tokens "
            'are off with them. Use `adapter_names=["__base__", ...]` there.'
        )


class ServedHead(_Asking, ModulesToSaveWrapper):
    """A `ModulesToSaveWrapper` that asks: `ServedModules.of` makes PEFT's ones these."""

    def _forward_in_spite(self, *args: Any, **kwargs: Any) -> Any:
        has_it = self._adapters.issuperset(self.active_adapters)
        return (self._forward_wrapped if has_it else self.original_module)(*args, **kwargs)


class ServedTokens(_Asking, TrainableTokensWrapper):
    """A `TrainableTokensWrapper` that asks."""


def _let_ask(wrapper: AuxiliaryTrainingWrapper, path: str) -> None:
    for asking, kind in ((ServedHead, ModulesToSaveWrapper), (ServedTokens, TrainableTokensWrapper)):
        if isinstance(wrapper, kind):
            wrapper.__class__ = asking
            vars(wrapper)["path"] = path


def _through_heads(wrapper: _Asking, batch: MixedBatch, *args: Any, **kwargs: Any) -> Tensor:
    """As PEFT does it for some modules, for any: each adapter's rows through what it trained of the module."""
    names = batch.names
    one_input = len(args) == 1 and not any(isinstance(value, Tensor) for value in kwargs.values())
    if one_input:
        _check_rows(args[0], names, wrapper.path)
    result: Tensor | None = None
    for name in dict.fromkeys(names):
        rows = [row for row, wanted in enumerate(names) if wanted == name]
        module = _trained_with(wrapper, name, batch)
        # Of several inputs nobody knows which have rows; and a product of fewer rows may be rounded otherwise, while
        # rows of the base are the base's bit for bit.
        if one_input and module is not wrapper.original_module:
            output = module(args[0][rows], **kwargs)
        else:
            output = _check_rows(module(*args, **kwargs), names, wrapper.path)[rows]
        if result is None:
            result = output.new_empty((len(names), *output.shape[1:]))
        result[rows] = output.to(result.dtype)
    assert result is not None, "a batch has rows"
    return result


def _trained_with(wrapper: _Asking, name: str, batch: MixedBatch) -> Callable[..., Any]:
    """What an adapter makes of a module that can be trained with it: the base's module, if it has nothing there."""
    if name in batch.held:
        return partial(_through_head, wrapper, batch.held[name].heads.get(wrapper.path, {}))
    if name not in wrapper._get_available_adapters():
        return wrapper.original_module
    if isinstance(wrapper, ModulesToSaveWrapper):
        return wrapper.modules_to_save[name]
    return partial(wrapper.token_adapter.forward_adapters, active_adapters=[name])


def _check_rows(batch: Any, names: Sequence[str], path: str) -> Tensor:
    rows = len(batch) if isinstance(batch, Tensor) else f"a {type(batch).__name__}"
    if rows != len(names):
        raise CraftError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(names)} and {rows} respectively (at '{path}', which adapters have trained copies of)."
        )
    return cast(Tensor, batch)


def _through_head(wrapper: _Asking, tensors: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    """What a saved module computes, with the tensors of one adapter; with none, what the base's computes."""
    module = wrapper.original_module
    if not tensors:
        return module(*args, **kwargs)
    own = module.state_dict()  # where, and in which dtype, the model is now
    tensors = {name: tensor.to(own[name]) for name, tensor in tensors.items()}
    if torch.compiler.is_compiling():
        return functional_call(module, tensors, args, kwargs)
    return _with_tensors(module, tensors)(*args, **kwargs)


def _with_tensors(module: nn.Module, tensors: Mapping[str, Tensor], prefix: str = "") -> nn.Module:
    """A module with other tensors; `functional_call` puts them into the module itself for a time, for all threads."""
    twin = copy(module)
    for kind in ("_parameters", "_buffers"):
        vars(twin)[kind] = {name: tensors.get(prefix + name, own) for name, own in vars(module)[kind].items()}
    twin._modules = {
        name: None if child is None else _with_tensors(child, tensors, f"{prefix}{name}.")
        for name, child in module._modules.items()
    }
    if hasattr(twin, "_hf_hook"):  # accelerate's, which brings the inputs to the module's device
        vars(twin)["forward"] = partial(_between_hooks, twin)
    return twin


def _between_hooks(module: Any, *args: Any, **kwargs: Any) -> Any:
    args, kwargs = module._hf_hook.pre_forward(module, *args, **kwargs)
    return module._hf_hook.post_forward(module, type(module).forward(module, *args, **kwargs))
