"""Runs in processes of their own, here, on Ray and by `accelerate launch`; killed at bad moments."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_encoder import settings, write_workshop
from tiny_sweep import TOML, InProcess, Told, make_sweep
from transformers import TrainerCallback

from craft_peft import CraftError
from craft_peft.glue.runs import RESULT, RunFolder
from craft_peft.glue.sweep import commands, executors
from craft_peft.glue.sweep.commands import Command, run_command
from craft_peft.glue.sweep.executors import JOB, LocalExecutor
from craft_peft.glue.sweep.forked import fork_server, run_forked
from craft_peft.glue.sweep.runner import Listener

PROJECT = Path(__file__).resolve().parent.parent
ONE = ("sst2-head-seed0",)
TIMES = ("seconds", "time", "peak_memory_bytes", "output", "processes")
pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(scope="module")
def expected(sweep_folder: Path) -> dict[str, Any]:
    """The result of one run that nothing interrupted."""
    make_sweep(sweep_folder / "tiny.toml", only=ONE).run(InProcess(), Listener())
    return bare(sweep_folder)


def bare(folder: Path) -> dict[str, Any]:
    """The published result without times and memory."""
    result = json.loads((folder / "results" / "sst2-head-seed0.json").read_text())
    curve = [{**record, "seconds": None} for record in result["curve"]]
    return {name: value for name, value in {**result, "curve": curve}.items() if name not in TIMES}


def command(folder: Path, code: str, shared: bool = True) -> Command:
    if shared:
        (folder / "marker").touch()
    return Command(("-c", code), folder / "run", {"GIVEN": "yes"}, folder / "marker")


class TestCommands:
    def test_status_environment_and_log(self, tmp_path: Path) -> None:
        ended = run_command(command(tmp_path, "import os, sys; print(os.environ['GIVEN']); sys.exit(3)"))
        assert ended.status == 3 and ended.files == {}
        assert (tmp_path / "run.log").read_text() == "yes\n"

    def test_a_fork_does_the_same(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """What `run_command` gives a process: environment, log, a pipe as input, threads, and functions at its exit."""
        monkeypatch.setenv("OUTER", "seen")
        context = fork_server(JOB)
        if context is None:
            pytest.skip("this system's libraries do not bear a fork")
        given = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
        asked = Command(("-m", "forked_job", "word"), tmp_path / "run", given, tmp_path, "forked_job")
        ended = run_forked(context, asked)
        assert (ended.status, ended.files) == (3, {})
        same = run_command(asked)
        assert same.status == 3
        log = (tmp_path / "run.log").read_text().splitlines()
        assert log[: len(log) // 2] == log[len(log) // 2 :]
        assert log[0] == "word seen 1 pipe" and log[1] == "finished"

    def test_the_pipe_ends_with_the_parent(self, tmp_path: Path) -> None:
        """A process that starts one which waits for its input, and is killed by it."""
        told = tmp_path / "told"
        os.mkfifo(told)  # whose reader waits until the inner one has read to the end
        inner = (
            "import os, signal, sys; os.kill(os.getppid(), signal.SIGKILL); rest = sys.stdin.read()\n"
            f"with open({str(told)!r}, 'w') as file: file.write('ended with ' + repr(rest))"
        )
        outer = Path(commands.__file__).read_text()  # without the package, whose import takes seconds
        outer += f"\nrun_command(Command(('-c', {inner!r}), Path(sys.argv[1]) / 'run', {{}}, Path(sys.argv[1])))\n"
        with subprocess.Popen([sys.executable, "-c", outer, str(tmp_path)]) as process:
            assert told.read_text() == "ended with ''"
        assert process.returncode == -9

    def test_a_fork_ends_with_the_process_that_asked_for_it(self, tmp_path: Path) -> None:
        if fork_server(JOB) is None:
            pytest.skip("this system's libraries do not bear a fork")
        told = tmp_path / "told"
        os.mkfifo(told)
        outer = (
            "import sys; from pathlib import Path; from craft_peft.glue.sweep.commands import Command\n"
            "from craft_peft.glue.sweep.forked import fork_server, run_forked\n"
            "here, words = Path(sys.argv[1]), ('-m', 'forked_job', sys.argv[2])\n"
            "asked = Command(words, here / 'run', {'OMP_NUM_THREADS': '1'}, here, 'forked_job')\n"
            "run_forked(fork_server('craft_peft.glue.sweep.job'), asked)"
        )
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (Path(__file__).parent, *sys.path)))}
        words = [sys.executable, "-c", outer, tmp_path, told]
        with subprocess.Popen(words, env=environment) as process, told.open() as lines:
            assert lines.readline() == "here\n"
            process.kill()
            assert lines.read() == ""  # comes when the fork has ended

    def test_files_come_back_from_where_nobody_sees_them(self, tmp_path: Path) -> None:
        code = f"from pathlib import Path; p = Path({str(tmp_path / 'run')!r}); p.mkdir(); (p / 'a').write_text('b')"
        ended = run_command(command(tmp_path, code, shared=False))
        assert ended.files == {"run.log": b"", "run/a": b"b"}

    def test_what_fits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
        monkeypatch.setattr(executors.psutil, "virtual_memory", lambda: type("", (), {"available": 10_000})())
        assert executors.how_many_fit(threads=1, need=1, devices=0) == 8
        assert executors.how_many_fit(threads=3, need=1, devices=0) == 2
        assert executors.how_many_fit(threads=1, need=3_000, devices=0) == 3
        assert executors.how_many_fit(threads=1, need=90_000, devices=0) == 1
        assert executors.how_many_fit(threads=1, need=90_000, devices=4) == 4

    def test_each_slot_has_its_gpu(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(executors.torch.cuda, "device_count", lambda: 2)
        executor = LocalExecutor()
        code = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"
        done = [
            executor.submit(command(tmp_path / name, code)) for name in ("a", "b") if (tmp_path / name).mkdir() is None
        ]
        assert [future.result().status for future in done] == [0, 0]
        executor.close()
        assert {(tmp_path / name / "run.log").read_text() for name in ("a", "b")} <= {"0\n", "1\n"}


class Die(TrainerCallback):
    """Ends a run as kill -9 does, for what is on the disk: in a step, or as the weights of a finished one are saved."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


class TestKilled:
    @pytest.mark.parametrize("moment", ["first epoch", "second epoch", "staged", "half published", "claimed"])
    def test_started_again_it_ends_in_the_same_result(
        self, sweep_folder: Path, expected: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
    ) -> None:
        def die(*arguments: Any) -> None:
            raise KeyboardInterrupt

        callbacks = {"first epoch": (Die(2),), "second epoch": (Die(6),)}.get(moment, ())
        with monkeypatch.context() as patch:
            if moment == "staged":
                patch.setattr(RunFolder, "publish", die)
            if moment == "half published":
                move = shutil.move
                patch.setattr(shutil, "move", lambda source, to: die() if to.name == RESULT else move(source, to))
            if moment == "claimed":
                patch.setattr("craft_peft.plugin.folders.os.replace", die)
            with pytest.raises(KeyboardInterrupt):
                make_sweep(sweep_folder / "tiny.toml", tmp_path, only=ONE).run(InProcess(*callbacks), Listener())
        assert not list((tmp_path / "runs").glob(f"*/{RESULT}"))
        assert make_sweep(sweep_folder / "tiny.toml", tmp_path, only=ONE).run(InProcess(), Listener())
        assert bare(tmp_path) == expected

    def test_processes(
        self, sweep_folder: Path, expected: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A run whose process is killed is a failure by name; done again, it goes on from its checkpoint."""
        monkeypatch.setenv("KILL", "self:6")
        monkeypatch.setenv("KILL_MARKER", str(tmp_path / "killed"))
        told = Told()
        sweep = make_sweep(sweep_folder / "tiny.toml", tmp_path, only=ONE, job="killed_job")
        assert not sweep.run(LocalExecutor(jobs=1), told)
        assert told.events == [("failed", "sst2-head-seed0")]
        (record,) = (tmp_path / "runs").glob("*.failed.json")
        assert "was ended by signal 9" in json.loads(record.read_text())["reason"]
        sweep = make_sweep(sweep_folder / "tiny.toml", tmp_path, only=ONE, job="killed_job")
        assert sweep.run(LocalExecutor(jobs=1), told, retry=True)
        assert "Resuming from checkpoint-4." in next((tmp_path / "runs").glob("*.log")).read_text()
        assert bare(tmp_path) == expected


@pytest.fixture
def ray_cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Ray of two processors on this machine, which the executor then finds."""
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # what Ray would else say is to come, it then does
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    with warnings.catch_warnings():
        # Its clients leave sockets and processes to the end of the interpreter.
        warnings.simplefilter("ignore", ResourceWarning)
        ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
        yield
        ray.shutdown()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
def test_ray_starts_a_run_again_whose_worker_was_killed(
    ray_cluster: None, sweep_folder: Path, expected: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from craft_peft.glue.sweep.on_ray import RayExecutor

    executor = RayExecutor()
    assert executor.slots == 2
    submit = executor.submit

    def killed(asked: Command):
        asked.environment.update(KILL="parent:6", KILL_MARKER=str(tmp_path / "killed"))
        return submit(asked)

    executor.submit = killed
    told = Told()
    only = ("sst2-head-seed0", "sst2-head-seed1")
    assert make_sweep(sweep_folder / "tiny.toml", tmp_path, only=only, job="killed_job").run(executor, told)
    assert (tmp_path / "killed").exists() and sorted(told.events) == [("finished", name) for name in only]
    logs = [log.read_text() for log in (tmp_path / "runs").glob("*.log")]
    assert sum("Resuming from checkpoint-4." in log for log in logs) == 1
    assert bare(tmp_path) == expected


def test_a_run_in_two_processes_agrees_with_one(
    sweep_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By `accelerate launch`, on gloo: one folder, one summary, the scores of one process."""
    encoder = json.loads((sweep_folder / "encoder" / "config.json").read_text())
    shutil.copytree(sweep_folder, tmp_path / "shop")
    still = {**encoder, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (tmp_path / "shop" / "encoder" / "config.json").write_text(json.dumps(still))
    toml = TOML.replace("hold_out = 0.2", "hold_out = 0.25")  # leaves 48 rows, three whole batches
    path = tmp_path / "shop" / "tiny.toml"
    path.write_text(toml.format(model=tmp_path / "shop" / "encoder"))
    only = ("sst2-lora-r2-seed0",)
    make_sweep(path, tmp_path / "one", only=only).run(InProcess(), Listener())
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    launch = ("--config_file", str(PROJECT / "examples" / "accelerate" / "ddp.yaml"), "--main_process_port", "0")
    sweep = make_sweep(path, tmp_path / "two", only=only, launch=launch)
    assert sweep.run(LocalExecutor(jobs=1), Told()), next((tmp_path / "two" / "runs").glob("*.log")).read_text()
    one, two = (json.loads((tmp_path / n / "results" / f"{only[0]}.json").read_text()) for n in ("one", "two"))
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["experiment"] == two["experiment"] and len(one["loss"]) == len(two["loss"]) == 6
    # Losses of sums in another order; the trainer logs them with the rounding of float32.
    for (_, first, _), (_, second, _) in zip(one["loss"], two["loss"], strict=True):
        assert first == pytest.approx(second, rel=1e-4)
    assert one["metrics"] == two["metrics"]
    log = next((tmp_path / "two" / "runs").glob("*.log")).read_text()
    assert log.count("adapted modules") == 1


def test_a_batch_that_two_processes_cannot_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from craft_peft.glue import training
    from craft_peft.glue.training import TrainingConfig

    sweep_folder = write_workshop(tmp_path)
    config = TrainingConfig(**settings(sweep_folder, tmp_path / "run", batch_size=15))
    with pytest.raises(CraftError, match=r"A batch of 15 rows cannot be shared evenly by 2 processes"):
        training._prepare(config, None, 2)
