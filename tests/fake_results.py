"""Result files that nobody trained: invented, but whole and consistent, and in the shape of real ones."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from craft_peft.glue.results import EpochRecord, Parameters, Result, choose_scores
from craft_peft.glue.tasks import TASKS

DEV_ROWS = {"cola": 527, "mrpc": 408, "rte": 277, "stsb": 1500, "sst2": 872}
TRAIN_ROWS = {"cola": 8551, "mrpc": 3668, "rte": 2490, "stsb": 5749, "sst2": 10000}
LEVEL = {"cola": 0.45, "mrpc": 0.82, "rte": 0.58, "stsb": 0.80, "sst2": 0.88}
# method -> (settings, adapter parameters, points above LEVEL)
METHODS: dict[str, tuple[dict[str, Any], int, float]] = {
    "craft": ({"ranks": [6, 100, 100]}, 40072, 0.020),
    "craft free": ({"ranks": [6, 57, 57], "method_options": {"tying": "free"}}, 38988, 0.024),
    "craft hooi": ({"ranks": [6, 100, 100], "method_options": {"decomposition": "hooi"}}, 40072, 0.018),
    "lora": ({"ranks": [4], "budget": 41000}, 36864, 0.010),
    "lora 8": ({"ranks": [8]}, 73728, 0.026),
    "pissa": ({"ranks": [4]}, 36864, 0.008),
    "lora-xs": ({"ranks": [57]}, 38988, 0.004),
    "vera": ({"ranks": [256]}, 7680, -0.004),
    "lotr": ({"ranks": [40]}, 40960, 0.006),
    "superlora": ({"ranks": [30]}, 40100, -0.010),
    "head": ({}, 0, -0.060),
}


def fake_result(name: str, task: str, seed: int, epochs: int = 5, hold_out: bool = True) -> Result:
    """A result as `train` would write it, from random numbers that only its arguments decide."""
    settings, adapter, above = METHODS[name]
    method = name.split()[0]
    noise = np.random.default_rng([seed, *map(ord, name + task)])
    same_seed = np.random.default_rng([seed, *map(ord, task)]).normal() * 0.006
    curve = []
    for epoch in range(1, epochs + 1):
        level = LEVEL[task] + above + same_seed - 0.15 * math.exp(-1.1 * epoch) + noise.normal() * 0.003
        metrics = _metrics(task, level, noise)
        held = round(level + noise.normal() * 0.004, 6) if hold_out else None
        curve.append(EpochRecord(epoch, {"dev": metrics}, metrics["score"], held, 0.6 / epoch, 48.0 * epoch))
    recipe = {"learning_rate": 1e-3, "batch_size": 32, "max_length": 128, "epochs": epochs}
    rows = TRAIN_ROWS[task]
    steps = math.ceil(rows / 32) * epochs
    return Result(
        task=task,
        method=method,
        model="all-MiniLM-L6-v2",
        seed=seed,
        config={"method": method, "task": task, "seed": seed, "precision": "float32", "recipe": recipe, **settings},
        data={"train": rows, "dev": {"dev": DEV_ROWS[task]}, "held_out": 100 if hold_out else None, "notes": []},
        parameters=Parameters(adapter, 770, 22713216 + adapter, 1262668 if adapter else 90868000),
        score=choose_scores(curve),
        metrics=curve[-1].metrics,
        curve=curve,
        loss=[(step, 0.7 / (1 + step / 50), 1e-3) for step in range(10, steps, max(1, steps // 40))],
        seconds=48.0 * epochs + 1,
        peak_memory_bytes=1_310_000_000 + adapter,
        versions={"python": "3.11.7", "craft-peft": "0.1.0"},
        commit=None,
        processor="an invented processor, 1 threads",
        output=f"runs/{task}-{name}-{seed}",
    )


def write_results(
    folder: Path,
    names: Iterable[str] = tuple(METHODS),
    tasks: Iterable[str] = tuple(LEVEL),
    seeds: Iterable[int] = range(3),
    **changed: Any,
) -> Path:
    """Writes a result file for each combination, flat, as published ones are."""
    folder.mkdir(parents=True, exist_ok=True)
    for task in tasks:
        for name in names:
            for seed in seeds:
                result = fake_result(name, task, seed, **changed)
                result.write(folder / f"{task}-{name.replace(' ', '-')}-seed{seed}.json")
    return folder


def write_run(folder: Path, name: str = "craft", task: str = "rte", seed: int = 0) -> Path:
    """Writes a run folder with a result and an adapter with transforms of two stacks."""
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(
        json.dumps({"format": "craft-peft run 1", "settings": {}, "task": {}, "files": []})
    )
    fake_result(name, task, seed).write(folder / "result.json")
    generator = torch.Generator().manual_seed(seed)
    ranks, layers, tensors = (3, 8, 8), 3, {}
    for stack in ("query", "value"):
        start = f"base_model.model.bert.encoder.layer.0.attention.self.{stack}.craft_adapters"
        for mode, rank in zip(("layer", "out", "in"), ranks, strict=True):
            tensors[f"{start}.{mode}_transform"] = 0.1 * torch.randn(rank, rank, generator=generator)
        tensors[f"{start}.core"] = torch.ones(ranks)
        # Norm 16 a layer and three entries, then one number a basis vector: the core holds 192 of 768.
        tensors[f"{start}.fingerprint"] = torch.tensor([16.0, 0.1, 0.2, 0.3] * layers + [0.5] * sum(ranks))
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def _metrics(task: str, level: float, noise: np.random.Generator) -> dict[str, float]:
    values = {}
    for metric in TASKS[task].metrics:
        value = level + noise.normal() * 0.002
        values[metric] = round(value * DEV_ROWS[task]) / DEV_ROWS[task] if metric == "accuracy" else round(value, 6)
    return {**values, "score": sum(values.values()) / len(values)}
