"""Which positions of a layer's input are tokens, and which are padding that statistics have to leave out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .stacks import path_pattern, say_once

Rows = Callable[[Tensor], Tensor]


class Positions:
    """What the masks of a batch say about the inputs of a model's layers.

    Args:
        model: the base model.
        modules: its layers whose inputs are looked at, and their paths.
        mask_of: gives for a batch which positions count, instead of the masks that the model itself is given.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[nn.Module, str],
        mask_of: Callable[[Mapping[str, Any]], Tensor] | None = None,
    ) -> None:
        self._modules, self._mask_of = modules, mask_of
        split = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        self._encoder: nn.Module | None = model.get_encoder() if split else None
        self._in_encoder = set(self._encoder.modules()) if self._encoder is not None else set()
        self._mask: Tensor | None = None
        self._decoder_mask: Tensor | None = None
        self._encoded = 0  # where the output of the encoder lies in memory

    @contextmanager
    def of_batch(self, batch: Mapping[str, Any]) -> Iterator[None]:
        """Within it, this batch passes through the model."""
        self._mask = _attended(batch.get("attention_mask"), batch)
        self._decoder_mask = _attended(batch.get("decoder_attention_mask"), batch)
        labels = batch.get("labels")
        if self._encoder is not None and self._decoder_mask is None and isinstance(labels, Tensor) and labels.ndim == 2:
            self._decoder_mask = labels.ne(-100)
        if self._mask_of is not None:
            self._mask = self._decoder_mask = self._mask_of(batch) != 0
        if self._encoder is None:
            yield
            return
        with self._encoder.register_forward_hook(self._see_encoded):
            yield

    def _see_encoded(self, encoder: nn.Module, args: Any, output: Any) -> None:
        self._encoded = output[0].data_ptr()

    def counted(self, module: nn.Module, x: Tensor) -> Rows:
        """What takes from a tensor of as many positions as `x`, this layer's input, those that count, one a row."""
        of_encoder = self._encoder is None or module in self._in_encoder or x.data_ptr() == self._encoded
        mask = self._mask if of_encoder else self._decoder_mask
        keep = None if mask is None else _in_shape(mask, x)
        if mask is not None and keep is None:
            self._say_unknown(module, mask, x)
        if keep is None:
            return lambda tensor: tensor.flatten(0, -2)
        return lambda tensor: tensor.flatten(0, -2)[keep.to(tensor.device)]

    def _say_unknown(self, module: nn.Module, mask: Tensor, x: Tensor) -> None:
        one_a_row_or_unpadded = x.ndim == 2 and x.shape[0] in (mask.shape[0], int(mask.sum()))
        if not (mask.all() or one_a_row_or_unpadded):
            say_once(
                f"All positions of '{path_pattern(self._modules[module])}' count in its bases: its input, of shape "
                f"{tuple(x.shape)}, is not laid out as the mask of the batch, {tuple(mask.shape)}. If some of them are "
                "padding, give `fit_bases` a `mask_of` that tells which."
            )


def _attended(mask: Any, batch: Mapping[str, Any]) -> Tensor | None:
    """An attention mask as (rows, positions) of True and False; None if there is none of a kind that is known."""
    if not isinstance(mask, Tensor):
        return None
    if mask.ndim == 2:
        return mask > 0
    seen = mask > torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else mask > 0  # what is added, or a flag
    if mask.ndim == 3 and getattr(batch.get("input_ids"), "ndim", 0) == 3:  # several texts a row
        return (mask > 0).flatten(0, 1)
    return seen.flatten(1, -2).any(1)  # a position that some other attends to


def _in_shape(mask: Tensor, x: Tensor) -> Tensor | None:
    """For each position of a layer's input, in order, whether it counts; None if the mask is of another shape."""
    rows = x.shape[:-1]
    if rows == mask.shape or rows == (mask.numel(),):
        return mask.flatten()
    if rows == mask.T.shape:
        return mask.T.flatten()
    return None
