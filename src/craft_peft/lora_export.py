r"""An adapter of this package as an ordinary LoRA checkpoint, for engines that serve LoRA and know nothing of stacks.

What an adapter adds to a layer is a product of thin matrices, :math:`\Delta W_l = (s\,U K_l) V^\top`, so it *is* a LoRA
of rank ``min(r_out, r_in)``, exactly and without an SVD of a large matrix. A smaller rank keeps the largest singular
values of the small matrix between orthonormal bases, which is the best that rank can do (Eckart and Young 1936).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .errors import CraftError
from .plugin.bank_files import ROOT
from .plugin.beside_stacks import biased_heads
from .plugin.layer import StackedLinear
from .plugin.tensor_names import adapter_keys
from .sharing import shared_work


@dataclass(frozen=True)
class LoraExport:
    r"""A LoRA checkpoint in memory.

    Args:
        config: PEFT's config of it, with `lora_alpha = r`.
        tensors: its state dict, with trained biases, tokens and saved modules such as heads; copies.
        errors: the relative error :math:`\|\Delta W - BA\| / \|\Delta W\|` of each layer, by module path; 0 where
            nothing was cut.
        total_error: the same over all layers together.
    """

    config: LoraConfig
    tensors: dict[str, Tensor]
    errors: dict[str, float]
    total_error: float

    def save(self, folder: str | Path) -> None:
        """Write `adapter_config.json` and `adapter_model.safetensors`; makes the folder if it is missing."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        self.config.save_pretrained(str(folder))


def to_lora(
    model: PeftModel, adapter_name: str = "default", rank: int | None = None, dtype: torch.dtype | None = None
) -> LoraExport:
    """Turn an adapter into a LoRA checkpoint. The model is only read.

    Args:
        model: a PEFT model with an adapter of this package.
        adapter_name: which adapter.
        rank: the LoRA rank, from 1; None for the smallest rank that is exact for every layer.
        dtype: of the LoRA matrices; None for the adapter's own.

    Raises:
        CraftError: no such adapter, or not one of this package; a rank below 1, or above the exact one; trained tokens
            in a head with a bias, which PEFT computes without it.

    Cost:
        A layer: a QR decomposition of two thin matrices and, if the rank cuts, an SVD of one ``r x r`` matrix.

    Example:
        >>> from peft import get_peft_model
        >>> from torch import nn
        >>> from craft_peft import CraftConfig
        >>> base = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
        >>> model = get_peft_model(base, CraftConfig(target_modules=["0", "1", "2"], ranks=(1, 4, 3)))
        >>> export = to_lora(model)
        >>> export.config.r, export.total_error
        (3, 0.0)
    """
    layers = _adapted_layers(model, adapter_name)
    _refuse_biased_heads(model, adapter_name)
    with shared_work():
        factors = {key: _lora_factors(layer, adapter_name) for key, layer in layers.items()}
    exact = max(b.shape[1] for b, _ in factors.values())
    rank = exact if rank is None else rank
    if not 1 <= rank <= exact:
        raise CraftError(f"rank={rank} is outside 1..{exact}; rank {exact} is exact already.")
    saved = get_peft_model_state_dict(model, adapter_name=adapter_name)
    beside = saved.keys() - adapter_keys(saved, model, StackedLinear)
    tensors = {
        key: saved[key].detach().clone().contiguous() for key in sorted(beside)
    }  # a bias and a head may be one tensor
    lost, energy, errors = 0.0, 0.0, {}
    for key, (b, a) in factors.items():
        b, a, cut, norm = _truncate(b, a, rank)
        errors[key] = (cut / norm) ** 0.5 if norm > 0 else 0.0
        lost, energy = lost + cut, energy + norm
        tensors[f"{ROOT}{key}.lora_A.weight"] = a.to(dtype or a.dtype).contiguous()
        tensors[f"{ROOT}{key}.lora_B.weight"] = b.to(dtype or b.dtype).contiguous()
    config = _lora_config(model, adapter_name, rank, layers)
    return LoraExport(config, tensors, errors, (lost / energy) ** 0.5 if energy > 0 else 0.0)


def _adapted_layers(model: PeftModel, adapter_name: str) -> dict[str, StackedLinear]:
    if adapter_name not in model.peft_config:
        raise CraftError(f"There is no adapter '{adapter_name}'. The model has {', '.join(model.peft_config)}.")
    layers = {
        key: module
        for key, module in model.get_base_model().named_modules()
        if isinstance(module, StackedLinear) and adapter_name in module.slots
    }
    if not layers:
        raise CraftError(
            f"The adapter '{adapter_name}' is a {model.peft_config[adapter_name].peft_type} adapter, not one of "
            "craft_peft; there is nothing to export."
        )
    return layers


def _refuse_biased_heads(model: PeftModel, adapter_name: str) -> None:
    heads = biased_heads(model.get_base_model()) if model.peft_config[adapter_name].trainable_token_indices else []
    if heads:
        raise CraftError(
            f"The adapter '{adapter_name}' trains tokens in '{heads[0]}', which has a bias. PEFT leaves the bias "
            "of such a head out, so that the LoRA would give other outputs than the adapter. Merge the adapter into "
            "the model instead (`merge_and_unload`)."
        )


@torch.no_grad()
def _lora_factors(layer: StackedLinear, adapter_name: str) -> tuple[Tensor, Tensor]:
    slot = layer.slots[adapter_name]
    return slot.adapter.thin_factors(slot.layer)


def _truncate(b: Tensor, a: Tensor, rank: int) -> tuple[Tensor, Tensor, float, float]:
    """`b @ a` at exactly `rank` columns: padded with zeros, or the best fit; and the squared norms cut and in all."""
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().T)
    left, values, right = torch.linalg.svd(r_b @ r_a.T)
    norm = values.square().sum().item()
    if rank >= b.shape[1]:
        missing = rank - b.shape[1]
        return nn.functional.pad(b, (0, missing)), nn.functional.pad(a, (0, 0, 0, missing)), 0.0, norm
    root = values[:rank].sqrt()
    cut = values[rank:].square().sum().item()
    return (
        (q_b @ left[:, :rank] * root).to(b.dtype),
        (root[:, None] * right[:rank] @ q_a.T).to(a.dtype),
        cut,
        norm,
    )


def _lora_config(model: PeftModel, adapter_name: str, rank: int, layers: dict[str, StackedLinear]) -> LoraConfig:
    config = model.peft_config[adapter_name]
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=_target_names(model, layers),
        lora_dropout=config.dropout,
        fan_in_fan_out=any(isinstance(layer.get_base_layer(), Conv1D) for layer in layers.values()),
        bias="lora_only" if config.bias.endswith("_only") else config.bias,
        modules_to_save=config.modules_to_save,
        trainable_token_indices=config.trainable_token_indices,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
    )


def _target_names(model: PeftModel, layers: dict[str, StackedLinear]) -> list[str] | str:
    """The projections' short names, which serving engines expect; where they would match more, paths or a pattern."""
    paths = [path for path, _ in model.get_base_model().named_modules()]
    for names in sorted({key.rpartition(".")[2] for key in layers}), sorted(layers):
        if {path for path in paths if f".{path}".endswith(tuple(f".{name}" for name in names))} == set(layers):
            return names
    return "|".join(map(re.escape, sorted(layers)))
