"""Adapters as folders: loading one from somebody else, and saving one so that no reader ever meets half of it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..errors import CraftError
from ..weights import as_bits
from .adapter_files import read_config, read_tensors
from .folders import written_at_once
from .tensor_names import adapter_keys, current_names

_FAILURES = (ValueError, RuntimeError, TypeError, LookupError, AttributeError, ImportError, re.error)
"""What PEFT raises about configs and tensors that make no sense to it."""


def load_adapter(
    base_model: nn.Module, folder: str | Path, adapter_name: str = "default", *, is_trainable: bool = False
) -> PeftModel:
    """Load a saved adapter that may come from anybody: check first, load then, and change nothing if it fails.

    What `peft.PeftModel.from_pretrained` does, for a local folder, after these checks: only the two files of the
    adapter are read, and only in that folder; no file can run code; every field of the config has its type and range;
    the tensors are those that the config asks for on this base model, by name, shape and kind, are finite, and have the
    checksum that the config was saved with. Nothing is allocated for an adapter before its tensors fit.

    Args:
        base_model: the pretrained model, or a `peft.PeftModel` that gets one adapter more.
        folder: what `save_pretrained` wrote.
        adapter_name: the name it gets in the model. It becomes the active one on a fresh base model only.
        is_trainable: whether to train it further; otherwise it is frozen and the model in evaluation mode.

    Returns:
        The model with the adapter: a new one, or the `peft.PeftModel` that was given.

    Raises:
        CraftError: anything that is wrong with the folder, or that does not fit the base model, which is then as it was
            before, bit for bit.

    Cost:
        Beside the base model, memory for the file twice.

    Example:
        >>> import copy, tempfile
        >>> from peft import get_peft_model
        >>> from torch import nn
        >>> from craft_peft import CraftConfig, load_adapter, save_adapter
        >>> base = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
        >>> model = get_peft_model(copy.deepcopy(base), CraftConfig(target_modules=["0", "1", "2"], ranks=(1, 4, 3)))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_adapter(model, f"{folder}/mine")
        ...     load_adapter(base, f"{folder}/mine").active_adapter
        'default'
    """
    folder = Path(folder)
    config = read_config(folder)
    tensors = current_names(read_tensors(folder, config), base_model)
    if isinstance(base_model, PeftModel) and adapter_name in base_model.peft_config:
        raise CraftError(f"There is an adapter '{adapter_name}' already. Give this one another name.")
    config.inference_mode = not is_trainable
    with _unchanged_on_failure(base_model):
        try:
            try:
                with _unchanged_on_failure(base_model):
                    model, empty = _with_adapter(base_model, config, adapter_name, empty=True), True
            except RuntimeError:  # a start that PEFT computes from the weights, as PiSSA's
                model, empty = _with_adapter(base_model, config, adapter_name, empty=False), False
            wanted = _expected(model, adapter_name, tensors)
            tensors = {name: _as_in(wanted.get(name), tensor) for name, tensor in tensors.items()}
            _check_fit(wanted, tensors)
            set_peft_model_state_dict(model, tensors, adapter_name, low_cpu_mem_usage=empty)
            _check_filled(model, adapter_name)
        except CraftError as error:
            raise CraftError(f"The adapter in {folder} does not fit this base model. {error}") from error
        except _FAILURES as error:
            line = str(error).strip().partition("\n")[0]
            raise CraftError(f"The adapter in {folder} does not fit this base model: {line}") from error
    if is_trainable:
        model.set_requires_grad(adapter_name)
        return model
    return model.eval()


def save_adapter(model: PeftModel, folder: str | Path, adapter_name: str = "default") -> None:
    """Save an adapter as `save_pretrained` does, all at once: a reader finds the old folder or the new one.

    It is written beside the folder and then takes its place in one step, so that a killed process or a full disk leaves
    the old folder as it was. The config holds the checksum of the tensors.

    Args:
        model: holds the adapter.
        folder: new, or an adapter that is replaced; files that an adapter does not have are carried over.
        adapter_name: which adapter.

    Raises:
        CraftError: no such adapter; the folder is a file.
    """
    folder = Path(folder)
    if adapter_name not in model.peft_config:
        raise CraftError(f"There is no adapter '{adapter_name}'. The model has {', '.join(model.peft_config)}.")
    with written_at_once(folder) as staged:
        model.save_pretrained(staged, selected_adapters=[adapter_name])
        if adapter_name != "default":  # PEFT puts it into a folder of its name
            for file in (staged / adapter_name).iterdir():
                os.replace(file, staged / file.name)
            (staged / adapter_name).rmdir()


def _with_adapter(base_model: nn.Module, config: PeftConfig, adapter_name: str, *, empty: bool) -> PeftModel:
    """The model with a new adapter; an empty one has its tensors on the meta device, where they take no memory."""
    if isinstance(base_model, PeftModel):
        base_model.add_adapter(adapter_name, config, low_cpu_mem_usage=empty)
        return base_model
    kind = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel)
    return kind(base_model, config, adapter_name=adapter_name, low_cpu_mem_usage=empty)


def _expected(model: PeftModel, adapter_name: str, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What an adapter has in a file, with the embeddings if they are there: PEFT saves them if they have changed."""
    expected = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    if not found.keys() <= expected.keys() and hasattr(model.get_base_model(), "get_input_embeddings"):
        more = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=True)
        return more if found.keys() <= more.keys() else expected
    return expected


def _as_in(place: Tensor | None, tensor: Tensor) -> Tensor:
    """A saved tensor in the dtype of its place: an empty place takes it as it is, where a filled one would cast it."""
    if place is None or not tensor.is_floating_point():
        return tensor
    if place.dtype == torch.int32:  # a fingerprint, which version 0.1.0 saved as numbers
        return as_bits(tensor)
    return tensor.to(place.dtype) if place.is_floating_point() else tensor


def _check_fit(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    for names, what in ((missing, "It lacks"), (extra, "Its config does not ask for")):
        if names:
            listed = ", ".join(f"'{name}'" for name in names[:3]) + (f" and {len(names) - 3} more" * (len(names) > 3))
            raise CraftError(f"{what} the tensor{'s' * (len(names) > 1)} {listed}.")
    for name, tensor in found.items():
        wanted = expected[name]
        if tensor.shape != wanted.shape or tensor.is_floating_point() != wanted.is_floating_point():
            raise CraftError(
                f"The tensor '{name}' is {tuple(tensor.shape)} of {tensor.dtype}; the config and the base model ask "
                f"for {tuple(wanted.shape)} of {wanted.dtype}."
            )


def _check_filled(model: nn.Module, adapter_name: str) -> None:
    empty = [name for name, tensor in model.named_parameters() if tensor.is_meta]
    for name in adapter_keys(empty, model, (BaseTunerLayer, AuxiliaryTrainingWrapper), [adapter_name]):
        raise CraftError(f"The file has nothing for '{name}'.")


@contextmanager
def _unchanged_on_failure(model: nn.Module) -> Iterator[None]:
    """Within it an error takes back every change of modules, hooks, attributes and of what is trained."""
    before = [(module, _parts(module)) for module in model.modules()]
    # The numbers too: PiSSA puts others in their place.
    held = [(parameter, parameter.requires_grad, parameter.data) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for module, parts in before:
            module.__dict__.clear()
            module.__dict__.update(parts)
        for parameter, was_trained, numbers in held:
            parameter.data = numbers
            parameter.requires_grad_(was_trained)
        raise


def _parts(module: nn.Module) -> dict[str, object]:
    """The attributes of a module, with copies of the containers in which it keeps others."""
    return {name: value.copy() if isinstance(value, dict) else value for name, value in module.__dict__.items()}
