"""Seconds of a training step of each method of an experiment, one step of each in turn.

    python experiments/steps.py experiments/compare.toml --data GLUE --to results/compare_steps.json

The runs of a sweep share the machine, so that their wall time says little. Here one process takes a step of every
method, in another order every round: whatever else the machine does falls on all of them alike. Kept are the wall time
and the processor time of the process.
"""

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import DataCollatorWithPadding, set_seed

from craft_peft.glue.encoding import encode
from craft_peft.glue.machine import describe_processor, describe_versions, find_commit
from craft_peft.glue.methods import METHODS, make_peft_config
from craft_peft.glue.models import adapt
from craft_peft.glue.optimization import RunTrainer, trainer_arguments
from craft_peft.glue.pretrained import load_base
from craft_peft.glue.settings import TrainingConfig, read_data
from craft_peft.glue.sweep.counts import Counts
from craft_peft.glue.sweep.experiment import read_experiment
from craft_peft.glue.sweep.plan import Plan


def configs_of(arguments: argparse.Namespace) -> dict[str, TrainingConfig]:
    """By label the first run of each method, at the rate of its recipe."""
    experiment = read_experiment(arguments.experiment)
    plan = Plan(experiment, Counts(experiment.model, Path(tempfile.gettempdir()) / "no-counts"), arguments.data)
    found: dict[str, TrainingConfig] = {}
    for cell in plan.cells:
        if cell.factor in (None, 1.0):
            found.setdefault(cell.method, plan.decide(cell, {cell.method: 1.0}).config)
    return found


def measure(configs: dict[str, TrainingConfig], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds by method and clock; the first round, which allocates what the others find, is left out."""
    batches = read_batches(next(iter(configs.values())), rounds)
    stepping = [(label, make_step(config)) for label, config in configs.items()]
    seconds: dict[str, dict[str, list[float]]] = {label: {"wall": [], "processor": []} for label, _ in stepping}
    for number, batch in enumerate(batches):
        random.Random(number).shuffle(stepping)
        for label, step in stepping:
            start = time.perf_counter(), time.process_time()
            step(batch)
            seconds[label]["wall"].append(time.perf_counter() - start[0])
            seconds[label]["processor"].append(time.process_time() - start[1])
        medians = {label: statistics.median(clocks["processor"]) for label, clocks in seconds.items()}
        shown = ", ".join(f"{label} {median:.2f} s" for label, median in sorted(medians.items(), key=lambda m: m[1]))
        print(f"round {number + 1} of {len(batches)}, load {os.getloadavg()[0]:.1f}: {shown}", flush=True)
    return {label: {clock: values[1:] for clock, values in clocks.items()} for label, clocks in seconds.items()}


def read_batches(config: TrainingConfig, rounds: int) -> list[dict[str, torch.Tensor]]:
    data = read_data(config)
    _, tokenizer = load_base(config.model, data.task)
    recipe = config.resolve_recipe(1)
    rows = encode(data.train.shuffle(seed=config.seed), tokenizer, recipe.max_length)
    collate = DataCollatorWithPadding(tokenizer)
    size = recipe.batch_size
    chosen = [[i % len(rows) for i in range(r * size, (r + 1) * size)] for r in range(rounds + 1)]
    return [dict(collate([rows[i] for i in batch])) for batch in chosen]


def make_step(config: TrainingConfig):
    """A model with its optimizer, as a function that takes one training step on a batch."""
    set_seed(config.seed)
    base, _ = load_base(config.model, read_data(config).task)
    model = adapt(base, make_peft_config(config.method, config.options()), METHODS[config.method].trains_base).train()
    recipe = config.resolve_recipe(1)
    training = trainer_arguments(Path(tempfile.gettempdir()) / "no-steps", recipe, config.seed, "float32", steps=1)
    trainer = RunTrainer(recipe, model=model, args=training, eval_dataset={})  # asked for, never used
    optimizer = trainer.create_optimizer()

    def step(batch: dict[str, torch.Tensor]) -> None:
        optimizer.zero_grad()
        trainer.compute_loss(model, batch).backward()
        torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], recipe.clip)
        optimizer.step()

    return step


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", type=Path, help="experiment file")
    parser.add_argument("--data", help="folder of the GLUE files")
    parser.add_argument("--to", required=True, type=Path, help="file to write")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20, help="steps a method, after a first one to warm up")
    arguments = parser.parse_args(words)
    torch.set_num_threads(arguments.threads)
    seconds = measure(configs_of(arguments), arguments.rounds)
    written = {"processor": describe_processor(), "threads": arguments.threads, "load": os.getloadavg()[0]}
    written |= {"versions": describe_versions(), "commit": find_commit(), "seconds": seconds}
    arguments.to.parent.mkdir(parents=True, exist_ok=True)
    arguments.to.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
