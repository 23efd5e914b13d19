"""Size of a saved adapter, time to load it, time to put a new one into a model; CRAFT beside PEFT's LoRA r = 8.

    python benchmarks/load.py --output results/performance/load-cpu.json
    python benchmarks/load.py --quick               # tiny models: that the script runs

Query and value are adapted; the weights are random, and layers have one feed-forward unit: no figure here depends on
either. Injection is `get_peft_model` for the second time on a base, when CRAFT's decomposition is in the cache on disk
(what the first one takes is in decompose.py); loading is `PeftModel.from_pretrained` of what was saved. Also: what
`import craft_peft` adds to `import peft`, each in a fresh process.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pairs import seconds_of, write
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaModel, PreTrainedModel, RobertaConfig, RobertaModel

from craft_peft import CraftConfig

SHAPES = {  # width, layers
    "RoBERTa-base": (768, 12),
    "RoBERTa-large": (1024, 24),
    "Llama, 2048 wide": (2048, 16),
}
TARGETS = {"roberta": ["query", "value"], "llama": ["q_proj", "v_proj"]}


def build(name: str, quick: bool) -> PreTrainedModel:
    width, layers = (32, 2) if quick else SHAPES[name]
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": width // 16}
    torch.manual_seed(0)
    if name.startswith("Llama"):
        return LlamaModel(LlamaConfig(vocab_size=100, intermediate_size=1, **sizes)).eval()
    return RobertaModel(RobertaConfig(vocab_size=100, intermediate_size=1, **sizes), add_pooling_layer=False).eval()


def configs(base: PreTrainedModel) -> dict[str, Callable[[], PeftConfig]]:
    targets = TARGETS[base.config.model_type]
    ranks = (min(24, base.config.num_hidden_layers), *(min(100, base.config.hidden_size),) * 2)
    craft = partial(CraftConfig, ranks=ranks, target_modules=targets)
    return {
        "craft": craft,
        "craft, no factors": partial(craft, save_factors=False),
        "lora r=8": partial(LoraConfig, r=8, target_modules=targets),
    }


def measure(name: str, rounds: int, device: str, quick: bool, folder: Path) -> list[dict[str, Any]]:
    """File size, injection and loading of each side, on one base, which each side leaves as it was."""
    base = build(name, quick).to(device)
    sides = configs(base)

    def inject(side: str) -> None:
        models[side] = get_peft_model(base, sides[side]())

    def load(side: str) -> None:
        models[side] = PeftModel.from_pretrained(base, folder / side)

    models: dict[str, PeftModel] = {}
    seconds: dict[str, dict[str, list[float]]] = {}
    for what, act in (("inject", inject), ("load", load)):
        # One side at a time holds the base: it is unloaded between, which is not part of the time.
        per_side: dict[str, list[float]] = {side: [] for side in sides}
        for number in range(-1, rounds):
            for side in sorted(sides, reverse=bool(number % 2)):
                found = seconds_of(partial(act, side), device)
                if number >= 0:
                    per_side[side].append(found)
                if what == "inject":
                    models[side].save_pretrained(folder / side)
                base = models.pop(side).unload()
        seconds[what] = per_side
    return [
        {
            "shape": name,
            "side": side,
            "file_bytes": sum(file.stat().st_size for file in (folder / side).glob("adapter_model*")),
            "inject_seconds": statistics.median(seconds["inject"][side]),
            "load_seconds": statistics.median(seconds["load"][side]),
            "rounds": rounds,
        }
        for side in sides
    ]


def import_seconds(rounds: int) -> dict[str, float]:
    """Seconds to import peft, and what craft_peft adds, by the clock of a fresh process."""
    code = "import time; t = time.perf_counter(); import {}; print(time.perf_counter() - t)"
    found: dict[str, list[float]] = {"peft": [], "peft, craft_peft": []}
    for number in range(-1, rounds):
        for modules, times in found.items():
            done = subprocess.run(
                [sys.executable, "-c", code.format(modules)], capture_output=True, text=True, check=True, env=os.environ
            )
            if number >= 0:
                times.append(float(done.stdout))
    pairs = zip(found["peft, craft_peft"], found["peft"], strict=True)
    return {"peft": statistics.median(found["peft"]), "craft_peft_adds": statistics.median(a - b for a, b in pairs)}


def own_import_seconds() -> float:
    """What Python counts for this package's own modules when it is imported after peft (`-X importtime`)."""
    command = [sys.executable, "-X", "importtime", "-c", "import peft, craft_peft"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stderr.splitlines()
    total = next(line for line in lines if line.endswith("| craft_peft"))
    return int(total.split("|")[1]) / 1e6


def show(rows: list[dict[str, Any]], imports: dict[str, float]) -> None:
    table = Table("shape", "side", "file, MB", "inject, s", "load, s")
    for row in rows:
        numbers = (row["file_bytes"] / 1e6, row["inject_seconds"], row["load_seconds"])
        table.add_row(row["shape"], row["side"], *(f"{number:.3f}" for number in numbers))
    Console().print(table)
    print({name: round(seconds, 3) for name, seconds in imports.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny models, one round")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    arguments = parser.parse_args()
    rounds = 1 if arguments.quick else 3
    folder = Path(tempfile.mkdtemp())
    try:
        rows = []
        for name in SHAPES:
            rows += measure(name, rounds, arguments.device, arguments.quick, folder / name)
    finally:
        shutil.rmtree(folder)
    imports = import_seconds(1 if arguments.quick else 7)
    imports["own"] = own_import_seconds()
    show(rows, imports)
    write(arguments.output, {"rows": rows, "import": imports})


if __name__ == "__main__":
    main()
