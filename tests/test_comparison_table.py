"""From an experiment in which every rate is trained, and the seconds of a step, to the table in the docs."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

from test_docs import build
from tiny_sweep import TOML, InProcess, make_sweep, write_sweep

from craft_peft.glue.sweep.runner import Listener

PROJECT = Path(__file__).resolve().parent.parent


def test_from_runs_to_the_table(tmp_path: Path, no_pictures: None) -> None:
    path = write_sweep(tmp_path, TOML.replace('choose_on = ["sst2"]', ""))
    sweep = make_sweep(path, only=("sst2-*-seed0",))
    assert sweep.run(InProcess(), Listener())
    spec = importlib.util.spec_from_file_location("steps", PROJECT / "experiments" / "steps.py")
    assert spec is not None and spec.loader is not None
    steps = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(steps)
    results = tmp_path / "project" / "results"
    words = [str(path), "--data", str(tmp_path / "glue"), "--rounds", "2", "--to", str(results / "compare_steps.json")]
    steps.main(words)
    for file in (tmp_path / "results").glob("*.json"):
        (results / "compare").mkdir(exist_ok=True)
        shutil.copy(file, results / "compare" / file.name.replace("sst2", "stsb"))
    shutil.copytree(PROJECT / "docs" / "templates", tmp_path / "project" / "docs" / "templates")
    page = build.filled("<!-- generated: comparison -->\n<!-- end -->", tmp_path / "project")
    rows = [line for line in page.splitlines() if line.startswith(("| craft", "| lora", "| head"))]
    (craft,) = (row for row in rows if row.startswith("| craft"))
    tried = [json.loads(file.read_text()) for file in (results / "compare").glob("stsb-craft-*.json")]
    best = max(tried, key=lambda run: run["score"]["last"])
    assert len(tried) == 2 and len(rows) == 3
    rate = best["config"]["recipe"]["learning_rate"]
    assert f"| layer 2, out 12, in 12 | 584 | {rate:g} | {best['score']['last']:.3f} |" in craft
    assert "median of 2 steps" in page and str(tmp_path) not in (results / "compare_steps.json").read_text()
