"""Small models on quantised bases, as transformers loads them; and how far each quantiser rounds."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import torch
from bitsandbytes.functional import get_4bit_type
from small_models import bert
from torch import Tensor
from torchao.quantization import Int8WeightOnlyConfig
from transformers import BertForSequenceClassification, BitsAndBytesConfig, PreTrainedModel, TorchAoConfig

Model = TypeVar("Model", bound=PreTrainedModel)
HEADS = ["classifier", "lm_head"]
WIDTH = 64  # bitsandbytes quantises to 4 bits in blocks of 64


@dataclass(frozen=True)
class Backend:
    """One way to quantise.

    Args:
        name: as PEFT calls it.
        config: makes transformers' config; without the head, which is trained in full.
        dtype: of what is not quantised.
        rounding: the farthest that a weight can be from what is stored of it, entry by entry; None for two stages of
            rounding, whose bound is not a formula of one line.
        rounds_inputs: whether the forward pass rounds the inputs too, so that it is no smooth function of them.
    """

    name: str
    config: Callable[[], Any]
    dtype: torch.dtype = torch.float32
    rounding: Callable[[Tensor], Tensor] | None = None
    rounds_inputs: bool = False

    def quantise(self, model: Model) -> Model:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            quantised = (
                type(model)
                .from_pretrained(folder, quantization_config=self.config(), dtype=self.dtype, device_map="cpu")
                .eval()
            )
        quantised.name_or_path = quantised.config._name_or_path = ""  # the folder is gone
        return quantised

    def bert(self) -> BertForSequenceClassification:
        return copy.deepcopy(_quantised_bert(self))


@cache
def _quantised_bert(backend: Backend) -> BertForSequenceClassification:
    return backend.quantise(bert(width=WIDTH))


def half_a_step_of_int8_in_float16(weight: Tensor) -> Tensor:
    """The weight is rounded to float16, then to 127 steps on each side of zero; the largest of a row is exact."""
    half = weight.abs() * torch.finfo(torch.float16).eps / 2 + torch.finfo(torch.float16).smallest_normal
    return half + weight.half().float().abs().amax(1, keepdim=True) / 127 / 2


def half_a_step_of_int8(weight: Tensor) -> Tensor:
    """255 steps from the negative to the positive largest of a row."""
    return weight.abs().amax(1, keepdim=True) / 127.5 / 2


def half_the_widest_gap_of_nf4(weight: Tensor) -> Tensor:
    """A table of 16 numbers, times the largest of each block of 64."""
    gap = get_4bit_type("nf4", device="cpu").sort().values.diff().max()
    blocks = weight.reshape(-1, 64)
    return (blocks.abs().amax(1, keepdim=True) * gap / 2).expand_as(blocks).reshape(weight.shape)


def _four_bits(**fields: Any) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=HEADS, **fields)


BACKENDS = [
    Backend(
        "bnb 8bit",
        lambda: BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=HEADS),
        rounding=half_a_step_of_int8_in_float16,
        rounds_inputs=True,
    ),
    Backend("bnb 4bit", _four_bits, rounding=half_the_widest_gap_of_nf4),
    Backend(
        "bnb 4bit",
        lambda: _four_bits(
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
            bnb_4bit_quant_storage=torch.bfloat16,
        ),
        dtype=torch.bfloat16,
    ),
    Backend(
        "torchao",
        lambda: TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=HEADS),
        rounding=half_a_step_of_int8,
    ),
]
