"""Frozen tensors that are computed, or loaded, or postponed until they are needed: the life of an adapter's bases."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import chain
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import CraftError
from ...fused import autocasts
from ...weights import ReadWeights, StackShape, as_bits

_filling = RLock()  # held while frozen tensors are made, so that another thread does not use them half made


class DeferredState(nn.Module, ABC):
    """A module whose trained tensors are parameters, and whose frozen ones (taken from pretrained weights) are buffers.

    The frozen part is either computed from the weights (`initialise`) or loaded with a state dict. To save a
    decomposition that loading would overwrite, `defer` postpones it until the tensors are first needed.

    A method whose frozen tensors mean something beside the weights they were computed from alone has a buffer
    ``fingerprint``, the bits (`as_bits`) of numbers that begin with their `weights_fingerprint`; `watch_loading` then
    tells when another is loaded.

    Args:
        shape: the sizes of the stack of weights.
    """

    def __init__(self, shape: StackShape) -> None:
        super().__init__()
        self.shape = shape
        self._deferred: Callable[[], None] | None = None
        self._is_filling = False  # in some thread
        self._watcher: Callable[[Tensor], None] | None = None

    @abstractmethod
    def initialise(self, read_weights: ReadWeights) -> None:
        """Fill every frozen tensor, from the pretrained weights if the method needs them (it reads them then)."""

    @property
    def derived_from(self) -> tuple[object, ...] | None:
        """What the frozen tensors depend on beside the weights, as values to compare; None if there are none."""
        return None

    def take_frozen(self, twin: DeferredState) -> None:
        """Copy the frozen tensors of an adapter of the same class, stack and `derived_from`, instead of computing them.

        So that a copy of an adapter by its config and its parameters (which is how others copy adapters) is that
        adapter, also where the frozen tensors cannot be computed again: from batches, or from weights that have since
        been cast or quantised.
        """
        twin.make_ready()
        self._deferred = None
        for name, frozen in twin.named_buffers(recurse=False):
            setattr(self, name, frozen.detach().clone())

    def defer(self, fill: Callable[[], None]) -> None:
        """Call this to fill the frozen tensors when they are first used, unless they are loaded before."""
        self._deferred = fill

    @property
    def is_deferred(self) -> bool:
        """Whether the frozen tensors are still to be filled."""
        return self._deferred is not None

    def watch_loading(self, watcher: Callable[[Tensor], None]) -> None:
        """Call this with the saved fingerprint whenever frozen tensors are loaded together with one."""
        self._watcher = watcher

    def _meet_fingerprint(self, saved: Tensor) -> None:
        if self._watcher is not None:
            self._watcher(saved)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "fingerprint":
            # transformers' own loading sets tensors one by one, with this mark, and calls no `load_state_dict`.
            if getattr(value, "_is_hf_initialized", False):
                self._meet_fingerprint(value)
            value = as_bits(value)
        super().__setattr__(name, value)

    @contextmanager
    def still_deferred(self) -> Iterator[None]:
        """Within it a deferred `initialise` stays deferred: for reading names and shapes, not values."""
        held, self._deferred = self._deferred, None
        try:
            yield
        finally:
            self._deferred = held

    def make_ready(self) -> None:
        """Run a deferred `initialise`, if there is one. Cheap otherwise; called before every use, by all threads."""
        if self._deferred is None and not self._is_filling:
            return
        with _filling:
            while self._deferred is not None:  # what was deferred may turn out to need something else first
                was_filling, self._is_filling = self._is_filling, True
                deferred, self._deferred = self._deferred, None
                try:
                    # Whoever asks first may do so in a mode of his own. What is made here stays.
                    with torch.inference_mode(False), torch.no_grad(), self._without_autocast():
                        deferred()
                except BaseException:
                    self._deferred = deferred  # the next use is an error again, not a use of tensors that hold nothing
                    raise
                finally:
                    self._is_filling = was_filling

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if not any(parameter.is_meta for parameter in self.parameters()):  # those are still to be loaded
            self.make_ready()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any) -> None:
        self._check_shapes(state_dict, prefix)
        saved = [name for name, _ in self.named_buffers(recurse=False) if name not in self._non_persistent_buffers_set]
        if all(prefix + name in state_dict for name in saved):
            self._deferred = None  # everything frozen comes with the state: nothing is left to compute
            if "fingerprint" in saved:
                self._meet_fingerprint(state_dict[f"{prefix}fingerprint"])
        if (key := f"{prefix}fingerprint") in state_dict:
            state_dict = {**state_dict, key: as_bits(state_dict[key])}
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _check_shapes(self, state_dict: dict[str, Tensor], prefix: str) -> None:
        """Refuse saved tensors of other shapes before any is loaded; torch would name each, but not the reason."""
        for name, own in [*self.named_parameters(recurse=False), *self.named_buffers(recurse=False)]:
            saved = state_dict.get(prefix + name)
            if saved is not None and saved.shape != own.shape:
                raise CraftError(
                    f"The saved adapter does not fit this base model: '{prefix}{name}' was saved with the shape "
                    f"{tuple(saved.shape)} and needs {tuple(own.shape)} for {self.shape}. Load it on the base model "
                    "that it was trained on."
                )

    def _without_autocast(self) -> AbstractContextManager[Any]:
        # Within a call, FSDP 1 puts plain tensors in the place of the parameters.
        tensors = chain(self.parameters(), (value for value in vars(self).values() if isinstance(value, Tensor)))
        device = next(tensors).device.type
        return torch.autocast(device, enabled=False) if autocasts(device) else nullcontext()


@contextmanager
def still_deferred(model: nn.Module) -> Iterator[None]:
    """Within it every deferred `initialise` of a model's adapters stays deferred: for reading names and shapes."""
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, DeferredState):
                stack.enter_context(module.still_deferred())
        yield
