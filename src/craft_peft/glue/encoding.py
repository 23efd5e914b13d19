"""Texts to token numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import datasets
import numpy as np
from datasets.fingerprint import generate_random_fingerprint
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import CraftError


def encode(rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> datasets.Dataset:
    """Turns texts into token numbers.

    Args:
        rows: Columns `text`, perhaps `text_pair`, and perhaps `label`.
        tokenizer: The tokenizer.
        max_length: Longer rows are cut.

    Returns:
        The model's inputs, with `labels` where there were labels; nothing is padded yet. A row has at least one token.
    """
    # An empty text has no token where the tokenizer adds none of its own, and no model reads a row of no length.
    end = tokenizer.pad_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    nothing = {"input_ids": [end], "attention_mask": [1], "token_type_ids": [0]}

    def batch(columns: Mapping[str, Any]) -> dict[str, Any]:
        encoded = tokenizer(columns["text"], columns.get("text_pair"), truncation=True, max_length=max_length)
        rows = {name: [row or nothing[name] for row in column] for name, column in encoded.items()}
        return rows | ({"labels": columns["label"]} if "label" in columns else {})

    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        # A fingerprint of its own, since to make one the library pickles the tokenizer, which takes seconds.
        fingerprint = generate_random_fingerprint()
        columns = rows.column_names
        return rows.map(batch, batched=True, remove_columns=columns, keep_in_memory=True, new_fingerprint=fingerprint)
    finally:
        if not bars:
            datasets.enable_progress_bars()


def longest_first(rows: datasets.Dataset) -> list[int]:
    """An order of encoded rows in which a batch needs hardly any padding: of STS-B in batches of 32, 60 % otherwise.

    Args:
        rows: As from `encode`.

    Returns:
        Row numbers, for `rows.select`; rows of one length stay in their order.
    """
    lengths = [len(numbers) for numbers in rows["input_ids"]]
    return np.argsort(np.negative(lengths), kind="stable").tolist()


def check_length(max_length: int, model: PreTrainedModel, name: str) -> None:
    """Raises a `CraftError` if rows may be longer than the model's positions."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is None or positions < 1:  # XLNet says -1 for no limit
        return
    words = model.get_input_embeddings()
    for table in model.modules():
        if isinstance(table, nn.Embedding) and table is not words and table.num_embeddings == positions:
            # RoBERTa's first position comes after that of padding.
            positions -= 0 if table.padding_idx is None else table.padding_idx + 1
            break
    if max_length > positions:
        raise CraftError(
            f"max_length={max_length} is longer than the {positions} positions of `{name}`. Use at most "
            f"`max_length={positions}`."
        )
