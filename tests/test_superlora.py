"""SuperLoRA's own promises: counts, the methods it contains, every combination of its options, and bad input."""

import copy
import itertools
import math

import pytest
import tensorly
import torch
from laws import TARGETS, assert_close
from naive_superlora import naive_delta
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from small_models import bert, gpt2, logits, roberta
from torch import nn

from craft_peft import CraftError, LotrConfig, SuperLoraConfig
from craft_peft.folding import Folding
from craft_peft.plugin.layer import StackedLinear
from craft_peft.weights import StackShape


def build(config, shape, seed=0):
    torch.manual_seed(seed)
    return config.build_adapter("query + value", shape).double()


def adapters_of(model):
    return list(dict.fromkeys(m.slots["default"].adapter for m in model.modules() if isinstance(m, StackedLinear)))


# Query and value of RoBERTa-base (12 layers of width 768) and RoBERTa-large (24, 1024): r times the sum of the folded
# sizes a group, and r^M for a dense core.
@pytest.mark.parametrize(
    ("config", "layers", "width", "count"),
    [
        (SuperLoraConfig.lora(r=8), 12, 768, 294_912),
        (SuperLoraConfig(r=8, order=2), 12, 768, 60_416),
        (SuperLoraConfig(r=8, order=3), 12, 768, 6_336),
        (SuperLoraConfig(r=27, order=3), 12, 768, 39_339),
        (SuperLoraConfig(r=8, order=4), 12, 768, 6_064),
        (SuperLoraConfig(r=24, order=3), 24, 1024, 41_472),
        (SuperLoraConfig.lorta(r=8, order=4), 12, 768, 6_064),
        # As LoTR: the official table of daskol/lotr.
        (SuperLoraConfig.lotr(r=8), 12, 768, 13_824),
        (SuperLoraConfig.lotr(r=32), 24, 1024, 114_688),
    ],
)
def test_counts_of_the_reference(config, layers, width, count):
    with torch.device("meta"):
        adapter = config.build_adapter("query + value", StackShape.uniform(2 * layers, width, width))
    assert sum(parameter.numel() for parameter in adapter.parameters()) == count


# ---------------------------------------------------------------------------------------------------------------------
# The methods that it contains
# ---------------------------------------------------------------------------------------------------------------------

SHAPES = StackShape(((12, 8), (6, 8), (12, 8), (6, 8)), blocks=(2, 2))


def tensors(adapter, label, row):
    """The factors of one split of one group, and its core if it has one."""
    state = adapter.state_dict()
    names = (f"factor_{label}_{mode}" for mode in range(adapter.folding.order))
    core = state.get(f"core_{label}")
    return [state[name][row] for name in names if name in state], None if core is None else core[row]


def test_as_lora():
    adapter = build(SuperLoraConfig.lora(r=3, alpha=6.0, init_weights=False), SHAPES)
    x = torch.randn(5, 8, dtype=torch.float64)
    for layer in range(4):
        (b, a), _ = tensors(adapter, f"{layer % 2}_0", layer // 2)
        assert_close(adapter.delta_weight(layer).detach(), 2 * b @ a.T, products=10)
        assert_close(adapter.delta_output(layer, x).detach(), 2 * x @ a @ b.T, products=100)


def test_as_lora_in_a_model_is_that_of_peft():
    base = bert()
    torch.manual_seed(1)
    ours = get_peft_model(copy.deepcopy(base), SuperLoraConfig.lora(r=4, target_modules=TARGETS, init_weights=False))
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS)
    theirs = get_peft_model(copy.deepcopy(base), lora)
    (adapter,) = adapters_of(ours)
    layers = [m for m in theirs.modules() if hasattr(m, "lora_A")]
    for layer, module in enumerate(layers):
        (b, a), _ = tensors(adapter.float(), "0_0", layer)
        module.lora_A["default"].weight.data = a.T.contiguous()
        module.lora_B["default"].weight.data = b
    assert len(layers) == 6
    assert_close(logits(ours.eval()), logits(theirs.eval()), products=1000)


@pytest.mark.parametrize(
    ("config", "splits"), [(SuperLoraConfig.lokr(r=2), 2), (SuperLoraConfig.lonkr(r=2, splits=3), 3)]
)
def test_as_lokr_and_lonkr(config, splits):
    shape = StackShape(((24, 36), (60, 8), (24, 36)))
    config.alpha, config.init_weights = 3.0, False
    adapter = build(config, shape)
    for layer, (kind, row) in enumerate([(0, 0), (1, 0), (0, 1)]):
        expected = torch.ones(1, 1, dtype=torch.float64)
        for split in range(splits):
            (b, a), _ = tensors(adapter, f"{kind}_{split}", row)
            expected = torch.kron(expected, b @ a.T)
        assert_close(adapter.delta_weight(layer).detach(), 1.5 * expected, products=100)


def test_as_lorta():
    """Against tensorly's Tucker product; 28 * 64 = 1792 = 4 * 7 * 8 * 8 entries."""
    adapter = build(SuperLoraConfig.lorta(r=2, order=4, alpha=2.0, init_weights=False), StackShape.uniform(7, 16, 16))
    factors, core = tensors(adapter, "0_0", 0)
    assert adapter.kinds[0].sizes == ((4, 7, 8, 8),)
    expected = tensorly.tucker_to_tensor((core.numpy(), [factor.numpy() for factor in factors])).reshape(7, 16, 16)
    for layer in range(7):
        assert_close(adapter.delta_weight(layer).detach(), torch.from_numpy(expected[layer]), products=100)


def test_an_identity_core_of_order_3_is_a_sum_of_rank_one_tensors():
    config = SuperLoraConfig(r=3, core="identity", alpha=3.0, init_weights=False)
    adapter = build(config, StackShape.uniform(4, 16, 8))
    factors, core = tensors(adapter, "0_0", 0)
    assert core is None
    expected = tensorly.cp_to_tensor((None, [factor.numpy() for factor in factors])).reshape(4, 16, 8)
    for layer in range(4):
        assert_close(adapter.delta_weight(layer).detach(), torch.from_numpy(expected[layer]), products=100)


def test_as_lotr():
    shape = StackShape.uniform(5, 7, 6)
    ours = build(SuperLoraConfig.lotr(r=3, alpha=2.0, init_weights=False), shape)
    lotr = build(LotrConfig(r=3, alpha=2.0), shape)
    (lotr.out_factor.data, lotr.in_factor.data), lotr.core.data = tensors(ours, "0_0", 0)
    x = torch.randn(4, 6, dtype=torch.float64)
    for layer in range(5):
        assert_close(ours.delta_weight(layer).detach(), lotr.delta_weight(layer).detach(), products=100)
        assert_close(ours.delta_output(layer, x).detach(), lotr.delta_output(layer, x).detach(), products=100)


def test_as_lotr_starts_as_lotr_does():
    ours = build(SuperLoraConfig.lotr(r=8), StackShape.uniform(2, 400, 400))
    assert ours.scaling == LotrConfig(r=8).build_adapter("query", StackShape.uniform(2, 400, 400)).scaling
    assert ours.factor_0_0_1.std().item() == pytest.approx(1, rel=0.05)


# ---------------------------------------------------------------------------------------------------------------------
# Every combination of the options
# ---------------------------------------------------------------------------------------------------------------------

OPTIONS = {
    "groups": ["weight", "layer", "all", 3],
    "order": [2, 3, 4],
    "splits": [1, 2],
    "core": ["identity", "dense"],
    "projection": ["none", "fastfood"],
    "shuffle": [False, True],
}
COMBINATIONS = [dict(zip(OPTIONS, values, strict=True)) for values in itertools.product(*OPTIONS.values())]


def shown(options):
    return "-".join(str(value) for value in options.values())


@pytest.mark.parametrize("options", COMBINATIONS, ids=shown)
def test_the_start_is_zero_and_its_gradient_is_not(options):
    shape = StackShape(((24, 16), (16, 16), (24, 16), (16, 16)), blocks=(2, 2))
    adapter = build(SuperLoraConfig(r=2, projection_ratio=0.9, **options), shape)
    zero = {name for name, parameter in adapter.named_parameters() if not parameter.any()}
    core = "core_{}_0" if options["core"] == "dense" else "factor_{}_0_0"
    assert zero == {core.format(kind) for kind in range(len(adapter.kinds))}
    for layer in range(4):
        assert (adapter.delta_weight(layer) == 0).all()
        adapter.zero_grad()
        torch.manual_seed(layer)
        (adapter.delta_weight(layer) * torch.randn(shape.matrices[layer])).sum().backward()
        assert any(p.grad is not None and p.grad.any() for p in adapter.parameters())


@pytest.mark.parametrize("options", [o for o in COMBINATIONS if o["order"] < 4], ids=shown)
def test_the_equation_entry_by_entry(options):
    shape = StackShape(((6, 4), (4, 4), (6, 4), (4, 4)), blocks=(2, 2))
    ratio = 0.7 if options["projection"] == "fastfood" else None
    folding = Folding(options["groups"], options["order"], options["splits"], options["core"], ratio=ratio)
    smallest = min(size for kind in folding.kinds(shape.matrices, shape.blocks) for s in kind.sizes for size in s)
    config = SuperLoraConfig(r=min(2, smallest), projection_ratio=0.7, init_weights=False, alpha=3.0, **options)
    adapter = build(config, shape)
    x = torch.randn(3, 4, dtype=torch.float64)
    for layer in range(4):
        expected = naive_delta(adapter, layer)
        assert expected.abs().max() > 0
        assert_close(adapter.delta_weight(layer).detach(), expected, products=10_000)
        assert_close(adapter.delta_output(layer, x).detach(), x @ expected.T, products=10_000)


def test_later_splits_start_with_entries_of_mean_square_one():
    for fields in ({"order": 2}, {"order": 3}, {"order": 3, "core": "identity"}):
        config = SuperLoraConfig(r=8, splits=2, sizes=((8,) * fields["order"], (64,) * fields["order"]), **fields)
        entries = math.prod(math.prod(split) for split in config.sizes)
        adapter = build(config, StackShape.uniform(1, 512, entries // 512))
        # The mean over random factors, of which there are few: within a factor of 2.
        assert 0.5 < adapter._tensor("0_1", False).square().mean().item() < 2


# ---------------------------------------------------------------------------------------------------------------------
# Groups and foldings
# ---------------------------------------------------------------------------------------------------------------------


def kinds(config, shape):
    return [(len(kind.places), kind.entries, kind.sizes) for kind in build(config, shape).kinds]


def test_groups():
    assert kinds(SuperLoraConfig(r=1, order=2, groups="weight"), SHAPES) == [(2, 96, ((8, 12),)), (2, 48, ((6, 8),))]
    assert kinds(SuperLoraConfig(r=1, order=2, groups="layer"), SHAPES) == [(2, 144, ((12, 12),))]
    assert kinds(SuperLoraConfig(r=1, order=2, groups="all"), SHAPES) == [(1, 288, ((16, 18),))]
    # 288 = 3 * 96: the boundary at 192 cuts the third matrix, which begins at 144.
    assert kinds(SuperLoraConfig(r=1, order=2, groups=3), SHAPES) == [(3, 96, ((8, 12),))]
    # 5 * 58 = 290: the last group ends behind the vector.
    assert kinds(SuperLoraConfig(r=1, order=2, groups=5, cut_weights=True), SHAPES) == [(5, 58, ((6, 10),))]


def test_layers_of_a_model_are_found_by_their_paths():
    t5 = ["decoder.block.0.layer.0.SelfAttention.q", "decoder.block.0.layer.1.EncDecAttention.q"]
    names = ["a.0.query", "a.0.value", "a.1.query", *t5, "lm_head"]

    class Tree(nn.Module):
        def __init__(self):
            super().__init__()
            for name in names:
                module = self
                for part in name.split(".")[:-1]:
                    if part not in module._modules:
                        module.add_module(part, nn.Module())
                    module = module.get_submodule(part)
                module.add_module(name.rpartition(".")[2], nn.Linear(4, 4))

    config = SuperLoraConfig(r=1, order=2, groups="layer", target_modules=["query", "value", "q", "lm_head"])
    (adapter,) = adapters_of(get_peft_model(Tree(), config))
    assert adapter.shape.blocks == (2, 1, 2, 1)
    assert [len(kind.places) for kind in adapter.kinds] == [2, 2]


def test_a_model_with_matrices_of_several_shapes():
    config = SuperLoraConfig(r=2, target_modules=["query", "intermediate.dense"], init_weights=False)
    model = get_peft_model(roberta(layers=3, width=16), config).eval()
    (adapter,) = adapters_of(model)
    assert adapter.shape.matrices == ((16, 16), (1, 16)) * 3
    assert adapter.delta_weight(1).shape == (1, 16)
    adapted = logits(model)
    assert_close(logits(model.merge_and_unload()), adapted, products=1000)


def test_transposed_layers_are_worked_on_as_out_times_in():
    torch.manual_seed(1)
    model = get_peft_model(gpt2(), SuperLoraConfig(r=2, init_weights=False))
    (adapter,) = adapters_of(model)
    layer = model.base_model.model.transformer.h[1].attn.c_attn
    assert adapter.shape.matrices == ((48, 16),) * 3 and layer.base_layer.weight.shape == (16, 48)
    assert torch.equal(layer.get_delta_weight("default"), adapter.delta_weight(1).T)


def test_sizes_can_be_given():
    shape = StackShape.uniform(4, 12, 8)
    assert kinds(SuperLoraConfig(r=2, sizes=[4, 12, 8]), shape) == [(1, 384, ((4, 12, 8),))]
    config = SuperLoraConfig(r=2, order=2, splits=2, sizes=[[4, 2], [6, 8]])
    assert kinds(config, shape) == [(1, 384, ((4, 2), (6, 8)))]


def test_seeds_decide_projection_and_permutation():
    shape = StackShape.uniform(3, 8, 8)
    fields = {"r": 2, "projection": "fastfood", "shuffle": True, "init_weights": False}
    deltas = [
        build(SuperLoraConfig(**fields, projection_seed=p, shuffle_seed=s), shape).delta_weight(0)
        for p, s in [(0, 0), (0, 0), (1, 0), (0, 1)]
    ]
    assert torch.equal(deltas[0], deltas[1])
    assert not torch.allclose(deltas[0], deltas[2]) and not torch.allclose(deltas[0], deltas[3])


def test_rank_pattern_gives_modules_another_rank_and_a_vector_of_their_own():
    model = get_peft_model(bert(), SuperLoraConfig(target_modules=TARGETS, r=2, rank_pattern={"value": 4}))
    assert [(a.shape.layers, a.r) for a in adapters_of(model)] == [(3, 2), (3, 4)]


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def test_the_file_holds_the_trained_tensors_alone(tmp_path):
    config = SuperLoraConfig(
        target_modules=TARGETS, r=2, projection="fastfood", projection_ratio=0.9, shuffle=True, init_weights=False
    )
    base = bert()
    model = get_peft_model(copy.deepcopy(base), config).eval()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    trained = sum(p.numel() for p in adapters_of(model)[0].parameters())
    indices = sum(tensor.numel() for name, tensor in saved.items() if name.endswith("index"))
    assert sum(tensor.numel() for tensor in saved.values()) == trained + indices
    for low_memory in (False, True):
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, low_cpu_mem_usage=low_memory)
        assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize(
    "config",
    [
        SuperLoraConfig.lora(r=3, target_modules=["query"]),
        SuperLoraConfig.lotr(r=3, rank_pattern={"query": 2}),
        SuperLoraConfig(r=2, order=2, splits=2, sizes=((4, 2), (6, 8)), groups=3, projection="fastfood", shuffle=True),
    ],
)
def test_a_config_survives_a_file(config, tmp_path):
    config.save_pretrained(tmp_path)
    for loaded in (SuperLoraConfig.from_pretrained(tmp_path), PeftConfig.from_pretrained(tmp_path)):
        assert loaded == config and isinstance(loaded, SuperLoraConfig)


def test_fields_explain_themselves():
    for config_field in SuperLoraConfig.__dataclass_fields__.values():
        assert config_field.metadata.get("help"), config_field.name


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, r"r=0 has to be a whole number of at least 1"),
        ({"rank_pattern": {"value": 0}}, r"rank_pattern\['value'\]=0"),
        ({"groups": "stack"}, r"groups='stack' is unknown. Use one of weight, layer, all"),
        ({"groups": 0}, r"groups=0 has to be a whole number of at least 1"),
        ({"order": 1}, r"order=1 has to be at least 2: order 2 folds a group into a matrix"),
        ({"order": 5, "splits": 2**31}, r"fold a group into \d+ sizes\. Use at most 64"),
        ({"order": 2.5}, r"order=2.5 has to be a whole number"),
        ({"splits": 0}, r"splits=0 has to be a whole number"),
        ({"core": "full"}, r"core='full' is unknown. Use one of auto, identity, dense"),
        ({"sizes": "square"}, r"sizes='square' is unknown. Use one of equal, weights"),
        ({"sizes": (4, 4)}, r"sizes=\(4, 4\) has to be 'equal', 'weights' or 3 whole numbers"),
        ({"sizes": (4, 4, 0)}, r"sizes=\(4, 4, 0\) has to be"),
        ({"sizes": (4, 4), "order": 2, "splits": 2}, r"or 2 whole numbers for each of 2 splits"),
        ({"sizes": 7}, r"sizes=7 has to be"),
        ({"sizes": ()}, r"sizes=\(\) has to be"),
        ({"identity_modes": (3,)}, r"identity_modes=\(3,\) has to name some, not all, of the modes 0 to 2"),
        ({"identity_modes": (0, 1, 2)}, r"has to name some, not all"),
        ({"identity_modes": (0,), "order": 2}, r"identity_modes need core='dense'"),
        ({"projection": "gaussian"}, r"projection='gaussian' is unknown. Use one of none, fastfood"),
        ({"projection_ratio": 0.0}, r"projection_ratio=0.0 is outside \(0, 1\]"),
        ({"projection_ratio": 1.5}, r"projection_ratio=1.5 is outside \(0, 1\]"),
        ({"init_std": -1.0}, r"init_std=-1.0 has to be above 0"),
        ({"bias": "lora_only"}, r"Use 'none', 'all' or 'superlora_only'"),
    ],
)
def test_a_bad_config_is_refused(fields, message):
    with pytest.raises(CraftError, match=message):
        SuperLoraConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"sizes": (8, 8, 8)},
            r"sizes=\(8, 8, 8\) multiply to 512, but a group needs 1536 numbers. sizes=\(8, 12, 16\) would fit",
        ),
        (
            {"order": 2, "splits": 2, "sizes": ((2, 2), (4, 4)), "groups": 3},
            r"multiply to 64, but a group needs 512 numbers. sizes=\(\(4, 4\), \(8, 4\)\) would fit",
        ),
        (
            {"sizes": (8, 12, 16), "projection": "fastfood"},
            r"multiply to 1536, but a group needs 768 numbers. sizes=\(8, 8, 12\) would fit",
        ),
        (
            {"groups": 7},
            r"groups=7 makes groups that are smaller than a matrix: there are 6 matrices. Use groups=6 or fewer",
        ),
        ({"groups": 1000, "cut_weights": True}, r"groups=1000 leaves nothing for the last groups .* Use groups=768"),
        ({"r": 9}, r"r=9 is above 8, the smallest size of a folded tensor \(8, 12, 16\).* Use r=8 or less"),
        ({"sizes": "weights", "order": 2}, r"sizes='weights' needs groups of whole matrices .* holds 6 whole matrices"),
        ({"sizes": "weights", "groups": 4}, r"sizes='weights' needs .* a group of 384 entries holds 1 whole matrices"),
        ({"sizes": "weights", "projection": "fastfood"}, r"is made from 768 numbers"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(fields, message):
    base = bert()
    before = {name: type(module) for name, module in base.named_modules()}
    with pytest.raises(CraftError, match=message):
        get_peft_model(base, SuperLoraConfig(**{"r": 2, "target_modules": TARGETS, **fields}))
    assert {name: type(module) for name, module in base.named_modules()} == before


def test_an_adapter_of_another_shape_is_refused(tmp_path):
    get_peft_model(bert(), SuperLoraConfig(target_modules=TARGETS, r=2)).save_pretrained(tmp_path)
    with pytest.raises(CraftError, match=r"does not fit this base model: .*factor_0_0_1' was saved with the shape"):
        PeftModel.from_pretrained(bert(layers=4), tmp_path)
