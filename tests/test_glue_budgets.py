"""What settings cost, against adapters on real models, published counts and the formulas; and what a budget chooses."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    RobertaConfig,
    ViTConfig,
)

from craft_peft import CraftError
from craft_peft.folding import fold_sizes
from craft_peft.glue import budgets
from craft_peft.glue.budgets import Choice, choose_setting, last_within, offers, price
from craft_peft.glue.method_row import MethodOptions, Ranks
from craft_peft.glue.methods import METHODS, make_peft_config
from craft_peft.glue.models import adapt
from craft_peft.glue.pretrained import head_modules, is_head_parameter
from craft_peft.glue.targets import Targets, empty_model, find_model_targets

ADAPTERS = [name for name, method in METHODS.items() if method.config is not None]

ROBERTA_BASE = RobertaConfig()
ROBERTA_LARGE = RobertaConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
SIZES = {"vocab_size": 50, "pad_token_id": 0}
SQUARE = BertConfig(**SIZES, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48)
# The value projection is half as wide as the query's.
GROUPED = LlamaConfig(
    **SIZES,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=32,
    bos_token_id=None,
    eos_token_id=None,
)
# One transposed matrix a layer for query, key and value together.
TRANSPOSED = GPT2Config(**SIZES, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=None, eos_token_id=None)


def empty(config: PreTrainedConfig) -> nn.Module:
    with torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(config)


def targets_of(config: PreTrainedConfig, *names: str) -> Targets:
    return find_model_targets(empty(config), names or None)


def last_of(method: str, targets: Targets) -> int:
    return METHODS[method].setting.last(targets)


def ranks_at(method: str, step: int, targets: Targets) -> Ranks:
    return METHODS[method].setting.along(step, targets)


class TestPublishedCounts:
    # Counts from the papers and official codes of the methods, and the formulas in them, by hand. More of LoTR and
    # SuperLoRA stand with those methods.
    @pytest.mark.parametrize(
        ("method", "ranks", "config", "names", "count"),
        [
            ("craft", (24, 100, 100), ROBERTA_LARGE, (), 41_152),
            ("craft", (12, 100, 100), ROBERTA_BASE, (), 40_288),
            ("lora", (8,), ROBERTA_BASE, (), 294_912),
            ("lora", (8,), ROBERTA_LARGE, (), 786_432),
            ("vera", (1024,), ROBERTA_BASE, (), 43_008),
            ("vera", (256,), ROBERTA_LARGE, (), 61_440),
            (
                "lora-xs",
                (16,),
                ROBERTA_LARGE,
                ("query", "value", "attention.output.dense", "output.dense"),
                24_576,
            ),
            ("lora-xs", (41,), ROBERTA_BASE, (), 40_344),
            ("dora", (8,), ROBERTA_BASE, (), 313_344),
            ("superlora", (27,), ROBERTA_BASE, (), 39_339),
            ("superlora", (24,), ROBERTA_LARGE, (), 41_472),
            ("lotr", (8,), ROBERTA_BASE, (), 13_824),
            ("lotr", (32,), ROBERTA_LARGE, (), 114_688),
        ],
    )
    def test_adapters(
        self, method: str, ranks: Ranks, config: PreTrainedConfig, names: tuple[str, ...], count: int
    ) -> None:
        assert price(method, MethodOptions(ranks=ranks), targets_of(config, *names)).trainable == count

    @pytest.mark.parametrize(("config", "count"), [(ROBERTA_BASE, 592_130), (ROBERTA_LARGE, 1_051_650)])
    def test_heads(self, config: PreTrainedConfig, count: int) -> None:
        model = empty(config)
        heads = [getattr(model, name) for name in head_modules(model)]
        assert sum(parameter.numel() for head in heads for parameter in head.parameters()) == count


class TestCounts:
    @pytest.mark.parametrize("method", ADAPTERS)
    @pytest.mark.parametrize(
        ("config", "names"),
        [(SQUARE, ()), (SQUARE, ("query", "intermediate.dense")), (GROUPED, ())],
        ids=["square", "mixed", "grouped"],
    )
    def test_are_those_of_an_adapter_on_a_real_model(
        self, method: str, config: PreTrainedConfig, names: tuple[str, ...], tmp_path: Path
    ) -> None:
        targets = targets_of(config, *names)
        default = price(method, MethodOptions(), targets).ranks
        for ranks in (default, ranks_at(method, 1, targets)):
            choice = price(method, MethodOptions(ranks=ranks), targets)
            model = adapted(method, config, ranks, targets)
            trained = [(name, p.numel()) for name, p in model.named_parameters() if p.requires_grad]
            assert choice.trainable == sum(count for name, count in trained if not is_head_parameter(name, model))
            model(torch.arange(1, 9).reshape(2, 4)).logits.sum().backward()  # the smallest setting works too
            model.save_pretrained(tmp_path)
            saved = load_file(tmp_path / "adapter_model.safetensors")
            assert choice.stored == sum(
                t.numel()
                for name, t in saved.items()
                if "base_model.model.score" not in name and "base_model.model.classifier" not in name
            )

    @pytest.mark.parametrize("method", ADAPTERS)
    @pytest.mark.parametrize("names", [("query", "value"), ("intermediate.dense",)])
    def test_are_those_of_the_formula(self, method: str, names: tuple[str, ...]) -> None:
        targets = targets_of(SQUARE, *names)
        ((d_out, d_in),) = set(targets.shapes)
        for step in {1, min(4, last_of(method, targets)), min(9, last_of(method, targets))}:
            ranks = ranks_at(method, step, targets)
            sizes = {"T": len(targets.modules), "n_p": len(names), "G": 1, "d_out": d_out, "d_in": d_in}
            folded = fold_sizes(sum(a * b for a, b in targets.shapes), 3)
            sizes |= {f"d_{mode}": size for mode, size in enumerate(folded, start=1)}
            numbers = dict(zip(METHODS[method].setting.names, ranks, strict=True))
            count = evaluate(METHODS[method].formula, {**sizes, **numbers})
            assert price(method, MethodOptions(ranks=ranks), targets).trainable == count

    @pytest.mark.parametrize("method", ADAPTERS)
    def test_a_transposed_matrix_is_counted_or_refused_in_words(self, method: str) -> None:
        found = offers(MethodOptions(), targets_of(TRANSPOSED))[method]
        if isinstance(found, Choice):
            model = adapted(method, TRANSPOSED, found.ranks, targets_of(TRANSPOSED))
            trained = [(name, p.numel()) for name, p in model.named_parameters() if p.requires_grad]
            assert found.trainable == sum(count for name, count in trained if not is_head_parameter(name, model))
        else:
            assert "Conv1D" in str(found) and "does not fit the model" in str(found)

    def test_further_fields_of_the_config_count(self) -> None:
        targets = targets_of(SQUARE)
        whole = price("craft", MethodOptions(ranks=(3, 4, 4)), targets).trainable
        part = price("craft", MethodOptions(ranks=(3, 4, 4), extra={"trained_modes": (1,)}), targets).trainable
        assert (whole, part) == (2 * (9 + 16 + 16), 2 * 16)

    def test_what_is_left_out_of_the_file_is_not_stored(self) -> None:
        options = MethodOptions(ranks=(3, 4, 4), extra={"save_factors": False})
        choice = price("craft", options, targets_of(SQUARE))
        whole = price("craft", MethodOptions(ranks=(3, 4, 4)), targets_of(SQUARE))
        factors = 2 * (3 * 4 * 4 + 3 * 3 + 2 * 32 * 4)
        indices = 6  # the number of each adapted layer in its stack
        assert choice.trainable == whole.trainable == 2 * (9 + 16 + 16)
        assert whole.stored - choice.stored == factors + indices

    def test_need_no_weights(self, tmp_path: Path) -> None:
        SQUARE.save_pretrained(tmp_path)
        assert [file.name for file in tmp_path.iterdir()] == ["config.json"]
        model = empty_model(str(tmp_path))
        assert all(parameter.is_meta for parameter in model.parameters())
        assert price("lora", MethodOptions(), find_model_targets(model)).trainable == 6 * 8 * 64


def evaluate(formula: str, values: dict[str, int]) -> float:
    return eval(re.sub(r"[A-Za-z]\w*", lambda word: str(values[word[0]]), formula).replace("^", "**"))


def adapted(method: str, config: PreTrainedConfig, ranks: Ranks | None, targets: Targets) -> nn.Module:
    torch.manual_seed(0)
    peft_config = make_peft_config(method, MethodOptions(ranks=ranks))
    peft_config.target_modules = targets.names
    return adapt(AutoModelForSequenceClassification.from_config(config), peft_config, trains_base=False)


class TestTargets:
    def test_a_model_that_cannot_classify_has_them_too(self, tmp_path: Path) -> None:
        ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16).save_pretrained(
            tmp_path
        )
        targets = find_model_targets(empty_model(str(tmp_path)))
        assert [stack.shape.layers for stack in targets.stacks] == [2, 2]

    def test_all_linear_is_every_matrix_but_the_head(self) -> None:
        targets = targets_of(SQUARE, "all-linear")
        assert len(targets.modules) == 3 * 6 + 1 and not any("classifier" in path for path, _ in targets.modules)
        assert price("lora", MethodOptions(ranks=(1,)), targets).trainable == sum(map(sum, targets.shapes))

    @pytest.mark.parametrize(
        ("names", "message"),
        [(("qery",), r"Did you mean 'query'\?"), (("LayerNorm",), r"is a LayerNorm, not a linear layer")],
    )
    def test_names_that_do_not_fit(self, names: tuple[str, ...], message: str) -> None:
        with pytest.raises(CraftError, match=message):
            targets_of(SQUARE, *names)


class TestSearch:
    @given(
        costs=st.lists(st.integers(0, 50), min_size=1, max_size=60).map(
            lambda rises: [sum(rises[: end + 1]) for end in range(len(rises))]
        ),
        place=st.integers(0, 59),
        change=st.integers(-1, 1),
    )
    def test_is_the_last_that_fits(self, costs: list[int], place: int, change: int) -> None:
        budget = costs[place % len(costs)] + change
        expected = sum(cost <= budget for cost in costs)
        found = last_within(lambda step: costs[step - 1], budget, len(costs))
        # Where several steps cost the same, the last of them is found.
        assert found == expected

    @pytest.mark.parametrize(
        "cost",
        [
            lambda step: 48 * step * step,
            lambda step: 98_304 * step,
            lambda step: 48 * (1024 + step),
            lambda step: 2 * (24**2 + 2 * step * step),
            lambda step: step**4,
            lambda step: min(step, 1000),
        ],
    )
    @pytest.mark.parametrize("budget", [41_000, 100_000, 1_234_567])
    def test_asks_for_few(self, cost: Callable[[int], int], budget: int) -> None:
        asked: list[int] = []

        def count(step: int) -> int:
            asked.append(step)
            return cost(step)

        step = last_within(count, budget, 2000)
        assert (cost(step) <= budget if step else cost(1) > budget) and (step == 2000 or cost(step + 1) > budget)
        assert len(asked) == len(set(asked)) <= 10


class TestBudget:
    @pytest.mark.parametrize("method", ADAPTERS)
    @pytest.mark.parametrize("budget", [300, 5000])
    def test_is_met_as_closely_as_the_method_can(self, method: str, budget: int) -> None:
        targets = targets_of(SQUARE)
        choice = price(method, MethodOptions(budget=budget), targets)

        def cost(step: int) -> int:
            return price(method, MethodOptions(ranks=ranks_at(method, step, targets)), targets).trainable

        steps = range(1, last_of(method, targets) + 1)
        step = next(step for step in steps if ranks_at(method, step, targets) == choice.ranks)
        assert choice.trainable == cost(step)
        assert choice.fits == (cost(1) <= budget)
        assert choice.largest == (choice.fits and step == last_of(method, targets))
        if choice.fits and not choice.largest:
            assert choice.trainable <= budget < cost(step + 1)
        elif not choice.fits:
            assert step == 1

    def test_takes_few_builds(self, monkeypatch: pytest.MonkeyPatch) -> None:
        built: list[str] = []
        build = budgets._build
        monkeypatch.setattr(budgets, "_build", lambda name, *rest: built.append(name) or build(name, *rest))
        wide = BertConfig(**SIZES, hidden_size=1024, num_hidden_layers=2, intermediate_size=1, num_attention_heads=8)
        found = offers(MethodOptions(budget=20_000), targets_of(wide))
        assert all(isinstance(choice, Choice) and choice.fits for choice in found.values())
        assert {name: built.count(name) for name in ADAPTERS if built.count(name) > 8} == {}

    @pytest.mark.parametrize(
        ("method", "budget", "sentence"),
        [
            (
                "craft",
                41_000,
                "craft with layer 12, out 100, in 100 trains 40,288 adapter parameters of a budget of 41,000 "
                "(712 left).",
            ),
            (
                "tinylora",
                41_000,
                "tinylora with u 256 trains 6,144 adapter parameters of a budget of 41,000 (34,856 left, its largest "
                "setting).",
            ),
        ],
    )
    def test_says_so(self, method: str, budget: int, sentence: str) -> None:
        assert str(choose_setting(method, MethodOptions(budget=budget), targets_of(ROBERTA_BASE))) == sentence

    def test_below_the_smallest_setting(self) -> None:
        with pytest.raises(CraftError) as error:
            choose_setting("vera", MethodOptions(budget=150), targets_of(SQUARE))
        assert str(error.value) == (
            "`budget=150` is below the smallest setting of method `vera` on this model, r 1, which trains 198 "
            "adapter parameters. Give at least `budget=198`, or another method; within 150 fit: craft, lotr, "
            "superlora, lora-xs, fourierft, tinylora, unilora."
        )

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"ranks": (4,), "budget": 100}, r"Both `ranks=\(4,\)` and `budget=100` were given"),
            ({"budget": 0}, r"`budget=0` is no number of parameters"),
            ({"budget": -5}, r"`budget=-5` is no number of parameters"),
        ],
    )
    def test_that_cannot_be_one(self, fields: dict[str, Any], message: str) -> None:
        with pytest.raises(CraftError, match=message):
            MethodOptions(**fields)
