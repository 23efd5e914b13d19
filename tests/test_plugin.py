"""CRAFT's own promises in PEFT: counts, sizes of files, configs, stacks; and the message of each bad input."""

import copy
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from accelerate import init_empty_weights
from laws import TARGETS, moved
from method_table import METHODS
from peft import PeftConfig, PeftModel, PeftType, get_peft_model, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from small_models import bert, gpt2, logits, roberta, tokens
from torch import nn

from craft_peft import CraftConfig, CraftError
from craft_peft.adapters import craft as craft_module
from craft_peft.adapters.craft import CraftAdapter
from craft_peft.plugin.registration import register_methods
from craft_peft.weights import StackShape

CRAFT = next(method for method in METHODS if str(method) == "craft")


@pytest.fixture
def decompositions(monkeypatch):
    """Counts how often anything is decomposed."""
    calls = []
    original = craft_module.hosvd
    monkeypatch.setattr(craft_module, "hosvd", lambda *args, **kwargs: calls.append(args) or original(*args, **kwargs))
    return calls


@pytest.mark.parametrize(
    ("ranks", "layers", "width", "count"),
    [
        ("paper", 24, 1024, 41_152),
        ((24, 100, 100), 24, 1024, 41_152),
        ("paper", 12, 768, 40_288),
        ("paper", 6, 384, 40_072),
        ("paper", 6, 4096, 40_072),
        ("paper", 2, 16, 1_032),
    ],
)
def test_counts_of_the_reference(ranks, layers, width, count):
    adapter = CraftConfig(ranks=ranks).build_adapter("query", StackShape.uniform(layers, width, width))
    assert 2 * sum(parameter.numel() for parameter in adapter.parameters()) == count


def test_counts_in_a_model():
    model = get_peft_model(roberta(layers=12, width=104), CraftConfig())
    assert model.get_nb_trainable_parameters()[0] == 40_288


def test_the_default_says_what_it_became(caplog):
    get_peft_model(roberta(layers=5, width=104), CraftConfig(target_modules=TARGETS))
    assert [record.message.partition(":")[0] for record in caplog.records] == [
        "ranks='paper' became (5, 100, 100) for stack 'query'",
        "ranks='paper' became (5, 100, 100) for stack 'value'",
    ]
    caplog.clear()
    get_peft_model(roberta(layers=5, width=104), CraftConfig(target_modules=TARGETS))
    get_peft_model(roberta(layers=24, width=104), CraftConfig(target_modules=TARGETS))
    assert not caplog.records, "said again, or without need"


def test_trained_modes_leave_the_others_at_the_identity():
    for modes in [(0,), (1,), (2,), (0, 2)]:
        adapter = CraftConfig(ranks=(2, 4, 3), trained_modes=modes, init_weights=False).build_adapter(
            "query", StackShape.uniform(3, 7, 5)
        )
        adapter.initialise(lambda: [torch.randn(7, 5) for _ in range(3)])
        assert sum(p.numel() for p in adapter.parameters()) == sum((2, 4, 3)[mode] ** 2 for mode in modes)
        for mode, transform in enumerate(adapter.transforms().values()):
            assert torch.equal(transform, torch.eye(len(transform))) == (mode not in modes)
        torch.testing.assert_close(adapter.delta_weight(1).detach(), CRAFT.naive_delta(adapter, 1))


def test_fused_projections_of_gpt2_are_one_stack():
    model = get_peft_model(gpt2(), CraftConfig(ranks=(3, 5, 4), init_weights=False))
    layer = model.base_model.model.transformer.h[0].attn.c_attn
    assert (layer.in_features, layer.out_features) == (16, 48)
    adapter = layer.craft_adapters["default"]
    assert (adapter.shape.layers, adapter.shape.matrix) == (3, (48, 16))


def adapters_of(model):
    """Every adapter of a model, with the number of its layers and its ranks, by the projection of its first layer."""
    owners = [(key, module) for key, module in model.named_modules() if isinstance(module, CraftAdapter)]
    return [(key.split(".craft_")[0].rpartition(".")[2], a.shape.layers, a.ranks) for key, a in owners]


@pytest.mark.peft_feature("`rank_pattern`")
def test_rank_pattern_gives_modules_other_ranks_and_stacks_of_their_own(tmp_path):
    pattern = {"value": (3, 5, 6), r"layer\.1\.attention\.self\.query": [1, 2, 2]}
    model, base = moved(CRAFT, rank_pattern=pattern)
    assert adapters_of(model) == [("query", 2, (2, 4, 3)), ("value", 3, (3, 5, 6)), ("query", 1, (1, 2, 2))]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.peft_config["default"].rank_pattern == model.peft_config["default"].rank_pattern


@pytest.mark.peft_feature("layers of different shapes in one projection")
def test_alternating_shapes_form_separate_stacks(tmp_path, caplog):
    def shapes_alternate():
        torch.manual_seed(0)
        return nn.Sequential(*(nn.ModuleDict({"query": nn.Linear(16, 8 if i % 2 else 16)}) for i in range(5)))

    config = CRAFT.config(target_modules=["query"], init_weights=False)
    model = get_peft_model(shapes_alternate(), config)
    assert adapters_of(model) == [("query", 3, (2, 4, 3)), ("query", 2, (2, 4, 3))]
    assert [record.message for record in caplog.records] == [
        "The modules '*.query' have 2 shapes, so they form 2 stacks with an adapter each: 3 layers of 16 x 16 weights, "
        "2 layers of 8 x 16 weights."
    ]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(shapes_alternate(), tmp_path)
    x = torch.randn(2, 16)
    for i in range(5):
        layers = [m.base_model.model[i]["query"] for m in (model, loaded)]
        assert torch.equal(layers[0](x), layers[1](x)) and not torch.equal(layers[0](x), layers[0].base_layer(x))


@pytest.mark.parametrize("decomposition", ["auto", "hosvd", "st-hosvd", "randomized", "hooi"])
def test_every_decomposition_starts_at_the_base_model(decomposition):
    base = bert()
    before = logits(base)
    assert torch.equal(logits(get_peft_model(base, CRAFT.config(decomposition=decomposition)).eval()), before)


@pytest.mark.peft_feature("`dropout`")
def test_dropout_acts_in_training_alone():
    model, _ = moved(CRAFT, dropout=0.5)
    assert torch.equal(logits(model), logits(model))
    layer = model.base_model.model.bert.encoder.layer[0].attention.self.query.train()
    x = torch.ones(4, 16)
    assert not torch.equal(layer(x), layer(x))


def test_bias_trains_the_biases_of_the_adapted_modules():
    model = get_peft_model(bert(), CRAFT.config(target_modules=TARGETS, bias="craft_only"))
    trained = {n for n, p in model.named_parameters() if p.requires_grad and n.endswith("bias")}
    assert len(trained) == 6 and all(".base_layer.bias" in name for name in trained)


# ---------------------------------------------------------------------------------------------------------------------
# Registration and configs
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.peft_feature("`PeftType`: the methods are members")
def test_registration_is_idempotent_and_the_member_behaves():
    register_methods()
    register_methods()
    member = PeftType["CRAFT"]
    assert member is PeftType("CRAFT") is PeftType.CRAFT
    assert list(PeftType).count(member) == 1
    assert member.value == member.name == member == "CRAFT"
    assert pickle.loads(pickle.dumps(member)) is member and copy.deepcopy(member) is member
    assert json.dumps({"type": member}) == '{"type": "CRAFT"}'


@pytest.mark.peft_feature("configs: copies, pickle, files")
def test_a_config_survives_a_file(tmp_path):
    config = CraftConfig(ranks=(2, 4, 3), target_modules=["query"], trained_modes=(1, 2), decomposition="hooi")
    config.save_pretrained(tmp_path)
    for loaded in (CraftConfig.from_pretrained(tmp_path), PeftConfig.from_pretrained(tmp_path)):
        assert loaded == config and isinstance(loaded, CraftConfig)


def test_fields_explain_themselves():
    for config_field in CraftConfig.__dataclass_fields__.values():
        assert config_field.metadata.get("help"), config_field.name


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.peft_feature("small files: the trained numbers alone (`save_factors=False`)")
def test_a_24_layer_file_without_factors_is_small_and_exact(tmp_path):
    base = roberta(layers=24, width=104)
    config = CraftConfig(target_modules=TARGETS, save_factors=False, init_weights=False)
    model = get_peft_model(copy.deepcopy(base), config).eval()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size <= 170_000
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(logits(loaded), logits(model))


def test_loading_factors_decomposes_nothing(tmp_path, decompositions):
    model, base = moved(CRAFT)
    model.save_pretrained(tmp_path)
    decompositions.clear()
    for low_memory in (False, True):
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, low_cpu_mem_usage=low_memory)
        assert torch.equal(logits(loaded), logits(model))
    assert not decompositions


def test_injecting_from_a_state_dict_decomposes_nothing(decompositions):
    """It says that tensors are about to be loaded, so they are not computed first."""
    model = inject_adapter_in_model(CRAFT.config(target_modules=TARGETS, init_weights=False), bert()).eval()
    state = get_peft_model_state_dict(model)
    decompositions.clear()
    for low_memory in (False, True):
        config = CRAFT.config(target_modules=TARGETS)
        loaded = inject_adapter_in_model(config, bert(), state_dict=state, low_cpu_mem_usage=low_memory)
        set_peft_model_state_dict(loaded, state, low_cpu_mem_usage=low_memory)
        assert torch.equal(logits(loaded.eval()), logits(model))
    assert not decompositions


def test_a_config_from_a_file_can_start_a_new_adapter(tmp_path, decompositions):
    """Its factors are deferred, in case a file brings them; without one they are computed when they are needed."""
    CRAFT.config(target_modules=TARGETS, init_weights=False).save_pretrained(tmp_path)
    config = CraftConfig.from_pretrained(tmp_path)
    base = bert()
    for use in (logits, lambda model: model.state_dict(), lambda model: model.merge_and_unload()):
        decompositions.clear()
        torch.manual_seed(1)
        model = get_peft_model(copy.deepcopy(base), copy.deepcopy(config)).eval()
        assert not decompositions
        use(model)
        assert len(decompositions) == 2
    torch.manual_seed(1)
    expected = get_peft_model(copy.deepcopy(base), CRAFT.config(target_modules=TARGETS, init_weights=False)).eval()
    torch.manual_seed(1)
    assert torch.equal(logits(get_peft_model(copy.deepcopy(base), config).eval()), logits(expected))


def test_transforms_are_refused_in_other_bases(tmp_path):
    model, base = moved(CRAFT, save_factors=False)
    model.save_pretrained(tmp_path)
    with pytest.raises(CraftError, match="base weights are not those that the adapter was trained with"):
        PeftModel.from_pretrained(bert(seed=1), tmp_path)
    with pytest.raises(CraftError, match="base weights are not those that the adapter was trained with"):
        PeftModel.from_pretrained(copy.deepcopy(base).bfloat16(), tmp_path)


def test_transforms_are_refused_when_a_basis_vector_is_flipped(tmp_path, monkeypatch):
    model, base = moved(CRAFT, save_factors=False)
    model.save_pretrained(tmp_path)
    original = craft_module.hosvd

    def flipped(*args):
        tucker = original(*args)
        tucker.factors[1][:, 0] *= -1
        tucker.core[:, 0] *= -1
        return tucker

    monkeypatch.setattr(craft_module, "hosvd", flipped)
    with pytest.raises(CraftError, match="bases computed from the weights are not those"):
        PeftModel.from_pretrained(base, tmp_path)


def test_an_adapter_of_another_shape_is_refused(tmp_path):
    model, _ = moved(CRAFT)
    model.save_pretrained(tmp_path)
    with pytest.raises(
        CraftError, match=r"does not fit this base model: .*out_factor' .*\(16, 4\) and needs \(24, 4\)"
    ):
        PeftModel.from_pretrained(bert(width=24), tmp_path)
    with pytest.raises(CraftError, match=r"layer_factor' .*\(3, 2\) and needs \(4, 2\) for 4 layers of 16 x 16"):
        PeftModel.from_pretrained(bert(layers=4), tmp_path)
    model, _ = moved(CRAFT, save_factors=False)
    model.save_pretrained(tmp_path)
    with pytest.raises(CraftError, match=r"fingerprint' was saved with the shape"):
        PeftModel.from_pretrained(bert(layers=4), tmp_path)


@pytest.mark.peft_feature("an adapter of a float32 base on a bfloat16 one")
def test_a_float32_adapter_on_a_bfloat16_base_keeps_its_bases(tmp_path):
    model, base = moved(CRAFT)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base).bfloat16(), tmp_path)
    for name, tensor in model.state_dict().items():
        if ".craft_" in name:
            assert torch.equal(loaded.state_dict()[name], tensor)


@pytest.mark.peft_feature("`save_pretrained` and `from_pretrained`, bit for bit")
def test_loading_in_a_new_process_is_bit_equal(tmp_path):
    model, base = moved(CRAFT)
    base.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    save_file({"logits": logits(model)}, tmp_path / "expected.safetensors")
    code = """
import sys, torch
import craft_peft
from peft import AutoPeftModelForSequenceClassification, PeftModel
from transformers import AutoModelForSequenceClassification
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
base = AutoModelForSequenceClassification.from_pretrained(sys.argv[1] + "/base")
model = PeftModel.from_pretrained(base, sys.argv[1] + "/adapter", adapter_name="other").eval()
tokens = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(0))
save_file({"logits": model(tokens).logits.detach()}, sys.argv[1] + "/found.safetensors")
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    expected, found = (load_file(tmp_path / f"{name}.safetensors")["logits"] for name in ("expected", "found"))
    assert torch.equal(expected, found)


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ranks": (0, 100, 100)}, r"ranks\[0\]=0, the layer rank, has to be a whole number of at least 1"),
        ({"ranks": (24, -1, 100)}, r"ranks\[1\]=-1, the out rank"),
        ({"ranks": (24, 100, 1.5)}, r"ranks\[2\]=1.5, the in rank"),
        ({"ranks": (24, True, 100)}, r"ranks\[1\]=True"),
        ({"ranks": (24, 100)}, r"ranks=\(24, 100\) has to be 'paper' or three whole numbers"),
        ({"ranks": 24}, r"has to be 'paper' or three whole numbers"),
        ({"ranks": "best"}, r"ranks='best' has to be 'paper' or three whole numbers"),
        ({"rank_pattern": {"query": (1, 2)}}, r"rank_pattern\['query'\]=\(1, 2\) has to be 'paper' or three"),
        ({"trained_modes": ()}, r"trained_modes=\(\) has to name at least one of the modes"),
        ({"trained_modes": (1, 3)}, r"trained_modes=\(1, 3\)"),
        (
            {"decomposition": "svd"},
            r"decomposition='svd' is unknown. Use one of auto, hosvd, st-hosvd, randomized, hooi",
        ),
        ({"dropout": 1.0}, r"dropout=1.0 is outside \[0, 1\)"),
        ({"bias": "lora_only"}, r"bias='lora_only' is unknown. Use 'none', 'all' or 'craft_only'"),
        ({"layers_pattern": "layer"}, r"`layers_pattern` is set without `layers_to_transform`"),
        (
            {"target_modules": ".*query", "layers_to_transform": [1]},
            r"cannot be used when `target_modules` is a string",
        ),
    ],
)
def test_a_bad_config_is_refused(fields, message):
    with pytest.raises(CraftError, match=message):
        CraftConfig(**fields)


def spoil(value, layer=1):
    model = bert()
    model.bert.encoder.layer[layer].attention.self.value.weight.data[2, 3] = value
    return model


def on_the_meta_device():
    with init_empty_weights():
        return bert()


@pytest.mark.parametrize(
    ("make", "fields", "message"),
    [
        (
            bert,
            {"ranks": (24, 4, 4)},
            r"`ranks\[0\]=24` keeps more layer directions than stack 'query' has layers \(3\). "
            r"Use `ranks=\(3, 4, 4\)` to keep them all",
        ),
        (bert, {"ranks": (3, 17, 4)}, r"`ranks\[1\]=17` keeps more output directions than .* has outputs \(16\)"),
        (bert, {"ranks": (3, 4, 99)}, r"`ranks\[2\]=99` keeps more input directions .* Use `ranks=\(3, 4, 16\)`"),
        (
            bert,
            {"target_modules": ["querry"]},
            r"target_modules=\['querry'\]` matches no module of .* Did you mean 'query'",
        ),
        (bert, {"target_modules": ["word_embeddings"]}, r"word_embeddings' is a Embedding, not a linear layer"),
        (bert, {"target_modules": ["LayerNorm"]}, r"is a LayerNorm, not a linear layer"),
        (
            bert,
            {"rank_pattern": {"key": (3, 2, 2)}},
            r"`rank_pattern` has ranks for 'key', which matches no target module.*layer.\*.attention.self.query'",
        ),
        (
            bert,
            {"rank_pattern": {"value": (3, 99, 2)}},
            r"`ranks\[1\]=99` keeps more output directions than stack 'value' has outputs",
        ),
        (lambda: spoil(torch.nan), {}, r"weight of 'bert.encoder.layer.1.attention.self.value' holds NaN or infinity"),
        (lambda: spoil(torch.inf, layer=2), {}, r"layer.2.attention.self.value' holds NaN or infinity"),
        (on_the_meta_device, {}, r"weight of 'bert.encoder.layer.0.attention.self.query' is on the meta device"),
    ],
)
def test_a_bad_model_is_refused_and_left_as_it_was(make, fields, message):
    base = make()
    before = {name: type(module) for name, module in base.named_modules()}
    with pytest.raises(CraftError, match=message):
        get_peft_model(base, CraftConfig(**{"ranks": (3, 4, 4), "target_modules": TARGETS, **fields}))
    assert {name: type(module) for name, module in base.named_modules()} == before


@pytest.mark.peft_feature(
    "adding an adapter while another is merged", no="it would be made from the merged weights; unmerge first."
)
def test_an_adapter_beside_a_merged_one_is_refused():
    model, _ = moved(CRAFT)
    model.merge_adapter()
    with pytest.raises(CraftError, match=r"merged into 'bert.encoder.layer.0.*unmerge_adapter"):
        model.add_adapter("second", CRAFT.config(target_modules=TARGETS))


@pytest.mark.peft_feature("mixed batches (`adapter_names=[...]`, `__base__`)")
@pytest.mark.parametrize(
    ("prepare", "names", "message"),
    [
        (lambda model: model.train(), ["default", "default"], "when the model is in training mode"),
        (lambda model: model, ["default", "defult"], r"non-existing adapter\(s\): defult. The model has default"),
        (lambda model: model, ["default"], r"number of inputs, but got 1 and 2 respectively"),
        (lambda model: model.merge_adapter(), ["default", "__base__"], "when there are merged adapters"),
    ],
)
def test_a_bad_mixed_batch_is_refused(prepare, names, message):
    model, _ = moved(CRAFT)
    prepare(model)
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    with pytest.raises(CraftError, match=message):
        model(tokens(), adapter_names=names)
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks


@pytest.mark.peft_feature("`safe_merge`")
def test_safe_merge_refuses_a_broken_adapter():
    model, base = moved(CRAFT)
    next(p for n, p in model.named_parameters() if "out_transform" in n).data.fill_(torch.nan)
    with pytest.raises(
        CraftError, match=r"NaNs detected in the merged weights. The adapter default seems to be broken"
    ):
        model.merge_adapter(safe_merge=True)
    layer = model.base_model.model.bert.encoder.layer[0].attention.self.query
    assert torch.equal(layer.base_layer.weight, base.bert.encoder.layer[0].attention.self.query.weight)
    assert not layer.merged


# ---------------------------------------------------------------------------------------------------------------------
# Fields as tools make them, names, and weights that nothing can be learned from
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"ranks": tuple(np.array([2, 8, 8]))},
        {"ranks": np.array([2, 8, 8])},
        {"ranks": torch.tensor([2, 8, 8])},
        {"alpha": np.float32(2)},
        {"target_modules": ("query", "value")},
        {"exclude_modules": ("key",)},
        {"layers_to_transform": (0, 1), "layers_pattern": ("layer",)},
        {"rank_pattern": {"query": np.array([2, 4, 4])}},
        {"trained_modes": np.array([1, 2])},
        {"trainable_token_indices": np.array([1, 2])},
    ],
    ids=str,
)
def test_fields_of_numpy_and_tuples_are_plain_ones(fields, tmp_path):
    config = CraftConfig(**{"target_modules": ["query"], **fields})
    config.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path) == config
    json.dumps({name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()})


@pytest.mark.parametrize("name", ["v1.0", "", "keys"])
@pytest.mark.filterwarnings("ignore:Adapter name '' should not:UserWarning")
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_name_that_no_module_can_have_is_refused_before_anything_changes(method, name):
    base = bert()
    before = {path: type(module) for path, module in base.named_modules()}
    with pytest.raises(CraftError, match="cannot be called"):
        get_peft_model(base, method.config(target_modules=TARGETS), adapter_name=name)
    assert {path: type(module) for path, module in base.named_modules()} == before


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_weights_of_zero_are_refused_where_nothing_could_be_learned(method):
    base = bert()
    for name, parameter in base.named_parameters():
        if ".query.weight" in name:
            parameter.data.zero_()
    try:
        model = get_peft_model(base, method.config(target_modules=TARGETS))
    except CraftError as error:
        assert "all zero" in str(error) and "exclude_modules" in str(error)
        return
    for _ in range(2):  # at the start some gradients are zero
        model.zero_grad()
        model(tokens(), labels=torch.tensor([0, 1])).loss.backward()
        for parameter in (p for n, p in model.named_parameters() if f".{method.name}_" in n):
            parameter.data -= parameter.grad * 10
    assert all(p.grad.abs().max() > 0 for n, p in model.named_parameters() if f"query.{method.name}_" in n)
