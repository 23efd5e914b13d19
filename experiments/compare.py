"""Compares the methods on one task: each at its own best of three learning rates, at one budget of parameters.

    python experiments/compare.py train --model FOLDER --data GLUE --runs runs/compare --jobs 2
    python experiments/compare.py steps --model FOLDER --data GLUE --runs runs/compare --rounds 20
    python experiments/compare.py publish --runs runs/compare --name all-MiniLM-L6-v2 --to results/compare

- `train` runs every method at its start rate, then at three times and a third of it, each run in a process of its own,
  so that its peak memory is its own. Finished runs are skipped: interrupt it and start it again at will. A run that
  diverges is kept as such.
- `steps` measures the seconds of a training step in one process that takes one step of each method in turn, so that
  whatever else the machine does falls on all of them alike: the wall time, and the processor time of the process. The
  runs of `train` share the machine: their wall time says little.
- `publish` writes what `docs/templates/comparison.md.jinja` shows. The rate of a method is the one with the best score
  on the development set after the last epoch: chosen on the rows that it is measured on, for every method alike.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import DataCollatorWithPadding, set_seed

from craft_peft import CraftError
from craft_peft.glue.budgets import price
from craft_peft.glue.encoding import encode
from craft_peft.glue.machine import describe_processor, describe_versions, find_commit
from craft_peft.glue.method_row import MethodOptions, Ranks
from craft_peft.glue.methods import METHODS, make_peft_config
from craft_peft.glue.models import adapt, load_base
from craft_peft.glue.optimization import RunTrainer, trainer_arguments
from craft_peft.glue.runs import RESULT, RunFolder
from craft_peft.glue.settings import TrainingConfig, read_data
from craft_peft.glue.targets import Targets, empty_model, find_model_targets
from craft_peft.glue.training import train

FACTORS = (1.0, 3.0, 1 / 3)
# The most telling first; methods that are not named here come after these.
ORDER = ("craft", "lora-xs", "lora", "lotr", "superlora", "unilora", "vera", "pissa", "lokr", "head", "fourierft")
# Where the search of `--budget` ends far below the budget (PEFT's LoKr has no larger second factor at its factor 8).
RANKS: dict[str, Ranks] = {"lokr": (17, 4)}
FAILED = "failed.txt"


@dataclass(frozen=True)
class Plan:
    """One run: a method at a rate.

    Args:
        factor: On the method's start rate.
        config: What `train` takes.
    """

    factor: float
    config: TrainingConfig

    @property
    def name(self) -> str:
        return Path(self.config.output).name


def make_plans(arguments: argparse.Namespace) -> list[Plan]:
    targets = find_model_targets(empty_model(arguments.model))
    wanted = arguments.methods.split(",") if arguments.methods else sorted(METHODS, key=place)
    plans = []
    for factor in FACTORS:
        for method in wanted:
            # The head has no adapter, whose rate could be tried.
            if METHODS[method].config is not None or METHODS[method].trains_base or factor == 1:
                plans.append(make_plan(arguments, method, factor, targets))
    return plans


def place(method: str) -> int:
    return ORDER.index(method) if method in ORDER else len(ORDER)


def make_plan(arguments: argparse.Namespace, method: str, factor: float, targets: Targets) -> Plan:
    ranks = None
    if METHODS[method].config is not None:
        ranks = RANKS.get(method) or price(method, MethodOptions(budget=arguments.budget), targets).ranks
    config = TrainingConfig(
        output="",
        model=arguments.model,
        method=method,
        task=arguments.task,
        data=arguments.data,
        ranks=ranks,
        epochs=arguments.epochs,
        seed=arguments.seed,
        resume=True,
    )
    rate = float(f"{config.resolve_recipe(1).learning_rate * factor:.3g}")
    output = arguments.runs / f"{arguments.task}-{method}-{rate:.2e}-seed{arguments.seed}"
    return Plan(factor, replace(config, output=output, learning_rate=rate))


def run_all(arguments: argparse.Namespace) -> None:
    plans = make_plans(arguments)
    arguments.runs.mkdir(parents=True, exist_ok=True)
    missing = [plan for plan in plans if not done(plan)]
    print(f"{len(plans) - len(missing)} of {len(plans)} runs are there; {arguments.jobs} at a time")
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for line in pool.map(lambda plan: run_in_process(plan, arguments.threads), missing):
            print(line, flush=True)


def done(plan: Plan) -> bool:
    return RunFolder(Path(plan.config.output)).is_finished or (Path(plan.config.output) / FAILED).is_file()


def run_in_process(plan: Plan, threads: int) -> str:
    command = [sys.executable, "-c", "import json, sys, compare; compare.run_one(json.loads(sys.argv[1]))"]
    fields = {name: str(value) if isinstance(value, Path) else value for name, value in vars(plan.config).items()}
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": path}
    start = time.perf_counter()
    log = Path(f"{plan.config.output}.log")
    with log.open("w") as output:
        ended = subprocess.run([*command, json.dumps(fields)], stdout=output, stderr=output, env=environment)
    took = f"{time.perf_counter() - start:,.0f} s"
    if ended.returncode != 0:
        return f"{plan.name}: stopped, see {log}"
    if (Path(plan.config.output) / FAILED).is_file():
        return f"{plan.name}: {(Path(plan.config.output) / FAILED).read_text()} ({took})"
    result = json.loads((Path(plan.config.output) / RESULT).read_text())
    return f"{plan.name}: {result['score']['last']:.4f}, {result['parameters']['adapter']:,} parameters ({took})"


def run_one(fields: dict[str, Any]) -> None:
    """Trains one run in this process; what stops it as bad training is a result too."""
    config = TrainingConfig(**{**fields, "ranks": tuple(fields["ranks"]) if fields["ranks"] else None})
    try:
        train(config, console=Console(width=120))
    except CraftError as error:
        if "diverged" not in str(error):
            raise
        (Path(config.output) / FAILED).write_text(str(error))


def measure_steps(arguments: argparse.Namespace) -> None:
    """Seconds of a training step of each method, a step of each in turn, in another order every round."""
    torch.set_num_threads(arguments.threads)
    plans = [plan for plan in make_plans(arguments) if plan.factor == 1]
    batches = read_batches(plans[0].config, arguments.rounds)
    stepping = [(plan.config.method, make_step(plan.config)) for plan in plans]
    seconds: dict[str, dict[str, list[float]]] = {m: {"wall": [], "processor": []} for m, _ in stepping}
    for number, batch in enumerate(batches):
        random.Random(number).shuffle(stepping)
        for method, step in stepping:
            start = time.perf_counter(), time.process_time()
            step(batch)
            seconds[method]["wall"].append(time.perf_counter() - start[0])
            seconds[method]["processor"].append(time.process_time() - start[1])
        load = os.getloadavg()[0]
        print(f"round {number + 1} of {len(batches)}, load {load:.1f}: " + summary(seconds), flush=True)
    # The first round allocates what the others find.
    kept = {method: {clock: values[1:] for clock, values in clocks.items()} for method, clocks in seconds.items()}
    written = {"processor": describe_processor(), "threads": arguments.threads, "load": load, "seconds": kept}
    arguments.runs.mkdir(parents=True, exist_ok=True)
    (arguments.runs / "steps.json").write_text(json.dumps(written, indent=1) + "\n")


def summary(seconds: dict[str, dict[str, list[float]]]) -> str:
    medians = {method: statistics.median(clocks["processor"]) for method, clocks in seconds.items()}
    return ", ".join(f"{method} {median:.2f} s" for method, median in sorted(medians.items(), key=lambda item: item[1]))


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
    folder = Path(config.output).parent / "steps"
    training = trainer_arguments(folder, recipe, config.seed, "float32", steps=1)
    trainer = RunTrainer(recipe, model=model, args=training, eval_dataset={})  # asked for, never used
    optimizer = trainer.create_optimizer()

    def step(batch: dict[str, torch.Tensor]) -> None:
        optimizer.zero_grad()
        trainer.compute_loss(model, batch).backward()
        torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], recipe.clip)
        optimizer.step()

    return step


def publish(arguments: argparse.Namespace) -> None:
    """One file for the docs: what each run came to, and the seconds of a step."""
    folders = sorted(folder for folder in arguments.runs.iterdir() if folder.is_dir())
    finished = [folder for folder in folders if RunFolder(folder).is_finished]
    runs = [describe_run(json.loads((folder / RESULT).read_text())) for folder in finished]
    diverged = [folder.name for folder in folders if (folder / FAILED).is_file()]
    steps = arguments.runs / "steps.json"
    written = {
        "model": arguments.name,
        "runs": runs,
        "diverged": diverged,
        "steps": json.loads(steps.read_text()) if steps.is_file() else None,
        "versions": describe_versions(),
        "commit": find_commit(),
    }
    arguments.to.mkdir(parents=True, exist_ok=True)
    for task in sorted({run["task"] for run in runs}):
        path = arguments.to / f"{task}.json"
        of_task = [run for run in runs if run["task"] == task]
        path.write_text(json.dumps({"task": task, **written, "runs": of_task}, indent=1) + "\n")
        print(f"{path}: {len(of_task)} runs, {len(diverged)} diverged")


def describe_run(result: dict[str, Any]) -> dict[str, Any]:
    config, ranks = result["config"], result["config"]["ranks"]
    return {
        "task": result["task"],
        "method": result["method"],
        "setting": METHODS[result["method"]].setting.describe(tuple(ranks)) if ranks else "",
        "ranks": ranks,
        "learning_rate": config["recipe"]["learning_rate"],
        "recipe": config["recipe"],
        "seed": result["seed"],
        "parameters": result["parameters"],
        "score": result["score"]["last"],
        "scores": [record["score"] for record in result["curve"]],
        "metrics": result["metrics"],
        "seconds": result["seconds"],
        "peak_memory_bytes": result["peak_memory_bytes"],
        "processor": result["processor"],
        "commit": result["commit"],
    }


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, function in {"train": run_all, "steps": measure_steps, "publish": publish}.items():
        command = commands.add_parser(name, help=(function.__doc__ or "train what is missing").splitlines()[0])
        command.add_argument("--runs", required=True, type=Path, help="folder of the runs")
        command.set_defaults(function=function)
        if function is publish:
            command.add_argument("--to", required=True, type=Path, help="folder under results/")
            command.add_argument("--name", required=True, help="name of the base model")
            continue
        command.add_argument("--model", required=True, help="base model")
        command.add_argument("--data", required=True, help="folder of the GLUE files")
        command.add_argument("--task", default="stsb")
        command.add_argument("--methods", help="some methods, between commas (default: all)")
        command.add_argument(
            "--budget", type=int, default=40072, help="adapter parameters (default: CRAFT's on MiniLM)"
        )
        command.add_argument("--epochs", type=int, default=2)
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--threads", type=int, default=1, help="of each process")
        if function is run_all:
            command.add_argument("--jobs", type=int, default=1, help="runs at a time")
        else:
            command.add_argument("--rounds", type=int, default=20, help="steps a method, after a first one to warm up")
    arguments = parser.parse_args(words)
    arguments.function(arguments)


if __name__ == "__main__":
    main()
