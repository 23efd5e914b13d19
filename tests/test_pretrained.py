"""What a run computes with is in its folder or in its base, whatever transformers had to draw when it read the base."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from laws import assert_close
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file, save_file
from tiny_encoder import settings, write_tokenizer
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from craft_peft import CraftError, load_adapter
from craft_peft.cli.main import main
from craft_peft.glue.encoding import check_length
from craft_peft.glue.inference import evaluate, read_for
from craft_peft.glue.method_row import MethodOptions
from craft_peft.glue.methods import METHODS, make_peft_config
from craft_peft.glue.models import adapt, load_trained, start_from_run
from craft_peft.glue.pretrained import head_modules, lacked_keys, load_base, load_encoder, new_modules
from craft_peft.glue.runs import RESULT, RunFolder
from craft_peft.glue.tasks import Task
from craft_peft.glue.training import TrainingConfig, train

REVIEWS = Task("reviews", ("text",), "label", ("bad", "good"), ("accuracy",))
SIZES = {"vocab_size": 19, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
SIZES |= {"max_position_embeddings": 40, "initializer_range": 0.3}
GPT = {"vocab_size": 19, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 40, "initializer_range": 0.3}
XLNET = {"vocab_size": 19, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 16, "initializer_range": 0.3}
DISTIL = {"vocab_size": 19, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 16, "initializer_range": 0.3}
PERCEIVER = {"vocab_size": 19, "d_model": 16, "d_latents": 16, "num_latents": 4, "num_self_attends_per_block": 2}
PERCEIVER |= {"num_self_attention_heads": 2, "num_cross_attention_heads": 2, "max_position_embeddings": 40}
NARROW = {"embedding_size": 8, "intra_bottleneck_size": 8, "true_hidden_size": 8}

# What wrote the checkpoint, the modules to adapt, and what a classifier computes with that is not in it.
BASES: dict[str, tuple[Callable[[], PreTrainedModel], tuple[str, ...], list[str]]] = {
    "bert": (lambda: hf.BertForMaskedLM(hf.BertConfig(**SIZES)), ("query", "value"), ["bert.pooler"]),
    "albert": (
        lambda: hf.AlbertForMaskedLM(hf.AlbertConfig(**SIZES, embedding_size=8)),
        ("query", "value"),
        ["albert.pooler"],
    ),
    "mobilebert": (
        lambda: hf.MobileBertForMaskedLM(hf.MobileBertConfig(**SIZES, **NARROW)),
        ("query", "value"),
        ["mobilebert.pooler"],
    ),
    "ernie": (lambda: hf.ErnieForMaskedLM(hf.ErnieConfig(**SIZES)), ("query", "value"), ["ernie.pooler"]),
    "rembert": (
        lambda: hf.RemBertForMaskedLM(hf.RemBertConfig(**SIZES, input_embedding_size=8, output_embedding_size=8)),
        ("query", "value"),
        ["rembert.pooler"],
    ),
    "perceiver": (
        lambda: hf.PerceiverForMaskedLM(hf.PerceiverConfig(**PERCEIVER, num_blocks=1, qk_channels=16, v_channels=16)),
        ("query", "value"),
        ["perceiver.decoder"],
    ),
    "electra": (lambda: hf.ElectraForPreTraining(hf.ElectraConfig(**SIZES)), ("query", "value"), []),
    "distilbert": (lambda: hf.DistilBertForMaskedLM(hf.DistilBertConfig(**DISTIL)), ("q_lin", "v_lin"), []),
    "xlm-roberta": (lambda: hf.XLMRobertaModel(hf.XLMRobertaConfig(**SIZES)), ("query", "value"), []),
    "mpnet": (lambda: hf.MPNetForMaskedLM(hf.MPNetConfig(**SIZES)), ("q", "v"), []),
    "deberta-v2": (lambda: hf.DebertaV2Model(hf.DebertaV2Config(**SIZES)), ("query_proj", "value_proj"), []),
    "xlnet": (lambda: hf.XLNetLMHeadModel(hf.XLNetConfig(**XLNET)), ("layer_1",), []),
    "gpt2": (lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT)), ("c_attn",), []),
    "llama": (lambda: hf.LlamaModel(hf.LlamaConfig(**SIZES)), ("q_proj", "v_proj"), []),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Writes each checkpoint once."""
    folder = tmp_path_factory.mktemp("bases")

    def write(name: str) -> Path:
        if not (folder / name).exists():
            torch.manual_seed(0)
            BASES[name][0]().save_pretrained(folder / name)
            write_tokenizer(folder / name)
        return folder / name

    return write


def batch() -> dict[str, Tensor]:
    ids = torch.arange(24).reshape(3, 8) % 15 + 4
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(**batch()).logits


def adapted(base: Path, name: str, method: str, seed: int) -> tuple[nn.Module, Any]:
    torch.manual_seed(seed)
    model, tokenizer = load_base(str(base), REVIEWS)
    config = make_peft_config(method, MethodOptions(target_modules=BASES[name][1] if METHODS[method].config else None))
    return adapt(model, config, METHODS[method].trains_base), tokenizer


def trained_run(base: Path, name: str, method: str, folder: Path) -> tuple[RunFolder, Tensor]:
    """A finished run of one step, as training leaves it, and what its model computed."""
    model, tokenizer = adapted(base, name, method, seed=1)
    torch.nn.functional.cross_entropy(model.eval()(**batch()).logits, torch.tensor([0, 1, 0])).backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    torch.optim.AdamW(trained, lr=0.05).step()
    run = RunFolder(folder)
    run.claim({"model": str(base.resolve()), "method": method}, REVIEWS.fields(), resume=False)
    staged = run.stage()
    model.save_pretrained(staged)
    tokenizer.save_pretrained(staged)
    (staged / RESULT).write_text("{}")
    run.publish()
    return run, logits(model)


@pytest.mark.parametrize(
    ("name", "method"),
    [(name, method) for name in BASES for method in ("craft", "lora", "head") if method == "craft" or BASES[name][2]],
)
def test_a_run_read_afresh_computes_what_it_computed(
    bases: Callable[[str], Path], tmp_path: Path, name: str, method: str
) -> None:
    base, has_adapter = bases(name), METHODS[method].config is not None
    run, expected = trained_run(base, name, method, tmp_path / "run")
    for seed in (2, 3):
        torch.manual_seed(seed)
        assert torch.equal(logits(load_trained(run.path).model), expected)
    again, _ = adapted(base, name, method, seed=4)
    start_from_run(again, run.path, method, str(base.resolve()))
    head = tuple(("base_model.model." if has_adapter else "") + f"{part}." for part in head_modules(inner(again)))
    ended = load_trained(run.path).model.state_dict()
    again.load_state_dict({key: tensor for key, tensor in ended.items() if key.startswith(head)}, strict=False)
    assert torch.equal(logits(again), expected)
    if not has_adapter:
        return
    for load in (load_adapter, PeftModel.from_pretrained):
        torch.manual_seed(5)
        assert torch.equal(logits(load(read_plainly(base), run.path)), expected)
    if method == "craft":
        assert main(["export", str(run.path), "--output", str(tmp_path / "lora")]) == 0
        torch.manual_seed(6)
        exported = PeftModel.from_pretrained(read_plainly(base), tmp_path / "lora")
        assert_close(logits(exported), expected, products=16 * 16)


def inner(model: nn.Module) -> PreTrainedModel:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def read_plainly(base: Path) -> PreTrainedModel:
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    model.config.pad_token_id = 0
    return model


@pytest.mark.parametrize("name", BASES)
def test_what_a_checkpoint_lacks_is_what_transformers_says(bases: Callable[[str], Path], name: str) -> None:
    model, _ = load_base(str(bases(name)), REVIEWS)
    report = AutoModelForSequenceClassification.from_pretrained(bases(name), num_labels=2, output_loading_info=True)[1]
    assert lacked_keys(model) == set(report["missing_keys"])
    assert new_modules(model) == BASES[name][2]
    assert all(key.startswith((*new_modules(model), *head_modules(model))) for key in lacked_keys(model))


@pytest.mark.parametrize("method", ["craft", "lora", "head", "full"])
def test_a_pooler_that_was_drawn_is_told_trained_and_kept(
    bases: Callable[[str], Path], workshop: Path, tmp_path: Path, no_pictures: None, method: str
) -> None:
    """The told case: a BERT from masked-LM training has no pooler; its runs evaluated at chance."""
    fields = settings(workshop, tmp_path / "run", model=str(bases("bert")), method=method, epochs=1, max_length=32)
    result = train(TrainingConfig(**fields), console=Console(quiet=True))
    assert [note for note in result.data["notes"] if "no weights for bert.pooler: new ones are drawn at random" in note]
    assert result.parameters.head == 2 * 16 + 2 + 16 * 16 + 16
    trained = load_trained(result.output)
    assert evaluate(trained, read_for(trained)) == result.metrics
    files = [load_file(file) for file in (tmp_path / "run").glob("*.safetensors")]
    (pooler,) = [tensor for file in files for key, tensor in file.items() if key.endswith("bert.pooler.dense.weight")]
    torch.manual_seed(fields.get("seed", 0))
    assert not torch.equal(pooler, load_base(str(bases("bert")), REVIEWS)[0].bert.pooler.dense.weight)


def test_a_run_of_0_1_0_without_its_pooler_is_refused(bases: Callable[[str], Path], tmp_path: Path) -> None:
    base = bases("bert")
    run, _ = trained_run(base, "bert", "lora", tmp_path / "run")
    config = json.loads((run.path / "adapter_config.json").read_text())
    (run.path / "adapter_config.json").write_text(json.dumps(config | {"modules_to_save": ["classifier", "score"]}))
    file = run.path / "adapter_model.safetensors"
    save_file({key: tensor for key, tensor in load_file(file).items() if "pooler" not in key}, file)
    wrong = r"computed with bert\.pooler\.dense\.bias, bert\.pooler\.dense\.weight, which .* Train the run again"
    with pytest.raises(CraftError, match=wrong):
        load_trained(run.path)
    with pytest.raises(CraftError, match=wrong):
        start_from_run(adapted(base, "bert", "lora", 1)[0], run.path, "lora", str(base.resolve()))


@pytest.mark.parametrize("damage", [lambda file: file.write_bytes(file.read_bytes()[:99]), Path.unlink])
def test_a_damaged_run_is_no_start(bases: Callable[[str], Path], tmp_path: Path, damage: Callable) -> None:
    run, _ = trained_run(bases("bert"), "bert", "lora", tmp_path / "run")
    damage(run.path / "adapter_model.safetensors")
    with pytest.raises(CraftError, match="Train"):
        start_from_run(adapted(bases("bert"), "bert", "lora", 1)[0], run.path, "lora", str(bases("bert").resolve()))


def without(part: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if part not in key}


WRONG = {
    "no embeddings": (without("embeddings"), r"lack \S*embeddings\.LayerNorm\.bias, .* and 2 more"),
    "no second layer": (without("layer.1."), r"lack \S*encoder\.layer\.1\..* and 13 more"),
    "one matrix less": (without("layer.1.output.dense.w"), r"lack \S*encoder\.layer\.1\.output\.dense\.weight\. Give"),
    "another vocabulary": (
        lambda tensors: {key: t[:9].clone() if "word_embeddings" in key else t for key, t in tensors.items()},
        r"word_embeddings\.weight of shape \(19, 16\) \(they have \(9, 16\)\)",
    ),
    "other names": (lambda tensors: {f"other.{key}": tensor for key, tensor in tensors.items()}, r"and \d\d more"),
}


@pytest.mark.parametrize("load", [lambda name: load_base(name, REVIEWS), load_encoder], ids=["base", "encoder"])
@pytest.mark.parametrize("change", WRONG)
def test_weights_that_are_not_the_models_are_refused(
    bases: Callable[[str], Path], tmp_path: Path, change: str, load: Callable[[str], object]
) -> None:
    edit, wrong = WRONG[change]
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((bases("bert") / name).read_bytes())
    save_file(edit(load_file(bases("bert") / "model.safetensors")), tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CraftError, match=wrong):
        load(str(tmp_path))


def test_weights_cut_short_are_refused(bases: Callable[[str], Path], tmp_path: Path) -> None:
    for file in bases("bert").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CraftError, match="Could not read a model for text classification"):
        load_base(str(tmp_path), REVIEWS)


def test_an_adapter_is_no_base(bases: Callable[[str], Path], tmp_path: Path) -> None:
    """transformers reads it with its base and reports what the adapter lacks, not what the base lacks."""
    run, _ = trained_run(bases("bert"), "bert", "lora", tmp_path / "run")
    with pytest.raises(CraftError, match=r"holds an adapter \(adapter_config\.json\).*`start_from`"):
        load_base(str(run.path), REVIEWS)


def test_an_encoder_to_inspect_has_nothing_that_was_drawn(bases: Callable[[str], Path]) -> None:
    held = load_file(bases("bert") / "model.safetensors")
    assert {f"bert.{name}" for name, _ in load_encoder(str(bases("bert"))).named_parameters()} <= held.keys()


@pytest.mark.parametrize(
    ("name", "most"), [("bert", 40), ("xlm-roberta", 38), ("mpnet", 38), ("gpt2", 40), ("xlnet", None)]
)
def test_the_most_tokens_are_those_that_have_a_position(
    bases: Callable[[str], Path], name: str, most: int | None
) -> None:
    """XLNet's -1 is no limit; RoBERTa and its like count positions from after that of padding."""
    model, _ = load_base(str(bases(name)), REVIEWS)
    check_length(most or 10_000, model, name)
    with torch.no_grad():
        model(input_ids=torch.full((1, most or 64), 7))
    if most is not None:
        with pytest.raises(CraftError, match=f"Use at most `max_length={most}`"):
            check_length(most + 1, model, name)


def test_a_tokenizer_that_does_not_fit_is_told_before_anything_is_trained(tmp_path: Path) -> None:
    hf.BertModel(hf.BertConfig(**{**SIZES, "vocab_size": 10})).save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    with pytest.raises(CraftError, match=r"has \d+ tokens, and the model has embeddings for 10"):
        load_base(str(tmp_path), REVIEWS)
    tokenizer = json.loads((tmp_path / "tokenizer_config.json").read_text())
    tokenizer.pop("pad_token")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    with pytest.raises(CraftError, match="neither a padding token nor an end token"):
        load_base(str(tmp_path), REVIEWS)
