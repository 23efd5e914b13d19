"""A training step with CRAFT, beside other adapters and beside the floor: time, and bytes kept for the backward pass.

    python benchmarks/step.py --output results/performance/step-cpu.json       # all settings; an hour on two cores
    python benchmarks/step.py --quick                                          # tiny models: that the script runs
    python benchmarks/step.py --settings main --sides craft,lora-8 --rounds 9  # one comparison

The floor is the base model with all weights frozen: forward, and the gradients of the inputs. Every side adapts query
and value of the same base, whose weights are random and which drops nothing; the optimizer is AdamW. Models of many
layers are cut to their first few, since a step costs the same for each; the table says how many. In bytes kept for the
backward pass each tensor counts once, and none that exists anyway (weights, factors). Also: generation with a cache.
"""

import argparse
import copy
import gc
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pairs import describe_machine, ratio, read, replaced, take_turns, write
from peft import LoraConfig, PeftConfig, PsoftConfig, VeraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PretrainedConfig,
    PreTrainedModel,
    RobertaConfig,
    RobertaModel,
)

from craft_peft import CraftConfig, LotrConfig, SuperLoraConfig

VOCABULARY = 1000  # small: a step does not train embeddings
WIDTHS, DEPTHS, RANKS = (256, 512, 1024, 2048), (2, 4, 8, 16), (8, 32, 64, 128, 256)


@dataclass(frozen=True)
class Shape:
    """A base model.

    Args:
        name: of the model whose sizes it has.
        config: its config.
        targets: its query and value projections.
    """

    name: str
    config: PretrainedConfig
    targets: tuple[str, ...] = ("query", "value")

    def build(self, generates: bool = False) -> PreTrainedModel:
        torch.manual_seed(0)
        if generates:
            return LlamaForCausalLM(self.config)
        return {"roberta": RobertaModel, "llama": LlamaModel}[self.config.model_type](self.config)


def roberta(name: str, width: int, layers: int) -> Shape:
    config = RobertaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=4 * width,
        num_attention_heads=width // 64 or 1,
        num_hidden_layers=layers,
        max_position_embeddings=1026,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return Shape(name, config)


def llama(name: str, width: int, layers: int) -> Shape:
    heads = width // 64 or 1
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=4 * width,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        num_hidden_layers=layers,
    )
    return Shape(name, config, ("q_proj", "v_proj"))


SHAPES = {
    "roberta-base": roberta("RoBERTa-base", 768, 12),
    "roberta-large": roberta("RoBERTa-large, 6 layers", 1024, 6),
    "llama": llama("Llama 3.2 1B, 2 layers", 2048, 2),
    "llama-deep": llama("Llama of 16 layers, 512 wide", 512, 16),
    "tiny": roberta("tiny", 128, 2),
    "tiny-llama": llama("tiny Llama", 128, 2),
    **{f"width-{width}": roberta(f"width {width}", width, 4) for width in WIDTHS},
    **{f"depth-{depth}": roberta(f"depth {depth}", 512, depth) for depth in DEPTHS},
}

ADAPTERS: dict[str, Callable[..., Any]] = {
    "dora": lambda **targets: LoraConfig(r=8, use_dora=True, **targets),
    "vera": lambda **targets: VeraConfig(r=256, **targets),
    "lora-xs": lambda **targets: PsoftConfig(
        r=41, psoft_alpha=41, psoft_orth=False, psoft_mag_a=False, psoft_mag_b=False, **targets
    ),
    "lotr": lambda **targets: LotrConfig(r=28, **targets),
    "superlora": lambda **targets: SuperLoraConfig(r=8, **targets),
}
FLOOR, FULL = "floor", "full"
OF_RANK = tuple(f"{name}-{rank}" for name in ("craft", "lora") for rank in RANKS)
THREE = (FLOOR, "craft", "lora-8")
ALL = (*THREE, "lora-64", *ADAPTERS, FULL)


@dataclass(frozen=True)
class Setting:
    """One comparison.

    Args:
        shape: key in `SHAPES`.
        batch: rows.
        length: tokens a row.
        dtype: of the base model; adapters are float32, as PEFT makes them.
        sides: which sides take turns.
        rounds: how often each, if not told otherwise.
    """

    shape: str
    batch: int
    length: int
    dtype: str = "float32"
    sides: tuple[str, ...] = THREE
    rounds: int = 5


@dataclass(frozen=True)
class Generation:
    """A prompt of 16 tokens continued greedily, with a cache of keys and values, in evaluation.

    Args:
        shape: key in `SHAPES`.
        batch: rows.
        new: tokens to generate.
        sides: which sides take turns; the floor is the base model.
        rounds: how often each, if not told otherwise.
    """

    shape: str
    batch: int
    new: int = 24
    sides: tuple[str, ...] = THREE
    rounds: int = 5


GRID = [(1, 16), (1, 128), (4, 128), (16, 128)]
SETTINGS: dict[str, list[Setting | Generation]] = {
    "main": [Setting("roberta-base", 16, 128, sides=ALL, rounds=5)],
    "grid": [
        Setting(shape, batch, length, rounds=11 if batch * length < 512 else 4)
        for shape in ("roberta-base", "roberta-large", "llama")
        for batch, length in GRID
    ],
    "long": [Setting(shape, 16, 512, rounds=2) for shape in ("roberta-base", "roberta-large", "llama")],
    "growth": [
        *(Setting(f"width-{width}", 4, 64) for width in WIDTHS),
        *(Setting(f"depth-{depth}", 4, 64) for depth in DEPTHS),
        Setting("width-512", 4, 64, sides=(FLOOR, *OF_RANK)),
    ],
    "generation": [Generation("llama", 1), Generation("llama", 16), Generation("llama-deep", 1)],
    "bfloat16": [
        Setting(shape, batch, length, "bfloat16", rounds=5)
        for shape in ("roberta-base", "llama")
        for batch, length in GRID
    ],
}
QUICK: list[Setting | Generation] = [
    Setting("tiny", 2, 16, sides=ALL, rounds=2),
    Setting("tiny-llama", 2, 16, "bfloat16", rounds=2),
    Generation("tiny-llama", 2, new=3, rounds=2),
]


def make_side(name: str, base: PreTrainedModel, shape: Shape) -> PreTrainedModel:
    """The base model with an adapter. All sides but `full` hold the very same base weights."""
    if name == FULL:
        return copy.deepcopy(base).requires_grad_(True)
    model = copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})
    if name == FLOOR:
        return model
    return get_peft_model(model, adapter_config(name, base.config, list(shape.targets)))


def adapter_config(name: str, base: PretrainedConfig, targets: list[str]) -> PeftConfig:
    """Of `ADAPTERS`, or CRAFT or LoRA of the rank that the name ends with."""
    if name in ADAPTERS:
        return ADAPTERS[name](target_modules=targets)
    method, _, rank = name.partition("-")
    if method == "lora":
        return LoraConfig(r=int(rank), target_modules=targets)
    if not rank:
        return CraftConfig(target_modules=targets)  # at the paper's ranks
    return CraftConfig(ranks=(base.num_hidden_layers, int(rank), int(rank)), target_modules=targets)


def make_step(model: nn.Module, embeddings: Tensor, weights: Tensor) -> Callable[[], None]:
    """A training step as a function; for the floor, without trained weights, forward and the inputs' gradients."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None
    inputs = embeddings if trained else embeddings.clone().requires_grad_()

    def step() -> None:
        (model(inputs_embeds=inputs).last_hidden_state * weights).sum().backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        inputs.grad = None

    return step


@contextmanager
def count_saved(model: nn.Module) -> Iterator[dict[int, int]]:
    """Bytes of each storage that autograd keeps for the backward pass, without those of the model itself."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    found: dict[int, int] = {}
    alive = []  # a storage that is freed and used again would count once

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


def saved_bytes(model: nn.Module, embeddings: Tensor) -> int:
    trains = any(parameter.requires_grad for parameter in model.parameters())
    inputs = embeddings if trains else embeddings.clone().requires_grad_()
    with count_saved(model) as found:
        model(inputs_embeds=inputs)
    return sum(found.values())


def compare_generation(setting: Generation, sides: tuple[str, ...], rounds: int, device: str) -> dict[str, Any]:
    shape = SHAPES[setting.shape]
    base = shape.build(generates=True).to(device).requires_grad_(False).eval()
    prompt = torch.arange(setting.batch * 16, device=device).reshape(setting.batch, 16)
    length = {"max_new_tokens": setting.new, "min_new_tokens": setting.new, "do_sample": False, "pad_token_id": 0}

    def generate(model: nn.Module) -> None:
        model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **length)

    models = {name: make_side(name, base, shape).eval() for name in sides}
    seconds = take_turns({name: partial(generate, model) for name, model in models.items()}, rounds, device)
    found = {
        name: {"seconds": seconds[name], **{f"of_{to}": ratio(seconds, name, to) for to in (FLOOR, "lora-8")}}
        for name in sides
    }
    described = {"shape": shape.name, "layers": base.config.num_hidden_layers, "width": base.config.hidden_size}
    return {**described, "batch": setting.batch, "new_tokens": setting.new, "dtype": "float32", "sides": found}


def compare(setting: Setting, sides: tuple[str, ...], rounds: int, device: str) -> dict[str, Any]:
    shape, dtype = SHAPES[setting.shape], getattr(torch, setting.dtype)
    base = shape.build().to(device=device, dtype=dtype).requires_grad_(False).train()
    models = {name: make_side(name, base, shape).train() for name in sides}
    torch.manual_seed(1)
    size = (setting.batch, setting.length, base.config.hidden_size)
    embeddings = torch.randn(size, device=device, dtype=dtype)
    weights = torch.randn(size, device=device, dtype=dtype) / size[-1] ** 0.5
    steps = {name: make_step(model, embeddings, weights) for name, model in models.items()}
    seconds = take_turns(steps, rounds, device)
    found: dict[str, Any] = {}
    for name, model in models.items():
        found[name] = {
            "seconds": seconds[name],
            "saved_bytes": saved_bytes(model, embeddings),
            "trained": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        }
        for other in (FLOOR, "lora-8"):
            if other in models:
                found[name][f"of_{other}"] = ratio(seconds, name, other)
        if device == "cuda":
            found[name]["peak_bytes"] = peak_bytes(steps[name])
    described = {"shape": shape.name, "layers": base.config.num_hidden_layers, "width": base.config.hidden_size}
    return {**described, "batch": setting.batch, "length": setting.length, "dtype": setting.dtype, "sides": found}


def name_of(result: dict[str, Any]) -> tuple[Any, ...]:
    return (*(result.get(key) for key in ("shape", "batch", "length", "new_tokens", "dtype")), *result["sides"])


def peak_bytes(step: Callable[[], None]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def show(result: dict[str, Any], console: Console) -> None:
    what = "{batch} x {length}" if "length" in result else "{batch} rows, {new_tokens} new tokens"
    title = ("{shape}, " + what + ", {dtype}").format(**result)
    table = Table("side", "seconds", "of the floor", "of LoRA r = 8", "kept beyond the floor", "trained", title=title)
    floor = result["sides"].get(FLOOR, {}).get("saved_bytes", 0)
    for name, side in result["sides"].items():
        ratios = [f"{side[key]:.3f}" if key in side else "" for key in ("of_floor", "of_lora-8")]
        kept = f"{(side['saved_bytes'] - floor) / 2**20:,.1f} MiB" if "saved_bytes" in side else ""
        trained = f"{side['trained']:,}" if "trained" in side else ""
        table.add_row(name, f"{statistics.median(side['seconds']):.3f}", *ratios, kept, trained)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", default=",".join(SETTINGS), help=f"some of {', '.join(SETTINGS)} (default: all)")
    parser.add_argument("--sides", help="some sides, between commas (default: those of the setting)")
    parser.add_argument("--rounds", type=int, help="rounds of each setting (default: 3 to 9)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--quick", action="store_true", help="tiny models, two rounds")
    arguments = parser.parse_args()
    chosen = QUICK if arguments.quick else [s for name in arguments.settings.split(",") for s in SETTINGS[name]]
    console, before = Console(), read(arguments.output)
    found = {kind: before.get(kind, []) for kind in ("settings", "generation")}
    for setting in chosen:
        sides = tuple(arguments.sides.split(",")) if arguments.sides else setting.sides
        kind = "settings" if isinstance(setting, Setting) else "generation"
        run = compare if isinstance(setting, Setting) else compare_generation
        result = run(setting, sides, arguments.rounds or setting.rounds, arguments.device)  # type: ignore[operator]
        show(result, console)
        found[kind] = replaced(found[kind], [result], name_of)
        write(arguments.output, {**found, "device": arguments.device})
        gc.collect()  # models hold themselves by cycles; the next ones need their memory
    if arguments.output is None:
        console.print(describe_machine()["processor"])


if __name__ == "__main__":
    main()
