"""What stops a run, and what is left then: damage, a lost loss, no memory, no disk, Ctrl-C."""

from __future__ import annotations

import io
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file
from tiny_encoder import settings
from transformers import TrainerCallback

from craft_peft.cli.main import main
from craft_peft.errors import CraftError
from craft_peft.glue.checkpoints import SEAL, find_damage
from craft_peft.glue.results import Result
from craft_peft.glue.training import TrainingConfig, train

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture
def heard() -> Iterator[None]:
    """Ctrl-C is Python's own, as at a terminal; a process that was started in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class At(TrainerCallback):
    """Does something at the end of a step."""

    def __init__(self, step: int, act: Callable[[], Any]) -> None:
        self.step, self.act = step, act

    def on_step_end(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        if state.global_step == self.step:
            self.act()


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def start(
    workshop: Path, output: Path, *callbacks: TrainerCallback, console: Console | None = None, **changed: Any
) -> Result:
    fields = settings(workshop, output, epochs=3, **changed)  # 4 steps an epoch
    return train(TrainingConfig(**fields), console=console or Console(quiet=True), callbacks=callbacks)


def weights(output: Path) -> dict[str, torch.Tensor]:
    return {f"{path.name}:{k}": t for path in output.glob("*.safetensors") for k, t in load_file(path).items()}


def assert_same_end(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first and first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.fixture(scope="module")
def whole(workshop: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    start(workshop, folder)
    return folder


@pytest.fixture(scope="module")
def cut(workshop: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that died in its third epoch, with two checkpoints."""

    def die() -> None:
        raise RuntimeError("power cut")

    folder = tmp_path_factory.mktemp("cut") / "run"
    with pytest.raises(RuntimeError, match="power cut"):
        start(workshop, folder, At(10, die))
    assert [find_damage(path) for path in sorted((folder / "checkpoints").iterdir())] == [None, None]
    return folder


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a bit of the adapter": (
        lambda folder: flip(folder / "adapter_model.safetensors"),
        "adapter_model.safetensors is damaged",
    ),
    "a bit of the optimizer": (lambda folder: flip(folder / "optimizer.pt"), "optimizer.pt is damaged"),
    "a file is gone": (lambda folder: (folder / "rng_state.pth").unlink(), "rng_state.pth is missing"),
    "an empty file": (lambda folder: (folder / "scheduler.pt").write_bytes(b""), "scheduler.pt is damaged"),
    "no seal": (lambda folder: (folder / SEAL).unlink(), "it was cut short"),
    "half a seal": (lambda folder: (folder / SEAL).write_text('{"a'), f"{SEAL} is damaged"),
    "another seal": (lambda folder: (folder / SEAL).write_text("[]"), f"{SEAL} is damaged"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint(damage: str, workshop: Path, cut: Path, whole: Path, tmp_path: Path) -> None:
    harm, message = DAMAGE[damage]
    output = shutil.copytree(cut, tmp_path / "run")
    harm(output / "checkpoints" / "checkpoint-8")
    console = Console(record=True, width=200, file=io.StringIO())
    start(workshop, output, console=console, resume=True)
    shown = console.export_text()
    assert f"Warning: a checkpoint cannot be used. checkpoint-8: {message}." in shown
    assert "Resuming from checkpoint-4." in shown
    assert_same_end(output, whole)


def test_every_checkpoint_damaged(workshop: Path, cut: Path, whole: Path, tmp_path: Path) -> None:
    output = shutil.copytree(cut, tmp_path / "run")
    for checkpoint in (output / "checkpoints").iterdir():
        flip(checkpoint / "optimizer.pt")
    start(workshop, output, resume=True)
    assert_same_end(output, whole)


@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize("method", ["craft", "full"])
@pytest.mark.parametrize(("step", "last"), [(2, 3), (4, 4), (7, 8)])  # the step or the evaluation under way ends first
def test_interrupted(step: int, last: int, method: str, workshop: Path, tmp_path: Path) -> None:
    start(workshop, tmp_path / "whole", method=method)
    output = tmp_path / "run"
    console = Console(record=True, width=200, file=io.StringIO())
    with pytest.raises(KeyboardInterrupt):
        start(workshop, output, At(step, press_ctrl_c), console=console, method=method)
    assert "Stopping after this step." in console.export_text()
    assert find_damage(output / "checkpoints" / f"checkpoint-{last}") is None
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    ended = start(workshop, output, resume=True, method=method)
    assert_same_end(output, tmp_path / "whole")
    assert [record.epoch for record in ended.curve] == [1, 2, 3]


@pytest.mark.usefixtures("heard")
def test_interrupted_twice(workshop: Path, tmp_path: Path) -> None:
    def press_twice() -> None:
        press_ctrl_c()
        press_ctrl_c()

    with pytest.raises(KeyboardInterrupt):
        start(workshop, tmp_path / "run", At(2, press_twice))
    assert list((tmp_path / "run" / "checkpoints").glob("checkpoint-*")) == []


@pytest.mark.usefixtures("heard")
def test_interrupted_at_the_last_step(workshop: Path, tmp_path: Path, whole: Path) -> None:
    """There is nothing left to stop: the run ends as ever."""
    start(workshop, tmp_path / "run", At(12, press_ctrl_c))
    assert_same_end(tmp_path / "run", whole)


def test_interrupted_at_the_terminal(
    workshop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any, **keywords: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("craft_peft.glue.training.train", interrupted)
    words = ["train", "--model", str(workshop / "encoder"), "--data", str(workshop / "train.csv")]
    assert main([*words, "--output", str(tmp_path / "run")]) == 130
    assert capsys.readouterr().err == "\ninterrupted. The same command with --resume goes on.\n"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e9])
def test_lost_loss(value: float, workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from craft_peft.glue.optimization import RunTrainer

    compute, seen = RunTrainer.compute_loss, []

    def lose(self: RunTrainer, *args: Any, **keywords: Any) -> Any:
        seen.append(1)
        loss = compute(self, *args, **keywords)
        return loss * value if self.state.global_step >= 5 and self.model.training else loss

    monkeypatch.setattr(RunTrainer, "compute_loss", lose)
    with pytest.raises(
        CraftError,
        match=r"the loss is (nan|inf|[\d.]+e\+\d+) at step 6 of 12, where the learning rate is 0\.00\d+\. Use a lower",
    ) as caught:
        start(workshop, tmp_path / "run")
    assert "learning_rate" in str(caught.value)
    assert find_damage(tmp_path / "run" / "checkpoints" / "checkpoint-4") is None


def no_memory() -> None:
    torch.empty(2**60, dtype=torch.uint8)


def no_python_memory() -> None:
    raise MemoryError


def no_gpu_memory() -> None:
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize("act", [no_memory, no_python_memory, no_gpu_memory])
def test_out_of_memory(act: Callable[[], None], workshop: Path, tmp_path: Path) -> None:
    with pytest.raises(
        CraftError, match=r"Out of memory in training.* Lower `batch_size` \(now 16\) or `max_length` \(now 128\)"
    ):
        start(workshop, tmp_path / "run", At(2, act))


def test_other_errors_are_not_called_memory(workshop: Path, tmp_path: Path) -> None:
    def fail() -> None:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match=r"^something else$"):
        start(workshop, tmp_path / "run", At(2, fail))


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device", "run/checkpoints"),
        OSError(28, "No space left on device"),
        SafetensorError('IoError(Os { code: 28, kind: StorageFull, message: "No space left on device" })'),
        RuntimeError("[enforce fail at inline_container.cc] . PytorchStreamWriter failed writing file data/0"),
    ],
    ids=["with its name", "without", "of safetensors", "of PyTorch"],
)
def test_full_disk(
    error: Exception,
    workshop: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*args: Any, **keywords: Any) -> None:
        raise error

    monkeypatch.setattr("craft_peft.glue.checkpoints.write_whole", full)
    words = ["train", "--model", str(workshop / "encoder"), "--data", str(workshop / "train.csv"), "--epochs", "2"]
    assert main([*words, "--output", str(tmp_path / "run")]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(r"error: No space left on device(: run/checkpoints)?\. Make room; .*", last)


def test_ignored_in_the_background(workshop: Path, tmp_path: Path, whole: Path) -> None:
    """A process that ignores Ctrl-C goes on ignoring it."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        start(workshop, tmp_path / "run", At(2, press_ctrl_c))
    finally:
        signal.signal(signal.SIGINT, before)
    assert_same_end(tmp_path / "run", whole)
