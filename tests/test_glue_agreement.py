"""Our LoRA is PEFT's: the runner agrees with PEFT and `Trainer` put together by hand; and loggers are the trainer's."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from peft import LoraConfig, TaskType, get_peft_model
from rich.console import Console
from tiny_encoder import settings, write_workshop
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from craft_peft import CraftError
from craft_peft.cli.main import main
from craft_peft.glue import loggers
from craft_peft.glue.training import TrainingConfig, train

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small encoder without dropout, whose masks would depend on how a batch is cut."""
    folder = write_workshop(tmp_path_factory.mktemp("workshop"))
    config = folder / "encoder" / "config.json"
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config.write_text(json.dumps({**json.loads(config.read_text()), **still}))
    return folder


def by_hand(workshop: Path, folder: Path) -> tuple[list[float], float]:
    """Losses and accuracy of LoRA with PEFT and `Trainer` alone: rate 1e-2, 2 epochs of 4 steps of 16 rows, seed 0."""
    tokenizer = AutoTokenizer.from_pretrained(workshop / "encoder")

    def read(name: str) -> Dataset:
        with (workshop / f"{name}.csv").open() as file:
            texts = [(row["text"], int(row["label"] == "good")) for row in csv.DictReader(file)]
        return Dataset.from_list([dict(tokenizer(text)) | {"labels": label} for text, label in texts])

    set_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(workshop / "encoder", num_labels=2)
    lora = LoraConfig(task_type=TaskType.SEQ_CLS, r=2, lora_alpha=2, target_modules=["query", "value"])
    arguments = TrainingArguments(
        str(folder), learning_rate=1e-2, num_train_epochs=2, per_device_train_batch_size=16, weight_decay=0.0,
        warmup_steps=round(0.06 * 8), max_grad_norm=1.0, seed=0, use_cpu=True, logging_steps=1, report_to="none",
        save_strategy="no", disable_tqdm=True, label_names=["labels"],
    )  # fmt: skip
    trainer = Trainer(
        get_peft_model(base, lora),
        arguments,
        DataCollatorWithPadding(tokenizer),
        read("train"),
        read("dev"),
        compute_metrics=lambda found: {"accuracy": float(np.mean(found.predictions.argmax(-1) == found.label_ids))},
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, trainer.evaluate()["eval_accuracy"]


def test_lora_agrees_with_peft_and_trainer_by_hand(workshop: Path, tmp_path: Path) -> None:
    fields = settings(workshop, tmp_path / "run", method="lora", ranks=(2,), head_start="random")
    result = train(TrainingConfig(**{**fields, "head_learning_rate": 1e-2}), console=Console(quiet=True))
    losses, accuracy = by_hand(workshop, tmp_path / "hand")
    assert result.metrics["dev"]["accuracy"] == accuracy
    # Our batches are cut into parts of like length, whose sums round in another order in each of the eight steps.
    assert [loss for _, loss, _ in result.loss] == pytest.approx(losses, rel=1e-4)


class TestLoggers:
    def test_the_trainer_makes_them(self, workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from transformers.integrations import integration_utils

        seen: list[Any] = []

        class Fake(TrainerCallback):
            """Reads its folder when it is made, as the trainer's own does."""

            def __init__(self) -> None:
                self.folder = os.environ[loggers.FOLDER]

            def on_log(self, args: Any, state: Any, control: Any, logs: Any, **keywords: Any) -> None:
                seen.append((args.run_name, self.folder, sorted(logs)))

        monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Fake)
        monkeypatch.setitem(loggers.LOGGERS, "tensorboard", ("json",))  # a module that is there
        fields = settings(workshop, tmp_path / "run", epochs=1, report_to=("tensorboard",))
        train(TrainingConfig(**fields), console=Console(quiet=True))
        assert seen and {entry[:2] for entry in seen} == {("run", str(tmp_path / "run" / "logs"))}
        assert any("eval_dev_accuracy" in entry[2] for entry in seen)
        assert "report_to" not in json.loads((tmp_path / "run" / "run.json").read_text())["settings"]

    def test_mistakes(
        self, workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setitem(loggers.LOGGERS, "wandb", ("not_there",))
        words = ["train", "--output", str(tmp_path / "run"), "--model", str(workshop / "encoder"), "--report-to"]
        assert main([*words, "wandb"]) == 2
        assert (
            "`--report-to wandb` needs a package that is not installed: pip install not_there"
            in capsys.readouterr().err
        )
        with pytest.raises(CraftError, match=r"Unknown logger `mlfow`\. Did you mean `mlflow`"):
            loggers.check_loggers(["mlfow"])


class TestStart:
    @pytest.mark.parametrize("method", ["craft", "vblora", "full"])
    def test_a_run_starts_where_another_ended(self, workshop: Path, tmp_path: Path, method: str) -> None:
        """With rates so small that nothing moves, the adapter ends as that of the first run, under a new head."""
        from craft_peft.glue.models import load_trained

        first = settings(workshop, tmp_path / "first", method=method)
        train(TrainingConfig(**first), console=Console(quiet=True))
        still = {"learning_rate": 1e-30, "head_learning_rate": 0.0, "epochs": 1, "head_start": "fitted", "seed": 1}
        second = settings(workshop, tmp_path / "second", method=method, start_from=tmp_path / "first", **still)
        train(TrainingConfig(**second), console=Console(quiet=True))
        before, after = (dict(load_trained(tmp_path / name).model.named_parameters()) for name in ("first", "second"))
        heads = {name for name in before if "classifier" in name}
        assert all((before[name] == after[name]).all() for name in before.keys() - heads)
        assert any((before[name] != after[name]).any() for name in heads)

    def test_mistakes(self, workshop: Path, tmp_path: Path) -> None:
        train(TrainingConfig(**settings(workshop, tmp_path / "first", method="lora")), console=Console(quiet=True))
        for changed, message in (
            ({"method": "craft"}, "trained lora on .* cannot be the start of craft"),
            ({"method": "lora", "ranks": (3,)}, "do not fit: .* Start from a run with the same ranks"),
            ({"method": "lora", "start_from": tmp_path / "none"}, "There is no folder"),
        ):
            fields = {"start_from": tmp_path / "first", **changed}
            with pytest.raises(CraftError, match=message):
                train(TrainingConfig(**settings(workshop, tmp_path / "run", **fields)), console=Console(quiet=True))


def test_rows_are_the_same_whatever_the_seed(workshop: Path, tmp_path: Path) -> None:
    from craft_peft.glue.settings import read_data

    sets = []
    for seed in (0, 1):
        config = TrainingConfig(**settings(workshop, tmp_path / "run", rows=20, seed=seed))
        sets.append(read_data(config).train["text"][:])
    assert sets[0] == sets[1] and len(sets[0]) == 20
    with pytest.raises(CraftError, match=r"rows=65 cannot be used: task `train` has 64 training rows"):
        read_data(TrainingConfig(**settings(workshop, tmp_path / "run", rows=65)))
