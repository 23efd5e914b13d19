"""Which linear modules of a model an adapter changes, found without the model's weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import TaskType
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PreTrainedModel

from ..errors import CraftError
from ..plugin.config import StackConfig
from ..plugin.stacks import Stack, collect_stacks
from ..plugin.targets import find_targets, set_default_targets
from .pretrained import quiet_transformers, resolve_model_name


@dataclass(frozen=True)
class Targets:
    """The linear modules that an adapter changes; their sizes decide what a setting of a method costs.

    Args:
        names: What `target_modules` became: names, or a regular expression.
        modules: Path and module of each, in the model's order; their numbers are never read.
        shapes: The sizes ``(d_out, d_in)`` of each weight.
    """

    names: set[str] | str
    modules: tuple[tuple[str, nn.Module], ...]
    shapes: tuple[tuple[int, int], ...]

    @property
    def smallest_side(self) -> int:
        """The smallest size of any weight: a matrix of rank above it is of no higher rank."""
        return min(min(shape) for shape in self.shapes)

    @property
    def stacks(self) -> list[Stack]:
        """The modules of each projection over the layers, for methods whose layers share something.

        Raises:
            CraftError: Targets that cannot be stacked.
        """
        return collect_stacks(self.modules)

    def skeleton(self) -> nn.Module:
        """A model that holds these modules alone, under their paths: adding an adapter to it costs next to nothing."""
        root = nn.Module()
        for path, module in self.modules:
            *parents, name = path.split(".")
            parent = root
            for part in parents:
                if not hasattr(parent, part):
                    parent.add_module(part, nn.Module())
                parent = getattr(parent, part)
            parent.add_module(name, copy.deepcopy(module).to("meta"))
        return root


def empty_model(name: str, outputs: int | None = None) -> PreTrainedModel:
    """Makes a model from its config alone, on the meta device: all modules, no numbers, no download of weights.

    Args:
        name: Name on the Hub, or a folder that holds a `config.json`.
        outputs: Width of the head; None leaves it to the config.

    Returns:
        The model, with a classification head where its type has one.

    Raises:
        CraftError: No such folder or name, or a config of no known model type.
    """
    source = resolve_model_name(name)
    try:
        with quiet_transformers(), torch.device("meta"):
            config = AutoConfig.from_pretrained(source, **({} if outputs is None else {"num_labels": outputs}))
            try:
                return AutoModelForSequenceClassification.from_config(config)
            except ValueError:
                return AutoModel.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CraftError(
            f"Could not read a model's config from `{name}`: {reason} Give a folder that holds config.json, or a name "
            "on the Hub."
        ) from error


def find_model_targets(model: nn.Module, target_modules: Sequence[str] | str | None = None) -> Targets:
    """Finds the modules to adapt in a model; the same ones whatever the method.

    Args:
        model: The model, as `empty_model` makes it.
        target_modules: Names, as in every PEFT config; None for query and value under their names in this model type.

    Returns:
        The modules.

    Raises:
        CraftError: Nothing matches, a target that is not linear, or a model type without defaults.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32)
        >>> with torch.device("meta"):
        ...     model = BertModel(config)
        >>> targets = find_model_targets(model)
        >>> sorted(targets.names), [stack.shape.layers for stack in targets.stacks], targets.smallest_side
        (['query', 'value'], [3, 3], 16)
    """
    names = target_modules if isinstance(target_modules, str) or target_modules is None else list(target_modules)
    # As on the command line, where every choice is a list of names.
    names = names[0] if names == ["all-linear"] else names
    config = StackConfig(task_type=TaskType.SEQ_CLS, target_modules=names)
    set_default_targets(config, model)
    modules = tuple(find_targets(config, model))
    assert config.target_modules is not None
    found = config.target_modules if isinstance(config.target_modules, str) else set(config.target_modules)
    return Targets(found, modules, tuple(collect_stacks([target])[0].shape.matrix for target in modules))
