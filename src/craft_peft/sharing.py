"""Work that all layers of a model share, done once a forward pass instead of once a layer.

An adapter whose layers need parts of one computation asks `compute_once` for it. Within a forward pass (between the two
hooks that `share_work_in` puts on a model) the first layer that asks computes, with a graph if the pass has one, and
the others get the same tensors; after it they are dropped. Nothing outlives a pass, so nothing can be stale.

Gradient checkpointing runs layers again while the backward pass is under way, when the forward pass is over. What they
ask for is then computed once more for that whole backward pass, without a graph, and handed out as leaves. The kind of
checkpointing that backpropagates a layer at a time (``use_reentrant=True``) leaves its gradients in these leaves; when
the backward pass ends they go through the computation in one piece. The other kind only needs the values.

Everywhere else (a layer called by itself, code that `torch.compile` traces) it is computed where it is asked for, which
is as right and, when several layers ask, slower.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.autograd.graph import saved_tensors_hooks

Compute = Callable[[], tuple[Tensor, ...]]


@dataclass
class _Pass:
    """A forward pass of `model`, or a block of code in which nothing is trained (then None)."""

    model: nn.Module | None
    outer: _Pass | None
    with_graph: bool
    found: dict[tuple[nn.Module, bool], tuple[Tensor, ...]] = field(default_factory=dict)


_current: ContextVar[_Pass | None] = ContextVar("the forward pass under way", default=None)
_repeated: WeakKeyDictionary[nn.Module, tuple[int, tuple[Tensor, ...]]] = WeakKeyDictionary()


def compute_once(owner: nn.Module, compute: Compute) -> tuple[Tensor, ...]:
    """What `compute` returns, computed once a forward pass.

    Args:
        owner: whose computation it is; its parameters are what the gradients go to.
        compute: computes the tensors; the same ones for the same parameters.
    """
    if torch.compiler.is_compiling():
        return compute()  # traced into the graph, where the compiler merges what is the same
    under_way = _current.get()
    if under_way is not None:
        return _compute_in(under_way, owner, compute)
    if torch._C._current_graph_task_id() != -1:
        return _compute_again(owner, compute)
    with _unseen_by_checkpoints():
        return compute()


def share_work_in(model: nn.Module) -> None:
    """Make every call of the model one pass, if it is not yet."""
    if _begin not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_begin)
        model.register_forward_hook(_end, always_call=True)


def stop_sharing_work_in(model: nn.Module) -> None:
    """Undo `share_work_in`."""
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for number, hook in list(hooks.items()):
            if hook in (_begin, _end):
                del hooks[number]
                model._forward_hooks_always_called.pop(number, None)


@contextmanager
def shared_work() -> Iterator[None]:
    """A block in which all layers share their work, as in a forward pass; no parameter may change in it."""
    token = _current.set(_Pass(None, _current.get(), torch.is_grad_enabled()))
    try:
        yield
    finally:
        _current.reset(token)


@contextmanager
def passes_end() -> Iterator[None]:
    """A block after which no pass is under way that was not before, even if one was interrupted from the keyboard."""
    before = _current.get()
    try:
        yield
    finally:
        _current.set(before)


def _begin(model: nn.Module, args: Any) -> None:
    if torch.compiler.is_compiling():
        return
    outer = _current.get()
    if outer is not None and outer.model is model:
        outer = outer.outer  # left behind by a pass that was interrupted from the keyboard
    _current.set(_Pass(model, outer, torch.is_grad_enabled()))


def _end(model: nn.Module, args: Any, output: Any) -> None:
    if torch.compiler.is_compiling():
        return
    under_way = _current.get()
    if under_way is not None and under_way.model is model:
        _current.set(under_way.outer)


def _compute_in(under_way: _Pass, owner: nn.Module, compute: Compute) -> tuple[Tensor, ...]:
    # With a graph if the pass has one: a checkpointed layer runs without, but the next layer may not be checkpointed.
    key = (owner, under_way.with_graph or torch.is_grad_enabled())
    if key not in under_way.found:
        with torch.set_grad_enabled(key[1]), _unseen_by_checkpoints():
            under_way.found[key] = compute()
    return under_way.found[key]


def _unseen_by_checkpoints() -> AbstractContextManager[Any]:
    """Keeps what is saved for the backward pass out of the books of a checkpointed layer, which will not redo it."""
    if not torch._C._autograd._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]
        return nullcontext()  # in a transform of `torch.func`, where there are no such books
    return saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


def _compute_again(owner: nn.Module, compute: Compute) -> tuple[Tensor, ...]:
    backward = torch._C._current_graph_task_id()
    held, leaves = _repeated.get(owner, (None, ()))
    if held != backward:
        trained = any(parameter.requires_grad for parameter in owner.parameters())
        with torch.no_grad():
            leaves = tuple(tensor.detach().requires_grad_(trained) for tensor in compute())
        _repeated[owner] = (backward, leaves)
        Variable._execution_engine.queue_callback(partial(_pass_on_gradients, owner, compute, leaves))
    return leaves


def _pass_on_gradients(owner: nn.Module, compute: Compute, leaves: tuple[Tensor, ...]) -> None:
    """At the end of a backward pass: from the leaves that its checkpointed layers left gradients in, onwards."""
    if owner in _repeated and _repeated[owner][1] is leaves:
        del _repeated[owner]
    reached = [place for place, leaf in enumerate(leaves) if leaf.grad is not None]
    if reached:
        with torch.enable_grad():
            tensors = compute()
        torch.autograd.backward([tensors[place] for place in reached], [leaves[place].grad for place in reached])
