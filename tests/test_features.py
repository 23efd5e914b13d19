"""The record behind docs/peft-features.md is that of the tests as they are now."""

import json
from pathlib import Path

import pytest
from feature_record import features_of, test_name

RECORD = Path(__file__).parent.parent / "results" / "peft_features.json"
HINT = "run: python -m pytest --features=results/peft_features.json; python docs/build.py"


@pytest.fixture(scope="module")
def recorded() -> dict[str, dict]:
    return {row["name"]: row for row in json.loads(RECORD.read_text())["features"]}


def test_every_marked_test_is_in_the_record(request, recorded):
    missing = set()
    for item in request.session.items:
        for name, why_not in features_of(item):
            row = recorded.get(name, {"tests": [], "refusals": {}})
            if test_name(item) not in (row["tests"] if why_not is None else row["refusals"].get(why_not, [])):
                missing.add((name, test_name(item)))
    assert not missing, HINT


def test_every_recorded_test_exists(recorded):
    for row in recorded.values():
        for test in [*row["tests"], *(test for tests in row["refusals"].values() for test in tests)]:
            file, _, function = test.partition("::")
            path = RECORD.parent.parent / "tests" / file
            texts = [path.read_text(), (path.parent / "laws.py").read_text() if file == "test_laws.py" else ""]
            assert any(f"def {function}(" in text for text in texts), f"{test} is gone; {HINT}"


def test_nothing_is_both_without_tests_and_without_a_reason(recorded):
    for row in recorded.values():
        assert row["tests"] or row["refusals"], row["name"]
        assert row["works"] == bool(row["tests"])
