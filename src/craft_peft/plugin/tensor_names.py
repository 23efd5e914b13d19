"""Which tensors are an adapter's: told by the modules that hold them, not by pieces of their names.

A base model may have a module called `craft_block`, and an adapter may be called "0" as a layer is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import CraftError

ROOTS = ("base_model.model.", "base_model.")
"""What PEFT puts before the paths of modules in a saved adapter."""

DEEPEST = 2
"""How far below a module of the base model an adapter has its tensors, as in `query.lora_A.weight`."""

WRAPPERS = re.compile(r"\b(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
"""What FSDP 1, activation checkpoints and `torch.compile` put into the paths of modules, and some into state dicts."""


def container_names(prefix: str) -> tuple[str, str]:
    """What an adapted layer calls its places in stacks, and the adapters that it owns, by a method's prefix."""
    return f"{prefix}slots", f"{prefix}adapters"


def adapter_keys(
    keys: Iterable[str],
    model: nn.Module,
    layer_class: type[nn.Module] | tuple[type[nn.Module], ...],
    adapter_names: Collection[str] = ("",),
) -> set[str]:
    """Those keys of a state dict under which the adapted layers of a model hold what is theirs.

    Args:
        keys: of a state dict of the model, with or without the names of adapters.
        model: the model.
        layer_class: of the adapted layers, or of other modules of PEFT that hold adapters.
        adapter_names: only those of these adapters; the keys have their names in them then.
    """
    owners = {
        WRAPPERS.sub("", f"{path}.{own}.{name}").strip(".")
        for path, module in model.named_modules()
        if isinstance(module, layer_class)
        for own in module.adapter_layer_names
        for name in adapter_names
    }
    return {key for key in keys if not owners.isdisjoint(_ancestors(WRAPPERS.sub("", key)))}


def saved_modules(keys: Iterable[str], prefix: str, paths: Iterable[str]) -> set[str]:
    """Those modules, among these paths, that a saved adapter has tensors for, by its keys and its method's prefix."""
    owners = {f"{path}.{own}": path for path in paths for own in container_names(prefix)}
    return {owners[part] for key in keys for part in _ancestors(key) if part in owners}


def without_adapter_name(key: str, adapter_name: str, prefix: str) -> str:
    """The key of a state dict as a saved adapter has it.

    Example:
        >>> without_adapter_name("layer.0.query.craft_slots.0.index", "0", "craft_")
        'layer.0.query.craft_slots.index'
    """
    own = "|".join(map(re.escape, container_names(prefix)))
    return re.sub(rf"^(.*\.(?:{own}))\.{re.escape(adapter_name)}(?=\.|$)", r"\1", key)


def put_back(state_dict: dict[str, Tensor], model: nn.Module, others: Collection[str]) -> None:
    """Put back what PEFT has taken out of a state dict with other adapters since it has their names in its path.

    Args:
        state_dict: of a model, without all keys that have the name of one of the other adapters in them, which are
            those of the layers `layer.0` as well for an adapter called "0". Gets what is not theirs.
        model: the model.
        others: names of the other adapters.

    Raises:
        CraftError: the tensors are not the model's own, so that they cannot be put back.
    """
    own, names = model.state_dict(), [f".{name}." for name in others]
    taken = [key for key in own if key not in state_dict and any(name in f"{key}." for name in names)]
    lost = set(taken) - adapter_keys(taken, model, (BaseTunerLayer, AuxiliaryTrainingWrapper), others)
    if lost and any(own[key].data_ptr() != state_dict[key].data_ptr() for key in own.keys() & state_dict.keys()):
        raise CraftError(
            f"'{min(lost)}' has the name of another adapter in it, so that PEFT leaves it out of the tensors to save. "
            f"The other adapters are called {', '.join(map(repr, others))}; load them under names that no module has."
        )
    state_dict.update({key: own[key] for key in own if key in lost})


def current_names(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A saved adapter's tensors under the paths that transformers gives their modules by now.

    Transformers moves modules between versions, such as the language model in Llava, and keeps rules by which it reads
    older checkpoints. A key is renamed by them where that leads further into the model.

    Args:
        state_dict: of a saved adapter.
        model: the base model, adapted or not.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    paths = {WRAPPERS.sub("", path) for path, _ in base.named_modules()}
    names = {key: key.removeprefix(next((root for root in ROOTS if key.startswith(root)), "")) for key in state_dict}
    if all(_beyond(name, paths) <= DEEPEST for name in names.values()):
        return dict(state_dict)
    rename = _renaming_rules(base)
    found = {}
    for key, name in names.items():
        new = rename(name)
        nearer = _beyond(new, paths) < _beyond(name, paths)
        found[key.removesuffix(name) + new if nearer else key] = state_dict[key]
    return found


def _renaming_rules(base: nn.Module) -> Callable[[str], str]:
    if not any(isinstance(module, PreTrainedModel) for module in base.modules()):
        return lambda key: key
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:  # transformers 4
        rules = getattr(base, "_checkpoint_conversion_mapping", {})
        return lambda key: next((re.sub(old, new, key) for old, new in rules.items() if re.search(old, key)), key)
    renamings = [rule for rule in get_model_conversion_mapping(base) if isinstance(rule, WeightRenaming)]
    return lambda key: rename_source_key(key, renamings, [])[0]


def _beyond(key: str, paths: Collection[str]) -> int:
    """How many parts of a key come after the longest path of a module that it begins with."""
    found = next((part for part in _ancestors(key) if part in paths), None)
    return key.count(".") + DEEPEST if found is None else key.count(".") - found.count(".")


def refuse_names_that_hold(prefix: str, model: nn.Module) -> None:
    """Refuse a base model with a method's prefix in the path of a module, where PEFT goes by that.

    Raises:
        CraftError: peft 0.20 and such a module.
    """
    if hasattr(BaseTuner, "_get_adapter_state_dict"):
        return
    inside = [path for path, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    for name, _ in model.named_parameters():
        if prefix in name and not name.startswith(tuple(f"{path}." for path in inside)):
            raise CraftError(
                f"The base model's '{name}' has '{prefix}' in its name, by which peft 0.20 takes it for a part of the "
                "adapter. Install peft 0.21 or later, or rename the module."
            )


def _ancestors(key: str) -> Iterator[str]:
    while key:
        yield key
        key = key.rpartition(".")[0]
