"""Runs a command in a process that does not outlive this one.

The standard library alone: Ray sends this file to its nodes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Command:
    """What to start, and where it writes.

    Args:
        words: For the Python interpreter of the machine that runs it.
        folder: The folder that it fills; everything else that it writes begins with this folder's name.
        environment: Variables on top of those of the machine.
        marker: A file that is there exactly where the folder is the one that the sweep sees.
        module: The module whose `main` does with the last word what the words do, where there is one: a process that
            has imported it need not be a new one.
    """

    words: tuple[str, ...]
    folder: Path
    environment: dict[str, str]
    marker: Path
    module: str | None = None

    @property
    def log(self) -> Path:
        """What the process prints goes here."""
        return self.folder.with_name(self.folder.name + ".log")


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Args:
        status: Its exit status; negative for a signal.
        seconds: How long it ran.
        files: What it wrote, by path below the folder of runs, when nobody else can see it.
    """

    status: int
    seconds: float
    files: dict[str, bytes] = field(default_factory=dict)


def run_command(command: Command, started: Callable[[subprocess.Popen], None] = lambda process: None) -> Ended:
    """Starts a command and waits for it.

    Its standard input is a pipe that nothing is written to: when this process is gone, however it went, the pipe ends,
    and the command knows by that.

    Args:
        command: What to start.
        started: Is told the process.

    Returns:
        How it ended.
    """
    shared = command.marker.exists()
    command.folder.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, **command.environment}
    start = time.perf_counter()
    with command.log.open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, *command.words], stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment
        )
        try:
            started(process)
            status = process.wait()
        except BaseException:
            process.kill()
            process.wait()
            raise
        finally:
            assert process.stdin is not None
            process.stdin.close()
    return Ended(status, time.perf_counter() - start, {} if shared else read_files(command.folder))


def read_files(folder: Path) -> dict[str, bytes]:
    """What a run left: its folder, and the files beside it whose names begin with the folder's."""
    beside = [path for path in folder.parent.glob(f"{folder.name}*") if path.is_file()]
    inside = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder.parent).as_posix(): path.read_bytes() for path in (*beside, *inside)}


def words_of(module: str, argument: str, launch: Sequence[str] | None) -> tuple[str, ...]:
    """The words that start a module in one process, or by `accelerate launch` in several."""
    if launch is None:
        return ("-m", module, argument)
    return ("-m", "accelerate.commands.launch", *launch, "--module", module, argument)
