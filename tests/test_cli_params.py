"""`craft-peft params`: the table of what methods cost, from a model's config alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import BertConfig, GPT2Config

from craft_peft.cli.main import main
from craft_peft.glue.methods import METHODS

ADAPTERS = [name for name, method in METHODS.items() if method.config is not None]


@pytest.fixture(scope="module")
def config_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder that holds a config and nothing else: 6 layers of width 64."""
    folder = tmp_path_factory.mktemp("config")
    BertConfig(hidden_size=64, num_hidden_layers=6, num_attention_heads=2, intermediate_size=64).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def printed(config_folder: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["params", "--model", config_folder, "--budget", "1400"]) == 0
    return capsys.readouterr().out


def test_table_has_a_row_a_method(printed: str) -> None:
    rows = {line.split("│")[1].strip(): line for line in printed.splitlines() if line.startswith("│")}
    assert [name for name in rows if name] == ADAPTERS
    assert "r 10" in rows["lora-xs"] and "1,200" in rows["lora-xs"] and "T*r^2" in rows["lora-xs"]
    assert "(over)" not in rows["lora-xs"]


def test_table_says_what_does_not_fit_and_what_the_letters_mean(printed: str) -> None:
    assert "1,536" in printed and "r 1 (over)" in printed
    assert "(over): the smallest setting of a method that has none within the budget." in printed
    assert "T = 12 matrices of d_out x d_in: query 64 x 64 (6x), value 64 x 64 (6x); n_p: projections" in printed


def test_json(config_folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["params", "--model", config_folder, "--budget", "1400", "--target-modules", "key,value", "--json"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    fields = json.loads(printed)
    assert (fields["budget"], fields["target_modules"], fields["matrices"]) == (1400, ["key", "value"], 12)
    rows = {row["method"]: row for row in fields["methods"]}
    assert list(rows) == ADAPTERS
    expected = {"setting": {"r": 10}, "trainable": 1200, "stored": 1200, "fits": True, "formula": "T*r^2"}
    assert rows["lora-xs"] == {"method": "lora-xs", **expected}
    assert (rows["lora"]["trainable"], rows["lora"]["fits"]) == (1536, False)
    assert all(row["trainable"] <= 1400 for row in rows.values() if row["fits"])


def test_without_a_budget_each_has_its_default(config_folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["params", "--model", config_folder, "--json"]) == 0
    rows = {row["method"]: row for row in json.loads(capsys.readouterr().out)["methods"]}
    assert rows["lora"]["setting"] == {"r": 8}
    assert rows["craft"]["setting"] == {"layer": 6, "out": 64, "in": 64}
    assert all(row["fits"] for row in rows.values())


def test_a_method_that_cannot_adapt_the_model_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    GPT2Config(n_embd=16, n_layer=2, n_head=2).save_pretrained(tmp_path)
    assert main(["params", "--model", str(tmp_path), "--json"]) == 0
    rows = {row["method"]: row for row in json.loads(capsys.readouterr().out)["methods"]}
    assert rows["lora"]["trainable"] == 2 * 8 * 64
    assert "Conv1D" in rows["loha"]["problem"]
    assert main(["params", "--model", str(tmp_path)]) == 0
    assert "Conv1D" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--budget", "0"], "`--budget 0` is no number of parameters"),
        (["--target-modules", "qery"], "Did you mean 'query'?"),
        (["--target-modules", "LayerNorm"], "is a LayerNorm, not a linear layer"),
        (["--model", "./absent"], "There is no model folder `./absent`"),
        (["--model", "owner/no-such-name"], "Could not read a model's config from `owner/no-such-name`"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    words: list[str], message: str, config_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["params", "--model", config_folder, *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.splitlines()[-1].startswith("error: ") and "Traceback" not in err


def test_a_folder_without_a_config_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["params", "--model", str(tmp_path)]) == 2
    assert "holds config.json" in capsys.readouterr().err
