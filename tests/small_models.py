"""Small random models, made from their configs."""

from __future__ import annotations

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

LAYERS, WIDTH = 3, 16


def bert(
    dtype: torch.dtype = torch.float32, seed: int = 0, layers: int = LAYERS, width: int = WIDTH
) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=50, hidden_size=width, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=width
    )
    return BertForSequenceClassification(config).to(dtype).eval()


def roberta(layers: int, width: int) -> RobertaForSequenceClassification:
    """A RoBERTa shape with random weights and little else: one feed-forward unit, a small vocabulary."""
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=50, hidden_size=width, num_hidden_layers=layers, num_attention_heads=8, intermediate_size=1
    )
    return RobertaForSequenceClassification(config).eval()


def gpt2(seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=WIDTH, n_layer=LAYERS, n_head=2, n_positions=32)).eval()


def tokens(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(tokens()).logits
