"""What a request uses of a model: its own, whatever requests of other threads and tasks do at the same time.

A request is a call of a model, or a block of code whose calls are all alike (``with bank.use(name)``, ``with
model.disable_adapter()``). It is held in a context variable, where adapted layers and saved heads look for it. Nothing
of it is written to the modules, so nothing has to be put back when it ends, however it ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from threading import RLock, get_ident
from typing import Any
from weakref import ref

import torch
from torch import nn

from ..errors import CraftError
from .rows import Choice, MixedBatch

Modules = frozenset[nn.Module]


class Request:
    """What one call, or all calls of a block, use of a model.

    Args:
        modules: the model, its adapted layers and its saved modules.
        choice: what a bank puts in the place of the active adapters.
        batch_of: for each row of a batch its adapter, by the module that asks.
        off: no adapters.
        block: not one call but a block of code.
        alone: a block while which other threads and tasks cannot begin requests.
    """

    def __init__(
        self,
        modules: Modules,
        *,
        choice: Choice | None = None,
        batch_of: Callable[[nn.Module], MixedBatch] | None = None,
        off: bool = False,
        block: bool = False,
        alone: bool = False,
    ) -> None:
        self.modules, self.choice, self.batch_of = modules, choice, batch_of
        self.off, self.block, self.alone = off, block, alone
        self.over = False
        self.outer: Request | None = None

    def begin(self) -> None:
        """Make it the request of this thread or task."""
        self.outer = next(_own(), None)
        if self.block or self.batch_of is not None:
            _tell(lambda: _special.append(self))
        _current.set(self)

    def end(self) -> None:
        """Go back to the request around it; from another thread or task too, as when a generator is collected."""
        self.over = True
        if self in _special:
            _tell(lambda: _special.remove(self))
        _current.set(next(_own(), None))

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """Within it, this is the request of this thread or task."""
        try:
            self.begin()
            yield
        finally:
            self.end()

    def instead(self, module: nn.Module) -> Any:
        """What the module uses in the place of the active adapters, or None."""
        return None if self.choice is None else self.choice.part(module)


class Use(ExitStack):
    """What `AdapterBank.use` returns: entered it is a block, let go it was a statement, for the whole model.

    Which of them it is shows only after the call. Until then other threads see what was before.

    Args:
        block: the request that it is when it is entered.
        settle: make it the whole model's, and return how to undo that.
    """

    def __init__(self, block: Request, settle: Callable[[], Callable[[], None]]) -> None:
        super().__init__()
        _settle_own()
        self._block, self._settle = block, settle
        self._open, self._thread = True, get_ident()
        _tell(lambda: _unsettled.__setitem__(self._thread, ref(self)))

    def __enter__(self) -> Use:
        """Begin the block."""
        if self._close():
            self.callback(self._block.end)
            self._block.begin()
        return self

    def settle(self) -> None:
        """Make it the whole model's, unless it was entered."""
        if self._close():
            self.callback(self._settle())

    def _close(self) -> bool:
        was_open, self._open = self._open, False
        if was_open and _unsettled.get(self._thread, lambda: self)() in (self, None):
            _tell(lambda: _unsettled.pop(self._thread, None))
        return was_open

    def __del__(self) -> None:
        self.settle()


class _Compiled:
    """Whether code that `torch.compile` traced has to ask for requests: a value that it can guard on."""

    has_to_ask = False


compiled = _Compiled()
_current: ContextVar[Request | None] = ContextVar("the request of this thread or task", default=None)
_lock = RLock()
_special: list[Request] = []  # of all threads: blocks, and calls that name an adapter for each row
_unsettled: dict[int, ref[Use]] = {}  # by thread


def request_of(module: nn.Module) -> Request | None:
    """The request that a module works for in this thread or task; None if it is called by itself.

    Raises:
        CraftError: none, but the call could belong to a block of another thread.
    """
    if torch.compiler.is_dynamo_compiling() and not compiled.has_to_ask:
        return None
    if _unsettled:
        _settle_own()
    request = next(_own(module), None)
    if request is None and _special:
        return _of_another_thread(module)
    return request


def block_of(module: nn.Module) -> Request | None:
    """The innermost ``with bank.use(...)`` of this thread or task."""
    return next((request for request in _own(module) if request.block and not request.off), None)


def blocks_of(module: nn.Module) -> list[Request]:
    """The blocks of all threads and tasks."""
    return [request for request in tuple(_special) if request.block and module in request.modules]


def is_off(module: Any, request: Request | None) -> bool:
    """Whether a module is switched off for a request: by another thread, after the request began, it is not.

    Args:
        module: an adapted layer or saved module, which PEFT switches.
        request: of the module.
    """
    if not module.disable_adapters or request is None or any(own.off for own in _own(module)):
        return bool(module.disable_adapters)
    elsewhere = any(block.off for block in blocks_of(module))
    if elsewhere and request.block:
        refuse_while_off(module)
    return not elsewhere


def refuse_while_off(module: nn.Module) -> None:
    """Refuse a request that begins while another thread or task has switched the adapters off."""
    alone = {block for block in blocks_of(module) if block.alone}
    if alone.difference(_own(module)):
        raise CraftError(
            "Another thread or task has switched the adapters off (`disable_adapter`), which PEFT does to the whole "
            'model. In requests that overlap ask for the base model by name: `adapter_names=["__base__", ...]`, or '
            '`with bank.use("__base__")`.'
        )


def _of_another_thread(module: nn.Module) -> Request | None:
    refuse_while_off(module)
    blocks = [block for block in blocks_of(module) if not block.off]
    if len(blocks) == 1 and torch._C._current_graph_task_id() != -1:
        return blocks[0]  # a checkpointed layer, run again in a thread of autograd's
    if blocks:
        raise CraftError(
            "The call does not say which adapter it is for, and a `with bank.use(...)` is open in another thread or "
            "task, to which it may belong. Say it with `adapter_names=[...]`, or with `with bank.use(name)` around the "
            "call (None for the model's own adapter). Threads do not inherit a `with` that they are started in, unless "
            "they run `contextvars.copy_context().run(...)`; `asyncio.to_thread` does."
        )
    return None


def _own(module: nn.Module | None = None) -> Iterator[Request]:
    """The requests of this thread or task that are under way, of a module or of all, the innermost first."""
    request = _current.get()
    while request is not None:
        if not request.over and (module is None or module in request.modules):
            yield request
        request = request.outer


def _settle_own() -> None:
    use = _unsettled.get(get_ident(), lambda: None)()
    if use is not None:
        use.settle()


def _tell(change: Callable[[], Any]) -> None:
    with _lock:
        change()
        compiled.has_to_ask = bool(_special or _unsettled)
