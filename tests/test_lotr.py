"""LoTR's own promises: counts, groups, the start from the weights, configs, and the message of each bad input."""

import copy

import pytest
import torch
from laws import TARGETS, assert_close
from peft import PeftConfig, PeftModel, get_peft_model
from small_models import bert, logits
from torch import nn

from craft_peft import CraftError, LotrConfig
from craft_peft.adapters import lotr as lotr_module
from craft_peft.plugin.layer import StackedLinear
from craft_peft.weights import StackShape


def adapters_of(model):
    return list(dict.fromkeys(m.slots["default"].adapter for m in model.modules() if isinstance(m, StackedLinear)))


# The official table of daskol/lotr for RoBERTa-base (12 layers of width 768) and RoBERTa-large (24, 1024), query and
# value; r * (d_out + d_in) a group and r^2 a matrix.
@pytest.mark.parametrize(
    ("fields", "layers", "width", "count"),
    [
        ({"r": 1}, 12, 768, 1_560),
        ({"r": 2}, 12, 768, 3_168),
        ({"r": 4}, 12, 768, 6_528),
        ({"r": 8}, 12, 768, 13_824),
        ({"r": 16}, 12, 768, 30_720),
        ({"r": 32}, 12, 768, 73_728),
        ({"r": 8, "group": "per_projection"}, 12, 768, 26_112),
        ({"r": 32, "group": "per_projection"}, 12, 768, 122_880),
        ({"r": 32}, 24, 1024, 114_688),
    ],
)
def test_counts_of_the_reference(fields, layers, width, count):
    config = LotrConfig(**fields)
    groups = 1 if config.together == "shape" else 2
    adapter = config.build_adapter("query", StackShape.uniform(2 * layers // groups, width, width))
    assert groups * sum(parameter.numel() for parameter in adapter.parameters()) == count


@pytest.mark.parametrize(
    ("group", "stacks"),
    [("all", [(9, 16, 16), (3, 8, 16)]), ("per_projection", [(6, 16, 16), (3, 16, 16), (3, 8, 16)])],
)
def test_groups_hold_one_shape(group, stacks):
    """In a model whose value projections alternate between two shapes."""

    def layer(i):
        return nn.ModuleDict({"query": nn.Linear(16, 16), "value": nn.Linear(16, 8 if i % 2 else 16)})

    base = nn.ModuleDict({"layer": nn.ModuleList(layer(i) for i in range(6))})
    adapters = adapters_of(get_peft_model(base, LotrConfig(target_modules=TARGETS, r=2, group=group)))
    assert [(adapter.shape.layers, *adapter.shape.matrix) for adapter in adapters] == stacks


def test_what_is_added_is_scaled_by_alpha_over_r():
    adapter = LotrConfig(r=4, alpha=6.0, init_weights=False).build_adapter("query", StackShape.uniform(3, 7, 5))
    expected = 1.5 * adapter.out_factor @ adapter.core[2] @ adapter.in_factor.T
    assert_close(adapter.delta_weight(2).detach(), expected.detach(), products=100)


@pytest.mark.parametrize("matrix", [(7, 5), (5, 7), (6, 6)])
def test_at_full_rank_the_start_from_the_weights_is_the_weights(matrix):
    torch.manual_seed(0)
    weights = [torch.randn(matrix, dtype=torch.float64) for _ in range(4)]
    config = LotrConfig(init="svd", r=max(matrix), alpha=3.0)
    adapter = config.build_adapter("query", StackShape((matrix,) * 4)).double()
    adapter.initialise(lambda: weights)
    for layer, weight in enumerate(weights):
        start = adapter.start_out_factor @ adapter.start_core[layer] @ adapter.start_in_factor.T
        assert_close(adapter.scaling * start, weight, products=1000)
        assert (adapter.delta_weight(layer) == 0).all()


def test_below_full_rank_the_start_is_the_projection_on_the_leading_directions():
    torch.manual_seed(0)
    weights = torch.randn(4, 7, 5, dtype=torch.float64)
    adapter = LotrConfig(init="svd", r=3).build_adapter("query", StackShape.uniform(4, 7, 5)).double()
    adapter.initialise(lambda: list(weights))
    left = torch.linalg.svd(weights.permute(1, 0, 2).reshape(7, -1)).U[:, :3]
    right = torch.linalg.svd(weights.permute(2, 0, 1).reshape(5, -1)).U[:, :3]
    for layer, weight in enumerate(weights):
        start = adapter.scaling * adapter.start_out_factor @ adapter.start_core[layer] @ adapter.start_in_factor.T
        assert_close(start, left @ left.T @ weight @ right @ right.T, products=1000)


def test_loading_a_start_from_the_weights_decomposes_nothing(tmp_path, monkeypatch):
    base = bert()
    config = LotrConfig(target_modules=TARGETS, r=3, init="svd", init_weights=False)
    model = get_peft_model(copy.deepcopy(base), config).eval()
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(lotr_module, "hosvd", None)
    for low_memory in (False, True):
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, low_cpu_mem_usage=low_memory)
        assert torch.equal(logits(loaded), logits(model))


def test_init_std_is_the_spread_of_the_factors():
    torch.manual_seed(0)
    narrow = LotrConfig(r=8, init_std=None).build_adapter("query", StackShape.uniform(2, 400, 900))
    assert [f"{factor.std():.3f}" for factor in (narrow.out_factor, narrow.in_factor)] == ["0.050", "0.033"]
    adapter = LotrConfig(r=8, init_std=0.25).build_adapter("query", StackShape.uniform(2, 500, 500))
    for factor in (adapter.out_factor, adapter.in_factor):
        assert factor.std().item() == pytest.approx(0.25, rel=0.05)
    assert (adapter.core == 0).all()


def test_rank_pattern_gives_modules_another_rank_and_a_group_of_their_own():
    model = get_peft_model(bert(), LotrConfig(target_modules=TARGETS, r=2, rank_pattern={"value": 5}))
    assert [(a.shape.layers, a.r) for a in adapters_of(model)] == [(3, 2), (3, 5)]


def test_a_config_survives_a_file(tmp_path):
    config = LotrConfig(r=3, group="per_projection", init="svd", target_modules=["query"], rank_pattern={"query": 2})
    config.save_pretrained(tmp_path)
    for loaded in (LotrConfig.from_pretrained(tmp_path), PeftConfig.from_pretrained(tmp_path)):
        assert loaded == config and isinstance(loaded, LotrConfig)


def test_fields_explain_themselves():
    for config_field in LotrConfig.__dataclass_fields__.values():
        assert config_field.metadata.get("help"), config_field.name


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, r"r=0 has to be a whole number of at least 1"),
        ({"r": 1.5}, r"r=1.5 has to be a whole number"),
        ({"r": True}, r"r=True has to be a whole number"),
        ({"rank_pattern": {"value": -1}}, r"rank_pattern\['value'\]=-1 has to be a whole number"),
        ({"group": "shape"}, r"group='shape' is unknown. Use one of all, per_projection"),
        ({"init": "zero"}, r"init='zero' is unknown. Use one of normal, svd"),
        ({"init_std": 0.0}, r"init_std=0.0 has to be above 0"),
        ({"init": "svd", "alpha": 0}, r"alpha=0 cannot be used with init='svd'"),
        ({"bias": "craft_only"}, r"bias='craft_only' is unknown. Use 'none', 'all' or 'lotr_only'"),
    ],
)
def test_a_bad_config_is_refused(fields, message):
    with pytest.raises(CraftError, match=message):
        LotrConfig(**fields)


def test_a_rank_above_both_sides_is_refused():
    with pytest.raises(CraftError, match=r"`r=17` is above both sides of the 16 x 16 .* Use at most `r=16`"):
        get_peft_model(bert(), LotrConfig(target_modules=TARGETS, r=17))


def test_an_adapter_of_another_shape_is_refused(tmp_path):
    get_peft_model(bert(), LotrConfig(target_modules=TARGETS, r=3)).save_pretrained(tmp_path)
    with pytest.raises(CraftError, match=r"core' was saved with the shape \(6, 3, 3\) and needs \(8, 3, 3\)"):
        PeftModel.from_pretrained(bert(layers=4), tmp_path)
