"""The table of methods, their configs and recipes."""

from __future__ import annotations

import dataclasses

import pytest

from craft_peft import CraftConfig, CraftError
from craft_peft.glue.method_row import MethodOptions
from craft_peft.glue.methods import METHODS, find_method, make_peft_config
from craft_peft.glue.recipes import Recipe
from craft_peft.glue.settings import TrainingConfig


def test_methods_of_the_table() -> None:
    assert set(METHODS) >= {"craft", "lora", "head", "full"}
    assert METHODS["full"].trains_base and not METHODS["head"].trains_base


def test_craft_takes_three_ranks_and_modules() -> None:
    config = make_peft_config("craft", MethodOptions(ranks=(2, 8, 8), target_modules=("query",)))
    assert isinstance(config, CraftConfig)
    assert (config.ranks, config.target_modules) == ((2, 8, 8), {"query"})


def test_craft_defaults_to_the_paper() -> None:
    assert make_peft_config("craft", MethodOptions()).ranks == "paper"


def test_lora_has_rank_eight_and_scaling_one() -> None:
    config = make_peft_config("lora", MethodOptions())
    assert (config.r, config.lora_alpha) == (8, 8)


def test_extra_options_reach_the_config() -> None:
    assert make_peft_config("lora", MethodOptions(extra={"lora_alpha": 32})).lora_alpha == 32


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "lora",
            MethodOptions(ranks=(8, 8)),
            r"ranks=\(8, 8\) does not fit method `lora`, which takes 1 .*`ranks=\(8,\)`",
        ),
        ("lora", MethodOptions(ranks=(0,)), r"ranks=\(0,\) does not fit method `lora`"),
        ("vblora", MethodOptions(ranks=(90,)), r"takes 2 .*\(vectors, length\), as `ranks="),
        ("lora", MethodOptions(extra={"ranq": 1}), r"Method `lora` does not take these options: .*ranq"),
        ("head", MethodOptions(ranks=(8,)), r"Method `head` adds nothing to the model"),
        (
            "craft",
            MethodOptions(ranks=(8,)),
            r"ranks=\(8,\) does not fit method `craft`, which takes 3 .*\(layer, out, in\), as `ranks=",
        ),
        ("head", MethodOptions(budget=8), r"Method `head` adds nothing to the model.*budget=8"),
        ("lorra", MethodOptions(), r"Unknown method `lorra`\. Did you mean `lora`\?"),
    ],
)
def test_options_that_do_not_fit(name: str, options: MethodOptions, message: str) -> None:
    with pytest.raises(CraftError, match=message):
        make_peft_config(name, options)


@pytest.mark.parametrize("u", [1, 4, 5, 64, 65, 256])
def test_tinylora_has_the_smallest_rank_that_its_vector_can_fill(u: int) -> None:
    r = make_peft_config("tinylora", MethodOptions(ranks=(u,))).r
    assert r**2 >= u and (r == 2 or (r - 1) ** 2 < u)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("head_learning_rate", -1.0),
        ("warmup_ratio", 1.0),
        ("weight_decay", -0.1),
        ("head_weight_decay", float("inf")),
        ("clip", 0.0),
        ("batch_size", 0),
        ("max_length", 3),
        ("epochs", 0),
    ],
)
def test_recipe_refuses_numbers_out_of_range(field: str, value: float) -> None:
    with pytest.raises(CraftError, match=f"{field}=.* cannot be used: it must be"):
        Recipe(**{field: value})


def test_config_goes_before_recipe_goes_before_method() -> None:
    config = TrainingConfig(output="x", model="y", method="lora", recipe=Recipe(clip=5.0, batch_size=8), batch_size=4)
    recipe = config.resolve_recipe(task_epochs=7)
    assert (recipe.batch_size, recipe.clip, recipe.epochs) == (4, 5.0, 7)
    assert TrainingConfig(output="x", model="y", method="lora").resolve_recipe(7).learning_rate == 4e-4


def test_every_number_of_the_command_is_one_of_the_recipe() -> None:
    from craft_peft.cli.train import RECIPE_HELP

    names = {field.name for field in dataclasses.fields(Recipe)}
    assert set(RECIPE_HELP) <= names & {field.name for field in dataclasses.fields(TrainingConfig)}


def test_unknown_method_lists_all() -> None:
    with pytest.raises(CraftError, match=r"The methods are: craft, lotr, superlora, lora, pissa, .*head, full"):
        find_method("nothing")


@pytest.mark.parametrize(
    ("method", "ranks", "rate"),
    [
        ("craft", None, 1e-3),
        ("craft", (6, 100, 100), 1e-3),
        ("craft", (6, 50, 25), 2e-3),
        ("craft", (24, 100, 200), 5e-4),
        ("lora", (64,), 4e-4),
        ("lora-xs", (64,), 1e-3),
    ],
)
def test_crafts_rate_falls_with_the_rank(method: str, ranks: tuple[int, ...] | None, rate: float) -> None:
    config = TrainingConfig(output="run", model="base", method=method, ranks=ranks)
    assert config.resolve_recipe(1).learning_rate == pytest.approx(rate)
    given = dataclasses.replace(config, learning_rate=7e-3)
    assert given.resolve_recipe(1).learning_rate == 7e-3
