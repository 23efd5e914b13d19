"""Sweeps of runs of a second: what is run, in which order, what is never run again, and what is left when it fails."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_encoder import draw_nothing
from tiny_sweep import RUNS, TOML, InProcess, Told, make_sweep, write_sweep
from transformers import TrainerCallback

from craft_peft import CraftError
from craft_peft.cli.main import main
from craft_peft.glue.figures import FIELD, from_field, read_stacks
from craft_peft.glue.settings import identity
from craft_peft.glue.sweep import runner
from craft_peft.glue.sweep.plan import Cell
from craft_peft.glue.sweep.runner import Listener, Sweep

PROJECT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(scope="module")
def swept(sweep_folder: Path) -> tuple[Path, InProcess, Told]:
    """The experiment, run once."""
    executor, told = InProcess(), Told()
    with pytest.MonkeyPatch.context() as patch:
        draw_nothing(patch)
        assert make_sweep(sweep_folder / "tiny.toml").run(executor, told)
    return sweep_folder, executor, told


@pytest.fixture
def finished(swept: tuple[Path, InProcess, Told], tmp_path: Path) -> Path:
    """A copy of its folders."""
    shutil.copytree(swept[0], tmp_path / "copy")
    return tmp_path / "copy"


def small(sweep_folder: Path, tmp_path: Path, **options: Any) -> Sweep:
    """A sweep of one run, in a folder of this test."""
    return make_sweep(sweep_folder / "tiny.toml", tmp_path, only=("sst2-head-seed0",), **options)


class TestOrder:
    def test_everything_ran_once(self, swept: tuple[Path, InProcess, Told]) -> None:
        _, executor, told = swept
        assert len(executor.ran) == len(set(executor.ran)) == RUNS and executor.closed
        assert sum(event[0] == "finished" for event in told.events) == RUNS
        # Both rates of CRAFT on SST-2, its only choice, and one of them is the main run of seed 0 too.
        assert [name for name in executor.ran if name.startswith("sst2-craft") and "seed0" in name][:2]
        assert executor.ran[0].startswith("sst2-craft-8.33e-03-seed0-")

    def test_the_rate_has_the_best_held_out_score(self, swept: tuple[Path, InProcess, Told]) -> None:
        sweep_folder, _, told = swept
        ((_, method, scores),) = [event for event in told.events if event[0] == "chosen"]
        assert method == "craft" and set(scores) == {1.0, 10.0}
        tried = [json.loads(path.read_text()) for path in sorted((sweep_folder / "results" / "rates").iterdir())]
        assert sorted(scores.values()) == sorted(run["curve"][-1]["held_out_score"] for run in tried)
        best = max(tried, key=lambda run: run["curve"][-1]["held_out_score"])
        kept = json.loads((sweep_folder / "results" / "cola-craft-seed1.json").read_text())
        assert kept["config"]["recipe"]["learning_rate"] == best["config"]["recipe"]["learning_rate"]

    def test_runs_of_the_first_block_go_first(self, tmp_path: Path) -> None:
        path = write_sweep(tmp_path, TOML + '\n[[first]]\ntasks = ["cola"]\nmethods = ["lora r=2", "head"]\n')
        names = [(cell.task, cell.method, cell.seed) for cell in make_sweep(path).cells]
        assert names[:4] == [("cola", "lora r=2", 0), ("cola", "head", 0), ("cola", "lora r=2", 1), ("cola", "head", 1)]
        assert [cell.chooses for cell in make_sweep(path).cells][4:6] == [True, True]

    def test_without_a_choice_every_rate_is_run(self, tmp_path: Path) -> None:
        path = write_sweep(tmp_path, TOML.replace('choose_on = ["sst2"]', ""))
        cells = make_sweep(path, only=("sst2-*-seed0",)).cells
        assert [(cell.method, cell.factor) for cell in cells] == [
            ("craft", 1.0), ("lora r=2", 1.0), ("head", 1.0), ("craft", 10.0),
        ]  # fmt: skip


class TestResults:
    def test_published_is_the_result_with_its_label(self, swept: tuple[Path, InProcess, Told]) -> None:
        sweep_folder, _, _ = swept
        names = {path.name for path in (sweep_folder / "results").glob("*.json")}
        assert names == {
            f"{t}-{m}-seed{s}.json" for t in ("sst2", "cola") for m in ("craft", "lora-r2", "head") for s in (0, 1)
        }
        result = json.loads((sweep_folder / "results" / "cola-lora-r2-seed1.json").read_text())
        about = result["experiment"]
        assert (about["name"], about["label"], about["task"], about["setting"]) == ("tiny", "lora r=2", "cola", "r 2")
        settings = {name: value for name, value in result["config"].items() if name != "adapter"}
        assert about["id"] == identity({**settings, "model": str((sweep_folder / "encoder").resolve())})
        assert result["data"]["train"] == 26 and result["config"]["rows"] == 32
        assert str(sweep_folder) not in json.dumps({**result, "model": "", "config": {**result["config"], "model": ""}})

    def test_published_has_the_figures_of_its_adapter(self, swept: tuple[Path, InProcess, Told]) -> None:
        sweep_folder, _, _ = swept
        by_method = {
            name: sweep_folder / "results" / f"cola-{name}-seed1.json" for name in ("craft", "lora-r2", "head")
        }
        results = {name: json.loads(path.read_text()) for name, path in by_method.items()}
        (folder,) = (sweep_folder / "runs").glob("cola-craft-*-seed1-*/")
        assert from_field(results["craft"]) == read_stacks(folder) != ()
        assert FIELD not in results["lora-r2"] and FIELD not in results["head"]

    def test_a_damaged_adapter_is_a_failure_of_its_run_alone(self, finished: Path) -> None:
        (folder,) = (finished / "runs").glob("cola-craft-*-seed1-*/")
        (folder / "adapter_model.safetensors").write_bytes(b"cut")
        lost = [finished / "results" / f"cola-{name}-seed1.json" for name in ("craft", "head")]
        for path in lost:
            path.unlink()
        sweep = make_sweep(finished / "tiny.toml")
        assert not sweep.run(InProcess(), Listener())
        assert [path.exists() for path in lost] == [False, True]
        (broken,) = sweep.broken.values()
        assert "no adapter that can be read" in broken.reason

    def test_nothing_is_run_or_written_twice(self, finished: Path) -> None:
        files = list(finished.rglob("*.json"))
        before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}
        executor = InProcess()
        assert make_sweep(finished.parent / "copy" / "tiny.toml").run(executor, Listener())
        assert executor.ran == []
        assert before == {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in finished.rglob("*.json")}

    def test_a_lost_result_file_is_written_again(self, finished: Path) -> None:
        path = finished / "results" / "cola-head-seed0.json"
        before = path.read_bytes()
        path.write_text(path.read_text()[:100])
        make_sweep(finished / "tiny.toml").run(InProcess(), Listener())
        assert path.read_bytes() == before

    def test_what_was_done_here_goes_before_the_same_run_done_elsewhere(self, finished: Path) -> None:
        path = finished / "results" / "cola-head-seed0.json"
        before = path.read_bytes()
        fields = json.loads(before)
        path.write_text(json.dumps({**fields, "seconds": fields["seconds"] + 1.0}))
        executor = InProcess()
        assert make_sweep(finished / "tiny.toml").run(executor, Listener()) and executor.ran == []
        assert path.read_bytes() == before

    def test_a_finished_run_of_another_name_is_adopted(self, finished: Path, tmp_path: Path) -> None:
        for number, folder in enumerate(sorted(path for path in (finished / "runs").iterdir() if path.is_dir())):
            folder.rename(finished / "runs" / f"old-{number}")
        executor = InProcess()
        assert make_sweep(finished / "tiny.toml").run(executor, Listener()) and executor.ran == []
        metadata = finished / "runs" / "old-3" / "run.json"
        metadata.write_text(metadata.read_text().replace('"seed": ', '"seed": 9'))
        assert make_sweep(finished / "tiny.toml").run(executor, Listener()) and len(executor.ran) == 1


class TestPublishedResults:
    """What is left when the machine with the folder of runs is gone."""

    def test_they_are_not_run_again(self, finished: Path, tmp_path: Path) -> None:
        (finished / "results" / "cola-head-seed0.json").unlink()
        executor = InProcess()
        sweep = make_sweep(finished / "tiny.toml", tmp_path / "new", adopted=finished / "results")
        assert sweep.factors and sweep.run(executor, Listener())
        assert [name.rpartition("-")[0] for name in executor.ran] == ["cola-head-seed0"]
        old, new = finished / "results", tmp_path / "new" / "results"
        before = {path.relative_to(old): path.read_bytes() for path in old.rglob("*.json")}
        after = {path.relative_to(new): path.read_bytes() for path in new.rglob("*.json")}
        assert after.keys() - before.keys() == {Path("cola-head-seed0.json")}
        assert before.items() <= after.items()

    def test_what_others_start_from_is_run_again_for_them_alone(self, tmp_path: Path) -> None:
        path = write_sweep(
            tmp_path, TOML + '[tasks.later]\ntask = "cola"\nrows = 32\nepochs = 1\nstart_from = "sst2"\n'
        )
        only = ("later-lora-r2-*",)
        assert make_sweep(path, only=only).run(InProcess(), Listener())
        executor = InProcess()
        results = tmp_path / "results"
        assert make_sweep(path, tmp_path / "whole", results, only=only).run(executor, Listener()) and not executor.ran
        (results / "later-lora-r2-seed1.json").unlink()
        assert make_sweep(path, tmp_path / "part", results, only=only).run(executor, Listener())
        assert ["-".join(name.split("-")[:-1]) for name in executor.ran] == [
            "sst2-lora-r2-1.00e-02-seed1", "later-lora-r2-1.00e-02-seed1",
        ]  # fmt: skip

    def test_a_diverged_run_stays_one(self, tmp_path: Path) -> None:
        path = write_sweep(tmp_path, TOML.replace("learning_rate = 0.01", "learning_rate = 1e30\nclip = 1e30"))
        assert make_sweep(path, only=("sst2-lora-*",)).run(InProcess(), Listener())
        executor = InProcess()
        again = make_sweep(path, tmp_path / "new", tmp_path / "results", only=("sst2-lora-*",))
        assert again.run(executor, Listener()) and not executor.ran
        name = "results/sst2-lora-r2-seed0.json"
        assert (tmp_path / "new" / name).read_bytes() == (tmp_path / name).read_bytes()

    @pytest.mark.parametrize(
        ("old", "new", "reason"),
        [
            ('"epochs": 1', '"epochs": 2', "contradicts itself"),
            ('"clip": 1.0', '"clip": 2.0', "its settings are not those that it was published with"),
            ('{"matthews"', '"matthews"', "cannot be read"),
            ('"craft-peft result 1"', '"craft-peft result 9"', "written by another version"),
        ],
    )
    def test_one_that_was_changed_is_named_and_run_again(
        self, finished: Path, tmp_path: Path, old: str, new: str, reason: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = finished / "results" / "cola-lora-r2-seed1.json"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
        words = ["--runs", tmp_path / "new", "--to", tmp_path / "to", "--data", finished / "glue", "--dry-run"]
        words += ["--adopt", finished / "results"]
        assert main(["sweep", *map(str, (finished / "tiny.toml", *words))]) == 0
        shown = capsys.readouterr()
        assert f"left out: {path}: " in shown.err and reason in shown.err
        assert "1 runs to come" in shown.out


class TestPlanning:
    def test_a_plan_of_finished_runs_builds_and_reads_little(
        self, finished: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Seconds are not asserted: a file of settings and one of results for each run is what it costs."""
        make_sweep(finished / "tiny.toml").plan.counts.save()
        read: list[Path] = []
        real = Path.read_text
        monkeypatch.setattr(Path, "read_text", lambda self, *a, **k: (read.append(self), real(self, *a, **k))[1])
        monkeypatch.setattr("craft_peft.glue.sweep.counts.empty_model", lambda *a: pytest.fail("a model was built"))
        sweep = make_sweep(finished / "tiny.toml")
        assert {sweep.state(cell) for cell in sweep.cells} == {runner.FINISHED}
        assert len([path for path in read if path.name == "result.json"]) == RUNS
        assert len(read) < 4 * RUNS

    def test_dry_run(self, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
        words = ["--runs", finished / "runs", "--to", finished / "results", "--data", finished / "glue", "--dry-run"]
        assert main(["sweep", *map(str, (finished / "tiny.toml", *words))]) == 0
        shown = capsys.readouterr().out
        assert "0 runs to come" in shown and "256" in shown and "34" in shown
        assert main(["sweep", str(finished / "tiny.toml"), "--runs", str(finished / "none"), "--dry-run"]) == 0
        assert "since no run of these tasks is finished" in capsys.readouterr().out
        assert not (finished / "none").exists()

    @pytest.mark.parametrize("path", sorted((PROJECT / "experiments").rglob("*.toml")), ids=lambda path: path.stem)
    def test_shipped_experiments_plan(
        self, path: Path, tmp_path: Path, minilm_folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Without weights: the configs of the models on the Hub are written here."""
        from transformers import RobertaConfig

        large = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
        for name, fields in {"roberta-base": {}, "roberta-large": large}.items():
            RobertaConfig(**fields).save_pretrained(tmp_path / "FacebookAI" / name)
        monkeypatch.chdir(tmp_path)
        sweep = make_sweep(path, tmp_path)
        planned = [sweep.plan.decide(cell, dict.fromkeys(sweep.plan.experiment.methods, 1.0)) for cell in sweep.cells]
        assert len({run.id for run in planned}) == len({run.name for run in planned}) > 40
        assert sweep.estimates.seconds(planned[0])[0] > 0


class Full(TrainerCallback):
    """A disk that is full when the first checkpoint is to be written."""

    def on_evaluate(self, *arguments: Any, **keywords: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


class TestFailures:
    def test_a_failure_is_kept_and_the_rest_goes_on(
        self, sweep_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        executor, told = InProcess(Full()), Told()
        assert not small(sweep_folder, tmp_path).run(executor, told)
        assert told.events == [("failed", "sst2-head-seed0")]
        (record,) = (tmp_path / "runs").glob("*.failed.json")
        kept = json.loads(record.read_text())
        assert kept["reason"] == "OSError: [Errno 28] No space left on device"
        assert "on_evaluate" in (tmp_path / "runs" / kept["traceback"]).read_text()
        again = InProcess()
        assert not small(sweep_folder, tmp_path).run(again, Told()) and again.ran == []
        assert small(sweep_folder, tmp_path).run(again, Told(), retry=True) and len(again.ran) == 1
        assert not list((tmp_path / "runs").glob("*.failed.json"))

    def test_divergence_is_a_result(self, tmp_path: Path) -> None:
        path = write_sweep(tmp_path, TOML.replace("learning_rate = 0.01", "learning_rate = 1e30\nclip = 1e30"))
        executor = InProcess()
        assert make_sweep(path, only=("sst2-lora-*",)).run(executor, Listener())
        assert make_sweep(path, only=("sst2-lora-*",)).run(executor, Listener()) and len(executor.ran) == 2
        result = json.loads((tmp_path / "results" / "sst2-lora-r2-seed0.json").read_text())
        assert result["diverged"].startswith("Training diverged") and result["experiment"]["label"] == "lora r=2"

    def test_what_waits_for_a_failure_is_blocked(self, sweep_folder: Path, tmp_path: Path) -> None:
        sweep = make_sweep(sweep_folder / "tiny.toml", tmp_path, only=("cola-craft-seed0",))
        assert not sweep.run(InProcess(Full()), Listener())
        assert sweep.state(Cell("cola", "craft", 0, None)) == runner.BLOCKED

    def test_results_that_cannot_be_published_fail_by_name(
        self, finished: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = {path: path.read_bytes() for path in (finished / "results").rglob("*.json")}
        gone = finished / "results" / "cola-head-seed0.json"
        gone.unlink()

        def no_space(path: Path, text: str) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("craft_peft.glue.sweep.store.write_whole", no_space)
        sweep = make_sweep(finished / "tiny.toml")
        assert not sweep.run(InProcess(), Listener())
        assert sweep.state(Cell("cola", "head", 0, 1.0)) == runner.FAILED
        assert all(path.read_bytes() == text for path, text in before.items() if path != gone)

    def test_a_run_cut_short_by_hand_is_named(self, finished: Path) -> None:
        sweep = make_sweep(finished / "tiny.toml")
        planned = sweep.plan.decide(Cell("cola", "head", 0, 1.0), {})
        path = sweep.store.finished[planned.id]
        path.write_text(path.read_text()[:50])
        again = make_sweep(finished / "tiny.toml")
        assert again.state(Cell("cola", "head", 0, 1.0)) == runner.FAILED
        assert str(path) in again.record(planned).reason


class TestCommand:
    def test_two_sweeps_on_one_folder(self, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
        words = [str(finished / "tiny.toml"), "--runs", str(finished / "runs"), "--to", str(finished / "results")]
        words += ["--data", str(finished / "glue")]
        with make_sweep(finished / "tiny.toml").store.alone():
            assert main(["sweep", *words]) == 2
            assert "Another sweep is at work in" in capsys.readouterr().err
        assert main(["sweep", *words]) == 0  # everything is finished
        assert f"{RUNS} finished of {RUNS} runs" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (("--only", "sst2-lora-seed7"), "No run matches `--only sst2-lora-seed7`. The runs are: cola-craft-seed0"),
            (("--jobs", "0"), "`--jobs 0` cannot be used"),
            (("--adopt", "nowhere"), "There is no folder nowhere"),
            (("--report-to", "wandbb"), "Unknown logger `wandbb`. Did you mean `wandb`?"),
        ],
    )
    def test_mistakes(
        self, sweep_folder: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
    ) -> None:
        assert main(["sweep", str(sweep_folder / "tiny.toml"), "--dry-run", *words]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("hold_out = 0.2", "hold_uot = 0.2", "line 5, `hold_uot`: unknown key `hold_uot`. Did you mean `hold_out`?"),
        ("ranks = 2", "rank = 2", "line 24, `methods.lora r=2.rank`: unknown key `rank`. Did you mean `ranks`?"),
        ("ranks = 2", 'ranks = "2"', "found '2'; it must be a whole number above 0, or a list"),
        ("ranks = 2", "ranks = true", "found True; it must be a whole number above 0"),
        ("ranks = 2", "ranks = 2\nbudget = 9", "both `ranks` and `budget`"),
        ('method = "lora"', 'method = "lorra"', "unknown method `lorra`. Did you mean `lora`? Allowed: craft, lotr"),
        ("[tasks.cola]", "[tasks.kola]", "line 15, `tasks.kola.task`: unknown task `kola`. Did you mean `cola`?"),
        ("epochs = 1", "epochs = 1.5", "found 1.5; it must be a whole number above 0"),
        ("epochs = 1", 'start_from = "mnli"', "unknown task `mnli`. Allowed: sst2, cola"),
        ('choose_on = ["sst2"]', 'choose_on = ["rte"]', "unknown task `rte`. Allowed: sst2, cola"),
        ("factors = [1, 10]", 'factors = ["1/0"]', 'or fractions such as "1/3"'),
        ("hold_out = 0.2", "", "needs `hold_out` above 0"),
        ("hold_out = 0.2", "hold_out = 1", "it must be a number of at least 0 and below 1"),
        ("seeds = [0, 1]", "seeds = [0, 0]", "a list of different whole numbers"),
        ("seeds = [0, 1]", "", "`seeds` is missing"),
        ("seeds = [0, 1]", "seeds = [0, 1", "is not valid TOML"),
        ("[methods.head]", "[methods.LORA-r2]\nmethod = 'lora'", "names files like `lora r=2` does"),
        ("learning_rate = 0.01", "learning_rate = -1", "learning_rate=-1.0 cannot be used: it must be a number"),
        ('precision = "float32"', 'precision = "fp8"', "unknown precision `fp8`. Allowed: auto, float32, bf16"),
        ("budget = 600", "budget = 1", "methods.craft: `budget=1` is below the smallest setting"),
        ("budget = 600", "options = {{ tieing = 1 }}", "methods.craft: Method `craft` does not take these options"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_used(sweep_folder: Path, tmp_path: Path, old: str, new: str, message: str) -> None:
    assert TOML.count(old) == 1
    path = tmp_path / "tiny.toml"
    path.write_text(TOML.replace(old, new).format(model=sweep_folder / "encoder"))
    with pytest.raises(CraftError) as error:
        sweep = make_sweep(path)
        [sweep.plan.counts.of(row) for row in sweep.plan.experiment.methods.values()]
    assert message in str(error.value) and (str(path) in str(error.value) or "methods." in message)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(CraftError, match=r"Cannot read .*none\.toml: No such file"):
        make_sweep(tmp_path / "none.toml")
