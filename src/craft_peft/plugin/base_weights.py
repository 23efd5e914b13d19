"""The weights of a stack in a model, read one by one, with the memory of what was computed from them before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ..tucker import Tucker, decomposition_cost, reads_of_each_slice
from ..weights import StackWeights
from .factor_cache import FactorCache, key_of
from .progress import Progress

REMEMBERED_COST = 2e10
"""From how many products and sums on (`decomposition_cost`) factors are kept on disk: about a fifth of a second on two
cores. Below, reading every weight for the key and a file takes as long."""


class BaseWeights(StackWeights):
    """The weights of a stack in a model.

    Args:
        names: the paths of the modules.
        read: gives the weight of a layer.
        progress: where to show how far their decomposition is.
    """

    def __init__(self, names: Sequence[str], read: Callable[[int], Tensor], progress: Progress) -> None:
        super().__init__(names, read)
        self._progress = progress

    def __getitem__(self, layer: int) -> Tensor:
        self._progress.read()
        return super().__getitem__(layer)

    def decomposed(self, ranks: Sequence[int], method: Any, compute: Callable[[], Tucker]) -> Tucker:
        """What `compute` makes of these weights; if it takes long, from the cache on disk or into it."""
        shape = (len(self), *self[0].shape)
        cache = FactorCache.from_environment()
        # Several processes have to read split weights together, and would not if one found a file and another did not.
        alone = not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)
        remembers = cache is not None and alone and decomposition_cost(shape, ranks, method) >= REMEMBERED_COST
        reads = len(self) * (reads_of_each_slice(shape, ranks, method) + remembers)
        with self._progress.of_stack(reads):
            if cache is None or not remembers:
                return compute()
            key = key_of(self, ranks, method)
            found = cache.load(key, shape, ranks)
            if found is None:
                found = compute()
                cache.store(key, found)
            place = self.fingerprint(0).device
            return Tucker(found.core.to(place), tuple(factor.to(place) for factor in found.factors))
