"""The benchmark scripts run (`--quick`), and the pictures in the docs are those of the committed figures."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent
BENCHMARKS = PROJECT / "benchmarks"
NOT_SCRIPTS = {"pairs.py", "plots.py"}
SCRIPTS = sorted(path.name for path in BENCHMARKS.glob("*.py") if path.name not in NOT_SCRIPTS)

sys.path.insert(0, str(BENCHMARKS))
import plots  # noqa: E402
from pairs import ratio, replaced, take_turns  # noqa: E402


@pytest.mark.parametrize("script", SCRIPTS)
def test_quick(script, tmp_path):
    output = tmp_path / "figures.json"
    ended = subprocess.run(
        [sys.executable, BENCHMARKS / script, "--quick", "--output", output], capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert json.loads(output.read_text())["machine"]["processor"]


@pytest.mark.parametrize("name", plots.FIGURES)
def test_pictures_are_those_of_the_committed_figures(name):
    assert (PROJECT / "docs" / "img" / f"{name}.svg").read_text() == plots.render(name), (
        "run `python benchmarks/plots.py`"
    )


def test_sides_take_turns():
    calls = []
    seconds = take_turns({name: lambda name=name: calls.append(name) for name in "abc"}, rounds=4)
    assert [sorted(calls[i : i + 3]) for i in range(0, 15, 3)] == [["a", "b", "c"]] * 5
    assert len({tuple(calls[i : i + 3]) for i in range(0, 15, 3)}) > 1
    assert [len(times) for times in seconds.values()] == [4, 4, 4]


def test_a_ratio_is_the_median_of_pairs():
    assert ratio({"a": [2.0, 30.0, 8.0], "b": [1.0, 10.0, 2.0]}, "a", "b") == 3.0


def test_what_is_measured_again_takes_the_place_of_its_row():
    old = [{"name": "a", "seconds": 1}, {"name": "b", "seconds": 2}]
    new = [{"name": "b", "seconds": 3}, {"name": "c", "seconds": 4}]
    assert replaced(old, new, lambda row: row["name"]) == [old[0], *new]
