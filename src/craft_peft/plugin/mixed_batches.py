"""Batches whose rows use different adapters: PEFT's `adapter_names=[...]`, one name a row, "__base__" for none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from peft import PeftConfig
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import CraftError
from .layer import StackedLinear
from .rows import BASE, MixedBatch

if TYPE_CHECKING:
    from .bank import AdapterBank


@dataclass(frozen=True)
class ServedModules:
    """The modules of a model whose rows can use different adapters, each with whether it lies in an encoder.

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
        encoder = model.get_encoder() if getattr(getattr(model, "config", None), "is_encoder_decoder", False) else None
        inside = set(encoder.modules()) if encoder is not None else set()
        found = [(key, module, module in inside) for key, module in model.named_modules()]
        return cls(
            model,
            tuple((module, within) for _, module, within in found if isinstance(module, StackedLinear)),
            {key: (m, within) for key, m, within in found if isinstance(m, AuxiliaryTrainingWrapper)},
        )


@contextmanager
def rows_use(
    served: ServedModules,
    adapter_names: Sequence[str],
    known: Mapping[str, PeftConfig],
    bank: AdapterBank | None = None,
    num_beams: int | None = None,
) -> Iterator[None]:
    """Within it, row i of every batch goes through adapter `adapter_names[i]`.

    The names are left at the adapted layers, at saved heads and at embeddings with trained tokens, since the modules in
    between would not pass them on.

    Args:
        served: the modules of the model.
        adapter_names: one a row of the batch.
        known: the adapters that the model itself has, with their configs.
        bank: others that it can use.
        num_beams: in beam search, the rows of a decoder are repeated so often.

    Raises:
        CraftError: the model is in training mode, a name is unknown, or rows would get biases of another adapter.
    """
    if served.model.training:
        raise CraftError("Cannot pass `adapter_names` when the model is in training mode. Call `model.eval()` first.")
    unknown = sorted(name for name in set(adapter_names) - {BASE, *known} if bank is None or name not in bank)
    if unknown:
        others = f" and a bank of {len(bank)} others" if bank is not None else ""
        raise CraftError(
            f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}. The model has {', '.join(known)}"
            f"{others}."
        )
    _refuse_biases_of_others(adapter_names, known)
    whole = MixedBatch(list(adapter_names), bank)
    repeated = whole
    if (num_beams or 1) > 1:
        repeated = MixedBatch([name for name in adapter_names for _ in range(num_beams or 1)], bank)
    before = [layer.rows for layer, _ in served.layers]
    with ExitStack() as changes:
        try:
            for layer, in_encoder in served.layers:
                layer.rows = whole if in_encoder else repeated
            for path, (wrapper, in_encoder) in served.wrappers.items():
                names = (whole if in_encoder else repeated).names
                by_row = partial(_through_heads, wrapper, path, names, bank)
                changes.enter_context(called_instead(wrapper, by_row))
            yield
        finally:
            for (layer, _), rows in zip(served.layers, before, strict=True):
                layer.rows = rows


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


@contextmanager
def called_instead(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """Within it, a call of the module is a call of the function, between the same hooks."""
    before = vars(module).get("forward")
    vars(module)["forward"] = function
    try:
        yield
    finally:
        vars(module).pop("forward")
        if before is not None:
            vars(module)["forward"] = before


def _through_heads(
    wrapper: AuxiliaryTrainingWrapper,
    path: str,
    names: Sequence[str],
    bank: AdapterBank | None,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """As PEFT does it for some modules, for any: each adapter's rows through what it trained of the module."""
    if wrapper.disable_adapters:
        return wrapper.original_module(*args, **kwargs)
    one_input = len(args) == 1 and not any(isinstance(value, Tensor) for value in kwargs.values())
    if one_input:
        _check_rows(args[0], names, path)
    result: Tensor | None = None
    for name in dict.fromkeys(names):
        rows = [row for row, wanted in enumerate(names) if wanted == name]
        module = _trained_with(wrapper, path, name, bank)
        # Of several inputs nobody knows which have rows; and a product of fewer rows may be rounded otherwise, while
        # rows of the base are the base's bit for bit.
        if one_input and module is not wrapper.original_module:
            output = module(args[0][rows], **kwargs)
        else:
            output = _check_rows(module(*args, **kwargs), names, path)[rows]
        if result is None:
            result = output.new_empty((len(names), *output.shape[1:]))
        result[rows] = output.to(result.dtype)
    assert result is not None, "a batch has rows"
    return result


def _trained_with(
    wrapper: AuxiliaryTrainingWrapper, path: str, name: str, bank: AdapterBank | None
) -> Callable[..., Any]:
    """What an adapter makes of a module that can be trained with it: the base's module, if it has nothing there."""
    if bank is not None and name in bank:
        return partial(through_head, wrapper, bank.head_of(name, path))
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


def through_head(wrapper: AuxiliaryTrainingWrapper, head: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    """What a saved module computes, with the tensors of one adapter; with none, what the base's computes."""
    if not head or wrapper.disable_adapters:
        return wrapper.original_module(*args, **kwargs)
    own = wrapper.original_module.state_dict()  # where, and in which dtype, the model is now
    return functional_call(wrapper.original_module, {name: t.to(own[name]) for name, t in head.items()}, args, kwargs)
