"""The ladder of CRAFT: what layers share (`tying`) and where the bases come from (`basis`); sums of adapters."""

from typing import get_args

import pytest
import torch
from laws import TARGETS, assert_close
from peft import LoraConfig, PeftModel, get_peft_model
from small_models import LAYERS, WIDTH, bert, gpt2, logits, tokens

from craft_peft import CraftConfig, CraftError, fit_bases, hosvd
from craft_peft.adapters.craft import Basis, Tying
from craft_peft.plugin.layer import StackedLinear
from craft_peft.weights import StackShape

RANKS = (2, 4, 3)
BATCHES = [{"input_ids": tokens(seed), "labels": torch.tensor([0, 1])} for seed in (1, 2)]


def adapted(make=bert, name="default", **fields):
    task = {"target_modules": TARGETS, "task_type": "SEQ_CLS"} if make is bert else {}
    return get_peft_model(make(), CraftConfig(**{"ranks": RANKS, **task, **fields}), adapter_name=name).eval()


def adapters_of(model, name="default"):
    """The adapter of each stack, by the path of its first module."""
    return {
        key: layer.slots[name].adapter
        for key, layer in model.get_base_model().named_modules()
        if isinstance(layer, StackedLinear) and name in layer.slots and layer.slots[name].layer == 0
    }


@pytest.mark.parametrize("tying", get_args(Tying))
@pytest.mark.parametrize("basis", get_args(Basis))
def test_every_rung_starts_at_the_base_model_and_moves(tying, basis):
    before = logits(bert())
    model = adapted(tying=tying, basis=basis)
    if basis in ("activations", "gradients"):
        fit_bases(model, BATCHES)
    assert torch.equal(logits(model), before)
    model.train()(**BATCHES[0]).loss.backward()
    for adapter in adapters_of(model).values():
        assert all(parameter.grad.abs().max() > 0 for parameter in adapter.parameters())


@pytest.mark.parametrize(
    ("tying", "ranks", "shape", "count"),
    [
        ("shared", (12, 100, 100), (12, 768, 768), 12**2 + 2 * 100**2),
        ("diagonal", (12, 100, 100), (12, 768, 768), 12**2 + 2 * 100**2 + 12 * 200),
        ("free", (12, 41, 41), (12, 768, 768), 20_172),  # both projections: 40,344, as LoRA-XS at r = 41
        ("free", (3, 4, 7), (3, 8, 9), 84),
    ],
)
def test_counts(tying, ranks, shape, count):
    adapter = CraftConfig(ranks=ranks, tying=tying).build_adapter("query", StackShape.uniform(*shape))
    assert sum(parameter.numel() for parameter in adapter.parameters()) == count


def test_a_diagonal_at_zero_is_the_paper():
    torch.manual_seed(0)
    weights = [torch.randn(8, 6, dtype=torch.float64) for _ in range(LAYERS)]
    shape = StackShape.uniform(LAYERS, 8, 6)
    built = [CraftConfig(ranks=RANKS, tying=tying).build_adapter("q", shape) for tying in ("shared", "diagonal")]
    for adapter in built:
        adapter.double().initialise(lambda: weights)
    shared, diagonal = built
    for name, parameter in shared.named_parameters():
        parameter.data.normal_()
        getattr(diagonal, name).data.copy_(parameter.data)
    for layer in range(LAYERS):
        assert torch.equal(shared.delta_weight(layer), diagonal.delta_weight(layer))


def test_free_middles_reach_whatever_shared_transforms_do():
    shared, free = adapted(init_weights=False), adapted(tying="free")
    for key, adapter in adapters_of(shared).items():
        free_adapter = adapters_of(free)[key]
        free_adapter.middles.data = torch.stack([adapter.middle(layer) for layer in range(LAYERS)])
    assert_close(logits(free), logits(shared), products=1000)


def test_random_bases_are_orthonormal_and_repeat_with_their_seed():
    first, same, other = (
        next(iter(adapters_of(adapted(basis="random", basis_seed=seed)).values())) for seed in (0, 0, 1)
    )
    assert torch.equal(first.out_factor, same.out_factor) and not torch.allclose(first.out_factor, other.out_factor)
    assert_close(first.in_factor.T @ first.in_factor, torch.eye(3), products=WIDTH)


def naive_directions(basis, model, key):
    """The matrices whose decomposition gives the bases, by one forward or backward pass of the plain model a layer."""
    base = bert()
    module = base.get_submodule(key)
    if basis == "activations":
        seen = []
        module.register_forward_hook(lambda m, args, out: seen.append(args[0].detach().reshape(-1, WIDTH)))
        for batch in BATCHES:
            base(**batch)
        return module.weight.detach() * torch.cat(seen).square().sum(0).sqrt()
    for batch in BATCHES:
        base(**batch).loss.backward()
    return module.weight.grad


@pytest.mark.parametrize("basis", ["activations", "gradients"])
def test_bases_from_batches_are_those_of_the_equation(basis):
    model = adapted(basis=basis)
    fit_bases(model, BATCHES)
    for key, adapter in adapters_of(model).items():
        paths = [key.replace("layer.0", f"layer.{layer}") for layer in range(LAYERS)]
        expected = hosvd(torch.stack([naive_directions(basis, model, path) for path in paths]), RANKS).factors
        for found, factor in zip((adapter.layer_factor, adapter.out_factor, adapter.in_factor), expected, strict=True):
            # As subspaces: a sign may turn where two entries of a column are equally large.
            torch.testing.assert_close(found @ found.T, factor @ factor.T, rtol=0, atol=1e-3)
        weights = torch.stack([bert().get_submodule(path).weight.detach() for path in paths])
        core = torch.einsum("loi,la,ob,ic->abc", weights, adapter.layer_factor, adapter.out_factor, adapter.in_factor)
        assert_close(adapter.core, core, products=1000)


@pytest.mark.parametrize("basis", ["activations", "gradients"])
def test_fitting_leaves_the_model_as_it_was(basis):
    model = adapted(basis=basis).train()
    state = {name: tensor.clone() for name, tensor in model.get_base_model().bert.named_parameters()}
    hooks = [len(module._forward_hooks) for module in model.modules()]
    fit_bases(model, BATCHES)
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert all(torch.equal(state[name], p) for name, p in model.get_base_model().bert.named_parameters())


def test_conv1d_bases():
    model = adapted(gpt2, basis="gradients")
    fit_bases(model, [{"input_ids": tokens(), "labels": tokens()}])
    assert torch.equal(logits(model), logits(gpt2()))


def test_fitted_bases_are_saved(tmp_path):
    model = adapted(basis="activations", init_weights=False)
    fit_bases(model, BATCHES)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(bert(), tmp_path)), logits(model))


@pytest.mark.parametrize(
    ("make", "batches", "message"),
    [
        (lambda: adapted(), BATCHES, r"bases of the adapter 'default' are not computed from batches"),
        (lambda: adapted(basis="activations"), [], r"`fit_bases` got no batches"),
        (lambda: adapted(basis="gradients"), [{"input_ids": tokens()}], r"needs batches with labels"),
        (
            lambda: get_peft_model(bert(), LoraConfig(target_modules=TARGETS)),
            BATCHES,
            r"no adapter of this package called 'default'",
        ),
    ],
)
def test_bad_fitting(make, batches, message):
    with pytest.raises(CraftError, match=message):
        fit_bases(make(), batches)


def test_bases_that_were_never_fitted_are_an_error(tmp_path):
    model = adapted(basis="gradients")
    for use in (logits, lambda m: m.save_pretrained(tmp_path), lambda m: m.merge_and_unload()):
        with pytest.raises(CraftError, match=r"basis='gradients', and its bases were not computed yet. Call"):
            use(model)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tying": "fre"}, r"tying='fre' is unknown. Use one of shared, diagonal, free"),
        ({"basis": "data"}, r"basis='data' is unknown. Use one of weights, random, activations, gradients"),
        ({"tying": "free", "trained_modes": (1,)}, r"trained_modes=\(1,\) has no meaning with tying='free'"),
        ({"basis": "gradients", "save_factors": False}, r"needs save_factors=True: bases from batches cannot"),
    ],
)
def test_a_bad_rung_is_refused(fields, message):
    with pytest.raises(CraftError, match=message):
        CraftConfig(**fields)


# ---------------------------------------------------------------------------------------------------------------------
# Sums of adapters
# ---------------------------------------------------------------------------------------------------------------------


def two_adapters(**second):
    torch.manual_seed(1)
    model = adapted(init_weights=False, alpha=0.5)
    fields = {"ranks": RANKS, "target_modules": TARGETS, "task_type": "SEQ_CLS", "init_weights": False, **second}
    model.add_adapter("second", CraftConfig(**fields))
    return model.eval()


@pytest.mark.peft_feature("`add_weighted_adapter`")
@pytest.mark.parametrize("second", [{}, {"tying": "free"}, {"tying": "diagonal", "alpha": 2.0}])
def test_a_weighted_sum_is_the_sum_of_the_deltas(second, tmp_path):
    model = two_adapters(**second)
    before = logits(model)
    model.add_weighted_adapter(["default", "second"], [0.7, -0.2], "sum")
    assert torch.equal(logits(model), before), "the active adapter changed"
    for layer in (module for module in model.modules() if isinstance(module, StackedLinear)):
        deltas = {name: layer.get_delta_weight(name).detach() for name in ("default", "second", "sum")}
        assert_close(deltas["sum"], 0.7 * deltas["default"] - 0.2 * deltas["second"], products=100)
    model.base_model.set_adapter("sum")
    summed = logits(model)
    assert not torch.allclose(summed, before)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(bert(), tmp_path / "sum")
    layers = [[m for m in x.modules() if isinstance(m, StackedLinear)] for x in (model, loaded)]
    for saved, found in zip(*layers, strict=True):
        assert torch.equal(saved.get_delta_weight("sum"), found.get_delta_weight("default"))
    model.set_adapter("default")
    model.delete_adapter("sum")
    assert torch.equal(logits(model), before)


@pytest.mark.peft_feature("`add_weighted_adapter`")
@pytest.mark.parametrize(
    ("second", "arguments", "message"),
    [
        ({}, (["default", "third"], [1, 1], "sum"), r"There is no adapter \['third'\]. The model has default, second"),
        ({}, ([], [], "sum"), r"There is no adapter \(none given\)"),
        ({}, (["default", "second"], [1, 1], "second"), r"There is an adapter 'second' already"),
        ({}, (["default", "second"], [1], "sum"), r"1 weights were given for 2 adapters"),
        ({}, (["default", "second"], [1, 1], "sum", "svd"), r"combination_type='svd' is not supported. Use 'linear'"),
        ({"ranks": (2, 5, 3)}, (["default", "second"], [1, 1], "sum"), r"have different bases"),
        ({"decomposition": "hooi"}, (["default", "second"], [1, 1], "sum"), r"have different bases"),
        ({"target_modules": ["query"]}, (["default", "second"], [1, 1], "sum"), r"are not of one method on the same"),
    ],
)
def test_a_sum_that_does_not_exist_is_refused_and_leaves_nothing(second, arguments, message):
    model = two_adapters(**second)
    names = list(model.state_dict())
    with pytest.raises(CraftError, match=message):
        model.add_weighted_adapter(*arguments)
    assert list(model.peft_config) == ["default", "second"] and list(model.state_dict()) == names
