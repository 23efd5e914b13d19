"""Base models: where they come from, what their head is, where it starts, and in which precision they run."""

from __future__ import annotations

import shutil
from pathlib import Path

import datasets
import pytest
import torch
from tiny_encoder import settings
from transformers import (
    BertModel,
    DataCollatorWithPadding,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
)

from craft_peft import CraftError
from craft_peft.glue import models
from craft_peft.glue.budgets import price
from craft_peft.glue.data import read_own
from craft_peft.glue.encoding import encode
from craft_peft.glue.heads import HEAD_STARTS, start_head
from craft_peft.glue.method_row import MethodOptions
from craft_peft.glue.methods import METHODS, make_peft_config
from craft_peft.glue.models import adapt, choose_precision
from craft_peft.glue.optimization import parameter_groups
from craft_peft.glue.pretrained import head_modules, is_head_parameter, load_base, resolve_model_name
from craft_peft.glue.settings import TrainingConfig, read_data
from craft_peft.glue.targets import find_model_targets
from craft_peft.glue.tasks import TASKS, Task

REVIEWS = Task("reviews", ("text",), "label", ("bad", "good"), ("accuracy",))


class TestBase:
    def test_folder_becomes_absolute(self, workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(workshop)
        assert resolve_model_name("encoder") == str(workshop.resolve() / "encoder")

    def test_hub_name_stays(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        assert resolve_model_name("owner/name") == "owner/name"

    @pytest.mark.parametrize("name", ["./encoder", "/nowhere/encoder", "a/b/c", "~/no-such-folder"])
    def test_missing_folder(self, name: str) -> None:
        with pytest.raises(CraftError, match=r"There is no model folder"):
            resolve_model_name(name)

    def test_folder_without_a_model(self, tmp_path: Path) -> None:
        with pytest.raises(CraftError, match=r"Could not read a model for text classification from .*config\.json"):
            load_base(str(tmp_path), REVIEWS)

    def test_hub_name_without_a_network(self) -> None:
        with pytest.raises(
            CraftError, match=r"Could not read a model for text classification from `owner/no-such-name`"
        ):
            load_base("owner/no-such-name", REVIEWS)

    def test_head_fits_the_task_and_carries_its_labels(self, workshop: Path) -> None:
        model, tokenizer = load_base(str(workshop / "encoder"), TASKS["mnli"])
        assert model.classifier.out_features == 3
        assert model.config.id2label == {0: "entailment", 1: "neutral", 2: "contradiction"}
        assert tokenizer.pad_token_id == model.config.pad_token_id

    def test_regression_has_one_output(self, workshop: Path) -> None:
        model, _ = load_base(str(workshop / "encoder"), TASKS["stsb"])
        assert (model.classifier.out_features, model.config.problem_type) == (1, "regression")

    def test_half_precision_checkpoint_becomes_float32(self, workshop: Path, tmp_path: Path) -> None:
        shutil.copytree(workshop / "encoder", tmp_path / "half")
        BertModel.from_pretrained(tmp_path / "half").to(torch.bfloat16).save_pretrained(tmp_path / "half")
        model, _ = load_base(str(tmp_path / "half"), REVIEWS)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}

    def test_nothing_is_printed(self, workshop: Path, capfd: pytest.CaptureFixture[str]) -> None:
        load_base(str(workshop / "encoder"), REVIEWS)
        assert capfd.readouterr() == ("", "")


def distilbert() -> DistilBertForSequenceClassification:
    torch.manual_seed(0)
    return DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=20, dim=16, n_layers=2, n_heads=2, hidden_dim=16)
    )


def test_head_of_two_modules_is_trained_and_saved_whole(tmp_path: Path) -> None:
    base = distilbert()
    assert head_modules(base) == ["pre_classifier", "classifier"]
    model = adapt(base, make_peft_config("craft", MethodOptions()), trains_base=False)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for module in ("pre_classifier", "classifier"):
        assert f"base_model.model.{module}.modules_to_save.default.weight" in trained
        assert is_head_parameter(f"base_model.model.{module}.modules_to_save.default.weight", model)
    assert sum(is_head_parameter(name, model) for name in trained) == 4


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.config is not None])
def test_what_an_adapter_trains_is_told_from_the_head(method: str) -> None:
    base, targets = distilbert(), find_model_targets(distilbert())
    ranks = METHODS[method].setting.on(targets)
    model = adapt(base, make_peft_config(method, MethodOptions(ranks, ("q_lin", "v_lin"))), False)
    groups = {group["name"]: group["params"] for group in parameter_groups(model, METHODS[method].recipe)}
    assert sum(p.numel() for p in groups["head"]) == 16 * 16 + 16 + 16 * 2 + 2
    assert sum(p.numel() for p in groups["adapter"]) == price(method, MethodOptions(ranks=ranks), targets).trainable


@pytest.mark.parametrize(("trains_base", "count"), [(False, 4), (True, 4 + 2 + 2 + 2 * 16)])
def test_without_an_adapter_the_head_or_everything_trains(trains_base: bool, count: int) -> None:
    model = adapt(distilbert(), None, trains_base)
    assert sum(parameter.requires_grad for parameter in model.parameters()) == count


def test_adapter_that_matches_nothing(workshop: Path) -> None:
    base, _ = load_base(str(workshop / "encoder"), REVIEWS)
    with pytest.raises(
        CraftError, match=r"target modules \['nothing'\] does not fit the model: No modules were targeted"
    ):
        adapt(base, make_peft_config("lora", MethodOptions(target_modules=("nothing",))), trains_base=False)


class TestHeadStart:
    def started(self, workshop: Path, start: str, **changed: object) -> tuple[torch.nn.Linear, torch.Tensor, float]:
        """The output layer after its start, the training labels, and the loss on the rows it may look at."""
        data = read_data(TrainingConfig(**settings(workshop, workshop / "unused", **changed)))
        torch.manual_seed(0)
        model, tokenizer = load_base(str(workshop / "encoder"), data.task)
        rows = encode(data.train, tokenizer, 32)
        collator = DataCollatorWithPadding(tokenizer)
        start_head(model, data.task, rows, collator, start, seed=0)
        model.eval()
        with torch.no_grad():
            loss = model(**collator([rows[i] for i in range(len(rows))])).loss.item()
        return model.classifier, torch.tensor(list(rows["labels"])), loss

    def test_prior_of_a_regression_is_the_mean(self, workshop: Path) -> None:
        columns = {"text_columns": ("first", "second"), "label_column": "score"}
        head, labels, _ = self.started(workshop, "prior", data=workshop / "scores.tsv", dev_data=None, **columns)
        assert head.bias.item() == pytest.approx(labels.mean().item())
        assert not head.weight.any()

    def test_prior_of_classes_is_their_log_frequency(self, workshop: Path, tmp_path: Path) -> None:
        data = tmp_path / "train.csv"
        data.write_text("text,label\n" + "x,bad\n" * 2 + "x,good\n" * 6)
        head, _, _ = self.started(workshop, "prior", data=data)
        assert head.bias.softmax(0).tolist() == pytest.approx([3 / 10, 7 / 10])

    def test_fitted_start_beats_the_prior_beats_nothing(self, workshop: Path) -> None:
        losses = {start: self.started(workshop, start)[2] for start in HEAD_STARTS}
        assert losses["fitted"] < losses["prior"] < losses["random"]

    def test_fitted_start_does_not_depend_on_the_random_one(self, workshop: Path) -> None:
        head, _, _ = self.started(workshop, "fitted")
        data = read_own(workshop / "train.csv", workshop / "dev.csv")
        torch.manual_seed(99)
        model, tokenizer = load_base(str(workshop / "encoder"), data.task)
        start_head(model, data.task, encode(data.train, tokenizer, 32), DataCollatorWithPadding(tokenizer), "fitted", 0)
        torch.testing.assert_close(model.classifier.weight, head.weight, atol=1e-3, rtol=0)

    def test_fitting_leaves_the_rest_alone(self, workshop: Path) -> None:
        data = read_own(workshop / "train.csv", workshop / "dev.csv")
        model, tokenizer = load_base(str(workshop / "encoder"), data.task)
        model.train()
        before = {name: value.clone() for name, value in model.state_dict().items() if "classifier" not in name}
        start_head(model, data.task, encode(data.train, tokenizer, 32), DataCollatorWithPadding(tokenizer), "fitted", 0)
        assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
        assert model.training and all(parameter.grad is None for parameter in model.parameters())

    def test_decoder_is_fitted_at_its_last_token(self, workshop: Path) -> None:
        data = read_own(workshop / "train.csv", workshop / "dev.csv")
        _, tokenizer = load_base(str(workshop / "encoder"), data.task)
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=50,
            n_positions=32,
            n_embd=16,
            n_layer=1,
            n_head=2,
            initializer_range=0.3,
            bos_token_id=2,
            eos_token_id=3,
        )
        config.pad_token_id = tokenizer.pad_token_id
        rows, collator = encode(data.train, tokenizer, 32), DataCollatorWithPadding(tokenizer)
        batch = collator([rows[i] for i in range(len(rows))])
        batch.pop("token_type_ids", None)
        model = GPT2ForSequenceClassification(config).eval()
        before = model(**batch).loss.item()
        start_head(model, data.task, rows, collator, "fitted", seed=0)
        assert model(**batch).loss.item() < min(before, 0.68)  # 0.693 knows nothing

    def test_head_that_does_more_after_its_linear_layer(self, workshop: Path) -> None:
        data = read_own(workshop / "train.csv", workshop / "dev.csv")
        model, tokenizer = load_base(str(workshop / "encoder"), data.task)
        model.classifier = torch.nn.Sequential(torch.nn.Linear(16, 2), torch.nn.Tanh())
        rows = encode(data.train, tokenizer, 32)
        with pytest.raises(CraftError, match=r"so that it cannot be fitted\. Use `head_start='random'`"):
            start_head(model, data.task, rows, DataCollatorWithPadding(tokenizer), "fitted", seed=0)

    def test_head_without_an_output_layer(self, workshop: Path) -> None:
        data = read_own(workshop / "train.csv", workshop / "dev.csv")
        model, tokenizer = load_base(str(workshop / "encoder"), data.task)
        model.classifier = torch.nn.Linear(16, 5)
        rows = encode(data.train, tokenizer, 32)
        with pytest.raises(CraftError, match=r"has no linear layer with 2 outputs to start with `prior`"):
            start_head(model, data.task, rows, DataCollatorWithPadding(tokenizer), "prior", seed=0)


class TestPrecision:
    @pytest.mark.parametrize(
        ("wish", "width", "available", "expected"),
        [
            ("auto", 768, True, "bf16"),
            ("auto", 384, True, "float32"),
            ("auto", 768, False, "float32"),
            ("bf16", 384, True, "bf16"),
            ("float32", 1024, True, "float32"),
        ],
    )
    def test_choice(
        self, monkeypatch: pytest.MonkeyPatch, wish: str, width: int, available: bool, expected: str
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(models, "has_bf16", lambda: available)
        assert choose_precision(wish, width) == expected

    def test_bf16_without_the_hardware(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(models, "has_bf16", lambda: False)
        with pytest.raises(CraftError, match=r"has no bfloat16 arithmetic.*Use `auto` or `float32`"):
            choose_precision("bf16", 768)

    def test_processor_is_asked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        for answer in (True, False):
            for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
                monkeypatch.setattr(torch.cpu, name, lambda answer=answer: answer, raising=False)
            assert models.has_bf16() is answer


def test_encoding_cuts_and_keeps_labels(workshop: Path) -> None:
    _, tokenizer = load_base(str(workshop / "encoder"), REVIEWS)
    rows = datasets.Dataset.from_dict({"text": ["the film was good"], "text_pair": ["the plot was bad"], "label": [1]})
    (encoded,) = encode(rows, tokenizer, max_length=7).to_list()
    assert len(encoded["input_ids"]) == 7 and encoded["labels"] == 1
    assert tokenizer.decode(encoded["input_ids"]).count("[SEP]") == 2
