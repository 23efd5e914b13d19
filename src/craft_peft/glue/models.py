"""What of a base model is trained, the adapter on top of it, and trained runs read back."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import CraftError
from ..plugin.loading import load_adapter
from .pretrained import (
    first_line,
    head_modules,
    keys_within,
    lacked_keys,
    load_base,
    new_modules,
    quiet_transformers,
    shown,
)
from .runs import RunFolder
from .tasks import Task

PRECISIONS = ("auto", "float32", "bf16")
PEFT_HEADS = ("classifier", "score")
SAVED = "base_model.model."
"""Stands before the name of a tensor of the base model in PEFT's files."""
# Below this width bfloat16 products were no faster than float32 on a processor that has them (measured at 384 and
# 768), so that "auto" keeps the exact type there.
BF16_WIDTH = 768


@dataclass(frozen=True)
class TrainedModel:
    """A finished run in memory.

    Args:
        model: The model with its adapter and head, in evaluation mode.
        tokenizer: The tokenizer it was trained with.
        task: What it predicts, with the label names.
        settings: The resolved settings of the run.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    task: Task
    settings: dict[str, Any]


def adapt(model: PreTrainedModel, config: PeftConfig | None, trains_base: bool) -> nn.Module:
    """Decides what of a model is trained, and adds the adapter if there is one.

    Args:
        model: The base model with its head.
        config: The adapter's config, or None for no adapter.
        trains_base: Without an adapter: whether the pretrained weights are trained too.

    Returns:
        The model to train; the head and what the checkpoint did not hold are always trained, and saved with the
        adapter.

    Raises:
        CraftError: The config does not fit the model.
    """
    if config is None:
        model.base_model.requires_grad_(trains_base)
        for path in new_modules(model):
            model.get_submodule(path).requires_grad_(True)
        return model
    # PEFT knows heads by two names only; a model with more of a head (DistilBERT's `pre_classifier`), or with a pooler
    # that its checkpoint lacked, would keep its new layers random and unsaved.
    new = [*new_modules(model), *head_modules(model)]
    config.modules_to_save = [name for name in new if name not in PEFT_HEADS] or None
    return add_adapter(model, config)


def add_adapter(model: nn.Module, config: PeftConfig) -> PeftModel:
    """PEFT's `get_peft_model`, quietly, with errors that say what does not fit.

    Args:
        model: A model with the target modules that the config names.
        config: The adapter's config.

    Returns:
        The model with its adapter.

    Raises:
        CraftError: The config does not fit the model.
    """
    try:
        with quiet_transformers():
            return get_peft_model(model, config)
    except CraftError:
        raise
    except (ValueError, TypeError) as error:
        targets = config.target_modules
        shown = sorted(targets) if isinstance(targets, set) else targets
        raise CraftError(
            f"An adapter with target modules {shown} does not fit the model: {first_line(error)}"
        ) from error


def load_trained(folder: str | Path, model: str | None = None) -> TrainedModel:
    """Reads a finished run: an adapter folder with its base, or a folder with a whole model.

    Args:
        folder: The output folder of a training run.
        model: The base model, when it is no longer where it was at training.

    Returns:
        The model, its tokenizer and its task.

    Raises:
        CraftError: Not a finished run, its base cannot be read, or neither holds all that the run computed with.
    """
    run = RunFolder(Path(folder))
    metadata = run.read_finished()
    task = Task.restore(metadata["task"])
    if not (run.path / "adapter_config.json").is_file():
        trained, tokenizer = load_base(str(run.path), task)
        _require_held(trained, (), run)
        return TrainedModel(trained.eval(), tokenizer, task, metadata["settings"])
    base, _ = load_base(model or metadata["settings"]["model"], task)
    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(run.path)
        adapted = load_adapter(base, run.path)
    _require_held(base, _saved_tensors(run), run)
    base.config.pad_token_id = tokenizer.pad_token_id
    return TrainedModel(adapted, tokenizer, task, metadata["settings"])


def choose_precision(wish: str, width: int) -> str:
    """Decides between float32 and bfloat16.

    Args:
        wish: "float32", "bf16", or "auto": bfloat16 on a GPU that has it, and on a processor that has it in hardware
            when the model is at least 768 wide (below, it was measured to be no faster).
        width: The model's hidden size.

    Returns:
        "float32" or "bf16".

    Raises:
        CraftError: "bf16" on a machine without it.

    Example:
        >>> from craft_peft.glue.models import choose_precision
        >>> choose_precision("float32", 1024)
        'float32'
    """
    if wish not in PRECISIONS:
        raise CraftError(f"Unknown precision `{wish}`. Use one of {', '.join(PRECISIONS)}.")
    if wish == "bf16" and not has_bf16():
        raise CraftError(
            "precision `bf16` was asked for, but this processor (or GPU) has no bfloat16 arithmetic, and emulating it "
            "is slow. Use `auto` or `float32`."
        )
    wide_enough = torch.cuda.is_available() or width >= BF16_WIDTH
    return "bf16" if wish == "bf16" or (wish == "auto" and wide_enough and has_bf16()) else "float32"


def has_bf16() -> bool:
    """Whether the device that will be used has bfloat16 arithmetic in hardware."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Private names of PyTorch, absent in some versions; without them the answer is no, which is always safe.
    checks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(check() for check in checks if check is not None)


def start_from_run(model: nn.Module, folder: str | Path, method: str, base: str) -> None:
    """Gives a model the adapter of a finished run, or its whole encoder, and leaves the head as it is.

    Args:
        model: As `adapt` returned it.
        folder: The run: of the same method, at the same ranks, on the same base.
        method: The method that is trained now.
        base: The base model's resolved name.

    Raises:
        CraftError: Not a finished run, one of another method, base or shape, or one that lacks what it computed with.
    """
    run = RunFolder(Path(folder))
    settings = run.read_finished()["settings"]
    if (settings["method"], settings["model"]) != (method, base):
        raise CraftError(
            f"The run in {run.path} trained {settings['method']} on {settings['model']}, which cannot be the start of "
            f"{method} on {base}. Start from a run of the same method on the same model."
        )
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    prefix = SAVED if isinstance(model, PeftModel) else ""
    tensors = _saved_tensors(run)
    _require_held(inner, tensors, run)
    heads = keys_within(tensors, [prefix + name for name in head_modules(inner)])
    saved = {name: tensor for name, tensor in tensors.items() if name not in heads}
    try:
        if isinstance(model, PeftModel):
            # PEFT wants the head too: it gets the one that the model has.
            set_peft_model_state_dict(model, {**get_peft_model_state_dict(model), **saved})
        else:
            model.load_state_dict(saved, strict=False)
    except (ValueError, RuntimeError) as error:
        raise CraftError(
            f"The weights of the run in {run.path} do not fit: {first_line(error)} Start from a run with the same "
            "ranks and target modules."
        ) from error


def _saved_tensors(run: RunFolder) -> dict[str, Tensor]:
    files = sorted(run.path.glob("*.safetensors"))
    try:
        return {name: tensor for file in files for name, tensor in load_file(file).items()}
    except (OSError, SafetensorError) as error:
        raise CraftError(
            f"The weights of the run in {run.path} are damaged: {first_line(error)} Train it again."
        ) from error


def _require_held(model: PreTrainedModel, saved: Collection[str], run: RunFolder) -> None:
    """Refuses what would be drawn at random where a finished run computed with something else."""
    lost = sorted(lacked_keys(model) - {name.removeprefix(SAVED) for name in saved})
    if lost:
        raise CraftError(
            f"The run in {run.path} computed with {shown(lost)}, which are neither in its folder nor in its base "
            "model and would be drawn at random now. Version 0.1.0 did not keep what it had drawn inside an encoder. "
            "Train the run again; it is kept now."
        )
