"""One run of a sweep, in a process of its own: `python -m craft_peft.glue.sweep.job JSON`."""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock
from rich.console import Console
from transformers import TrainerCallback

from .. import machine
from ..optimization import DivergedError
from ..recipes import Recipe
from ..settings import TrainingConfig
from ..training import train
from .store import DIVERGED, FAILED, write_record

SECONDS_TO_END = 60
"""What the process of a sweep that was killed has to end in, before another takes its run over."""


def run_job(fields: dict[str, Any], began: float | None = None, callbacks: Sequence[TrainerCallback] = ()) -> int:
    """Trains, and leaves a record beside the run's folder of what kept it from being finished.

    Args:
        fields: Of the `TrainingConfig`, in the types that JSON has.
        began: When this process was started for it.
        callbacks: For the trainer.

    Returns:
        The exit status: 0 for a finished or diverged run.
    """
    given: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    given["recipe"] = Recipe(**fields["recipe"])
    config = TrainingConfig(**given)
    if not machine.join_processes().is_main_process:
        train(config, callbacks=callbacks)
        return 0
    output = Path(config.output)
    locks = output.parent / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(locks / output.name, timeout=SECONDS_TO_END):
            train(config, console=Console(width=120), callbacks=callbacks, began=began)
    except DivergedError as error:
        write_record(output, DIVERGED, str(error))
    except Exception as error:
        write_record(output, FAILED, f"{type(error).__name__}: {error}", traceback.format_exc())
        return 1
    return 0


def end_with_parent() -> None:
    """Ends this process when its standard input does, which is a pipe of the process that started it."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main(words: list[str]) -> int:
    """Runs the run that the words describe."""
    end_with_parent()
    return run_job(json.loads(words[0]), began=machine.process_start())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
