"""Adapters loaded, used and deleted in one process, thousands of times: its memory stays where it was.

    python trust/soak.py --cycles 2000 --output results/trust.json     # a minute
    python trust/soak.py --cycles 60                                   # that it runs

Adapters of four methods take turns on one base model of RoBERTa's kind: each is loaded twice, the first deleted, the
second used, and the base taken back. After the first tenth of the cycles, in which Python and PyTorch take what they
keep, the resident set may change by 5 % at most.
"""

import argparse
import gc
import sys
import tempfile
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from record import keep, rss
from transformers import RobertaConfig, RobertaModel

from craft_peft import CraftConfig, LotrConfig, SuperLoraConfig, load_adapter, save_adapter

TARGETS = ["query", "value"]
CONFIGS = [
    CraftConfig(target_modules=TARGETS, init_weights=False),
    LotrConfig(target_modules=TARGETS, r=8, init_weights=False),
    SuperLoraConfig(target_modules=TARGETS, r=8, init_weights=False),
    LoraConfig(target_modules=TARGETS, r=8, init_lora_weights=False),
]
ALLOWED = 0.05


def base_model() -> RobertaModel:
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=100, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=256
    )
    return RobertaModel(config).eval()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=2000)
    parser.add_argument("--output", type=Path, help="add the figures to this JSON file")
    arguments = parser.parse_args()
    start, held = time.perf_counter(), []
    tokens = torch.arange(16).reshape(2, 8)
    with tempfile.TemporaryDirectory() as place, torch.no_grad():
        expected = []
        for number, config in enumerate(CONFIGS):
            model = get_peft_model(base_model(), config).eval()
            save_adapter(model, Path(place) / str(number))
            expected.append(model(input_ids=tokens).last_hidden_state)
        base = base_model()
        plain = base(input_ids=tokens).last_hidden_state
        for cycle in range(arguments.cycles):
            number = cycle % len(CONFIGS)
            model = load_adapter(base, Path(place) / str(number), "first")
            load_adapter(model, Path(place) / str(number), "second")
            model.delete_adapter("first")
            model.set_adapter("second")
            assert torch.equal(model(input_ids=tokens).last_hidden_state, expected[number]), f"cycle {cycle}"
            base = model.unload()
            if cycle % max(1, arguments.cycles // 40) == 0:
                gc.collect()
                held.append(rss("VmRSS"))
        assert torch.equal(base(input_ids=tokens).last_hidden_state, plain)
    settled = held[len(held) // 10 :]
    change = max(settled) / min(settled) - 1
    figures = {
        "cycles": arguments.cycles,
        "first_bytes": settled[0],
        "last_bytes": settled[-1],
        "largest_change": round(change, 4),
        "seconds": round(time.perf_counter() - start),
    }
    keep(arguments.output, "soak", figures)
    return 1 if change > ALLOWED else 0


if __name__ == "__main__":
    sys.exit(main())
