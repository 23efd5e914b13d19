"""What an `AdapterBank` reads and writes: saved adapters, checked against the model's stacks, sorted by them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import cast

import torch
from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME, AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from safetensors.torch import save_file
from torch import Tensor, nn

from ..adapters.base import FrozenBasesAdapter, StackAdapter
from ..errors import CraftError
from .adapter_files import read_config, read_tensors
from .config import StackConfig
from .folders import written_at_once
from .layer import StackedLinear
from .shelf import StackShelf

ROOT = "base_model.model."
"""What PEFT puts before the paths of modules in a saved adapter."""

Heads = dict[str, dict[str, Tensor]]
"""By path of a saved module its tensors."""

Trained = tuple[dict[str, Tensor], float]
"""The trained tensors of an adapter in one stack, and its scaling."""


def collect_shelves(model: nn.Module, adapter_name: str, *, keep_middles: bool) -> list[StackShelf]:
    """An empty shelf for every stack of an adapter.

    Args:
        model: the base model with adapted layers.
        adapter_name: of the adapter.
        keep_middles: see `StackShelf`.

    Raises:
        CraftError: there is no such adapter, or its bases are not frozen.
    """
    stacks: dict[FrozenBasesAdapter, list[tuple[str, StackedLinear]]] = {}
    for path, module in model.named_modules():
        if isinstance(module, StackedLinear) and adapter_name in module.slots:
            adapter = module.slots[adapter_name].adapter
            if not isinstance(adapter, FrozenBasesAdapter):
                raise CraftError(
                    f"A bank holds adapters on common, frozen bases. Those of adapter '{adapter_name}' "
                    f"({type(adapter).__name__}) are trained, or it has none: load such adapters into the model itself "
                    "(`model.load_adapter`)."
                )
            adapter.make_ready()
            stacks.setdefault(adapter, []).append((path, module))
    if not stacks:
        raise CraftError(f"The model has no adapter '{adapter_name}' whose bases a bank could use.")
    shelves = []
    for adapter, members in stacks.items():
        paths, layers = zip(*members, strict=True)
        shelves.append(StackShelf(paths, layers, adapter, keep_middles=keep_middles))
    return shelves


def read_adapter(folder: str | Path) -> tuple[PeftConfig, dict[str, Tensor]]:
    """Config and tensors of a saved adapter.

    Raises:
        CraftError: there is none, or it is not whole; see `craft_peft.plugin.adapter_files`.
    """
    config = read_config(Path(folder))
    return config, read_tensors(Path(folder), config)


def live_state(
    model: nn.Module, wrappers: Mapping[str, tuple[AuxiliaryTrainingWrapper, bool]], adapter_name: str
) -> dict[str, Tensor]:
    """What PEFT would save of an adapter of a model, without its walk over all tensors of the base."""
    state: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if isinstance(module, StackedLinear) and adapter_name in module.owned:
            adapter = module.owned[adapter_name]
            adapter.make_ready()
            prefix = f"{ROOT}{path}.{module.adapter_layer_names[1]}."
            state |= {prefix + name: tensor for name, tensor in adapter.state_dict().items()}
    for path, (wrapper, _) in wrappers.items():
        if isinstance(wrapper, ModulesToSaveWrapper) and adapter_name in wrapper.modules_to_save:
            head = wrapper.modules_to_save[adapter_name].state_dict()
            state |= {f"{ROOT}{path}.{name}": tensor for name, tensor in head.items()}
    return state


def write_adapter(folder: str | Path, config: StackConfig, state: Mapping[str, Tensor]) -> None:
    """Write an adapter as PEFT does, all at once."""
    config = copy(config)
    config.inference_mode = True
    with written_at_once(Path(folder)) as staged:
        save_file(dict(state), staged / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        config.save_pretrained(str(staged))


def adapter_state(shelves: Sequence[StackShelf], place: int, heads: Heads, config: StackConfig) -> dict[str, Tensor]:
    """The tensors that PEFT would save of the adapter at a place of the shelves."""
    state = {f"{ROOT}{path}.{name}": tensor for path, head in heads.items() for name, tensor in head.items()}
    for shelf in shelves:
        asked_for = dict(_sibling(shelf, config).named_parameters())  # a shelf has zeros for what others train
        own = {name: tensor for name, tensor in shelf.take(place).items() if name in asked_for}
        own["fingerprint"] = cast(Tensor, shelf.bases.fingerprint)
        if config.saves_what_it_derived:
            own |= shelf.bases.bases
            state |= {_index_key(shelf, layer): torch.tensor(layer) for layer in range(len(shelf.paths))}
        state |= {_prefix(shelf) + name: tensor for name, tensor in own.items()}
    return {key: tensor.detach().clone().contiguous() for key, tensor in state.items()}


def sort_state(
    shelves: Sequence[StackShelf],
    wrappers: Mapping[str, tuple[AuxiliaryTrainingWrapper, bool]],
    config: PeftConfig,
    state: Mapping[str, Tensor],
) -> tuple[list[Trained], Heads]:
    """What a saved adapter has for each shelf, and its heads.

    Args:
        shelves: the stacks of the bank.
        wrappers: the model's places for saved modules, by path.
        config: of the adapter.
        state: its tensors, under the names that they have in a file.

    Raises:
        CraftError: it is of another method, has other stacks, ranks, bases or tying, or holds what a bank does not.
    """
    _check_config(config)
    left = dict(state)
    trained = [_take_trained(shelf, cast(StackConfig, config), left) for shelf in shelves]
    heads = {}
    for path, (wrapper, _) in wrappers.items():
        head = _take(left, f"{ROOT}{path}.")
        if head and isinstance(wrapper, ModulesToSaveWrapper):
            heads[path] = _checked_head(path, head, wrapper.original_module.state_dict())
    for key in left:
        if any(f".{own}." in key for own in shelves[0].layers[0].adapter_layer_names):
            raise CraftError(
                f"It has '{key}', of a module that the model's adapter does not have. A bank's adapters all have the "
                "same target modules: make another model and bank for those with others."
            )
        raise CraftError(
            f"It has '{key}', and the model has no place for that. Make the model with the same `modules_to_save` and "
            "task type, for example with `PeftModel.from_pretrained` from this adapter."
        )
    return trained, heads


def check_beside_bank(configs: Mapping[str, PeftConfig]) -> None:
    """Refuse adapters of a model itself with biases or tokens, which all rows would get, those of a bank too.

    Args:
        configs: by adapter name.

    Raises:
        CraftError: there is one, of a model that has a bank or is about to get one.
    """
    for name, config in configs.items():
        try:
            _check_config(config)
        except CraftError as error:
            raise CraftError(f"The model's adapter '{name}' cannot be beside a bank. {error}") from None


def _check_config(config: PeftConfig) -> None:
    if not isinstance(config, StackConfig):
        raise CraftError(f"It is a {config.peft_type.value} adapter. Load it into a model of its own.")
    if config.bias != "none" or config.trainable_token_indices:
        raise CraftError(
            f"It was trained with bias={config.bias!r}, trainable_token_indices={config.trainable_token_indices!r}. A "
            "bank holds adapters and `modules_to_save`; load this one into the model itself (`model.load_adapter`), "
            "a model that has no bank."
        )


def _sibling(shelf: StackShelf, config: StackConfig) -> StackAdapter:
    """What a config asks for on a shelf's stack: names and shapes, without numbers."""
    config = copy(config)
    config.init_weights = True  # draws nothing
    with torch.device("meta"):
        return config.build_adapter(shelf.paths[0], shelf.bases.shape, config.ranks_of(shelf.paths[0]))


def _take_trained(shelf: StackShelf, config: StackConfig, left: dict[str, Tensor]) -> Trained:
    path, bases = shelf.paths[0], shelf.bases
    saved = _take(left, _prefix(shelf))
    if not saved:
        raise CraftError(
            f"It has no adapter for the stack that begins with '{path}'. A bank's adapters all have the same target "
            "modules: make another model and bank for those with others."
        )
    sibling = _sibling(shelf, config)
    sizes = {name: tensor.shape for name, tensor in bases.bases.items()}
    if not isinstance(sibling, FrozenBasesAdapter) or sizes != {n: t.shape for n, t in sibling.bases.items()}:
        raise CraftError(
            f"In the stack that begins with '{path}' it is a {sibling}, and the bank holds {bases}. Adapters share a "
            "bank if they are of one method and have the same ranks: make another model and bank for the others."
        )
    try:
        bases.check_same_bases(saved["fingerprint"])
    except CraftError as error:
        raise CraftError(
            f"{error} (Seen in the stack that begins with '{path}'.) Adapters share a bank if they were trained on the "
            "same base weights, with the same decomposition: make another model and bank for the others."
        ) from None
    for layer in range(len(shelf.paths)):
        left.pop(_index_key(shelf, layer), None)
    shapes = {name: tensor.shape for name, tensor in sibling.trained().items()}
    if not shelf.keep_middles and shapes.keys() != shelf.tensors.keys():
        raise CraftError(
            f"It trains {', '.join(shapes)}, and the bank holds {', '.join(shelf.tensors)}: another `tying`. Make the "
            'bank with keep="middles", which takes every tying.'
        )
    return {
        name: saved.get(name, torch.zeros(shape)).to(bases.in_factor) for name, shape in shapes.items()
    }, sibling.scaling


def _checked_head(path: str, head: dict[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    shapes, wanted = ({name: tuple(t.shape) for name, t in tensors.items()} for tensors in (head, expected))
    if shapes != wanted:
        raise CraftError(
            f"Its saved module '{path}' has the tensors {shapes}, and the model's has {wanted}. Adapters share a bank "
            "if their heads have the same sizes (number of labels)."
        )
    return {name: tensor.detach().to(expected[name], copy=True) for name, tensor in head.items()}


def _take(left: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): left.pop(key) for key in list(left) if key.startswith(prefix)}


def _prefix(shelf: StackShelf) -> str:
    return f"{ROOT}{shelf.paths[0]}.{shelf.layers[0].adapter_layer_names[1]}."


def _index_key(shelf: StackShelf, layer: int) -> str:
    return f"{ROOT}{shelf.paths[layer]}.{shelf.layers[layer].adapter_layer_names[0]}.index"
