"""Is the base model the one that a loaded adapter was trained on? A warning if its weights say no."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import CraftError
from ..weights import FINGERPRINT_NUMBERS, StackShape, as_numbers, fixed_entries
from .config import StackConfig
from .quantization import quantization_of
from .stacks import Stack

SPREAD = 0.4
"""How far quantisation may move the fixed entries of the weights: the root of their mean square, relative to that of
all entries. Measured on all stacks of all-MiniLM-L6-v2 and of random models: at most 0.16 over the 8-bit and 4-bit
types of bitsandbytes and torchao; at least 0.50 for the weights of another model, layer or projection (1044 pairs)."""

LAYERS = 4
"""How many layers of a stack are compared where reading one means to dequantise it."""


@dataclass
class BaseCheck:
    """Compares fingerprints of base weights; one object for all stacks of an adapter, so that it warns once.

    Args:
        trained_on: the base model's name where the adapter was trained, for the message.
        present: its name here. Names are not compared: one model has many paths.
        trained_on_quantised: whether the base model was quantised where the adapter was trained.
        warned: whether it warned already.
    """

    trained_on: str | None
    present: str | None
    trained_on_quantised: bool
    warned: bool = False

    @classmethod
    def between(cls, config: StackConfig, model: nn.Module) -> BaseCheck:
        """For an adapter with this config on this base model."""
        present = getattr(getattr(model, "config", None), "_name_or_path", None)
        return cls(config.base_model_name_or_path, present, config.base_quantization is not None)

    def compare(self, stack: Stack, saved: Tensor) -> None:
        """Warn if a saved fingerprint is not that of a stack's present weights, if these can be read.

        Args:
            stack: where the adapter is loaded.
            saved: begins with the `craft_peft.weights.weights_fingerprint` of the weights it was trained on.

        Cost:
            Nothing beside loading: three entries of each weight. Of quantised stacks up to 4 weights are dequantised.
        """
        if self.warned or saved.is_meta:
            return
        quantised = self.trained_on_quantised
        layers = list(range(len(stack.modules)))
        if quantization_of(stack.modules) is not None:
            quantised, layers = True, torch.linspace(0, len(layers) - 1, min(len(layers), LAYERS)).long().tolist()
        present = _entries(stack, layers)
        if present is None or same_weights(saved, present, layers, stack.shape, quantised):
            return
        self.warned = True
        names = (f"'{name}'" if name else "a model without a name" for name in (self.trained_on, self.present))
        warnings.warn(
            "The adapter was trained on other weights than those of this base model (seen in stack '{}'): on {}, while "
            "this is {}. It is loaded as it was saved, but what it adds was trained to go with those weights. Load it "
            "on the base model that it was trained on.".format(stack.name, *names),
            UserWarning,
            stacklevel=2,
        )


def same_weights(saved: Tensor, present: Tensor, layers: list[int], shape: StackShape, quantised: bool) -> bool:
    """Whether a fingerprint can be of the present weights, rounded in another way.

    The norms in it are not compared. That would take a pass over the weights and tell less: training moves them in the
    fifth digit, and random weights of one spread have almost the same.

    Args:
        saved: the fingerprint of all layers.
        present: the fixed entries of the present weights, a row a layer.
        layers: which layers these are.
        shape: the sizes of the weights.
        quantised: whether one of the two was taken of quantised weights. If not, every entry has to agree within the
            rounding of bfloat16, which a single step of training breaks (one of AdamW at 2e-5 moved 2 of 18 entries of
            the queries of all-MiniLM-L6-v2 farther). If so, only another model is told apart, not one trained a little.
    """
    numbers = as_numbers(saved)[: shape.layers * FINGERPRINT_NUMBERS].cpu().reshape(shape.layers, -1)[layers]
    norms, entries = numbers[:, :1], numbers[:, 1:]
    if not quantised:
        half = torch.finfo(torch.float16)
        rounding = torch.finfo(torch.bfloat16).eps * entries.abs() + half.smallest_normal * half.eps
        return bool(((present - entries).abs() <= rounding).all())
    sizes = torch.tensor([[shape.matrices[layer][0] * shape.matrices[layer][1]] for layer in layers])
    spread = (norms / sizes.sqrt()).clamp_min(torch.finfo(torch.float32).tiny)
    return bool(((present - entries) / spread).square().mean().sqrt() <= SPREAD)


def _entries(stack: Stack, layers: list[int]) -> Tensor | None:
    """The fixed entries of the present weights; None where they cannot be read, or not as a whole (sharded ones)."""
    rows = []
    for layer in layers:
        try:
            weight = stack.read_weight(layer)
        except CraftError:
            return None
        if type(weight) is not Tensor or weight.shape != stack.shape.matrices[layer]:
            return None
        rows.append(fixed_entries(weight).float().cpu())
    return torch.stack(rows)
