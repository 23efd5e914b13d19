"""Adapters that nobody would call, and weights with a second owner: refused or said where it can be known.

An adapted layer changes what the model computes only where the model calls it. Code that uses a layer's weight without
calling the layer passes the adapter by, in training too, while merging would change what it computes. Some of that can
be read off the modules before anything is replaced (`check_callers`); the rest shows in the first whole forward pass
(`watch_first_pass`).
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CraftError
from .layer import StackedLinear
from .stacks import path_pattern, say_once


def check_callers(model: nn.Module, targets: Iterable[tuple[str, nn.Module]]) -> None:
    """Refuse targets whose adapter would not be where they are used; say where a weight has another owner.

    Args:
        model: the base model, adapted or not.
        targets: path and linear module of every target.

    Raises:
        CraftError: a module in two places, of which PEFT would adapt one; the linear layers of a
            `torch.nn.TransformerEncoderLayer` whose fast path uses their weights without calling them.
    """
    places: dict[nn.Module, list[tuple[nn.Module, str]]] = defaultdict(list)
    owners: dict[Tensor | None, dict[str, nn.Module]] = defaultdict(dict)
    for path, module in model.named_modules():
        for name, child in module._modules.items():
            if child is not None:
                places[child].append((module, f"{path}.{name}".lstrip(".")))
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[parameter][path.removesuffix(".base_layer")] = module
    tied = set()
    for key, module in targets:
        names = [name for _, name in places[module]]
        if len(names) > 1:
            raise CraftError(
                f"The target module '{key}' is one module in {len(names)} places: {', '.join(map(repr, names))}. An "
                "adapter would be on one of them alone, while merging would change all. Leave it out with "
                "`exclude_modules`, or put copies (`copy.deepcopy`) in the other places."
            )
        for parent, _ in places[module]:
            _check_fast_path(key, parent)
        owning = owners.get(getattr(module, "weight", None), {})
        # A head on the weight of the embeddings is common; PEFT warns about it where it merges.
        if len(owning) > 1 and not any(isinstance(owner, nn.Embedding) for owner in owning.values()):
            tied.add(tuple(owning))
    for together in sorted(tied):
        say_once(
            f"The modules {', '.join(map(repr, together))} have one weight, and an adapter changes what one of them "
            "computes, not the weight: each of them goes its own way. Merging gives the merged module a weight of its "
            "own, so that they are tied no longer; unmerging ties them again."
        )


def _check_fast_path(key: str, parent: nn.Module) -> None:
    if (
        type(parent).forward is nn.TransformerEncoderLayer.forward
        and torch.backends.mha.get_fastpath_enabled()
        and parent.self_attn.batch_first
        and parent.activation_relu_or_gelu
    ):
        raise CraftError(
            f"The target module '{key}' lies in a torch.nn.TransformerEncoderLayer, which in evaluation uses its "
            "weights without calling it (torch's fast path), so that an adapter on it would be trained and then not "
            "used. Turn that off before you add or load the adapter, and wherever it is used: "
            "`torch.backends.mha.set_fastpath_enabled(False)`."
        )


def refuse_lost_adapters(model: nn.Module) -> None:
    """Refuse a model from which the layer that holds a stack's adapter was cut: it trains and saves nothing of it.

    Raises:
        CraftError: names a layer whose adapter is gone.
    """
    present = set(model.modules())
    for key, layer in model.named_modules():
        for name in layer.slots if isinstance(layer, StackedLinear) else ():
            if layer.slots[name].registered not in present:
                raise CraftError(
                    f"The adapter '{name}' of '{key}' is not in the model any more: the first layer of its stack, "
                    "which holds it for all, was taken out. Cut the base model first, then add or load the adapter."
                )


def watch_first_pass(model: nn.Module) -> None:
    """Warn after the next whole forward pass of a model of adapted layers that were passed by in it.

    That is where the module around a layer was called and the layer was not, nor any other of the same path but for
    the indices: experts that got no token, layers that were dropped and encoders that were not asked are no such case.
    """
    stop_watching(model)
    _FirstPass(model)


def stop_watching(model: nn.Module) -> None:
    """Undo `watch_first_pass`."""
    for hook in [*model._forward_pre_hooks.values(), *model._forward_hooks.values()]:
        watcher = getattr(hook, "__self__", None)
        if isinstance(watcher, _FirstPass):
            watcher.stop()


class _FirstPass:
    """What is called in the first whole forward pass of a model."""

    def __init__(self, model: nn.Module) -> None:
        self._called: set[nn.Module] = set()
        self._wait(model)

    def _wait(self, model: nn.Module) -> None:
        self._handles = [model.register_forward_pre_hook(self._begin)]

    def stop(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _begin(self, model: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        self.stop()
        seen = {module for pair in _layers_and_callers(model).values() for module in pair}
        self._handles = [module.register_forward_hook(self._see) for module in seen]
        self._handles.append(model.register_forward_hook(self._end, always_call=True))

    def _see(self, module: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            self._called.add(module)

    def _end(self, model: nn.Module, args: Any, output: Any) -> None:
        self.stop()
        if output is None:  # the pass was broken off: the next one tells
            self._wait(model)
            return
        found = _layers_and_callers(model)
        used = {path_pattern(key) for key, (layer, _) in found.items() if layer in self._called}
        passed_by: dict[str, int] = defaultdict(int)
        for key, (_, around) in found.items():
            if path_pattern(key) not in used and around in self._called:
                passed_by[path_pattern(key)] += 1
        if passed_by:
            named = ", ".join(f"'{pattern}' ({count})" for pattern, count in passed_by.items())
            warnings.warn(
                f"In the first forward pass {type(model).__name__} did not call the adapted layers {named}, though it "
                "called the modules around them. An adapter there has no effect and gets no gradient, and merging it "
                "would change the model. If the model uses their weights without calling them, leave them out with "
                "`exclude_modules`; if only this input did not need them, all is well.",
                stacklevel=2,
            )


def _layers_and_callers(model: nn.Module) -> dict[str, tuple[StackedLinear, nn.Module]]:
    """Every adapted layer by path, with the nearest module around it that can be called."""
    modules = dict(model.named_modules())
    found = {}
    for key, layer in modules.items():
        if isinstance(layer, StackedLinear):
            around = key.rpartition(".")[0]
            while around and isinstance(modules[around], nn.ModuleList | nn.ModuleDict):
                around = around.rpartition(".")[0]
            found[key] = (layer, modules[around])
    return found
