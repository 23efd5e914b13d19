"""An experiment of runs that take about a second, and an executor that runs them in this process."""

from __future__ import annotations

import json
import os
import signal
from concurrent.futures import Future
from pathlib import Path

from tiny_encoder import review, write_encoder
from transformers import TrainerCallback

from craft_peft.glue.sweep.commands import Command, Ended
from craft_peft.glue.sweep.counts import Counts
from craft_peft.glue.sweep.experiment import read_experiment
from craft_peft.glue.sweep.job import run_job
from craft_peft.glue.sweep.plan import Plan
from craft_peft.glue.sweep.runner import Listener, Sweep
from craft_peft.glue.sweep.store import COUNTS, Store

TOML = """
model = "{model}"
precision = "float32"
seeds = [0, 1]
hold_out = 0.2
recipe = {{ batch_size = 16, head_learning_rate = 0.02 }}

[learning_rates]
factors = [1, 10]
choose_on = ["sst2"]

[tasks.sst2]
epochs = 2

[tasks.cola]
epochs = 1
rows = 32

[methods.craft]
budget = 600

[methods."lora r=2"]
method = "lora"
ranks = 2
learning_rate = 0.01

[methods.head]
"""
RUNS = 4 + 4 + 4 + 1  # craft, lora and head on two tasks with two seeds; one run chooses a rate and is not a main one


def write_glue(folder: Path) -> Path:
    """SST-2 and CoLA in the layout of the official files."""
    for task, head, row in (
        ("SST-2", "sentence\tlabel\n", "{text}\t{label}\n"),
        ("CoLA", "", "x\t{label}\t*\t{text}\n"),
    ):
        (folder / task).mkdir(parents=True)
        for name, numbers in (("train", range(64)), ("dev", range(64, 96))):
            rows = [row.format(text=text, label=int(label == "good")) for text, label in map(review, numbers)]
            (folder / task / f"{name}.tsv").write_text(head + "".join(rows))
    return folder


def write_sweep(folder: Path, toml: str = TOML) -> Path:
    """An encoder, data and an experiment file; the file's path."""
    write_encoder(folder / "encoder")
    write_glue(folder / "glue")
    path = folder / "tiny.toml"
    path.write_text(toml.format(model=folder / "encoder"))
    return path


def make_sweep(path: Path, folder: Path | None = None, adopted: Path | None = None, **options: object) -> Sweep:
    """The sweep of an experiment file beside whose data it stands; runs and results go beside it, too."""
    folder = folder or path.parent
    store = Store(folder / "runs", folder / "results")
    experiment = read_experiment(path)
    if adopted is not None:
        assert store.adopt(adopted, experiment.model) == []
    plan = Plan(experiment, Counts(experiment.model, store.runs / COUNTS), str(path.parent / "glue"))
    return Sweep(plan, store, **options)


class InProcess:
    """Runs a command in this process, at once."""

    slots = 1

    def __init__(self, *callbacks: TrainerCallback) -> None:
        self.callbacks = callbacks
        self.ran: list[str] = []
        self.closed = False

    def submit(self, command: Command) -> Future[Ended]:
        future: Future[Ended] = Future()
        self.ran.append(command.folder.name)
        future.set_result(Ended(run_job(json.loads(command.words[-1]), callbacks=self.callbacks), 0.0))
        return future

    def close(self) -> None:
        self.closed = True


class Told(Listener):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[tuple] = []

    def ended(self, planned, state):
        self.events.append((state, planned.cell.name))

    def chosen(self, method, scores):
        self.events.append(("chosen", method, scores))


class DieOnce(TrainerCallback):
    """Kills a process at a step, the first time that it comes there: a file says whether it was there."""

    def __init__(self, step: int, marker: Path, pid: int) -> None:
        self.step, self.marker, self.pid = step, marker, pid

    def on_step_end(self, args, state, control, **keywords):
        if state.global_step == self.step:
            try:
                self.marker.touch(exist_ok=False)
            except FileExistsError:
                return
            os.kill(self.pid, signal.SIGKILL)
            signal.pause()  # until the pipe from the process that was killed ends this one
