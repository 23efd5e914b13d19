"""The script that compares the methods: from runs to the table in the docs, on an encoder that trains in seconds."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
from test_docs import build
from tiny_encoder import review, write_encoder

from craft_peft import CraftError

PROJECT = Path(__file__).resolve().parent.parent


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, with two rates, and its runs in this process instead of processes of their own."""
    spec = importlib.util.spec_from_file_location("compare", PROJECT / "experiments" / "compare.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Where dataclasses look their annotations up.
    monkeypatch.setitem(sys.modules, "compare", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "FACTORS", (1.0, 3.0))
    monkeypatch.setattr("craft_peft.glue.results.draw_curves", lambda result, path: path.write_bytes(b""))
    return module


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """Options for a small STS-B in the layout of the official files."""
    folder = tmp_path / "glue" / "STS-B"
    folder.mkdir(parents=True)
    columns = ["index", "genre", "file", "year", "old", "source1", "source2", "sentence1", "sentence2", "score"]
    for name, numbers in (("train", range(64)), ("dev", range(64, 96))):
        rows = []
        for number in numbers:
            (first, _), (second, label) = review(number), review(2 * number + number % 3)
            rows.append("\t".join(["0"] * 7 + [first, second, str(4.5 if label == "good" else 0.5 + number % 2)]))
        (folder / f"{name}.tsv").write_text("\n".join(["\t".join(columns), *rows]) + "\n")
    encoder = write_encoder(tmp_path / "encoder")
    return ["--model", str(encoder), "--data", str(tmp_path / "glue"), "--methods", "lora,head", "--budget", "300"]


def test_from_runs_to_the_table(
    compare: ModuleType, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    def in_this_process(plan, threads: int) -> str:
        ran.append(plan.name)
        compare.run_one({**vars(plan.config), "ranks": plan.config.ranks and list(plan.config.ranks)})
        return plan.name

    monkeypatch.setattr(compare, "run_in_process", in_this_process)
    runs = ["--runs", str(tmp_path / "runs")]
    for _ in range(2):  # the second finds everything there
        compare.main(["train", *runs, *words, "--epochs", "1"])
    assert ran == ["stsb-lora-4.00e-04-seed0", "stsb-head-1.00e-03-seed0", "stsb-lora-1.20e-03-seed0"]
    compare.main(["steps", *runs, *words, "--rounds", "2"])
    (tmp_path / "runs" / "stsb-lora-1.00e+00-seed0").mkdir()
    (tmp_path / "runs" / "stsb-lora-1.00e+00-seed0" / compare.FAILED).write_text("Training diverged")
    compare.main(["publish", *runs, "--name", "tiny", "--to", str(tmp_path / "results" / "compare")])

    (tmp_path / "docs").mkdir()
    shutil.copytree(PROJECT / "docs" / "templates", tmp_path / "docs" / "templates")
    page = build.filled("<!-- generated: comparison -->\n<!-- end -->", tmp_path)
    rows = [line for line in page.splitlines() if line.startswith("| lora") or line.startswith("| head")]
    found = json.loads((tmp_path / "results" / "compare" / "stsb.json").read_text())
    best = max((run for run in found["runs"] if run["method"] == "lora"), key=lambda run: run["score"])
    (lora,) = (row for row in rows if row.startswith("| lora"))
    assert f"| r 2 | 256 | {best['learning_rate']:g} | {best['score']:.3f} |" in lora
    assert "0.0004: " in lora and "0.0012: " in lora and len(rows) == 2
    assert "Diverged: stsb-lora-1.00e+00-seed0." in page and "median of 2 steps" in page
    assert str(tmp_path) not in json.dumps(found)


def test_a_run_that_diverges_is_a_result_and_a_defect_is_not(
    compare: ModuleType, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"output": str(tmp_path / "run"), "model": words[1], "ranks": None}
    (tmp_path / "run").mkdir()
    for message, kept in (("Training diverged: the loss is nan.", True), ("There is no folder.", False)):

        def fail(config, console, message: str = message):
            raise CraftError(message)

        monkeypatch.setattr(compare, "train", fail)
        if kept:
            compare.run_one(fields)
            assert (tmp_path / "run" / compare.FAILED).read_text() == message
        else:
            with pytest.raises(CraftError, match="There is no folder"):
                compare.run_one(fields)
