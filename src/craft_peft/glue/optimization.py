"""How a run is optimised: parameter groups, the trainer's arguments, progress, and the curve that it leaves."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from transformers import (
    EvalPrediction,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ..errors import CraftError
from .metrics import compute_metrics, mean_score
from .pretrained import is_head_parameter
from .recipes import Recipe
from .results import EpochRecord
from .tasks import Task

HELD_OUT = "held_out"
LOSS_POINTS = 100
PARTS = 4
EXPLODED = 1000.0
"""How many times its first value the loss may grow; losses of GLUE start at 0.5 to 10."""
ADVICE = (
    "Use a lower `learning_rate` or a longer warm-up (`warmup_ratio`), and start again with `overwrite=True`. What "
    "was saved before stays in the output folder until then."
)


class DivergedError(CraftError):
    """Training lost the loss: a property of the settings, so that the same run would do so again."""


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """The trained parameters in two groups, adapter (or encoder) first, head second, each with its rate and decay.

    Args:
        model: The model to train.
        recipe: Rates and decays.

    Returns:
        Groups for an optimizer; a group without parameters is left out.
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    head = [parameter for name, parameter in trained if is_head_parameter(name, model)]
    adapter = [parameter for name, parameter in trained if not is_head_parameter(name, model)]
    groups = [
        {"name": "adapter", "params": adapter, "lr": recipe.learning_rate, "weight_decay": recipe.weight_decay},
        {"name": "head", "params": head, "lr": recipe.head_learning_rate, "weight_decay": recipe.head_weight_decay},
    ]
    return [group for group in groups if group["params"]]


def trainer_arguments(folder: Path, recipe: Recipe, seed: int, precision: str, steps: int) -> TrainingArguments:
    """The trainer's arguments for a run.

    Args:
        folder: Where checkpoints go.
        recipe: The recipe, with epochs decided.
        seed: Decides the order of the rows and dropout.
        precision: "float32" or "bf16".
        steps: Optimizer steps of the whole run.

    Returns:
        Arguments that log the loss about a hundred times, and evaluate and save after each epoch.
    """
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=recipe.epochs or 1,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=recipe.batch_size,
        lr_scheduler_type="linear",
        warmup_steps=round(recipe.warmup_ratio * steps),
        max_grad_norm=recipe.clip,
        bf16=precision == "bf16",
        use_cpu=not torch.cuda.is_available(),
        seed=seed,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,
        logging_steps=max(1, steps // LOSS_POINTS),
        # A loss of NaN must be seen, not averaged away.
        logging_nan_inf_filter=False,
        log_level="error",
        disable_tqdm=True,
        report_to="none",
        label_names=["labels"],
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    # The trainer would use every GPU that it sees and multiply the batch by their number, unasked.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def measure(task: Task, prediction: EvalPrediction) -> dict[str, float]:
    """Metrics of what a trainer predicted.

    Args:
        task: Names the metrics.
        prediction: Logits and labels.

    Returns:
        As `compute_metrics`.

    Raises:
        DivergedError: The model returned NaN or infinity.
    """
    logits = prediction.predictions
    logits = logits[0] if isinstance(logits, tuple) else logits
    if not np.isfinite(logits).all():
        raise DivergedError(f"Training diverged: the model's outputs are not finite. {ADVICE}")
    return compute_metrics(task, logits, np.asarray(prediction.label_ids))


class Watch(TrainerCallback):
    """Shows the progress of training, keeps its time across interruptions, and stops it when the loss is lost.

    Args:
        console: Where to show it.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
        )
        self.start = self.began = self.ended = 0.0
        self.first_loss: float | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts the clock where the resumed run left it."""
        earlier = [entry["elapsed"] for entry in state.log_history if "elapsed" in entry]
        self.began = self.ended = time.perf_counter()
        self.start = self.began - (earlier[-1] if earlier else 0.0)
        self.bar = self.progress.add_task("training", total=state.max_steps, completed=state.global_step)
        self.progress.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Moves the bar."""
        self.progress.update(self.bar, completed=state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        """Stops a run whose loss is NaN or infinite, or so large that it will not come back."""
        if "loss" not in logs:
            return
        self.first_loss = logs["loss"] if self.first_loss is None else self.first_loss
        if not logs["loss"] <= EXPLODED * max(1.0, self.first_loss):
            raise DivergedError(
                f"Training diverged: the loss is {logs['loss']:.3g} at step {state.global_step} of {state.max_steps}, "
                f"where the learning rate is {logs['learning_rate']:.2g}. {ADVICE}"
            )

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: dict, **kwargs: Any
    ) -> None:
        """Keeps the time with the scores, in the part of the state that checkpoints hold."""
        self.ended = time.perf_counter()
        state.log_history.append({"step": state.global_step, "elapsed": self.ended - self.start})

    def close(self) -> None:
        """Leaves the terminal as it was, however training ended."""
        self.progress.stop()


def read_curve(log: list[dict[str, Any]], task: Task, dev_sets: list[str], steps_an_epoch: int) -> list[EpochRecord]:
    """Makes one record an epoch of what the trainer logged.

    Args:
        log: The trainer's log history.
        task: Names the metrics.
        dev_sets: Names of the development sets.
        steps_an_epoch: Optimizer steps an epoch.

    Returns:
        The records in order.
    """
    by_step: dict[int, dict[str, Any]] = {}
    for entry in log:
        by_step.setdefault(entry["step"], {}).update(entry)
    records = []
    for step in sorted(step for step, values in by_step.items() if f"eval_{dev_sets[0]}_score" in values):
        values = by_step[step]
        metrics = {
            name: {metric: values[f"eval_{name}_{metric}"] for metric in (*task.metrics, "score")} for name in dev_sets
        }
        losses = [entry["loss"] for entry in log if "loss" in entry and step - steps_an_epoch < entry["step"] <= step]
        records.append(
            EpochRecord(
                epoch=round(step / steps_an_epoch),
                metrics=metrics,
                score=mean_score(metrics),
                held_out_score=values.get(f"eval_{HELD_OUT}_score"),
                train_loss=float(np.mean(losses)) if losses else None,
                seconds=values["elapsed"],
            )
        )
    return records


def split_by_length(batch: Mapping[str, Tensor], parts: int) -> list[dict[str, Tensor]]:
    """Cuts a padded batch into parts of rows of like length, each padded no further than its own longest row.

    Random batches of short texts are mostly padding: of STS-B in batches of 32, 60 %. The rows and their gradient stay
    the same.

    Args:
        batch: Tensors with a row an example, `attention_mask` among them.
        parts: How many parts; fewer when there are fewer rows.

    Returns:
        The parts, the longest rows first.

    Example:
        >>> mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]])
        >>> [tuple(part["attention_mask"].shape) for part in split_by_length({"attention_mask": mask}, 2)]
        [(2, 4), (2, 2)]
    """
    mask = batch["attention_mask"]
    found = []
    for rows in mask.sum(1).argsort(descending=True, stable=True).chunk(parts):
        used = mask[rows].any(0)  # padding may be on either side
        part = {name: values[rows] for name, values in batch.items()}
        found.append({k: v[:, used] if v.ndim == 2 and v.shape == mask[rows].shape else v for k, v in part.items()})
    return found


class RunTrainer(Trainer):
    """The `transformers` trainer with our two parameter groups, and without the cost of padding on a processor.

    Args:
        recipe: Rates and decays.
        arguments: What `Trainer` takes.
    """

    optimizer: torch.optim.Optimizer | None

    def __init__(self, recipe: Recipe, **arguments: Any) -> None:
        self.recipe = recipe
        super().__init__(**arguments)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The mean loss of a batch; in training on one processor part by part, where more calls cost less than padding.

        A GPU prefers one call, and so does DDP, which expects one forward pass for each backward pass.
        """
        parts = PARTS if self.args.device.type == "cpu" and self.args.world_size == 1 and not return_outputs else 1
        if parts == 1:
            # Without the number of items, by which the trainer takes the mean loss for a sum and multiplies it.
            return super().compute_loss(model, inputs, return_outputs)
        rows = len(inputs["labels"])
        split = split_by_length(inputs, parts)
        return sum(super(RunTrainer, self).compute_loss(model, part) * (len(part["labels"]) / rows) for part in split)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW over `parameter_groups`."""
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(
                parameter_groups(model or self.model, self.recipe),
                betas=(0.9, self.recipe.beta2),
                eps=self.recipe.epsilon,
            )
        return self.optimizer
