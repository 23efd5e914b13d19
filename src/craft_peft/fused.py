r"""A linear layer with a factored adapter as one step of the graph, which keeps little for the backward pass.

.. math:: y = x (W + U K V^\top)^\top + b, \qquad
    \bar K = (\bar y U)^\top (x V), \qquad \bar x = \bar y (W + U K V^\top)

Only :math:`K` and :math:`x` have gradients; :math:`W, b, U, V` are frozen. Written out in plain operations, autograd
would keep ``x @ V``, ``x @ V @ K.T`` and the delta of the output for their additions; here it keeps ``x @ V`` alone
(tokens x r_in), neither ``x`` nor a matrix of the weight's size.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def adapted_linear(
    x: Float[Tensor, "... d_in"],
    weight: Float[Tensor, "d_out d_in"],
    bias: Float[Tensor, " d_out"] | None,
    out_factor: Float[Tensor, "d_out r_out"],
    middle: Float[Tensor, "r_out r_in"],
    in_factor: Float[Tensor, "d_in r_in"],
) -> Float[Tensor, "... d_out"]:
    r""":math:`y = x (W + U K V^\top)^\top + b`, all of one dtype.

    With many tokens it forms :math:`W + U K V^\top` (``d_out * d_in * r`` products), with few it goes through the thin
    factors (``tokens * r * (d_out + d_in)``). In less than float32 it always takes the thin factors, because a small
    delta added to a weight would be lost in rounding. Derivatives of any order are right.

    Args:
        x: the input.
        weight: frozen.
        bias: frozen.
        out_factor: U, frozen.
        middle: K, in the dtype of the rest.
        in_factor: V, frozen.

    Example:
        >>> x, w, u, k, v = (torch.ones(size) for size in ((4, 3), (2, 3), (2, 1), (1, 1), (3, 1)))
        >>> adapted_linear(x, w, None, u, k, v)[0].tolist()
        [6.0, 6.0]
    """
    hidden = x @ in_factor  # a step of its own: it keeps nothing, and higher derivatives pass through it
    return _AdaptedLinear.apply(x, hidden, middle, weight, bias, out_factor, in_factor)


def forms_the_weight(tokens: int, weight: Tensor) -> bool:
    """Whether it costs less to add the delta to the weight than to send so many tokens through the thin factors."""
    d_out, d_in = weight.shape
    return tokens * (d_out + d_in) > d_out * d_in and weight.dtype in (torch.float32, torch.float64)


class _AdaptedLinear(torch.autograd.Function):
    """`hidden` is ``x @ in_factor``; what its gradient would pass on to `x` is part of that of `x`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        hidden: Tensor,
        middle: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        out_factor: Tensor,
        in_factor: Tensor,
    ) -> Tensor:
        if forms_the_weight(x.numel() // x.shape[-1], weight):
            return F.linear(x, torch.addmm(weight, out_factor, middle @ in_factor.T), bias)
        return F.linear(x, weight, bias) + F.linear(hidden @ middle.T, out_factor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
        _, hidden, middle, weight, _, out_factor, in_factor = inputs
        ctx.save_for_backward(hidden, middle, weight, out_factor, in_factor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, middle, weight, out_factor, in_factor = ctx.saved_tensors
        narrow = gradient @ out_factor
        of_x = of_middle = None
        if ctx.needs_input_grad[2]:
            of_middle = narrow.flatten(0, -2).T @ hidden.flatten(0, -2)
        if ctx.needs_input_grad[0]:
            if forms_the_weight(gradient.numel() // gradient.shape[-1], weight):
                of_x = gradient @ torch.addmm(weight, out_factor, middle @ in_factor.T)
            else:
                of_x = gradient @ weight + (narrow @ middle) @ in_factor.T
        return of_x, None, of_middle, None, None, None, None
