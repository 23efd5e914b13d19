r"""A linear layer with a factored adapter as one step of the graph, which keeps little for the backward pass.

.. math:: y = x (W + U K V^\top)^\top + b, \qquad
    \bar K = (\bar y U)^\top (x V), \qquad \bar x = \bar y (W + U K V^\top)

Only :math:`K` and :math:`x` have gradients; :math:`W, b, U, V` are frozen. Written out in plain operations, autograd
would keep ``x @ V``, ``x @ V @ K.T`` and the delta of the output for their additions; here it keeps ``x @ V`` alone
(tokens x r_in), neither ``x`` nor a matrix of the weight's size, also where the operands are of several dtypes.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F


def adapted_linear(
    x: Float[Tensor, "... d_in"],
    weight: Float[Tensor, "d_out d_in"],
    bias: Float[Tensor, " d_out"] | None,
    out_factor: Float[Tensor, "d_out r_out"],
    middle: Float[Tensor, "r_out r_in"],
    in_factor: Float[Tensor, "d_in r_in"],
) -> Float[Tensor, "... d_out"]:
    r""":math:`y = x (W + U K V^\top)^\top + b`, computed in the dtype of `x`, whatever autocast asks for.

    With many tokens it forms :math:`W + U K V^\top` (``d_out * d_in * r`` products), with few it goes through the thin
    factors (``tokens * r * (d_out + d_in)``). In less than float32 it always takes the thin factors, because a small
    delta added to a weight would be lost in rounding; of float16 these products are in float32 (`thin_dtype`).
    Derivatives of any order are right.

    Args:
        x: the input.
        weight: frozen.
        bias: frozen.
        out_factor: U, frozen.
        middle: K; its gradient is in its own dtype.
        in_factor: V, frozen.

    Example:
        >>> x, w, u, k, v = (torch.ones(size) for size in ((4, 3), (2, 3), (2, 1), (1, 1), (3, 1)))
        >>> adapted_linear(x, w, None, u, k, v)[0].tolist()
        [6.0, 6.0]
    """
    with _no_autocast(x):
        thin = thin_dtype(x.dtype)
        hidden = x.to(thin) @ in_factor.to(thin)  # a step of its own: higher derivatives pass through it
        # With few tokens plain operations keep as little, and a step of our own costs more than it saves; but of
        # operands of several dtypes they would keep what was cast.
        plain = weight.dtype == middle.dtype == x.dtype == thin and not forms_the_weight(
            _count(hidden), weight, x.dtype
        )
        if plain or is_looked_into():
            return add_thin(F.linear(x, weight.to(x.dtype), _to(bias, x)), hidden @ middle.to(thin).T, out_factor.T)
        return _AdaptedLinear.apply(x, hidden, middle, weight, bias, out_factor, in_factor)


def is_looked_into() -> bool:
    """Whether a tool looks at the single operations, so that a step of our own would be one that it does not know.

    Those are compilers and exporters, `torch.jit.trace`, the transforms of `torch.func`, forward-mode derivatives.
    """
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def forms_the_weight(tokens: int, weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether it costs less to add the delta to the weight than to send so many tokens through the thin factors."""
    d_out, d_in = weight.shape
    return tokens * (d_out + d_in) > d_out * d_in and dtype in (torch.float32, torch.float64)


def thin_dtype(dtype: torch.dtype) -> torch.dtype:
    """In what the products with thin factors are computed for an input of a dtype: itself, but float32 for float16.

    ``x @ in_factor`` adds up a whole row: it would leave the range of float16 where the base layer's output is in it.
    """
    return torch.float32 if dtype == torch.float16 else dtype


def add_thin(base: Tensor, narrow: Tensor, factor: Tensor) -> Tensor:
    """``base + narrow @ factor`` in one operation, computed in the dtype of `narrow`, in that of `base`."""
    dtype = narrow.dtype
    return torch.addmm(_rows(base).to(dtype), _rows(narrow), factor.to(dtype)).view(base.shape).to(base.dtype)


class _AdaptedLinear(torch.autograd.Function):
    """`hidden` is ``x @ in_factor``; what its gradient would pass on to `x` is part of that of `x`.

    Without a `setup_context`, for which torch 2.13 takes apart the signature of `forward` in every call: half of what
    such a step costs in a small model.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        hidden: Tensor,
        middle: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        out_factor: Tensor,
        in_factor: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(hidden, middle, weight, out_factor, in_factor)
        if forms_the_weight(_count(hidden), weight, x.dtype):
            return F.linear(x, _formed(weight, out_factor, middle, in_factor, x.dtype), _to(bias, x))
        base = F.linear(x, weight.to(x.dtype), _to(bias, x))
        return add_thin(base, hidden @ middle.to(hidden.dtype).T, out_factor.T)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, middle, weight, out_factor, in_factor = ctx.saved_tensors
        of_x = of_middle = None
        with _no_autocast(gradient):
            narrow = gradient.to(hidden.dtype) @ out_factor.to(hidden.dtype)
            if ctx.needs_input_grad[2]:
                of_middle = (_rows(narrow).T @ _rows(hidden)).to(middle.dtype)
            if ctx.needs_input_grad[0]:
                if forms_the_weight(_count(hidden), weight, gradient.dtype):
                    of_x = gradient @ _formed(weight, out_factor, middle, in_factor, gradient.dtype)
                else:
                    base = gradient @ weight.to(gradient.dtype)
                    of_x = add_thin(base, narrow @ middle.to(narrow.dtype), in_factor.T)
        return of_x, None, of_middle, None, None, None, None


def _formed(weight: Tensor, out_factor: Tensor, middle: Tensor, in_factor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.addmm(weight.to(dtype), out_factor.to(dtype), middle.to(dtype) @ in_factor.T.to(dtype))


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _count(rows: Tensor) -> int:
    return rows.numel() // rows.shape[-1]


def _to(bias: Tensor | None, like: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(like.dtype)


def _no_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if autocasts(device) else nullcontext()


def autocasts(device: str) -> bool:
    """Whether autocast is on for a type of device; the meta device, on which nothing is computed, has none."""
    return device != "meta" and torch.is_autocast_enabled(device)
