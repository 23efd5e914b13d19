"""Runs from the first to the last file, on an encoder so small that each takes about a second."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tiny_encoder import draw_nothing, review, settings, write_encoder
from transformers import BertConfig, BertForSequenceClassification, TrainerCallback

from craft_peft import CraftError
from craft_peft.glue import models
from craft_peft.glue.inference import evaluate, predict, read_for
from craft_peft.glue.methods import METHODS
from craft_peft.glue.models import load_trained
from craft_peft.glue.optimization import parameter_groups, split_by_length
from craft_peft.glue.pretrained import load_base
from craft_peft.glue.results import Result
from craft_peft.glue.training import TrainingConfig, train

Run = Callable[..., Result]
ADAPTED = tuple(name for name, method in METHODS.items() if method.config is not None)


@pytest.fixture
def run(workshop: Path, tmp_path: Path, no_pictures: None) -> Run:
    """Trains into a folder of this test."""

    def start(callbacks: tuple[TrainerCallback, ...] = (), **changed: Any) -> Result:
        fields = settings(workshop, tmp_path / "run", **changed)
        return train(TrainingConfig(**fields), console=Console(quiet=True), callbacks=callbacks)

    return start


@pytest.fixture(scope="module")
def runs(workshop: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """A finished run of each method; only one with the picture, which takes longer than the training."""
    folder, results = tmp_path_factory.mktemp("runs"), {}
    for method in METHODS:
        config = TrainingConfig(**settings(workshop, folder / method, method=method, hold_out=0.2))
        with pytest.MonkeyPatch.context() as patch:
            if method != "craft":
                draw_nothing(patch)
            results[method] = train(config, console=Console(quiet=True))
    return results


@pytest.fixture(scope="module")
def cut_run(workshop: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was interrupted in its second epoch."""
    folder = tmp_path_factory.mktemp("cut") / "run"
    config = TrainingConfig(**settings(workshop, folder))
    with pytest.raises(KeyboardInterrupt):
        train(config, console=Console(quiet=True), callbacks=[Interrupt(step=6)])
    return folder


@pytest.fixture
def interrupted(cut_run: Path, tmp_path: Path) -> Path:
    """A copy of it, where the fixture `run` writes."""
    return shutil.copytree(cut_run, tmp_path / "run")


@pytest.fixture
def finished(runs: dict[str, Result], tmp_path: Path) -> Path:
    """A copy of a finished run, where the fixture `run` writes."""
    return shutil.copytree(runs["full"].output, tmp_path / "run")


def weights(folder: Path | str) -> dict[str, torch.Tensor]:
    return {name: tensor for file in Path(folder).glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_the_parts_of_the_time_are_the_whole(run: Run) -> None:
    before = time.perf_counter()
    result = run()
    whole, parts = time.perf_counter() - before, result.time
    assert parts is not None and parts.startup is None
    assert parts.training + parts.evaluation == pytest.approx(result.seconds)
    known = (parts.fitting, parts.setup, parts.training, parts.evaluation, parts.saving)
    assert all(part > 0 for part in known) and sum(known) <= whole


class TestFinishedRun:
    @pytest.mark.parametrize("method", METHODS)
    def test_files(self, runs: dict[str, Result], method: str) -> None:
        names = {file.name for file in Path(runs[method].output).iterdir()}
        model = {"adapter_config.json", "adapter_model.safetensors"} if method in ADAPTED else {"config.json"}
        expected = {"README.md", "run.json", "result.json", "curves.png", "tokenizer.json", "tokenizer_config.json"}
        assert expected | model <= names
        assert "checkpoints" not in names

    def test_same_score_in_a_new_process(self, runs: dict[str, Result]) -> None:
        folders = {method: result.output for method, result in runs.items()}
        code = (
            "import json, sys\n"
            "from craft_peft.glue.inference import evaluate, read_for\n"
            "from craft_peft.glue.models import load_trained\n"
            "runs = {name: load_trained(folder) for name, folder in json.loads(sys.argv[1]).items()}\n"
            "print(json.dumps({name: evaluate(run, read_for(run)) for name, run in runs.items()}))\n"
        )
        process = subprocess.run(
            [sys.executable, "-W", "error", "-c", code, json.dumps(folders)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert process.returncode == 0, process.stderr
        assert json.loads(process.stdout) == {method: result.metrics for method, result in runs.items()}

    @pytest.mark.parametrize("method", METHODS)
    def test_result_file_holds_the_protocol(self, runs: dict[str, Result], method: str) -> None:
        result = runs[method]
        kept = json.loads((Path(result.output) / "result.json").read_text())
        assert kept["score"]["last"] == result.curve[-1].score
        assert kept["score"]["held_out"] == result.curve[result.score.held_out_epoch - 1].score
        assert kept["data"] == {"train": 52, "dev": {"dev": 32}, "held_out": 12, "notes": list(kept["data"]["notes"])}
        assert [record["epoch"] for record in kept["curve"]] == [1, 2]
        assert kept["config"]["recipe"]["epochs"] == 2 and kept["seed"] == 0
        assert len(kept["loss"]) == 8 and kept["loss"][-1][0] == 8
        assert kept["seconds"] > 0 and kept["peak_memory_bytes"] > 0
        assert {"python", "torch", "transformers", "peft"} <= set(kept["versions"])
        assert {"commit", "processor"} <= set(kept)

    def test_parameter_counts(self, runs: dict[str, Result]) -> None:
        encoder = load_base(runs["full"].model, load_trained(runs["full"].output).task)[0].base_model
        base = sum(parameter.numel() for parameter in encoder.parameters())
        # CRAFT: 2 stacks of transforms (2, 16, 16); LoRA: 2 layers, 2 projections, 2 factors of 8 x 16.
        adapters = {"craft": 2 * (4 + 256 + 256), "lora": 2 * 2 * 2 * 8 * 16, "head": 0, "full": base}
        for method, adapter in adapters.items():
            parameters = runs[method].parameters
            assert (parameters.adapter, parameters.head) == (adapter, 2 * 16 + 2)
            assert parameters.total == base + 34 + (adapter if method in ADAPTED else 0)
            files = Path(runs[method].output).glob("*.safetensors")
            assert parameters.stored_bytes == sum(file.stat().st_size for file in files)

    def test_only_what_should_train_moved(self, runs: dict[str, Result], workshop: Path) -> None:
        base = load_file(workshop / "encoder" / "model.safetensors")
        for method, moved in (("head", False), ("full", True)):
            kept = weights(runs[method].output)
            query = "encoder.layer.0.attention.self.query.weight"
            assert torch.equal(kept[f"bert.{query}"], base[query]) != moved

    def test_labels_survive(self, runs: dict[str, Result]) -> None:
        for result in runs.values():
            trained = load_trained(result.output)
            assert trained.task.labels == ("bad", "good")
            assert trained.model.config.id2label == {0: "bad", 1: "good"}

    def test_card_says_how_to_load(self, runs: dict[str, Result]) -> None:
        card = (Path(runs["craft"].output) / "README.md").read_text()
        assert "`import craft_peft` before PEFT loads a CRAFT adapter" in card
        assert "1,032 adapter + 34 head" in card and "0 = bad, 1 = good" in card
        assert "craft_peft" not in (Path(runs["full"].output) / "README.md").read_text()

    def test_base_is_kept_by_absolute_path(self, runs: dict[str, Result], workshop: Path) -> None:
        config = json.loads((Path(runs["craft"].output) / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(workshop.resolve() / "encoder")

    def test_picture_is_a_picture(self, runs: dict[str, Result]) -> None:
        assert (Path(runs["craft"].output) / "curves.png").read_bytes().startswith(b"\x89PNG")


class TestTraining:
    def test_learns(self, run: Run, workshop: Path) -> None:
        result = run(method="full", epochs=10, batch_size=8, head_learning_rate=1e-2)
        assert result.score.last > 0.9
        trained = load_trained(result.output)
        texts, labels = zip(*[review(number) for number in range(200, 208)], strict=True)
        predictions = predict(trained, texts)
        assert [prediction.label for prediction in predictions] == list(labels)
        assert all(sum(p.probabilities.values()) == pytest.approx(1) for p in predictions)

    # One whose parameters lie in the layers, one whose layers share a parameter that lies beside the model.
    @pytest.mark.parametrize("method", ["craft", "vblora"])
    def test_two_groups_with_their_rates(self, run: Run, method: str) -> None:
        seen: list[dict[str, Any]] = []

        class Spy(TrainerCallback):
            def on_train_begin(self, *arguments: Any, optimizer: torch.optim.Optimizer, **keywords: Any) -> None:
                seen.extend(
                    {**group, "params": sum(p.numel() for p in group["params"])} for group in optimizer.param_groups
                )

        result = run((Spy(),), method=method, epochs=1, weight_decay=0.0, head_weight_decay=0.25, warmup_ratio=0.5)
        found = {group["name"]: (group["initial_lr"], group["weight_decay"], group["params"]) for group in seen}
        assert found == {"adapter": (1e-2, 0.0, result.parameters.adapter), "head": (2e-2, 0.25, 34)}
        # 4 steps, 2 of them warm-up; the rate logged for a step is the one that it used.
        assert [rate for _, _, rate in result.loss] == pytest.approx([0, 5e-3, 1e-2, 5e-3])

    def test_same_seed_same_run_other_seed_another(self, run: Run, runs: dict[str, Result]) -> None:
        again, other = (run(hold_out=0.2, seed=seed, overwrite=True).loss for seed in (0, 1))
        assert runs["craft"].loss == again != other

    def test_held_out_rows_are_not_trained_on(self, run: Run) -> None:
        result = run(epochs=1, hold_out=0.5)
        assert (result.data["train"], result.data["held_out"]) == (32, 32)
        assert result.loss[-1][0] == 2  # steps of 16 rows

    def test_divergence_is_an_error(self, run: Run) -> None:
        with pytest.raises(CraftError, match=r"Training diverged: .* Use a lower `learning_rate`"):
            run(method="full", learning_rate=1e30, head_learning_rate=1e30, clip=1e30, epochs=2)

    def test_regression_of_pairs(self, run: Run, workshop: Path) -> None:
        columns = {"text_columns": ("first", "second"), "label_column": "score"}
        result = run(data=workshop / "scores.tsv", dev_data=None, head_start="fitted", **columns)
        assert set(result.metrics["dev"]) == {"pearson", "spearman", "score"}
        assert (result.score.held_out, result.score.held_out_epoch) == (None, None)
        assert result.data == {"train": 43, "dev": {"dev": 5}, "held_out": None, "notes": result.data["notes"]}
        trained = load_trained(result.output)
        assert evaluate(trained, read_for(trained)) == result.metrics
        (prediction,) = predict(trained, ["the film was good"], ["the plot was bad"])
        assert prediction.label is None and 0.0 < prediction.value < 1.5

    def test_bfloat16_run_reloads_to_the_same_score(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        for module in ("models", "inference"):
            monkeypatch.setattr(f"craft_peft.glue.{module}.has_bf16", lambda: True)
        rounded = run(epochs=1, precision="bf16")
        assert rounded.config["precision"] == "bf16"
        trained = load_trained(rounded.output)
        assert evaluate(trained, read_for(trained)) == rounded.metrics

    def test_summary_comes_before_training(self, workshop: Path, tmp_path: Path) -> None:
        shown = io.StringIO()
        seen_at_start: list[str] = []

        class Spy(TrainerCallback):
            def on_train_begin(self, *arguments: Any, **keywords: Any) -> None:
                seen_at_start.append(shown.getvalue())

        config = TrainingConfig(**settings(workshop, tmp_path / "run", epochs=1))
        train(config, console=Console(file=shown, width=120), callbacks=[Spy()])
        for text in (
            "query x 2, value x 2",
            "1,032 adapter + 34 head = 1,066",
            "64 train, 32 dev",
            "adapter 0.01, head 0.02",
        ):
            assert text in seen_at_start[0]


class Interrupt(TrainerCallback):
    """Ends training like Ctrl-C does, in the middle of an epoch."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


class TestResume:
    # An adapter and a whole model: the two ways in which a checkpoint is written and read.
    @pytest.mark.parametrize("method", ["craft", "head"])
    def test_resumed_run_is_the_uninterrupted_one(self, workshop: Path, tmp_path: Path, method: str) -> None:
        def start(name: str, *callbacks: TrainerCallback, **changed: Any) -> Result:
            fields = settings(workshop, tmp_path / name, method=method, epochs=3, **changed)
            return train(TrainingConfig(**fields), console=Console(quiet=True), callbacks=callbacks)

        whole = start("whole")
        with pytest.raises(KeyboardInterrupt):
            start("cut", Interrupt(step=6))  # 4 steps an epoch
        resumed = start("cut", resume=True)
        one, other = weights(whole.output), weights(resumed.output)
        assert one.keys() == other.keys()
        assert [name for name in one if not torch.equal(one[name], other[name])] == []
        assert resumed.loss == whole.loss
        assert [record.score for record in resumed.curve] == [record.score for record in whole.curve]
        assert resumed.seconds > resumed.curve[0].seconds > 0

    def test_nothing_to_resume_starts_at_the_beginning(self, run: Run) -> None:
        assert len(run(epochs=1, resume=True).curve) == 1

    def test_interrupted_before_the_first_checkpoint(self, run: Run, interrupted: Path) -> None:
        shutil.rmtree(interrupted / "checkpoints")
        assert len(run(resume=True).curve) == 2

    def test_checkpoint_cut_short_is_passed_over(self, run: Run, interrupted: Path) -> None:
        (interrupted / "checkpoints" / "checkpoint-8").mkdir()
        assert len(run(resume=True).curve) == 2

    def test_other_settings_are_refused(self, run: Run, interrupted: Path) -> None:
        with pytest.raises(CraftError, match=r"had other settings \(seed: 0 then, 1 now\)"):
            run(resume=True, seed=1)

    def test_other_labels_are_refused(self, run: Run, interrupted: Path) -> None:
        metadata = (interrupted / "run.json").read_text()
        (interrupted / "run.json").write_text(metadata.replace('"bad"', '"mixed"'))
        with pytest.raises(CraftError, match=r"was trained for other labels or columns"):
            run(resume=True)


class TestOutputFolder:
    def test_finished_run_is_refused(self, run: Run, finished: Path) -> None:
        before = weights(finished)
        with pytest.raises(
            CraftError, match=r"already holds a finished run\. Give another folder, or `overwrite=True`"
        ):
            run()
        with pytest.raises(CraftError, match=r"It is finished, so that there is nothing to resume"):
            run(resume=True)
        assert all(torch.equal(before[name], tensor) for name, tensor in weights(finished).items())

    def test_interrupted_run_is_refused(self, run: Run, interrupted: Path) -> None:
        with pytest.raises(
            CraftError, match=r"interrupted run\. Give `resume=True` to go on with it, `overwrite=True`"
        ):
            run()

    def test_overwrite_removes_the_run_and_nothing_else(self, run: Run, finished: Path) -> None:
        (finished / "notes.txt").write_text("mine")
        result = run(epochs=1, method="lora", overwrite=True)
        assert not (finished / "model.safetensors").exists()
        assert (finished / "notes.txt").read_text() == "mine"
        assert load_trained(result.output).settings["method"] == "lora"

    @pytest.mark.parametrize("flag", [{}, {"overwrite": True}, {"resume": True}])
    def test_folder_of_something_else_is_left_alone(self, run: Run, tmp_path: Path, flag: dict[str, bool]) -> None:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "thesis.tex").write_text("mine")
        with pytest.raises(CraftError, match=r"holds files that are not a run of craft-peft; they are left alone"):
            run(**flag)
        assert [file.name for file in (tmp_path / "run").iterdir()] == ["thesis.tex"]

    def test_output_that_is_a_file(self, run: Run, tmp_path: Path) -> None:
        (tmp_path / "run").write_text("mine")
        with pytest.raises(CraftError, match=r"is a file\. Give a folder"):
            run(overwrite=True)

    def test_both_flags(self, run: Run) -> None:
        with pytest.raises(CraftError, match=r"Both `resume=True` and `overwrite=True`"):
            run(resume=True, overwrite=True)

    @pytest.mark.parametrize(
        ("fault", "message"),
        [
            ({"ranks": (3, 16, 16)}, r"`ranks\[0\]=3`.*Use `ranks=\(2, 16, 16\)`"),
            ({"target_modules": ("nothing",)}, r"nothing"),
            ({"model": "./absent"}, r"There is no model folder `\./absent`"),
            ({"max_length": 129}, r"max_length=129 is longer than the 128 positions .* Use at most `max_length=128`"),
            ({"head_start": "warm"}, r"Unknown head start `warm`\. Use one of random, prior, fitted"),
            ({"precision": "fp8"}, r"Unknown precision `fp8`"),
            ({"data": None}, r"Neither a task nor data was given"),
            ({"epochs": 0}, r"epochs=0 cannot be used"),
            ({"method": "magic"}, r"Unknown method `magic`"),
        ],
    )
    def test_bad_input_loses_nothing(self, run: Run, finished: Path, fault: dict[str, Any], message: str) -> None:
        before = {file.name: file.read_bytes() for file in finished.iterdir()}
        with pytest.raises(CraftError, match=message):
            run(overwrite=True, **fault)
        assert {file.name: file.read_bytes() for file in finished.iterdir()} == before


class TestReadingBack:
    def test_not_a_folder(self, tmp_path: Path) -> None:
        with pytest.raises(CraftError, match=r"There is no folder"):
            load_trained(tmp_path / "absent")

    def test_not_a_run(self, workshop: Path) -> None:
        with pytest.raises(CraftError, match=r"is not a run of craft-peft \(it has no run\.json\)"):
            load_trained(workshop / "encoder")

    def test_not_finished(self, cut_run: Path) -> None:
        with pytest.raises(CraftError, match=r"is not finished\. Give its training again"):
            load_trained(cut_run)

    @pytest.mark.parametrize("method", ADAPTED)
    def test_base_of_another_shape(self, runs: dict[str, Result], tmp_path: Path, method: str) -> None:
        other = write_encoder(tmp_path / "wide", width=32)
        with pytest.raises(CraftError, match=r"does not fit th(e|is) base model"):
            load_trained(runs[method].output, str(other))

    def test_base_that_moved(self, runs: dict[str, Result], workshop: Path, tmp_path: Path) -> None:
        moved = write_encoder(tmp_path / "moved")
        trained = load_trained(runs["craft"].output, str(moved))
        assert evaluate(trained, read_for(trained)) == runs["craft"].metrics

    def test_task_with_other_labels(self, runs: dict[str, Result]) -> None:
        with pytest.raises(
            CraftError, match=r"predicts the labels bad, good, and task `rte` has the labels entailment"
        ):
            read_for(load_trained(runs["head"].output), task="rte")

    def test_pairs_for_a_model_of_single_texts(self, runs: dict[str, Result]) -> None:
        with pytest.raises(CraftError, match=r"was trained on one text a row, and pairs of texts a row was given"):
            predict(load_trained(runs["head"].output), ["a"], ["b"])


def test_groups_without_parameters_are_left_out(workshop: Path, runs: dict[str, Result]) -> None:
    task = load_trained(runs["head"].output).task
    base, _ = load_base(str(workshop / "encoder"), task)
    model = models.adapt(base, None, trains_base=False)
    assert [group["name"] for group in parameter_groups(model, METHODS["head"].recipe)] == ["head"]


def test_outputs_that_are_not_finite_are_an_error(runs: dict[str, Result]) -> None:
    trained = load_trained(runs["head"].output)
    with torch.no_grad():
        trained.model.classifier.bias.fill_(np.nan)
    with pytest.raises(CraftError, match=r"the model's outputs are not finite"):
        evaluate(trained, read_for(trained))


def ragged_batch(side: str) -> dict[str, torch.Tensor]:
    """Nine rows of 1 to 7 tokens, which no number of parts divides."""
    lengths, places = torch.tensor([3, 7, 1, 4, 2, 6, 5, 2, 7]), torch.arange(7).expand(9, 7)
    mask = places < lengths[:, None] if side == "right" else places >= 7 - lengths[:, None]
    tokens = torch.randint(1, 50, (9, 7), generator=torch.Generator().manual_seed(0))
    return {
        "input_ids": torch.where(mask, tokens, 0),
        "attention_mask": mask.long(),
        "labels": torch.arange(9) % 2,
    }


def test_parts_of_like_length_have_the_gradient_of_the_whole_batch() -> None:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    model = BertForSequenceClassification(config).double().eval()
    gradients = []
    for pieces in ([ragged_batch("right")], split_by_length(ragged_batch("right"), 4)):
        model.zero_grad()
        sum(model(**piece).loss * (len(piece["labels"]) / 9) for piece in pieces).backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.parametrize("side", ["left", "right"])
def test_parts_keep_every_token_with_its_label(side: str) -> None:
    def rows(batch: dict[str, torch.Tensor]) -> list[tuple[list[int], int]]:
        return [
            (ids[mask.bool()].tolist(), int(label))
            for ids, mask, label in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True)
        ]

    batch = ragged_batch(side)
    parts = split_by_length(batch, 4)
    assert sorted(row for part in parts for row in rows(part)) == sorted(rows(batch))
    assert sum(part["input_ids"].numel() for part in parts) < batch["input_ids"].numel()
