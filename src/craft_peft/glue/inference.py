"""Scores and predictions of a trained run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, EvalPrediction

from ..errors import CraftError
from .data import TextData, read_glue, read_own
from .encoding import encode, longest_first
from .models import TrainedModel, has_bf16
from .optimization import measure
from .tables import describe_half_character
from .tasks import Task, find_task


@dataclass(frozen=True)
class Prediction:
    """What a model says about one text.

    Args:
        label: The likeliest class, or None for a regression.
        probabilities: Probability by class, the likeliest first; empty for a regression.
        value: The predicted number, or None for a classification.
    """

    label: str | None
    probabilities: dict[str, float]
    value: float | None

    def fields(self) -> dict[str, Any]:
        """The fields that apply, for JSON."""
        return {"label": self.label, "probabilities": self.probabilities} if self.label else {"value": self.value}

    def __str__(self) -> str:
        shares = "  ".join(f"{label} {share:.4f}" for label, share in self.probabilities.items())
        return shares if self.value is None else f"{self.value:.4f}"


def predict(trained: TrainedModel, texts: Sequence[str], pairs: Sequence[str] | None = None) -> list[Prediction]:
    """Predicts labels or values.

    Args:
        trained: A finished run.
        texts: The texts.
        pairs: The second text of each, for a model of pairs.

    Returns:
        One prediction a text, in their order; an empty text has one too.

    Raises:
        CraftError: Pairs are missing, superfluous, or not as many as texts, or a text that is no list or cannot be
            written.
    """
    if isinstance(texts, str) or isinstance(pairs, str):
        raise CraftError("A text was given, and a list of texts is required. Put it in a list: `[text]`.")
    wanted = len(trained.task.text_columns)
    if (pairs is not None) != (wanted == 2):
        found = "one text" if pairs is None else "pairs of texts"
        raise CraftError(
            f"The model was trained on {('one text', 'pairs of texts')[wanted - 1]} a row, and {found} a row was given."
        )
    if pairs is not None and len(pairs) != len(texts):
        raise CraftError(f"{len(texts)} texts and {len(pairs)} second texts were given; give as many of each.")
    for number, text in enumerate((*texts, *(pairs or ()))):
        if (half := describe_half_character(text)) is not None:
            raise CraftError(f"Text {number % len(texts) + 1} of {len(texts)} {half}")
    if not texts:
        return []
    columns = {"text": list(texts)} | ({} if pairs is None else {"text_pair": list(pairs)})
    logits = predict_logits(trained, datasets.Dataset.from_dict(columns))
    return [_prediction(trained.task, row) for row in logits]


def evaluate(trained: TrainedModel, data: TextData) -> dict[str, dict[str, float]]:
    """Measures a finished run.

    Args:
        trained: The run.
        data: Its development sets are measured.

    Returns:
        Metrics by development set.

    Raises:
        CraftError: The model's outputs are not finite.
    """
    metrics = {}
    for name, rows in data.dev.items():
        # In the order of training's own evaluation, for the same bits.
        encoded = _encode(trained, rows)
        encoded = encoded.select(longest_first(encoded))
        labels = np.asarray(encoded["labels"])
        prediction = EvalPrediction(_compute_logits(trained, encoded.remove_columns("labels")), labels)
        metrics[name] = measure(trained.task, prediction)
    return metrics


def predict_logits(trained: TrainedModel, rows: datasets.Dataset) -> np.ndarray:
    """The model's outputs, computed in the precision and batches of its training run.

    Args:
        trained: A finished run.
        rows: Columns `text` and perhaps `text_pair`.

    Returns:
        One row a text.
    """
    texts = rows.select_columns([name for name in ("text", "text_pair") if name in rows.column_names])
    encoded = _encode(trained, texts)
    order = longest_first(encoded)
    logits = _compute_logits(trained, encoded.select(order))
    return logits[np.argsort(order)]


def _encode(trained: TrainedModel, rows: datasets.Dataset) -> datasets.Dataset:
    return encode(rows, trained.tokenizer, trained.settings["recipe"]["max_length"])


def _compute_logits(trained: TrainedModel, encoded: datasets.Dataset) -> np.ndarray:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = trained.model.to(device)
    bf16 = trained.settings["precision"] == "bf16" and has_bf16()
    loader = DataLoader(
        encoded,
        batch_size=trained.settings["recipe"]["batch_size"],
        collate_fn=DataCollatorWithPadding(trained.tokenizer),
    )
    outputs = []
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        for batch in loader:
            outputs.append(model(**batch.to(device)).logits.float().cpu().numpy())
    return np.concatenate(outputs)


def read_for(
    trained: TrainedModel,
    task: str | None = None,
    data: str | Path | None = None,
    text_columns: Sequence[str] | None = None,
    label_column: str | None = None,
) -> TextData:
    """Reads development data that a finished run can be measured on; by default those of its training.

    Args:
        trained: The run.
        task: A GLUE task with the same labels; None for the run's own.
        data: GLUE folder or the user's own table; None for the run's own.
        text_columns: Text columns of the user's own table, if not those of the training table.
        label_column: Its label column, if not that of the training table.

    Returns:
        The data; `train` may be None.

    Raises:
        CraftError: Data that cannot be used or found, or a task with other labels.
    """
    settings = trained.settings
    task_name = task or settings["task"]
    if task_name is not None:
        chosen = find_task(task_name)
        if chosen.labels != trained.task.labels:
            raise CraftError(
                f"The run predicts {_describe(trained.task)}, and task `{chosen.name}` has {_describe(chosen)}. "
                "Choose a task with the same labels, in the same order."
            )
        return read_glue(chosen, data or (settings["data"] if chosen.name == settings["task"] else None), train=False)
    own = trained.task
    columns, label = tuple(text_columns or own.text_columns), label_column or own.label_column
    if data is not None:
        return read_own(None, data, columns, label, task=own)
    if settings["data"] is None:
        raise CraftError("The run was trained on data in memory, which cannot be read again. Give data to measure on.")
    return read_own(settings["data"], settings["dev_data"], columns, label, task=own)


def _describe(task: Task) -> str:
    return f"the labels {', '.join(task.labels)}" if task.labels else "a number"


def _prediction(task: Task, logits: np.ndarray) -> Prediction:
    if task.is_regression:
        return Prediction(None, {}, float(logits[0]))
    weights = np.exp(logits - logits.max())
    order = np.argsort(-weights, kind="stable")
    probabilities = {task.labels[number]: float(weights[number] / weights.sum()) for number in order}
    return Prediction(next(iter(probabilities)), probabilities, None)
