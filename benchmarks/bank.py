"""Serving many adapters from one process: memory, switching, mixed batches; CRAFT's bank beside PEFT's LoRA.

    python benchmarks/bank.py --output results/performance/bank-cpu.json   # about ten minutes on two cores
    python benchmarks/bank.py --quick                                      # tiny models: that the script runs

The base is a RoBERTa-base shape with random weights, query and value adapted; LoRA has r = 8. In a mixed batch 16 rows
name 16 adapters (all there are, if fewer), other ones in every round, in evaluation without gradients. The floor is the
base model by itself. LoRA modules are put straight into PEFT's layers, since `add_adapter` walks over all modules each
time; how long one more call of it takes is measured. Memory is that of a process of its own for each side: resident
beyond the loaded base, and the bytes of tensors.
"""

import argparse
import ctypes
import gc
import json
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from pairs import ratio, read, replaced, seconds_of, take_turns, write
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, RobertaConfig, RobertaModel

from craft_peft import AdapterBank, CraftConfig

ROWS = 16
ROUNDS = {1: 9, 8: 5, 32: 3, 128: 2}  # by length
SIDES = ("transforms", "middles", "lora")
TARGETS = {"roberta": ["query", "value"], "llama": ["q_proj", "v_proj"]}


def encoder(quick: bool) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = RobertaConfig(vocab_size=1000, max_position_embeddings=514, **(sizes if quick else {}))
    return RobertaModel(config, add_pooling_layer=False).eval()


def decoder(quick: bool) -> PreTrainedModel:
    torch.manual_seed(0)
    width, layers = (32, 2) if quick else (512, 8)
    sizes = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "intermediate_size": 3 * width,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=1000, **sizes)).eval()


def names_of(count: int) -> list[str]:
    return [f"tenant-{number}" for number in range(count)]


def with_lora(base: PreTrainedModel, count: int) -> PeftModel:
    """Adapters as `add_adapter` leaves them, all from the first."""
    config = LoraConfig(r=8, target_modules=TARGETS[base.config.model_type], init_lora_weights=False)
    first, *others = names_of(count)
    model = get_peft_model(base, config, adapter_name=first).eval()
    for layer in model.modules():
        if hasattr(layer, "lora_A"):
            device = layer.lora_A[first].weight.device
            for name in others:
                for own in ("r", "lora_alpha", "scaling", "use_rslora", "use_dora", "lora_bias"):
                    if first in (values := getattr(layer, own, {})):
                        values[name] = values[first]
                layer.lora_dropout[name] = nn.Identity()
                layer.lora_A[name] = nn.Linear(layer.in_features, 8, bias=False, device=device).requires_grad_(False)
                layer.lora_B[name] = nn.Linear(8, layer.out_features, bias=False, device=device).requires_grad_(False)
    model.peft_config.update(dict.fromkeys(others, config))
    return model


def with_bank(base: PreTrainedModel, count: int, keep: str) -> PeftModel:
    ranks = (base.config.num_hidden_layers, *(min(100, base.config.hidden_size),) * 2)
    config = CraftConfig(ranks=ranks, target_modules=TARGETS[base.config.model_type], init_weights=False)
    model = get_peft_model(base, config).eval()
    bank = AdapterBank(model, keep=keep)
    for name in names_of(count):
        bank.add(name)
    return model


def with_side(side: str, base: PreTrainedModel, count: int) -> PeftModel:
    return with_lora(base, count) if side == "lora" else with_bank(base, count, side)


# ---------------------------------------------------------------------------------------------------------------------
# Memory, in a process of its own
# ---------------------------------------------------------------------------------------------------------------------


def resident(device: str) -> int:
    gc.collect()
    if device == "cuda":
        return torch.cuda.memory_allocated()
    with suppress(OSError, AttributeError):  # glibc alone: give free memory back, so that only what is held counts
        ctypes.CDLL(None).malloc_trim(0)
    return psutil.Process(os.getpid()).memory_info().rss


def tensor_bytes(model: PeftModel) -> int:
    """All tensors of a side that the base does not have."""
    own = ("lora_", "craft_")
    held = {t.data_ptr(): t.nbytes for n, t in model.state_dict().items() if any(f".{prefix}" in n for prefix in own)}
    bank = model.base_model.bank if hasattr(model.base_model, "bank") else None
    return sum(held.values()) + (sum(bank.resident_bytes.values()) if bank is not None else 0)


def memory(side: str, count: int, quick: bool, device: str) -> dict[str, int]:
    base = encoder(quick).to(device)
    base(torch.zeros(1, 4, dtype=torch.long, device=device))
    before = resident(device)
    model = with_side(side, base, count)
    return {"resident": resident(device) - before, "tensors": tensor_bytes(model)}


def memory_in_a_process(side: str, count: int, arguments: argparse.Namespace) -> dict[str, int]:
    if arguments.quick:
        return memory(side, count, True, arguments.device)
    command = [sys.executable, __file__, "--memory", side, str(count), "--device", arguments.device]
    done = subprocess.run(
        [*command, *(["--quick"] if arguments.quick else [])], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


# ---------------------------------------------------------------------------------------------------------------------
# Time
# ---------------------------------------------------------------------------------------------------------------------


def mixed(model: Callable[..., Any], count: int | None, inputs: torch.Tensor, **fields: Any) -> Callable[[], Any]:
    """A call with other adapters each time; of the base alone without a count."""
    chooser = random.Random(0)

    @torch.no_grad()
    def call() -> Any:
        if count is None:
            return model(inputs, **fields)
        some = chooser.sample(names_of(count), min(ROWS, count))
        return model(inputs, adapter_names=[some[row % len(some)] for row in range(ROWS)], **fields)

    return call


def ratios(seconds: dict[str, list[float]], **row: Any) -> dict[str, Any]:
    medians = {side: statistics.median(times) for side, times in seconds.items()}
    ours = [side for side in ("transforms", "middles") if side in seconds]
    faster = {side: ratio(seconds, "lora", side) for side in ours} if "lora" in seconds else {}
    over_floor = {side: ratio(seconds, side, "base") for side in seconds} if "base" in seconds else {}
    result = {**row, "seconds": medians, "times_lora": faster, "over_floor": over_floor, "rounds": len(seconds["lora"])}
    print(json.dumps(result), file=sys.stderr, flush=True)
    return result


def switching(models: dict[str, PeftModel], count: int, rounds: int, device: str) -> dict[str, Any]:
    def switch(side: str, chooser: random.Random) -> None:
        name = chooser.choice(names_of(count))
        model = models[side]
        model.set_adapter(name) if side == "lora" else model.base_model.bank.use(name)

    seconds = take_turns({side: partial(switch, side, random.Random(0)) for side in models}, rounds, device)
    for side in ("transforms", "middles"):
        models[side].base_model.bank.use(None)
    models["lora"].set_adapter("tenant-0")
    return ratios(seconds, what="switch", adapters=count)


def encoder_rows(count: int, lengths: list[int], quick: bool, device: str) -> list[dict[str, Any]]:
    plain = encoder(quick).to(device)
    models = {side: with_side(side, encoder(quick).to(device), count) for side in SIDES}
    found = [switching(models, count, 3 if quick else 9, device)]
    for length in lengths:
        inputs = torch.randint(5, 1000, (ROWS, length), device=device)
        sides = {"base": mixed(plain, None, inputs)}
        sides |= {side: mixed(model, count, inputs) for side, model in models.items()}
        rounds = 2 if quick else ROUNDS[length]
        found.append(ratios(take_turns(sides, rounds, device), what="forward", adapters=count, length=length))
    if not quick or count == 1:
        config = LoraConfig(r=8, target_modules=TARGETS["roberta"])
        found.append(
            {
                "what": "add",
                "adapters": count,
                "seconds": {
                    "lora": seconds_of(lambda: models["lora"].add_adapter("one-more", config), device),
                    **{s: seconds_of(lambda s=s: models[s].base_model.bank.add("one-more"), device) for s in SIDES[:2]},
                },
            }
        )
    return found


def decoder_row(count: int, quick: bool, device: str) -> dict[str, Any]:
    tokens = 3 if quick else 16
    fields = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    inputs = torch.randint(5, 1000, (ROWS, 4), device=device)
    fields["attention_mask"] = torch.ones_like(inputs)
    sides = {"base": mixed(decoder(quick).to(device).generate, None, inputs, **fields)}
    for side in SIDES:
        sides[side] = mixed(with_side(side, decoder(quick).to(device), count).generate, count, inputs, **fields)
    seconds = take_turns(sides, 2 if quick else 5, device)
    return ratios(seconds, what="generate", adapters=count, tokens=tokens)


# ---------------------------------------------------------------------------------------------------------------------


def show(rows: list[dict[str, Any]]) -> None:
    console = Console()
    table = Table(
        "adapters", "what", *(f"{side}, ms" for side in ("base", *SIDES)), "LoRA / transforms", "LoRA / middles"
    )
    for row in rows:
        if row["what"] == "memory":
            continue
        label = f"{row['what']} {row.get('length', row.get('tokens', ''))}"
        times = (f"{1000 * row['seconds'][s]:.1f}" if s in row["seconds"] else "" for s in ("base", *SIDES))
        faster = (f"{row['times_lora'][side]:.2f}" if row.get("times_lora") else "" for side in SIDES[:2])
        table.add_row(str(row["adapters"]), label, *times, *faster)
    console.print(table)
    table = Table("adapters", *(f"{side}, MB {kind}" for side in SIDES for kind in ("resident", "of tensors")))
    for row in rows:
        if row["what"] == "memory":
            sizes = (f"{row[side][kind] / 1e6:.1f}" for side in SIDES for kind in ("resident", "tensors"))
            table.add_row(str(row["adapters"]), *sizes)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny models, at most 10 adapters")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--parts", default="memory,encoder,decoder", help="which parts, with commas")
    parser.add_argument("--counts", help="how many adapters, with commas (default: 1,10,100,1000)")
    parser.add_argument("--lengths", default="1,8,32,128", help="tokens a row, with commas")
    parser.add_argument("--merge", action="store_true", help="keep the other parts' rows of the output file")
    parser.add_argument("--memory", nargs=2, metavar=("SIDE", "COUNT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    quick, device = arguments.quick, arguments.device
    if arguments.memory:
        print(json.dumps(memory(arguments.memory[0], int(arguments.memory[1]), quick, device)))
        return
    counts = [int(n) for n in (arguments.counts or ("1,10" if quick else "1,10,100,1000")).split(",")]
    rows: list[dict[str, Any]] = []
    for count in counts:
        if "memory" in arguments.parts:
            sizes = {side: memory_in_a_process(side, count, arguments) for side in SIDES}
            rows.append({"what": "memory", "adapters": count, **sizes})
        if "encoder" in arguments.parts:
            lengths = [int(n) for n in arguments.lengths.split(",")]
            rows += encoder_rows(count, lengths, quick, device)
        if "decoder" in arguments.parts:
            rows.append(decoder_row(count, quick, device))
    if arguments.merge:
        kept = read(arguments.output).get("rows", [])
        rows = replaced(kept, rows, lambda row: (row["what"], row["adapters"], row.get("length")))
        order = ["memory", "add", "switch", "forward", "generate"]
        rows.sort(key=lambda row: (row["adapters"], order.index(row["what"]), row.get("length", 0)))
    show(rows)
    write(arguments.output, {"rows": rows, "base": "RoBERTa-base shape", "batch": ROWS})


if __name__ == "__main__":
    main()
