"""Where `transformers.Trainer` reports to besides our own files."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import CraftError, did_you_mean

LOGGERS = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "mlflow": ("mlflow",)}
"""By logger the modules of which one has to be installed; the first one's name is that of its package."""

FOLDER = "TENSORBOARD_LOGGING_DIR"


def check_loggers(names: Sequence[str]) -> None:
    """Refuses a logger that is not known or not installed.

    Args:
        names: Keys of `LOGGERS`.

    Raises:
        CraftError: Says which loggers there are, or what to install.

    Example:
        >>> check_loggers(["tensorbord"])
        Traceback (most recent call last):
            ...
        craft_peft.errors.CraftError: Unknown logger `tensorbord`. Did you mean `tensorboard`? ...
    """
    for name in names:
        if name not in LOGGERS:
            hint = did_you_mean(name, LOGGERS)
            raise CraftError(f"Unknown logger `{name}`.{hint} The loggers are: {', '.join(LOGGERS)}, or none.")
        if not any(importlib.util.find_spec(module) for module in LOGGERS[name]):
            raise CraftError(
                f"`report_to={name}` needs a package that is not installed: pip install {LOGGERS[name][0]}"
            )


@contextlib.contextmanager
def log_folder(folder: Path) -> Iterator[None]:
    """Lets a logger that writes files write them into a folder, unless the user's environment names another."""
    if FOLDER in os.environ:
        yield
        return
    os.environ[FOLDER] = str(folder)
    try:
        yield
    finally:
        del os.environ[FOLDER]
