"""`craft-peft sweep`: train all runs of an experiment file, and publish their results."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import Several, path, words, words_or_none
from .wording import option_console

if TYPE_CHECKING:
    from ..glue.sweep.executors import Executor
    from ..glue.sweep.runner import Sweep

EXAMPLE = """\
examples:
  What would be trained, with parameters and time:
    craft-peft sweep experiments/minilm.toml --data glue_data --dry-run

  Train it, two runs at a time; after an interruption, the same command again:
    craft-peft sweep experiments/minilm.toml --data glue_data --jobs 2

  A part of it, on a Ray cluster, with a GPU for each run:
    craft-peft sweep experiments/paper/roberta-base.toml --only 'rte-*,mrpc-craft-*' \\
      --executor ray --address auto --gpus 1
"""


def register(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command to the parser."""
    parser = subparsers.add_parser(
        "sweep",
        help="train methods x tasks x seeds x learning rates from one file",
        description="Train all runs of an experiment file. Finished runs are never run again, interrupted ones go on "
        "from their last checkpoint, failures are recorded and the rest goes on.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", metavar="FILE", help="experiment file (.toml)")
    parser.add_argument("--dry-run", action="store_true", help="show the plan and train nothing")
    folders = parser.add_argument_group("folders")
    folders.add_argument("--runs", metavar="DIR", help="folder of the runs (default: runs/NAME, as the file is called)")
    folders.add_argument("--to", metavar="DIR", help="folder of the published results (default: results/NAME)")
    folders.add_argument(
        "--data", metavar="DIR", help="folder of the GLUE files (default: $CRAFT_GLUE_DIR, else read from the Hub)"
    )
    folders.add_argument(
        "--adopt",
        action=Several,
        read=path,
        add=True,
        metavar="DIR",
        help="take finished runs of the same settings from here: folders of runs, or of published results",
    )
    which = parser.add_argument_group("which runs")
    which.add_argument(
        "--only",
        action=Several,
        read=words,
        default=(),
        metavar="PATTERN",
        help="names as stsb-craft-seed0, with * and ?",
    )
    which.add_argument("--retry-failed", action="store_true", help="also do runs again that failed before")
    _add_executor(parser)
    parser.add_argument(
        "--report-to",
        action=Several,
        read=words_or_none,
        default=(),
        metavar="NAME",
        help="tensorboard, wandb or mlflow (default: none)",
    )
    parser.set_defaults(run=run, interrupted=" The same command goes on from the last checkpoints.")


def _add_executor(parser: argparse.ArgumentParser) -> None:
    where = parser.add_argument_group("where")
    where.add_argument("--executor", default="local", choices=("local", "ray"), help="(default: local)")
    where.add_argument("--jobs", type=int, metavar="N", help="runs at a time (default: as many as fit)")
    where.add_argument("--threads", type=int, default=1, metavar="N", help="processor cores of a run (default: 1)")
    where.add_argument(
        "--address", metavar="HOST", help="with ray: the cluster, or auto (default: one on this machine)"
    )
    where.add_argument("--gpus", type=float, default=0, metavar="N", help="with ray: GPUs of a run (default: 0)")
    where.add_argument("--memory", type=float, metavar="GIB", help="with ray: memory of a run")
    where.add_argument(
        "--launch", metavar="WORDS", help="start each run by `accelerate launch WORDS`, as '--config_file ddp.yaml'"
    )


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    from ..glue.sweep.table import Progress, describe_rates, describe_time, plan_table, summary_lines

    console = option_console(arguments)
    sweep = _make_sweep(arguments)
    if arguments.dry_run:
        console.print(plan_table(sweep))
        for line in (describe_rates(sweep), describe_time(sweep, arguments.jobs or _slots(arguments, sweep))):
            console.print(line, soft_wrap=True)
        return 0
    with sweep.store.alone():
        sweep.plan.counts.save()
        executor = _make_executor(arguments, sweep)
        console.print(describe_time(sweep, executor.slots), soft_wrap=True)
        with Progress(sweep, console, executor.slots) as progress:
            complete = sweep.run(executor, progress, arguments.retry_failed)
    for line in summary_lines(sweep):
        console.print(line, soft_wrap=True)
    console.print(f"The results are in {sweep.store.published}", soft_wrap=True)
    return 0 if complete else 1


def _make_sweep(arguments: argparse.Namespace) -> Sweep:
    from ..errors import CraftError
    from ..glue.loggers import check_loggers
    from ..glue.pretrained import resolve_model_name
    from ..glue.sweep.counts import Counts
    from ..glue.sweep.experiment import read_experiment
    from ..glue.sweep.plan import Plan
    from ..glue.sweep.runner import Sweep
    from ..glue.sweep.store import COUNTS, Store

    for name in ("jobs", "threads"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise CraftError(f"`--{name} {value}` cannot be used: it must be a whole number above 0.")
    check_loggers(arguments.report_to)
    experiment = read_experiment(arguments.file)
    missing = [folder for folder in arguments.adopt if not Path(folder).is_dir()]
    if missing:
        raise CraftError(f"There is no folder {missing[0]} to adopt runs from.")
    runs = Path(arguments.runs or f"runs/{experiment.name}")
    store = Store(runs, Path(arguments.to or f"results/{experiment.name}"))
    for folder in arguments.adopt:
        for unusable in store.adopt(Path(folder), resolve_model_name(experiment.model)):
            print(f"left out: {unusable}", file=sys.stderr)
    plan = Plan(experiment, Counts(experiment.model, runs / COUNTS), arguments.data)
    launch = arguments.launch if arguments.launch is not None else experiment.launch
    return Sweep(
        plan,
        store,
        arguments.only,
        arguments.threads,
        arguments.report_to,
        None if launch is None else shlex.split(launch),
    )


def _slots(arguments: argparse.Namespace, sweep: Sweep) -> int:
    import torch

    from ..glue.sweep.executors import how_many_fit

    return how_many_fit(arguments.threads, sweep.memory_need(), torch.cuda.device_count())


def _make_executor(arguments: argparse.Namespace, sweep: Sweep) -> Executor:
    if arguments.executor == "local":
        from ..glue.sweep.executors import LocalExecutor

        return LocalExecutor(arguments.jobs, arguments.threads, sweep.memory_need())
    from ..glue.sweep.on_ray import RayExecutor

    memory = None if arguments.memory is None else int(arguments.memory * 2**30)
    print("starting Ray ..." if arguments.address is None else f"joining {arguments.address} ...", file=sys.stderr)
    return RayExecutor(arguments.address, arguments.threads, arguments.gpus, memory, arguments.jobs)
