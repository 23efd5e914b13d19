"""Query and value are found by structure in models of types that no table knows, and where it is not clear, refused."""

import copy
import logging
import re
from contextlib import suppress

import pytest
import torch
import transformers as hf
from laws import assert_close
from method_table import METHODS
from peft import get_peft_model
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from test_architectures import ARCHITECTURES, GROUPED, SEQ2SEQ, TEXT
from torch import nn

from craft_peft import CraftConfig, CraftError
from craft_peft.plugin.layer import StackedLinear
from craft_peft.plugin.registration import METHODS as REGISTERED
from craft_peft.plugin.stacks import path_pattern, say_once
from craft_peft.plugin.targets import QUERY_AND_VALUE, find_query_and_value, set_default_targets

BERT = "encoder.layer.*.attention.self"
LLAMA = "layers.*.self_attn"
SIDES = "encoder.layers.*.self_attn", "decoder.layers.*.self_attn", "decoder.layers.*.encoder_attn"
T5 = "encoder.block.*.layer.*.SelfAttention", "decoder.block.*.layer.*.SelfAttention"
LONG_T5 = ("encoder.block.*.layer.*.LocalSelfAttention", T5[1])
TOWERS = "text_model.encoder.layers.*.self_attn", "vision_model.encoder.layers.*.self_attn"

# model type: names of query and value, or of what is both; where they are
FOUND = {
    "mpnet": ("q v", "encoder.layer.*.attention.attn"),
    **dict.fromkeys(
        ("camembert", "convbert", "data2vec-text", "electra", "ernie", "layoutlmv3", "lilt", "longformer", "luke",
         "megatron-bert", "mobilebert", "rembert", "roformer", "xlm-roberta", "xlm-roberta-xl"),
        ("query value", BERT),
    ),
    "albert": ("query value", "encoder.albert_layer_groups.*.albert_layers.*.attention"),
    **dict.fromkeys(
        ("cohere", "eurobert", "granite", "jina_embeddings_v3", "nomic_bert", "olmo", "olmo2", "smollm3", "stablelm"),
        ("q_proj v_proj", LLAMA),
    ),
    "phi3": ("qkv_proj", LLAMA),
    "falcon": ("query_key_value", "h.*.self_attention"),
    "bloom": ("query_key_value", "h.*.self_attention"),
    "gpt_neox": ("query_key_value", "layers.*.attention"),
    "gpt_bigcode": ("c_attn", "h.*.attn"),
    "openai-gpt": ("c_attn", "h.*.attn"),
    "codegen": ("qkv_proj", "h.*.attn"),
    "deberta": ("in_proj", BERT),
    "mpt": ("Wqkv", "blocks.*.attn"),
    "ctrl": ("Wq Wv", "h.*.multi_head_attention"),
    "xlm": ("q_lin v_lin", "attentions.*"),
    "cpmant": ("project_q project_v", "encoder.layers.*.self_att.self_attention"),
    **dict.fromkeys(("pegasus", "mbart", "m2m_100", "marian"), ("q_proj v_proj", *SIDES)),
    "prophetnet": ("query_proj value_proj", *SIDES[:2], "decoder.layers.*.cross_attn"),
    "longt5": ("q v", *LONG_T5, "decoder.block.*.layer.*.EncDecAttention"),
    "deit": ("q_proj v_proj", "layers.*.attention"),
    "dinov2": ("q_proj v_proj", "encoder.layer.*.attention"),
    "swin": ("q_proj v_proj", "encoder.layers.*.blocks.*.attention"),
    "cvt": ("projection_query projection_value", "encoder.stages.*.layers.*.attention.attention"),
    "clip": ("q_proj v_proj", *TOWERS),
    "siglip": ("q_proj v_proj", *TOWERS),
    "wav2vec2": ("q_proj v_proj", "encoder.layers.*.attention"),
    "hubert": ("q_proj v_proj", "encoder.layers.*.attention"),
    "wav2vec2-bert": ("linear_q linear_v", "encoder.layers.*.self_attn"),
    # The attention that reads the input lies in no block, and has the same names.
    "perceiver": ("query value", "encoder.self_attends.*.attention.self"),
}  # fmt: skip

# model type: what the error names
REFUSED = {
    "led": r"'query' and 'value' in 'encoder\.layers\.\*.*; or 'q_proj' and 'v_proj' in 'decoder\.layers\.\*",
    "qwen2_vl": r"'qkv' in 'visual\.blocks\.\*\.attn'; or 'q_proj' and 'v_proj' in 'language_model\.layers\.\*",
    "deepseek_v3": "Its linear modules are called .*'kv_b_proj', .*'q_b_proj'",
    "fnet": "Its linear modules are called 'dense', 'projection'",
    "mamba": "Its linear modules are called .*'in_proj'",
}


def empty_model(model_type: str) -> nn.Module:
    """A model of two or a few blocks with its usual sizes, without numbers."""
    fields = ["num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"]
    config = hf.AutoConfig.for_model(model_type)
    for part in (config, getattr(config, "text_config", None), getattr(config, "vision_config", None)):
        for field in fields:
            if isinstance(getattr(part, field, None), int):
                with suppress(NotImplementedError):  # a name for the sum of two others
                    setattr(part, field, 2)
        if isinstance(vars(part).get("layer_types") if part else None, list):
            part.layer_types = part.layer_types[:2]
    with torch.device("meta"):
        return hf.AutoModel.from_config(config)


def matched(names, model: nn.Module) -> set[str]:
    endings = tuple(f".{name}" for name in names)
    return {path_pattern(key) for key, _ in model.named_modules() if key.endswith(endings)}


@pytest.mark.parametrize("model_type", FOUND)
@pytest.mark.peft_feature("default targets of a model type that no table knows: query and value, found by structure")
def test_found_by_structure(model_type):
    names, *places = FOUND[model_type]
    model = empty_model(model_type)
    found = find_query_and_value(model)
    assert matched(found, model) == {f"{place}.{name}" for place in places for name in names.split()}
    known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model_type)
    assert known is None or set(known) == found, "it is not what PEFT's table has"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_structure_agrees_with_the_table(name):
    model_class, config, stacks = ARCHITECTURES[name]
    with torch.device("meta"):
        model = model_class(copy.deepcopy(config))
    assert matched(find_query_and_value(model), model) == stacks.keys()


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_is_not_clear_is_refused(model_type):
    with pytest.raises(CraftError, match=REFUSED[model_type]) as caught:
        find_query_and_value(empty_model(model_type))
    assert str(caught.value).startswith("Please specify `target_modules` in `peft_config`")  # PEFT's words


def test_what_was_found_is_said_once(caplog):
    say_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            set_default_targets(CraftConfig(), empty_model("mpnet"))
    (message,) = caplog.messages
    assert "'mpnet'" in message and "'q' and 'v' in 'encoder.layer.*.attention.attn'" in message


# ---------------------------------------------------------------------------------------------------------------------
# Blocks of one's own
# ---------------------------------------------------------------------------------------------------------------------


def attention(kind: str = "Attention", inputs: int = 8, **rows: int) -> nn.Module:
    module = type(kind, (nn.Module,), {})()
    for name, size in rows.items():
        module.add_module(name, nn.Linear(inputs, size))
    return module


def blocks(**parts) -> nn.Module:
    return nn.ModuleDict({"layers": nn.ModuleList(nn.ModuleDict(copy.deepcopy(parts)) for _ in range(2))})


APART, FUSED = {"q": 8, "k": 4, "v": 4, "o": 8}, {"qkv": 16, "o": 8}


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (blocks(attn=attention(**APART)), {"q", "v"}),
        (blocks(attn=attention(**FUSED)), {"qkv"}),  # two heads of query, one of key and value
        (blocks(attn=attention(**APART), mlp=attention("Gate", q=8, k=8, v=8)), {"attn.q", "attn.v"}),
        (blocks(attn=attention(**FUSED), cross_attn=attention(**APART)), {"qkv"}),
        (blocks(attn=attention(**APART), cross_attn=attention(**APART)), {"q", "v"}),
        (blocks(attn=attention(**APART, q_rope=8, k_rope=8, v_rope=8)), {"q", "v"}),
        (nn.ModuleDict({"body": blocks(attn=attention(**APART)), "pool": attention(**APART)}), {"attn.q", "attn.v"}),
    ],
)
def test_found_in_blocks(model, expected):
    assert find_query_and_value(model) == expected


@pytest.mark.parametrize(
    "model",
    [
        blocks(cross_attn=attention(**APART)),
        blocks(mlp=attention("Gate", **APART)),
        blocks(attn=attention(qkv=20, o=8)),  # rows of no number of heads
        blocks(attn=attention(q=8, k=3, v=3, o=8)),
        blocks(attn=attention(q=8, v=8, o=8)),
        attention(**APART),  # in no block
        blocks(attn=attention(**APART), attention=attention(**FUSED)),
        blocks(attn=attention(q_a=8, k_a=8, v_a=8, q_b=8, k_b=8, v_b=8)),
    ],
)
def test_not_found_in_blocks(model):
    with pytest.raises(CraftError, match=r"^Please specify `target_modules` in `peft_config`"):
        find_query_and_value(model)


# ---------------------------------------------------------------------------------------------------------------------
# From the start to the merged model
# ---------------------------------------------------------------------------------------------------------------------

IMAGES = {"image_size": 8, "patch_size": 4}
SMALL = {
    "mpnet": (hf.MPNetModel, hf.MPNetConfig(**TEXT)),
    "longformer": (hf.LongformerModel, hf.LongformerConfig(**TEXT, attention_window=4)),
    "phi3": (hf.Phi3Model, hf.Phi3Config(**{k: v for k, v in GROUPED.items() if k != "head_dim"}, pad_token_id=0)),
    "falcon": (hf.FalconModel, hf.FalconConfig(**{k: v for k, v in TEXT.items() if k != "intermediate_size"})),
    "mbart": (hf.MBartModel, hf.MBartConfig(**SEQ2SEQ)),
    "dinov2": (hf.Dinov2Model, hf.Dinov2Config(**{k: v for k, v in TEXT.items() if k != "vocab_size"}, **IMAGES)),
}


def output(model) -> torch.Tensor:
    torch.manual_seed(3)
    if model.main_input_name == "pixel_values":
        return model(pixel_values=torch.randn(2, 3, 8, 8)).last_hidden_state
    return model(input_ids=torch.randint(3, 40, (2, 8))).last_hidden_state


@pytest.mark.parametrize("name", SMALL)
def test_a_type_without_an_entry_is_adapted(name, monkeypatch):
    monkeypatch.delitem(QUERY_AND_VALUE, name, raising=False)
    model_class, config = SMALL[name]
    torch.manual_seed(0)
    base = model_class(copy.deepcopy(config)).eval()
    base.requires_grad_(False)  # as in the adapted model: torch multiplies in another order where a gradient is due
    before = output(base)
    assert torch.equal(output(get_peft_model(copy.deepcopy(base), METHODS[0].config()).eval()), before)
    torch.manual_seed(1)
    model = get_peft_model(copy.deepcopy(base), METHODS[0].config(init_weights=False)).eval()
    adapted = output(model)
    assert not torch.allclose(adapted, before)
    adapted.square().sum().backward()
    layers = [module for module in model.modules() if isinstance(module, StackedLinear)]
    for adapter in {layer.slots["default"].adapter for layer in layers}:
        for parameter in adapter.parameters():
            assert parameter.grad is not None and parameter.grad.abs().max() > 0
    assert_close(output(model.merge_and_unload(safe_merge=True)), adapted, products=2000)


def test_a_second_adapter_without_targets_finds_the_same():
    model_class, config = SMALL["mpnet"]
    model = get_peft_model(model_class(copy.deepcopy(config)), METHODS[0].config())
    model.add_adapter("second", METHODS[0].config())
    assert model.peft_config["second"].target_modules == model.peft_config["default"].target_modules == {"q", "v"}


# ---------------------------------------------------------------------------------------------------------------------
# As PEFT's tuners say it
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tuner", [tuner for _, tuner in REGISTERED.values()])
@pytest.mark.peft_feature("`target_module_mapping` of a tuner")
def test_tuners_say_their_default_targets(tuner, monkeypatch):
    assert tuner.target_module_mapping["bert"] == ["query", "value"]
    assert tuner.target_module_mapping.keys() >= TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.keys()
    monkeypatch.setattr(tuner, "target_module_mapping", {"mpnet": [r"k", "o"]})
    model_class, config = SMALL["mpnet"]
    method = next(method for method in METHODS if re.match(method.name, tuner.prefix))
    adapted = get_peft_model(model_class(copy.deepcopy(config)), method.config())
    assert adapted.peft_config["default"].target_modules == {"k", "o"}
