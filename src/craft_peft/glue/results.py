"""What a run keeps beside its weights: `result.json`, the picture of its curves, and the model card."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

FORMAT = "craft-peft result 1"
"""What result files say that they are; one without it is of this format."""


@dataclass(frozen=True)
class Parameters:
    """How many numbers a run trains and keeps.

    Args:
        adapter: Trained numbers outside the head (all of the encoder in full fine-tuning).
        head: Trained numbers of the classification head.
        total: All numbers of the model, trained and frozen.
        stored_bytes: Size of the saved weight files; includes what a method keeps besides its trained numbers.
    """

    adapter: int
    head: int
    total: int
    stored_bytes: int = 0

    @property
    def trainable(self) -> int:
        """Adapter and head together."""
        return self.adapter + self.head


@dataclass(frozen=True)
class EpochRecord:
    """One point of the curve.

    Args:
        epoch: 1 for the first.
        metrics: Metrics by development set.
        score: Their mean score.
        held_out_score: Score on the held-out share of the training set, or None without one.
        train_loss: Mean training loss since the epoch before, or None when it was not logged.
        seconds: Time since the start of training, resumed parts added up.
    """

    epoch: int
    metrics: dict[str, dict[str, float]]
    score: float
    held_out_score: float | None
    train_loss: float | None
    seconds: float


@dataclass(frozen=True)
class Scores:
    """The three selections of the measuring protocol, all on the development set.

    Args:
        last: After the last epoch; the saved weights are these.
        best: Of the best epoch on the development set itself (optimistic).
        best_epoch: Which one.
        held_out: Of the epoch chosen on a share of the training set that was not trained on; None without one.
        held_out_epoch: Which one.
    """

    last: float
    best: float
    best_epoch: int
    held_out: float | None = None
    held_out_epoch: int | None = None


@dataclass(frozen=True)
class Seconds:
    """Where the time of a run went.

    Of a run that was interrupted, training and evaluation are those of all its parts, the rest those of the last.

    Args:
        startup: From the start of the process until training was asked for: imports; None when the process did more.
        setup: Data, model and adapter, until the first step.
        training: Steps, with the checkpoints between the epochs.
        evaluation: Measuring after each epoch.
        saving: The last checkpoint, weights, card and picture.
        fitting: What is fitted on training rows before the first step: the head, and bases from batches.
    """

    startup: float | None
    setup: float
    training: float
    evaluation: float
    saving: float
    fitting: float = 0.0


@dataclass(frozen=True)
class Result:
    """Everything that a finished run reports; `result.json` holds the same fields.

    Args:
        task: Name of the task.
        method: Name of the method.
        model: Base model, as the user named it.
        seed: Seed of the run.
        config: Resolved settings.
        data: Rows in each data set, and notes on how they and the base model were read.
        parameters: Parameter counts.
        score: The three scores.
        metrics: Metrics of the last epoch by development set.
        curve: One record an epoch.
        loss: Training loss as (step, loss, learning rate of the adapter).
        seconds: Wall time of training, evaluation included.
        peak_memory_bytes: Peak of the process (resident set), or of the CUDA allocator when a GPU was used; None where
            the platform does not say.
        versions: Versions of Python and of the packages that matter.
        commit: Commit of this package's source, or None for an installed package.
        processor: What it ran on.
        output: The run folder, as the user named it.
        processes: How many processes shared the batches.
        time: Where the time of the run went.
    """

    task: str
    method: str
    model: str
    seed: int
    config: dict[str, Any]
    data: dict[str, Any]
    parameters: Parameters
    score: Scores
    metrics: dict[str, dict[str, float]]
    curve: list[EpochRecord]
    loss: list[tuple[int, float, float]]
    seconds: float
    peak_memory_bytes: int | None
    versions: dict[str, str]
    commit: str | None
    processor: str
    output: str
    processes: int = 1
    time: Seconds | None = None

    def write(self, path: Path) -> None:
        """Writes the result as JSON: long curves stay readable beside the rest."""
        fields = {"format": FORMAT, **dataclasses.asdict(self)}
        fields["parameters"]["trainable"] = self.parameters.trainable
        path.write_text(as_lines(fields), encoding="utf-8")


def as_lines(fields: dict[str, Any]) -> str:
    """A dictionary as JSON with one field a line.

    Example:
        >>> print(as_lines({"seed": 0, "loss": [1, 2]}), end="")
        {
          "seed": 0,
          "loss": [1, 2]
        }
    """
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in fields.items())
    return "{\n" + lines + "\n}\n"


def held_out_score(results: Iterable[dict[str, Any] | None]) -> float:
    """The mean over tasks of the held-out score after the last epoch; of a diverged run, none is worse.

    Example:
        >>> held_out_score([{"curve": [{"held_out_score": 0.5}]}, {"curve": [{"held_out_score": 0.7}]}])
        0.6
        >>> held_out_score([None])
        -inf
    """
    scores = [float("-inf") if result is None else result["curve"][-1]["held_out_score"] for result in results]
    return sum(scores) / len(scores)


def choose_scores(curve: list[EpochRecord]) -> Scores:
    """Picks the last epoch, the best one, and the one chosen on held-out rows; of equals, the earliest.

    Args:
        curve: At least one record.

    Returns:
        The three scores.

    Example:
        >>> from craft_peft.glue.results import EpochRecord, choose_scores
        >>> curve = [EpochRecord(i + 1, {}, s, h, None, 0.0) for i, (s, h) in enumerate([(0.5, 0.9), (0.7, 0.8)])]
        >>> choose_scores(curve)
        Scores(last=0.7, best=0.7, best_epoch=2, held_out=0.5, held_out_epoch=1)
    """
    best = max(curve, key=lambda record: record.score)
    chosen = max((r for r in curve if r.held_out_score is not None), key=lambda r: r.held_out_score or 0, default=None)
    return Scores(
        last=curve[-1].score,
        best=best.score,
        best_epoch=best.epoch,
        held_out=chosen.score if chosen else None,
        held_out_epoch=chosen.epoch if chosen else None,
    )


def draw_curves(result: Result, path: Path) -> None:
    """Draws the loss over the steps and the score over the epochs.

    Args:
        result: The result.
        path: A `.png` file to write.
    """
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot([point[0] for point in result.loss], [point[1] for point in result.loss])
    left.set(xlabel="step", ylabel="training loss", title=f"{result.task}, {result.method}, seed {result.seed}")
    epochs = [record.epoch for record in result.curve]
    right.plot(epochs, [record.score for record in result.curve], marker="o", label="development set")
    if result.score.held_out is not None:
        right.plot(epochs, [r.held_out_score for r in result.curve], marker="o", label="held out of train")
    right.set(xlabel="epoch", ylabel="score")
    right.legend()
    figure.savefig(path, dpi=120)


def stored_bytes(folder: Path) -> int:
    """Size of the weight files in a folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


CARD = """---
{front_matter}
---

# {task}: {method} on {model_name}

{summary}

{loading}

| | |
|---|---|
| score after the last epoch | {last:.4f} |
| metrics | {metrics} |
| trained numbers | {adapter:,} adapter + {head:,} head of {total:,} |
| epochs, seed | {epochs}, {seed} |

Labels: {labels}.

`result.json` holds the settings, the curve and the versions; `curves.png` shows the curves.
"""

LOAD_ADAPTER = """`import craft_peft` before PEFT loads a CRAFT adapter: PEFT alone does not know the method's name.

```python
import craft_peft
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

base = AutoModelForSequenceClassification.from_pretrained("{model}", num_labels={outputs})
model = PeftModel.from_pretrained(base, "PATH OF THIS FOLDER")
tokenizer = AutoTokenizer.from_pretrained("PATH OF THIS FOLDER")
```"""

LOAD_MODEL = """```python
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained("PATH OF THIS FOLDER")
tokenizer = AutoTokenizer.from_pretrained("PATH OF THIS FOLDER")
```"""


def write_card(result: Result, labels: tuple[str, ...], summary: str, model: str, folder: Path) -> None:
    """Writes the model card.

    Args:
        result: The result.
        labels: Label names; empty for a regression.
        summary: What the method is, in one line.
        model: What `from_pretrained` takes for the base model.
        folder: The folder that holds the saved model; the card is its `README.md`.
    """
    is_adapter = (folder / "adapter_config.json").is_file()
    is_hub_name = not Path(model).is_absolute()
    front = ["library_name: peft" if is_adapter else "library_name: transformers", "pipeline_tag: text-classification"]
    if is_hub_name:
        front.append(f"base_model: {model}")
    front.append(f"tags: [{result.method}]")
    metrics = [
        f"{data_set} {name} {value:.4f}"
        for data_set, values in result.metrics.items()
        for name, value in values.items()
        if name != "score"
    ]
    loading = LOAD_ADAPTER.format(model=model, outputs=len(labels) or 1) if is_adapter else LOAD_MODEL
    text = CARD.format(
        front_matter="\n".join(front),
        task=result.task,
        method=result.method,
        model_name=Path(model).name,
        summary=summary,
        loading=loading,
        last=result.score.last,
        metrics=", ".join(metrics),
        adapter=result.parameters.adapter,
        head=result.parameters.head,
        total=result.parameters.total,
        epochs=len(result.curve),
        seed=result.seed,
        labels=", ".join(f"{number} = {label}" for number, label in enumerate(labels)) or "none, a number is predicted",
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
