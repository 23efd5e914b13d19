"""Small random models of each architecture: default targets, which stacks form, and the start, merge and file laws."""

import copy

import pytest
import torch
import transformers as hf
from laws import assert_close
from method_table import METHODS
from peft import PeftModel, get_peft_model

from craft_peft.plugin.layer import StackedLinear
from craft_peft.plugin.stacks import path_pattern

TEXT = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
GROUPED = {**TEXT, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 32}
SEQ2SEQ = {
    "vocab_size": 40, "d_model": 16, "encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 32,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
ENCODER = "encoder.layer.*.attention.self.{}"


def encoder_stacks(root, names=("query", "value"), layers=3):
    return {f"{root}.{ENCODER.format(name)}": (layers, 16, 16) for name in names}


def decoder_stacks(value_width=8):
    return {
        "model.layers.*.self_attn.q_proj": (3, 16, 16),
        "model.layers.*.self_attn.v_proj": (3, value_width, 16),
    }


def two_sided(query, value, sides):
    return {f"{path}.{name}": (layers, 16, 16) for path, layers in sides.items() for name in (query, value)}


# model class, config, expected stacks (pattern: layers, out, in)
ARCHITECTURES = {
    "roberta": (hf.RobertaForSequenceClassification, hf.RobertaConfig(**TEXT), encoder_stacks("roberta")),
    "bert": (hf.BertForTokenClassification, hf.BertConfig(**TEXT), encoder_stacks("bert")),
    "deberta-v2": (
        hf.DebertaV2ForSequenceClassification,
        hf.DebertaV2Config(**TEXT, relative_attention=True, pos_att_type=["p2c", "c2p"]),
        encoder_stacks("deberta", ("query_proj", "value_proj")),
    ),
    "distilbert": (
        hf.DistilBertForSequenceClassification,
        hf.DistilBertConfig(vocab_size=40, dim=16, n_layers=3, n_heads=2, hidden_dim=16),
        {f"distilbert.transformer.layer.*.attention.{name}": (3, 16, 16) for name in ("q_lin", "v_lin")},
    ),
    "modernbert": (
        hf.ModernBertForSequenceClassification,
        hf.ModernBertConfig(**TEXT, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2),
        {"model.layers.*.attn.Wqkv": (3, 48, 16)},
    ),
    "gpt2": (
        hf.GPT2LMHeadModel,
        hf.GPT2Config(vocab_size=40, n_embd=16, n_layer=3, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2),
        {"transformer.h.*.attn.c_attn": (3, 48, 16)},
    ),
    "opt": (
        hf.OPTForCausalLM,
        hf.OPTConfig(
            vocab_size=40, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, ffn_dim=16,
            max_position_embeddings=32, word_embed_proj_dim=16,
        ),
        {f"model.decoder.layers.*.self_attn.{name}": (3, 16, 16) for name in ("q_proj", "v_proj")},
    ),
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig(**GROUPED), decoder_stacks()),
    "mistral": (hf.MistralForCausalLM, hf.MistralConfig(**GROUPED), decoder_stacks()),
    "qwen2": (
        hf.Qwen2ForCausalLM,
        hf.Qwen2Config(**{**GROUPED, "num_key_value_heads": 1}),
        decoder_stacks(),
    ),
    "gemma2": (hf.Gemma2ForCausalLM, hf.Gemma2Config(**GROUPED), decoder_stacks()),
    "t5": (
        hf.T5ForConditionalGeneration,
        hf.T5Config(
            vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=3, num_decoder_layers=2, num_heads=2,
            decoder_start_token_id=0,
        ),
        two_sided("q", "v", {
            "encoder.block.*.layer.*.SelfAttention": 3,
            "decoder.block.*.layer.*.SelfAttention": 2,
            "decoder.block.*.layer.*.EncDecAttention": 2,
        }),
    ),
    "bart": (
        hf.BartForConditionalGeneration,
        hf.BartConfig(**SEQ2SEQ),
        two_sided("q_proj", "v_proj", {
            "model.encoder.layers.*.self_attn": 3,
            "model.decoder.layers.*.self_attn": 2,
            "model.decoder.layers.*.encoder_attn": 2,
        }),
    ),
    "vit": (
        hf.ViTForImageClassification,
        hf.ViTConfig(
            hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4
        ),
        {f"vit.layers.*.attention.{name}": (3, 16, 16) for name in ("q_proj", "v_proj")},
    ),
    "whisper": (
        hf.WhisperForConditionalGeneration,
        hf.WhisperConfig(
            **{k: v for k, v in SEQ2SEQ.items() if k != "max_position_embeddings"}, num_mel_bins=8,
            max_source_positions=16, max_target_positions=16,
        ),
        two_sided("q_proj", "v_proj", {
            "model.encoder.layers.*.self_attn": 3,
            "model.decoder.layers.*.self_attn": 2,
            "model.decoder.layers.*.encoder_attn": 2,
        }),
    ),
}  # fmt: skip


def inputs(model):
    torch.manual_seed(3)
    ids = torch.randint(3, 40, (2, 6))
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 8, 8)}
    if model.main_input_name == "input_features":
        return {"input_features": torch.randn(2, 8, 32), "decoder_input_ids": ids}
    return {"input_ids": ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})}


@torch.no_grad()
def logits(model):
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return model(**inputs(base)).logits


def stacks_of(model):
    """The patterns of the projections in every stack that an adapted model has, with the sizes of their matrices."""
    patterns, shapes = {}, {}
    for key, module in model.get_base_model().named_modules():
        if isinstance(module, StackedLinear):
            adapter = module.slots["default"].adapter
            patterns.setdefault(adapter, set()).add(path_pattern(key))
            shapes[adapter] = sorted(adapter.shape.matrices)
    return {frozenset(found): shapes[adapter] for adapter, found in patterns.items()}


def expected_stacks(projections, together):
    """The same from the table above, for methods that stack a projection, all matrices of one shape, or all."""
    groups = {}
    for pattern, (_, *matrix) in projections.items():
        apart = {"projection": pattern, "shape": tuple(matrix), "all": None}[together]
        groups.setdefault(apart, []).append(pattern)
    return {
        frozenset(patterns): sorted(tuple(projections[p][1:]) for p in patterns for _ in range(projections[p][0]))
        for patterns in groups.values()
    }


def shown_by(name):
    return pytest.mark.peft_feature(f"default targets, start, file and merge of {name}")


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("name", [pytest.param(name, marks=shown_by(name)) for name in ARCHITECTURES])
def test_architecture(name, method, tmp_path):
    model_class, config, stacks = ARCHITECTURES[name]
    torch.manual_seed(0)
    base = model_class(copy.deepcopy(config)).eval()
    before = logits(base)
    fresh = get_peft_model(copy.deepcopy(base), method.config()).eval()
    assert stacks_of(fresh) == expected_stacks(stacks, method.config().together)
    assert torch.equal(logits(fresh), before)
    torch.manual_seed(1)
    model = get_peft_model(copy.deepcopy(base), method.config(init_weights=False)).eval()
    adapted = logits(model)
    assert not torch.allclose(adapted, before)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()), adapted)
    merged = model.merge_and_unload(safe_merge=True)
    assert_close(logits(merged), adapted, products=2000)
    assert {n: type(m) for n, m in merged.named_modules()} == {n: type(m) for n, m in base.named_modules()}
