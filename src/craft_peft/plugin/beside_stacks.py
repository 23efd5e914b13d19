"""What PEFT itself trains beside the stacks, tokens and whole modules: where that would go wrong without a word."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import CraftError


class TokensWithBias(TrainableTokensLayer):
    """PEFT's layer of trained tokens, for a linear head: with the head's bias, which PEFT leaves out."""

    def forward_adapters(self, x: Tensor, active_adapters: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """As in PEFT, which calls the head itself unless the tokens of an adapter replace rows of its weight."""
        if self.disable_adapters or self.merged or not active_adapters:
            return super().forward_adapters(x, active_adapters, *args, **kwargs)
        self._check_overlapping_tokens(active_adapters)
        return F.linear(x, self.get_merged_weights(active_adapters), self.base_layer.bias)


def keep_biases_of_heads(model: nn.Module) -> None:
    """Have every head with trained tokens compute with its bias; for a model that PEFT has just changed."""
    for _, layer in _heads_with_bias(model):
        layer.__class__ = TokensWithBias


@torch.no_grad()
def biased_heads(model: nn.Module) -> list[str]:
    """The paths of heads that PEFT by itself would compute otherwise: trained tokens, and a bias that is not zero."""
    found = _heads_with_bias(model)
    return [path.removesuffix(".token_adapter") for path, layer in found if layer.get_base_layer().bias.any()]


def _heads_with_bias(model: nn.Module) -> Iterator[tuple[str, TrainableTokensLayer]]:
    for path, layer in _token_layers(model):
        base = layer.get_base_layer()
        if isinstance(base, nn.Linear) and base.bias is not None:
            yield path, layer


def _token_layers(model: nn.Module) -> Iterator[tuple[str, TrainableTokensLayer]]:
    for path, module in model.named_modules():
        if isinstance(module, TrainableTokensLayer):
            yield path, module


def refuse_to_merge_shared_tokens(model: nn.Module) -> None:
    """Merging writes into a weight: all its owners have to have the same trained tokens.

    Raises:
        CraftError: an embedding and a head, say, that share a weight and have other trained tokens each, or one none.
    """
    owners = {layer.get_base_layer(): (path, layer.tied_adapter or layer) for path, layer in _token_layers(model)}
    weights = {id(base.weight): owner for base, owner in owners.items()}
    for path, module in model.named_modules():
        for parameter in module._parameters.values():
            expected = weights.get(id(parameter))
            own = owners.get(module)
            if expected is not None and (own is None or own[1] is not expected[1]):
                raise CraftError(
                    f"The trained tokens of '{expected[0].removesuffix('.token_adapter')}' cannot be merged: it shares "
                    f"its weight with '{path.removesuffix('.token_adapter.base_layer')}', which does not have the same "
                    "trained tokens. Train the same tokens of both, or give the base model a weight for each."
                )


def refuse_nested_modules(model: nn.Module, modules_to_save: Collection[str] | None) -> None:
    """Refuse to save a module within another: PEFT writes such a file, and nothing can read it.

    Raises:
        CraftError: one of `modules_to_save` lies in another; PEFT takes every module whose path ends with one of them.
    """
    outer: list[str] = []
    for path, _ in model.named_modules(remove_duplicate=False):
        if any(path.endswith(name) for name in modules_to_save or ()):
            inside = next((other for other in outer if path.startswith(f"{other}.")), None)
            if inside is not None:
                raise CraftError(
                    f"`modules_to_save` takes every module whose path ends with one of its names: '{inside}', and "
                    f"'{path}' in it, which could not be loaded again. Give a name with which only one of them ends."
                )
            outer.append(path)
