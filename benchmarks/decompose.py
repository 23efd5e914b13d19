"""Time to adapt a RoBERTa-large shape with CRAFT, and the energy that its bases keep of a real encoder's weights.

    python benchmarks/decompose.py --model MODEL_FOLDER --name all-MiniLM-L6-v2 --output results/decompose.json
    python benchmarks/decompose.py --quick                  # two layers, no real encoder: that the script runs

The shape has random weights, query and value of 24 layers of width 1024, float32; what is timed is `get_peft_model`,
checks included. The median of three.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoModel, RobertaConfig, RobertaModel

from craft_peft import CraftConfig, explained_energy, hosvd
from craft_peft.glue.machine import describe_processor, describe_versions
from craft_peft.plugin.stacks import collect_stacks

METHODS = ("hosvd", "st-hosvd", "hooi")


def seconds_to_adapt(layers: int, repeats: int) -> list[float]:
    """Seconds of `get_peft_model` on a fresh RoBERTa-large shape, each time anew."""
    config = RobertaConfig(
        vocab_size=100, hidden_size=1024, num_hidden_layers=layers, num_attention_heads=16, intermediate_size=1
    )
    found = []
    for _ in range(repeats):
        model = RobertaModel(config)
        start = time.perf_counter()
        get_peft_model(model, CraftConfig(target_modules=["query", "value"]))
        found.append(time.perf_counter() - start)
    return found


def kept_energy(folder: str) -> dict[str, dict[str, float]]:
    """Share of the energy of a real encoder's query and value stacks that each decomposition keeps."""
    model = AutoModel.from_pretrained(folder)
    targets = [(key, m) for key, m in model.named_modules() if key.endswith((".query", ".value"))]
    energies: dict[str, dict[str, float]] = {}
    for stack in collect_stacks(targets):
        tensor = torch.stack(stack.read_weights())
        ranks = CraftConfig().resolve_ranks(stack.name, stack.shape)
        energies[stack.name] = {m: explained_energy(tensor, hosvd(tensor, ranks, m)).item() for m in METHODS}
    return energies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a real encoder; without it no energies are measured")
    parser.add_argument("--name", help="what to call that encoder (default: the folder's name)")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--quick", action="store_true", help="two layers, once")
    arguments = parser.parse_args()
    layers, repeats = (2, 1) if arguments.quick else (24, 3)
    seconds = seconds_to_adapt(layers, repeats)
    result: dict[str, Any] = {
        "shape": {"layers": layers, "width": 1024, "stacks": 2, "ranks": [min(24, layers), 100, 100]},
        "seconds": {"median": statistics.median(seconds), "all": seconds},
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg()[0],
        "kept_energy": kept_energy(arguments.model) if arguments.model else None,
        "model": arguments.name or (Path(arguments.model).name if arguments.model else None),
        "versions": describe_versions(),
        "processor": describe_processor(),
    }
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
