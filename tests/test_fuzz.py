"""Random files, configs and stacks: a table or an error, a config or an error, a law that holds. `make fuzz` runs more.

Errors are `CraftError`; what PEFT's own part of a config refuses is one of the errors that PEFT raises.
"""

from __future__ import annotations

import json
import string
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from laws import assert_close
from method_table import METHODS
from peft.utils import CONFIG_NAME

from craft_peft import CraftConfig, CraftError, LotrConfig, SuperLoraConfig
from craft_peft.glue.data import read_own
from craft_peft.glue.sweep.experiment import read_experiment
from craft_peft.glue.tables import Table, read_table
from craft_peft.plugin.adapter_files import read_config
from craft_peft.weights import StackShape

SOURCES = [st.binary(max_size=400), st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass"))]
CELLS = st.text(alphabet=st.characters(codec="utf-8"), max_size=12)
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.recursive(st.integers(-2, 200) | st.text(max_size=5), lambda inner: st.lists(inner, max_size=4), max_leaves=8),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=3),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def only_a_craft_error(action: object, *arguments: object) -> object:
    try:
        return action(*arguments)  # type: ignore[operator]
    except CraftError as error:
        assert str(error).strip() and "\n" not in str(error).strip()
        return None


@given(content=st.one_of(SOURCES), ending=st.sampled_from([".csv", ".tsv", ".jsonl", ".txt", ""]))
def test_any_file_is_a_table_or_an_error(place: Path, content: bytes, ending: str) -> None:
    path = place / f"table{ending}"
    path.write_bytes(content)
    table = only_a_craft_error(read_table, path)
    assert table is None or (isinstance(table, Table) and table.rows)


@given(rows=st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=12), kind=st.sampled_from(["auto", "regression"]))
def test_any_table_of_json_lines_is_data_or_an_error(place: Path, rows: list[tuple[str, str]], kind: str) -> None:
    path = place / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
    data = only_a_craft_error(read_own, path, path, ("text",), "label", kind)
    if data is not None:
        assert data.train["text"][:] == [text for text, _ in rows]  # type: ignore[attr-defined]


@given(content=st.one_of(*SOURCES, st.text(alphabet=string.printable, max_size=200).map(str.encode)))
def test_any_file_is_an_experiment_or_an_error(place: Path, content: bytes) -> None:
    path = place / "experiment.toml"
    path.write_bytes(content)
    only_a_craft_error(read_experiment, path)


@given(data=st.data())
@pytest.mark.parametrize("kind", [CraftConfig, LotrConfig, SuperLoraConfig])
def test_any_value_of_a_field_is_a_config_or_an_error(kind: type, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(kind.__dataclass_fields__)))
    value = data.draw(ODD)
    try:
        config = kind(**{name: value})
    except (CraftError, ValueError, TypeError, AttributeError, KeyError):
        return
    json.dumps(config.to_dict(), default=str)


@given(fields=st.dictionaries(st.sampled_from(sorted(CraftConfig.__dataclass_fields__)), ODD, max_size=3))
def test_any_config_file_is_a_config_or_an_error(place: Path, fields: dict[str, object]) -> None:
    (place / CONFIG_NAME).write_text(json.dumps({"peft_type": "CRAFT", **fields}))
    only_a_craft_error(read_config, place)


@given(
    layers=st.integers(2, 5),
    sizes=st.tuples(st.integers(4, 20), st.integers(4, 20)),
    method=st.sampled_from(METHODS),
    seed=st.integers(0, 99),
)
def test_stacks_of_any_size(layers: int, sizes: tuple[int, int], method: object, seed: int) -> None:
    shape = StackShape.uniform(layers=layers, d_out=sizes[0], d_in=sizes[1])
    start, away = method.adapter(shape, seed), method.adapter(shape, seed, init_weights=False)  # type: ignore[attr-defined]
    x = torch.randn(3, sizes[1], dtype=torch.float64)
    for layer in range(layers):
        assert (start.delta_weight(layer) == 0).all()
        expected = x @ away.delta_weight(layer).detach().T
        assert_close(away.delta_output(layer, x).detach(), expected, products=1000)
