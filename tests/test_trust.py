"""The scripts behind docs/reliability.md, with small numbers, and the page itself: every test that it names exists."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent


def run(script, tmp_path, *options):
    output = tmp_path / "figures.json"
    command = [sys.executable, PROJECT / "trust" / script, *options, "--output", output]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return json.loads(output.read_text())


def test_mutated_adapters(tmp_path):
    figures = run("mutants.py", tmp_path, "--count", "400", "--processes", "1")["mutants"]
    assert figures["refused"] + figures["loaded"] == 400 and figures["refused"] > 200 and figures["loaded"] > 5


def test_killed_runs(tmp_path):
    figures = run("kills.py", tmp_path, "--kills", "8", "--clock", "0")["kills"]
    assert figures["kills"] >= 8 and figures["differ"] == []


def test_soak(tmp_path):
    assert run("soak.py", tmp_path, "--cycles", "80")["soak"]["cycles"] == 80


def named_tests():
    return sorted(set(re.findall(r"`(tests/\w+\.py(?:::\w+)?)`", (PROJECT / "docs" / "reliability.md").read_text())))


@pytest.mark.parametrize("name", named_tests())
def test_every_test_that_the_page_names_exists(name):
    file, _, function = name.partition("::")
    assert (PROJECT / file).is_file()
    if function:
        tree = ast.parse((PROJECT / file).read_text())
        assert function in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
