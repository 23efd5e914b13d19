"""SuperLoRA and its projection entry by entry, from the papers' equations."""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
from torch import Tensor

from craft_peft.adapters.superlora import SuperLoraAdapter
from craft_peft.fastfood import Fastfood, random_permutation


def sylvester(size: int) -> np.ndarray:
    """The Walsh-Hadamard matrix by its definition: -1 to the number of ones that row and column have in common."""
    return np.array([[(-1.0) ** bin(i & j).count("1") for j in range(size)] for i in range(size)]) / np.sqrt(size)


def fastfood_matrix(fastfood: Fastfood, inputs: int, outputs: int) -> np.ndarray:
    """The product H G P H B of each block, one below the other."""
    size = fastfood.signs.shape[1]
    blocks = []
    for signs, places, gains in zip(fastfood.signs, fastfood.places, fastfood.gains, strict=True):
        permutation = np.eye(size)[places.numpy()]
        blocks.append(sylvester(size) @ np.diag(gains) @ permutation @ sylvester(size) @ np.diag(signs))
    return np.concatenate(blocks)[:outputs, :inputs]


def naive_delta(adapter: SuperLoraAdapter, layer: int) -> Tensor:
    """One layer's part of the vector."""
    groups = {}
    for number, kind in enumerate(adapter.kinds):
        for row, place in enumerate(kind.places):
            groups[place] = _group(adapter, number, row)
    vector = np.concatenate([groups[place] for place in range(len(groups))])
    entries = [math.prod(matrix) for matrix in adapter.shape.matrices]
    vector = vector[: sum(entries)]
    if adapter.shuffle_seed is not None:
        vector = np.array([vector[place] for place in random_permutation(adapter.shuffle_seed, len(vector))])
    start = sum(entries[:layer])
    matrix = vector[start : start + entries[layer]].reshape(adapter.shape.matrices[layer])
    return adapter.scaling * torch.from_numpy(matrix)


def _group(adapter: SuperLoraAdapter, number: int, row: int) -> np.ndarray:
    kind = adapter.kinds[number]
    splits = [_tensor(adapter, f"{number}_{split}", row, sizes) for split, sizes in enumerate(kind.sizes)]
    product = splits[0]
    for split in splits[1:]:
        product = _kronecker(product, split)
    vector = product.reshape(-1)[: kind.needed]
    if adapter.folding.ratio is None:
        return vector
    fastfood = Fastfood.from_seed(adapter.projection_seed, kind.needed, kind.entries)
    return fastfood_matrix(fastfood, kind.needed, kind.entries) @ vector


def _tensor(adapter: SuperLoraAdapter, label: str, row: int, sizes: tuple[int, ...]) -> np.ndarray:
    """core x_1 A_1 x_2 ... x_M A_M, with the identity for the core or the factors that have one."""
    state = {name: tensor[row].double().numpy() for name, tensor in adapter.state_dict().items()}
    fixed, r = adapter.folding.identity_modes, adapter.r
    factors = [np.eye(size) if m in fixed else state[f"factor_{label}_{m}"] for m, size in enumerate(sizes)]
    if adapter.folding.core == "dense":
        core = state[f"core_{label}"]
    else:
        core = np.zeros([r] * len(sizes))
        for a in range(r):
            core[(a,) * len(sizes)] = 1
    tensor = np.zeros(sizes)
    for place in itertools.product(*map(range, sizes)):
        for ranks in itertools.product(*map(range, core.shape)):
            weights = [factor[i, a] for factor, i, a in zip(factors, place, ranks, strict=True)]
            tensor[place] += core[ranks] * math.prod(weights)
    return tensor


def _kronecker(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    product = np.zeros([a * b for a, b in zip(first.shape, second.shape, strict=True)])
    for place in itertools.product(*map(range, product.shape)):
        outer = tuple(i // size for i, size in zip(place, second.shape, strict=True))
        inner = tuple(i % size for i, size in zip(place, second.shape, strict=True))
        product[place] = first[outer] * second[inner]
    return product
