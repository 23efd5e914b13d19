"""An adapter is more than its stacks: what each field of a config asks for is in every operation, or is refused there.

The table names, for every field of every config, what to try. A field that no row names fails a test.
"""

import copy
import dataclasses
from collections.abc import Callable
from functools import cache

import pytest
import torch
from laws import assert_close
from peft import PeftModel, convert_to_lora, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from small_models import LAYERS, WIDTH, bert, gpt2, logits, tokens
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from craft_peft import AdapterBank, CraftConfig, CraftError, LotrConfig, SuperLoraConfig, fit_bases, load_adapter
from craft_peft.lora_export import to_lora

NOT_COMPUTED = {
    *("auto_mapping", "base_model_name_or_path", "revision", "peft_type", "peft_version", "craft_peft_version"),
    *("inference_mode", "base_quantization", "tensors_sha256"),
}
"""Where an adapter comes from, and whether it is trained further: another value gives the same outputs."""

SAME_OUTPUTS = {"dropout", "save_factors"}
"""What acts in training or in files alone."""

SMALL = {
    CraftConfig: {"ranks": (2, 4, 3)},
    LotrConfig: {"r": 2, "init_std": 0.5},
    SuperLoraConfig: {"r": 2, "alpha": 2.0},
}
METHODS = list(SMALL)
SIZES = {
    **{"vocab_size": 50, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 2},
    "intermediate_size": WIDTH,
}


def masked(kind=BertForMaskedLM, sizes=BertConfig):
    """Its head is tied to the embedding and has a bias of its own."""
    torch.manual_seed(0)
    model = kind(sizes(**SIZES))
    nn.init.normal_(model.get_output_embeddings().bias)
    return model.eval()


def masked_roberta():
    return masked(RobertaForMaskedLM, RobertaConfig)


@dataclasses.dataclass(frozen=True)
class Case:
    """A config with one field set, or with others that it needs.

    Args:
        method: its class.
        field: the field that it is about.
        fields: what the config has.
        base: makes its base model.
    """

    method: type
    field: str
    fields: dict
    base: Callable[[], nn.Module] = bert

    def __str__(self) -> str:
        return f"{self.method.__name__}, {', '.join(f'{k}={v}' for k, v in self.fields.items())}, {self.base.__name__}"


HEAD = {"task_type": "SEQ_CLS"}
TOKENS = {"trainable_token_indices": [1, 5, 40]}

EVERY = [
    ("task_type", HEAD),
    ("target_modules", {"target_modules": ["key", "output.dense"]}),
    ("target_modules", {"target_modules": r".*layer\.[12].*\.(query|dense)"}),
    ("target_modules", {}, gpt2),  # of transformers' Conv1D
    ("exclude_modules", {"exclude_modules": ["0.attention.self.query"]}),
    ("layers_to_transform", {"layers_to_transform": [0, 2]}),
    ("layers_pattern", {"layers_to_transform": [1, 2], "layers_pattern": "layer"}),
    ("modules_to_save", {"modules_to_save": ["pooler", "layer.1.output"], **HEAD}),
    ("trainable_token_indices", {**TOKENS, **HEAD}),
    ("trainable_token_indices", {"trainable_token_indices": {"wte": [1, 5, 40]}}, gpt2),  # tied to the head
    ("trainable_token_indices", TOKENS, masked),  # tied to a head with a bias
    ("bias", {"bias": "all", **HEAD, **TOKENS}),
    ("bias", {"bias": "craft_only"}, gpt2),
    ("alpha", {"alpha": 3.0}),
    ("dropout", {"dropout": 0.5}),
    ("init_weights", {"init_weights": True}),
    ("rank_pattern", {"rank_pattern": {"query": (2, 3, 3)}}),
]
"""The fields that every config has; with the first method."""

OWN = {
    CraftConfig: [
        ("ranks", {"ranks": (3, 5, 6)}),
        ("trained_modes", {"trained_modes": (1, 2)}),
        ("decomposition", {"decomposition": "hooi"}),
        ("tying", {"tying": "diagonal"}),
        ("tying", {"tying": "free"}),
        ("basis", {"basis": "activations"}),
        ("basis_seed", {"basis_seed": 7, "basis": "random"}),
        ("save_factors", {"save_factors": False}),
    ],
    LotrConfig: [
        ("bias", {"bias": "lotr_only", **HEAD, **TOKENS}),
        ("rank_pattern", {"rank_pattern": {"query": 3}}),
        ("alpha", {"alpha": 3.0}),
        ("r", {"r": 3}),
        ("group", {"group": "per_projection"}),
        ("init", {"init": "svd"}),
        ("init_std", {"init_std": None}),
    ],
    SuperLoraConfig: [
        ("bias", {"bias": "superlora_only", **HEAD, **TOKENS}),
        ("rank_pattern", {"rank_pattern": {"query": 3}}),
        ("alpha", {"alpha": 3.0}),
        ("r", {"r": 3}),
        ("groups", {"groups": "layer"}),
        ("order", {"order": 2}),
        ("splits", {"splits": 2}),
        ("core", {"core": "identity"}),
        ("sizes", {"sizes": "weights"}),
        ("identity_modes", {"identity_modes": (0,), "sizes": "weights"}),
        ("cut_weights", {"cut_weights": True, "groups": 8, "order": 2}),
        ("projection", {"projection": "fastfood"}),
        ("projection_ratio", {"projection_ratio": 0.25, "projection": "fastfood"}),
        ("projection_seed", {"projection_seed": 3, "projection": "fastfood"}),
        ("shuffle", {"shuffle": True}),
        ("shuffle_seed", {"shuffle_seed": 3, "shuffle": True}),
        ("init_std", {"init_std": 0.7}),
    ],
}
CASES = [Case(method, *row) for method in METHODS for row in [*(EVERY if method is CraftConfig else ()), *OWN[method]]]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def adapted(case: Case):
    """A model whose adapter is away from its start in everything that is trained; and its base model."""
    base = case.base()
    targets = {} if case.base is gpt2 else {"target_modules": ["query", "value"]}
    config = case.method(**{**targets, "init_weights": False, **SMALL[case.method], **copy.deepcopy(case.fields)})
    torch.manual_seed(1)
    model = get_peft_model(copy.deepcopy(base), config)
    if case.fields.get("basis") == "activations":
        fit_bases(model, [{"input_ids": tokens()}])
    return move(model, 2), base


def move(model, seed: int):
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


@cache
def plain_outputs(method: type, base) -> torch.Tensor:
    return logits(adapted(Case(method, "", {}, base))[0])


@pytest.mark.parametrize("method", METHODS)
def test_the_table_has_every_field(method):
    named = {case.field for case in CASES if case.method is method}
    redefined = set(vars(method)["__annotations__"])
    inherited = {field for field, *_ in EVERY}
    assert named | NOT_COMPUTED | inherited == {field.name for field in dataclasses.fields(method)}
    assert redefined <= named and not (named | inherited) & NOT_COMPUTED


@every_case
def test_every_operation_has_all_of_the_adapter(case, tmp_path):
    model, base = adapted(case)
    expected = logits(model)
    if case.fields and case.field not in SAME_OUTPUTS:
        assert not torch.equal(expected, plain_outputs(case.method, case.base)), "the row is about nothing"
    saved_and_loaded(model, base, tmp_path / "saved", expected)
    exported(model, base, tmp_path / "lora", expected)
    mixed(model, base, expected, biased="bias" in case.fields)
    merged = copy.deepcopy(model).merge_and_unload()
    assert_close(logits(merged), expected, products=1000)
    if case.method is CraftConfig:
        banked(model, base, tmp_path, expected, refused={"bias", "trainable_token_indices"} & case.fields.keys())


def saved_and_loaded(model, base, folder, expected):
    model.save_pretrained(folder)
    for load in (PeftModel.from_pretrained, load_adapter):
        assert torch.equal(logits(load(copy.deepcopy(base), folder)), expected)


def exported(model, base, folder, expected):
    if isinstance(base, BertForMaskedLM):
        with pytest.raises(
            CraftError, match=r"tokens in 'cls.predictions.decoder', which has a bias.*merge_and_unload"
        ):
            to_lora(model)
        return
    to_lora(model).save(folder)
    assert_close(logits(PeftModel.from_pretrained(copy.deepcopy(base), folder)), expected, products=1000)


def mixed(model, base, expected, biased):
    assert_close(model(tokens(), adapter_names=["default", "default"]).logits.detach(), expected, products=1000)
    names = ["default", "__base__"]
    if biased:
        with pytest.raises(CraftError, match=r"'default' was trained with bias=.*rows of '__base__' would get them"):
            model(tokens(), adapter_names=names)
        return
    outputs = model(tokens(), adapter_names=names).logits.detach()
    assert_close(outputs[0], expected[0], products=1000)
    assert torch.equal(outputs[1], logits(base)[1])


def banked(model, base, folder, expected, refused):
    """Those that a bank takes are used, mixed and saved; the others are refused as guests and as hosts."""
    if refused:
        refused_by_banks(model, base, folder / "saved", f"{refused.pop()}=.*a model that has no bank")
        return
    bank = AdapterBank(move(model, 3))  # the host has the same bases, and other numbers
    assert not torch.equal(logits(model), expected)
    bank.load(folder / "saved", "guest")
    with bank.use("guest"):
        assert_close(logits(model), expected, products=2000)
    outputs = model(tokens(), adapter_names=["guest", "__base__"]).logits.detach()
    assert_close(outputs[0], expected[0], products=2000)
    assert torch.equal(outputs[1], logits(base)[1])
    bank.save("guest", folder / "again")
    files = [load_file(folder / name / "adapter_model.safetensors") for name in ("saved", "again")]
    assert files[0].keys() == files[1].keys() and all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    for load in (PeftModel.from_pretrained, load_adapter):
        assert torch.equal(logits(load(copy.deepcopy(base), folder / "again")), expected)


def refused_by_banks(model, base, folder, message):
    with pytest.raises(CraftError, match=f"'default' cannot be beside a bank. .*{message}"):
        AdapterBank(model)
    config = model.peft_config["default"]
    plain = CraftConfig(task_type=config.task_type, target_modules=config.target_modules, **SMALL[CraftConfig])
    host = get_peft_model(copy.deepcopy(base), plain).eval()
    bank, before = AdapterBank(host), logits(host)
    with pytest.raises(CraftError, match=f"'guest' cannot join the bank. .*{message}"):
        bank.load(folder, "guest")
    with pytest.raises(CraftError, match=f"'late' cannot be beside a bank. .*{message}"):
        load_adapter(host, folder, "late")
    assert "late" not in host.peft_config and torch.equal(logits(host), before)


# ---------------------------------------------------------------------------------------------------------------------
# Trained tokens
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.peft_feature("`trainable_token_indices`")
@pytest.mark.parametrize("make", [masked, masked_roberta])
def test_a_tied_head_keeps_its_bias(make):
    """PEFT by itself leaves it out."""
    config = CraftConfig(**SMALL[CraftConfig], target_modules=["query", "value"], **TOKENS, bias="all")
    base = make()
    model = get_peft_model(copy.deepcopy(base), config).eval()
    assert torch.equal(logits(model), logits(base))
    model(tokens()).logits.sum().backward()
    assert model.get_base_model().get_output_embeddings().original_module.bias.grad.abs().max() > 0


def test_rows_of_adapters_with_and_without_tokens():
    model, base = adapted(Case(CraftConfig, "", TOKENS))
    torch.manual_seed(5)
    model.add_adapter("plain", CraftConfig(**SMALL[CraftConfig], target_modules=["query"], init_weights=False))
    expected = {"__base__": logits(base)}
    for name in ("plain", "default"):
        model.set_adapter(name)
        expected[name] = logits(model.eval())
    for names in (["plain", "default"], ["__base__", "plain"]):
        outputs = model(tokens(), adapter_names=names).logits.detach()
        for row, name in enumerate(names):
            assert_close(outputs[row], expected[name][row], products=1000)


def test_tokens_of_one_weight_are_merged_if_they_are_the_same():
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True))
    for head, refused in (([1, 2], False), ([3], True)):
        indices = {"embed_tokens": [1, 2], "lm_head": head}
        config = CraftConfig(**SMALL[CraftConfig], trainable_token_indices=indices)
        model = move(get_peft_model(copy.deepcopy(base), config), 2)
        expected = logits(model)
        if refused:
            with pytest.raises(
                CraftError, match=r"tokens of '\S+' cannot be merged: it shares its weight with '\S+', w"
            ):
                model.merge_adapter()
            assert torch.equal(logits(model), expected)
        else:
            assert_close(logits(model.merge_and_unload()), expected, products=1000)


@pytest.mark.parametrize("fields", [{"bias": "all"}, TOKENS], ids=str)
def test_biases_and_tokens_have_no_sum(fields):
    model, _ = adapted(Case(CraftConfig, "", fields))
    before = logits(model)
    with pytest.raises(CraftError, match=f"'default' was trained with .*{next(iter(fields))}=.*no place in a sum"):
        model.base_model.add_weighted_adapter(["default"], [1.0], "sum")
    assert list(model.peft_config) == ["default"] and torch.equal(logits(model), before)


# ---------------------------------------------------------------------------------------------------------------------
# Saved modules
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.peft_feature("`modules_to_save`, several and per adapter")
def test_a_module_within_another_is_not_saved():
    base = bert()
    before = base.state_dict().keys()
    config = CraftConfig(**SMALL[CraftConfig], target_modules=["query"], modules_to_save=["embeddings"])
    with pytest.raises(CraftError, match=r"'bert.embeddings', and 'bert.embeddings.word_embeddings' in it"):
        get_peft_model(base, config)
    assert base.state_dict().keys() == before


def test_a_saved_module_without_rows_is_not_mixed():
    model, _ = adapted(Case(CraftConfig, "", {"modules_to_save": ["position_embeddings"]}))
    with pytest.raises(CraftError, match=r"but got 2 and 1 respectively .at 'bert.embeddings.position_embeddings'"):
        model(tokens(), adapter_names=["default", "__base__"])


# ---------------------------------------------------------------------------------------------------------------------
# The export
# ---------------------------------------------------------------------------------------------------------------------


def test_a_smaller_rank_or_another_dtype_leaves_the_rest_as_it_is():
    model, _ = adapted(Case(CraftConfig, "", {"bias": "all", **HEAD, **TOKENS}))
    exact, less = to_lora(model), to_lora(model, rank=1, dtype=torch.bfloat16)
    rest = {key for key in exact.tensors if ".lora_" not in key}
    assert {key.rpartition(".")[2] for key in rest} == {"bias", "weight", "trainable_tokens_delta"}
    saved = get_peft_model_state_dict(model)
    assert rest == {key for key in saved if ".craft_" not in key}
    assert all(torch.equal(less.tensors[key], saved[key]) for key in rest)
    move(model, 3)  # an export is a copy
    assert not any(
        torch.equal(exact.tensors[key], get_peft_model_state_dict(model)[key]) for key in rest - untrained(rest)
    )


def untrained(keys):
    """Of a head's original, which PEFT saves as one of all biases."""
    return {key for key in keys if "original_module" in key}


class Blocks(nn.Module):
    """One of its modules is named as a method's tensors are, and paths end other paths."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.craft_block = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(3)))
        self.inner = nn.ModuleDict({"craft_block": nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(3)))})

    def forward(self, x):
        return self.inner["craft_block"](torch.tanh(self.craft_block(x)))


@pytest.mark.parametrize(
    "targets", [["0", "1", "2"], r"craft_block\.\d", r"inner\.craft_block\.\d", r"craft_block\.[02]"]
)
def test_names_that_end_others_or_look_like_a_methods(targets, tmp_path):
    base = Blocks()
    config = CraftConfig(ranks=(2, 4, 3), target_modules=targets, bias="all", init_weights=False)
    model = move(get_peft_model(copy.deepcopy(base), config), 2)
    to_lora(model).save(tmp_path)
    x = torch.randn(2, WIDTH)
    found = PeftModel.from_pretrained(base, tmp_path)
    assert len([name for name, _ in found.named_modules() if name.endswith("lora_A")]) == len(to_lora(model).errors)
    assert_close(found(x).detach(), model(x).detach(), products=1000)


@pytest.mark.peft_feature("`convert_to_lora`")
@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [({"bias": "all"}, ValueError, "sets bias=all"), (TOKENS, TypeError, "TrainableTokensLayer|TokensWithBias")],
)
def test_peft_converts_neither_biases_nor_tokens(fields, error, message):
    model, _ = adapted(Case(CraftConfig, "", fields))
    with pytest.raises(error, match=message):
        convert_to_lora(model, rank=WIDTH)
