"""Fine-tuning a pretrained model with one method on one task."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from accelerate.utils import broadcast_object_list
from accelerate.utils.memory import should_reduce_batch_size
from peft import PeftConfig, PeftModel
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    set_seed,
)

from ..errors import CraftError
from ..plugin.bases import fit_bases, wants_batches
from . import machine, results
from .budgets import Choice, choose_setting
from .checkpoints import SealCheckpoints
from .data import TextData, hold_out
from .encoding import check_length, encode, longest_first
from .heads import sample, start_head
from .interruption import StopOnInterrupt
from .loggers import check_loggers, log_folder
from .method_row import Ranks
from .methods import METHODS, find_method, make_peft_config
from .models import (
    adapt,
    choose_precision,
    start_from_run,
)
from .optimization import HELD_OUT, RunTrainer, Watch, measure, read_curve, trainer_arguments
from .pretrained import describe_new_modules, is_head_parameter, load_base, quiet_transformers, resolve_model_name
from .recipes import Recipe
from .results import Parameters, Result, Seconds
from .runs import RESULT, RunFolder
from .settings import TrainingConfig as TrainingConfig
from .settings import read_data
from .summary import print_summary
from .targets import empty_model, find_model_targets

EVALUATED = re.compile("eval_.*_runtime")


def train(
    config: TrainingConfig,
    data: TextData | None = None,
    console: Console | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    began: float | None = None,
) -> Result:
    """Trains, evaluates after every epoch, and leaves a finished run folder.

    Everything that can be wrong with the input is found before the output folder is touched. Under `accelerate launch`
    all processes train and share each batch; the first one alone prints and writes.

    Args:
        config: What to do.
        data: Data sets in memory, instead of those that the config names.
        console: Where to show summary and progress; None for standard error.
        callbacks: Further callbacks for `transformers.Trainer`.
        began: When the process was started for this run, in seconds since 1970, to report the time until now.

    Returns:
        The result, as written to `result.json`; the same in every process.

    Raises:
        CraftError: Input that cannot be used.
    """
    clock = _Clock(began)
    processes = machine.join_processes()
    console = (console or Console(stderr=True)) if processes.is_main_process else Console(quiet=True)
    machine.reset_peak_memory()
    folder = RunFolder(Path(config.output))
    if processes.is_main_process:
        folder.check(config.resume, config.overwrite)
    check_loggers(config.report_to)
    with console.status("reading data and model ..."):
        run = _prepare(config, data, processes.num_processes)
    checkpoint: Path | None = None
    damage: list[str] = []
    if processes.is_main_process:
        checkpoint, damage = folder.claim(run.settings, run.data.task.fields(), config.resume)
    (checkpoint,) = broadcast_object_list([checkpoint])
    if run.choice is not None:
        console.print(f"Chosen: {run.choice}", soft_wrap=True)
    print_summary(console, run.data, run.model, run.recipe, run.parameters, run.settings, run.held_out, run.steps)
    for line in damage:
        console.print(f"Warning: a checkpoint cannot be used. {line}.", soft_wrap=True)
    if checkpoint is not None:
        console.print(f"Resuming from {checkpoint.name}.")
    stop = StopOnInterrupt(console)
    with log_folder(folder.logs):
        trainer, watch = _make_trainer(run, folder, console, [SealCheckpoints(), stop, *callbacks])
    try:
        with quiet_transformers(), stop.listening(), _memory_explained(run.recipe):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        watch.close()
    result = _publish(run, folder, trainer, clock.measure(watch, run.fitting)) if processes.is_main_process else None
    (result,) = broadcast_object_list([result])
    return result


@contextmanager
def _memory_explained(recipe: Recipe) -> Iterator[None]:
    """Says what to lower when memory runs out, on a processor or a GPU."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not should_reduce_batch_size(error):
            raise
        raise CraftError(
            f"Out of memory in training: {str(error).strip().partition(chr(10))[0]} Lower `batch_size` (now "
            f"{recipe.batch_size}) or `max_length` (now {recipe.max_length}), or use a smaller model; start again "
            "with `overwrite=True`."
        ) from error


class _Clock:
    """Measures what a run takes besides its steps, of this process alone when it went on with an interrupted one."""

    def __init__(self, began: float | None) -> None:
        self.start = time.perf_counter()
        self.startup = None if began is None else time.time() - began

    def measure(self, watch: Watch, fitting: float) -> Callable[[list[dict[str, Any]]], Seconds]:
        """What turns the trainer's log into seconds, when everything is saved."""

        def seconds(log: list[dict[str, Any]]) -> Seconds:
            evaluation = sum(value for entry in log for name, value in entry.items() if EVALUATED.fullmatch(name))
            return Seconds(
                startup=self.startup,
                setup=watch.began - self.start - fitting,
                training=next(entry["elapsed"] for entry in reversed(log) if "elapsed" in entry) - evaluation,
                evaluation=evaluation,
                saving=time.perf_counter() - watch.ended,
                fitting=fitting,
            )

        return seconds


class _Stopwatch:
    """Adds up the seconds of `with` blocks."""

    seconds = 0.0

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self.seconds += time.perf_counter() - self.start


@dataclass(frozen=True)
class _Run:
    """Everything that is ready before the first step."""

    config: TrainingConfig
    processes: int
    choice: Choice | None
    data: TextData
    held_out: datasets.Dataset | None
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    recipe: Recipe
    settings: dict[str, Any]
    parameters: Parameters
    train_set: datasets.Dataset
    dev_sets: dict[str, datasets.Dataset]
    fitting: float

    @property
    def steps_an_epoch(self) -> int:
        return math.ceil(len(self.train_set) / self.recipe.batch_size)

    @property
    def steps(self) -> int:
        return self.steps_an_epoch * (self.recipe.epochs or 1)


def _prepare(config: TrainingConfig, data: TextData | None, processes: int) -> _Run:
    method = find_method(config.method)
    if not 0 <= config.seed < 2**32:
        raise CraftError(f"seed={config.seed} cannot be used. Give a whole number from 0 to {2**32 - 1}.")
    model_name = resolve_model_name(config.model)
    peft_config, ranks, choice = _choose_adapter(config)
    # The budget stays in the settings, to say where the ranks come from; they are decided now.
    config = dataclasses.replace(config, ranks=ranks)
    in_memory = data is not None
    data = read_data(config) if data is None else data
    if data.train is None:
        raise CraftError("The data has no training rows. Give data with a training set.")
    recipe = config.resolve_recipe(data.task.epochs)
    if recipe.batch_size % processes:
        raise CraftError(
            f"A batch of {recipe.batch_size} rows cannot be shared evenly by {processes} processes. Use a "
            "`batch_size` that their number divides."
        )
    rest, held_out = hold_out(data.train, config.hold_out, config.seed) if config.hold_out else (data.train, None)
    # Before the model is made, so that its head starts the same way whatever the method.
    set_seed(config.seed)
    base, tokenizer = load_base(model_name, data.task)
    check_length(recipe.max_length, base, config.model)
    code = partial(encode, tokenizer=tokenizer, max_length=recipe.max_length)
    train_set = code(rest)
    watched = data.dev if held_out is None else {**data.dev, HELD_OUT: held_out}
    dev_sets = {name: code(rows) for name, rows in watched.items()}
    dev_sets = {name: rows.select(longest_first(rows)) for name, rows in dev_sets.items()}
    collator = DataCollatorWithPadding(tokenizer)
    set_head = partial(
        start_head, task=data.task, rows=train_set, collator=collator, start=recipe.head_start, seed=config.seed
    )
    fitting = _Stopwatch()
    if config.start_from is None:
        with fitting:
            set_head(base)
    total = sum(parameter.numel() for parameter in base.parameters())
    precision = choose_precision(config.precision, getattr(base.config, "hidden_size", 0))
    model = adapt(base, peft_config, method.trains_base)
    if wants_batches(model):
        with fitting:
            fit_bases(model, DataLoader(sample(train_set, config.seed), batch_size=32, collate_fn=collator))
    if config.start_from is not None:
        start_from_run(model, config.start_from, config.method, model_name)
        with fitting:
            set_head(model.get_base_model() if isinstance(model, PeftModel) else model)
    return _Run(
        config=config,
        processes=processes,
        choice=choice,
        data=dataclasses.replace(data, train=rest, notes=(*data.notes, *describe_new_modules(base, config.model))),
        held_out=held_out,
        model=model,
        tokenizer=tokenizer,
        recipe=recipe,
        settings=config.settings(recipe, model_name, precision, in_memory),
        parameters=_count(model, total),
        train_set=train_set,
        dev_sets=dev_sets,
        fitting=fitting.seconds,
    )


def _choose_adapter(config: TrainingConfig) -> tuple[PeftConfig | None, Ranks | None, Choice | None]:
    """The adapter's config, the ranks in it, and how a budget chose them: found without weights, and so early."""
    options = config.options()
    if make_peft_config(config.method, options) is None:
        return None, None, None
    targets = find_model_targets(empty_model(config.model), options.target_modules)
    choice = choose_setting(config.method, options, targets) if options.budget is not None else None
    ranks = find_method(config.method).setting.on(targets, choice.ranks if choice else options.ranks)
    peft_config = make_peft_config(config.method, dataclasses.replace(options, ranks=ranks, budget=None))
    assert peft_config is not None
    peft_config.target_modules = targets.names
    return peft_config, ranks, choice


def _count(model: nn.Module, base_total: int) -> Parameters:
    trained = [(name, parameter.numel()) for name, parameter in model.named_parameters() if parameter.requires_grad]
    head = sum(count for name, count in trained if is_head_parameter(name, model))
    adapter = sum(count for _, count in trained) - head
    # PEFT keeps a frozen copy of the head beside the trained one, so that counting its parameters counts it twice.
    return Parameters(adapter, head, base_total + (adapter if isinstance(model, PeftModel) else 0))


def _make_trainer(
    run: _Run, folder: RunFolder, console: Console, callbacks: Sequence[TrainerCallback]
) -> tuple[RunTrainer, Watch]:
    watch = Watch(console)
    arguments = trainer_arguments(
        folder.checkpoints, run.recipe, run.settings["seed"], run.settings["precision"], run.steps
    )
    arguments.per_device_train_batch_size = run.recipe.batch_size // run.processes
    arguments.report_to = list(run.config.report_to)
    arguments.run_name = folder.path.name
    with quiet_transformers():
        trainer = RunTrainer(
            run.recipe,
            model=run.model,
            args=arguments,
            train_dataset=run.train_set,
            eval_dataset=run.dev_sets,
            data_collator=DataCollatorWithPadding(run.tokenizer),
            compute_metrics=partial(measure, run.data.task),
            callbacks=[watch, *callbacks],
        )
    trainer.remove_callback(PrinterCallback)
    return trainer, watch


def _publish(
    run: _Run, folder: RunFolder, trainer: RunTrainer, measure: Callable[[list[dict[str, Any]]], Seconds]
) -> Result:
    staged = folder.stage()
    with quiet_transformers():
        run.model.save_pretrained(staged)  # type: ignore[operator]
        run.tokenizer.save_pretrained(staged)
    result = _result(run, folder, trainer, results.stored_bytes(staged))
    results.write_card(result, run.data.task.labels, METHODS[result.method].summary, run.settings["model"], staged)
    results.draw_curves(result, staged / "curves.png")
    result = dataclasses.replace(result, time=measure(trainer.state.log_history))
    result.write(staged / RESULT)
    folder.publish()
    return result


def _result(run: _Run, folder: RunFolder, trainer: RunTrainer, stored: int) -> Result:
    log = trainer.state.log_history
    curve = read_curve(log, run.data.task, list(run.data.dev), run.steps_an_epoch)
    assert run.data.train is not None
    # As the user wrote them: a result is meant to be passed on, where an absolute path of one machine means nothing.
    given = {name: _text(getattr(run.config, name)) for name in ("model", "data", "dev_data")}
    return Result(
        task=run.data.task.name,
        method=run.settings["method"],
        model=run.config.model,
        seed=run.settings["seed"],
        config={**run.settings, **given, "adapter": _adapter_fields(run.model)},
        data={
            "train": len(run.data.train),
            "dev": {name: len(rows) for name, rows in run.data.dev.items()},
            "held_out": None if run.held_out is None else len(run.held_out),
            "notes": list(run.data.notes),
        },
        parameters=dataclasses.replace(run.parameters, stored_bytes=stored),
        score=results.choose_scores(curve),
        metrics=curve[-1].metrics,
        curve=curve,
        loss=[(entry["step"], entry["loss"], entry["learning_rate"]) for entry in log if "loss" in entry],
        seconds=curve[-1].seconds,
        peak_memory_bytes=machine.peak_memory_bytes(),
        versions=machine.describe_versions(),
        commit=machine.find_commit(),
        processor=machine.describe_processor(),
        output=str(run.config.output),
        processes=run.processes,
    )


def _text(path: str | Path | None) -> str | None:
    return None if path is None else str(path)


def _adapter_fields(model: nn.Module) -> dict[str, Any] | None:
    """The adapter's config as PEFT resolved it, in the types that JSON has."""
    if not isinstance(model, PeftModel):
        return None
    fields = model.active_peft_config.to_dict()
    del fields["base_model_name_or_path"]  # says `model` again, as an absolute path
    return json.loads(json.dumps(fields, default=lambda value: sorted(value) if isinstance(value, set) else str(value)))
