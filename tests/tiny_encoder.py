"""A pretrained-looking encoder that the tests write to disk, and a text set that it can learn in seconds."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

# The trainer collects garbage at the start of every run; with transformers and torch loaded that takes longer than
# training here, unless what is loaded by now is left out.
gc.freeze()

NOUNS = ("film", "plot", "actor", "scene")
PRAISE = ("good", "fine", "great", "lovely")
BLAME = ("bad", "poor", "awful", "dull")
WORDS = ["the", "was", "so", *NOUNS, *PRAISE, *BLAME]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def write_tokenizer(folder: Path) -> None:
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)


def write_encoder(folder: Path, width: int = 16, positions: int = 128) -> Path:
    """Writes a BERT of two layers without a head, and its tokenizer."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=width,
        max_position_embeddings=positions,
        # Large enough that the sentence reaches the first token, as in a pretrained encoder.
        initializer_range=0.3,
    )
    BertModel(config).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def review(number: int) -> tuple[str, str]:
    """A sentence and its label; they alternate, and the words around the telling one vary."""
    good = number % 2 == 0
    telling = (PRAISE if good else BLAME)[number // 2 % 4]
    noun = NOUNS[number // 8 % 4]
    return f"the {noun} was {'so ' * (number % 3)}{telling}", "good" if good else "bad"


def write_reviews(path: Path, count: int, start: int = 0) -> Path:
    rows = [review(number) for number in range(start, start + count)]
    path.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    return path


def write_scores(path: Path, count: int) -> Path:
    """Pairs of sentences with a score between 0 and 1: the share of praise."""
    rows = []
    for number in range(count):
        (first, one), (second, two) = review(number), review(3 * number + 1)
        rows.append(f"{first}\t{second}\t{((one == 'good') + (two == 'good')) / 2 + 0.25}\n")
    path.write_text("first\tsecond\tscore\n" + "".join(rows))
    return path


def write_workshop(folder: Path) -> Path:
    """Writes an encoder, training and development reviews, and scored pairs."""
    write_encoder(folder / "encoder")
    write_reviews(folder / "train.csv", 64)
    write_reviews(folder / "dev.csv", 32, start=64)
    write_scores(folder / "scores.tsv", 48)
    return folder


def settings(workshop: Path, output: Path, **changed: Any) -> dict[str, Any]:
    """Fields of a `TrainingConfig` for a run of about a second."""
    fields = {
        "output": output,
        "model": str(workshop / "encoder"),
        "data": workshop / "train.csv",
        "dev_data": workshop / "dev.csv",
        "epochs": 2,
        "batch_size": 16,
        "learning_rate": 1e-2,
        "head_learning_rate": 2e-2,
    }
    return fields | changed


def draw_nothing(patch: pytest.MonkeyPatch) -> None:
    """Runs get an empty picture: the real one takes longer than their training."""
    patch.setattr("craft_peft.glue.results.draw_curves", lambda result, path: path.write_bytes(b""))
