"""Batches whose rows use different adapters: PEFT's `adapter_names=[...]`, one name a row, "__base__" for none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
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
    known: Sequence[str],
    bank: AdapterBank | None = None,
    num_beams: int | None = None,
) -> Iterator[None]:
    """Within it, row i of every batch goes through adapter `adapter_names[i]`.

    The names are left at the adapted layers, and reach saved heads as an argument that a hook adds, since the modules
    in between would not pass them on.

    Args:
        served: the modules of the model.
        adapter_names: one a row of the batch.
        known: the adapters that the model itself has.
        bank: others that it can use.
        num_beams: in beam search, the rows of a decoder are repeated so often.

    Raises:
        CraftError: the model is in training mode, or a name is unknown.
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
                changes.enter_context(_head_by_row(wrapper, path, (whole if in_encoder else repeated).names, bank))
            yield
        finally:
            for (layer, _), rows in zip(served.layers, before, strict=True):
                layer.rows = rows


@contextmanager
def _head_by_row(
    wrapper: AuxiliaryTrainingWrapper, path: str, names: Sequence[str], bank: AdapterBank | None
) -> Iterator[None]:
    if isinstance(wrapper, ModulesToSaveWrapper):
        with called_instead(wrapper, partial(_through_heads, wrapper, path, names, bank)):
            yield
        return
    known = [BASE if bank is not None and name in bank else name for name in names]
    hook = wrapper.register_forward_pre_hook(partial(_add_names, adapter_names=known), with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


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
    wrapper: ModulesToSaveWrapper,
    path: str,
    names: Sequence[str],
    bank: AdapterBank | None,
    x: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """As PEFT does it for some modules, for any: each adapter's rows through the copy of the module that it saved."""
    if wrapper.disable_adapters:
        return wrapper.original_module(x, *args, **kwargs)
    if len(names) != len(x):
        raise CraftError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(names)} and {len(x)} respectively."
        )
    own = wrapper.modules_to_save
    result: Tensor | None = None
    for name in dict.fromkeys(names):
        rows = torch.tensor([row for row, wanted in enumerate(names) if wanted == name], device=x.device)
        if bank is not None and name in bank:
            output = through_head(wrapper, bank.head_of(name, path), x[rows], *args, **kwargs)
        else:
            module = own[name] if name in own else wrapper.original_module  # noqa: SIM401, it is no dict
            output = module(x[rows], *args, **kwargs)
        if result is None:
            result = output.new_empty((len(x), *output.shape[1:]))
        result = result.index_copy(0, rows, output.to(result.dtype))
    assert result is not None, "a batch has rows"
    return result


def through_head(wrapper: ModulesToSaveWrapper, head: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    """What a saved module computes, with the tensors of one adapter; with none, what the base's computes."""
    if not head or wrapper.disable_adapters:
        return wrapper.original_module(*args, **kwargs)
    own = wrapper.original_module.state_dict()  # where, and in which dtype, the model is now
    return functional_call(wrapper.original_module, {name: t.to(own[name]) for name, t in head.items()}, args, kwargs)


def _add_names(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], adapter_names: Sequence[str]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {**kwargs, "adapter_names": list(adapter_names)}
