"""Batches whose rows use different adapters: PEFT's `adapter_names=[...]`, one name a row, "__base__" for none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from ..errors import CraftError
from .layer import StackedLinear

BASE = "__base__"


@contextmanager
def rows_use(
    model: nn.Module, adapter_names: Sequence[str], known: Sequence[str], num_beams: int | None = None
) -> Iterator[None]:
    """Within it, row i of every batch goes through adapter `adapter_names[i]`.

    The names reach the adapted layers (and saved heads) as an argument that a hook adds, since the layers in between
    would not pass it on.

    Args:
        model: the base model with adapted layers.
        adapter_names: one a row of the batch.
        known: the adapters that exist.
        num_beams: in beam search, the rows of a decoder are repeated so often.

    Raises:
        CraftError: the model is in training mode, or a name is unknown.
    """
    if model.training:
        raise CraftError("Cannot pass `adapter_names` when the model is in training mode. Call `model.eval()` first.")
    unknown = sorted(set(adapter_names) - {BASE, *known})
    if unknown:
        raise CraftError(
            f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}. The model has {', '.join(known)}."
        )
    repeated = [name for name in adapter_names for _ in range(num_beams or 1)]
    encoder = model.get_encoder() if getattr(getattr(model, "config", None), "is_encoder_decoder", False) else None
    in_encoder = set(encoder.modules()) if encoder is not None else set()
    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, StackedLinear | AuxiliaryTrainingWrapper):
                names = list(adapter_names) if module in in_encoder else repeated
                hooks.enter_context(
                    module.register_forward_pre_hook(partial(_add_names, adapter_names=names), with_kwargs=True)
                )
        yield


def _add_names(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], adapter_names: list[str]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {**kwargs, "adapter_names": adapter_names}
