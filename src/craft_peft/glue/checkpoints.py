"""Checkpoints that a run can go on from after whatever stopped it: sealed when they are whole, checked before use."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..plugin.folders import flush, write_whole
from . import machine

SEAL = "sha256.json"
"""Holds the SHA-256 of every other file of a checkpoint. It is written last: a checkpoint without it was cut short."""

_BLOCK = 2**20


class SealCheckpoints(TrainerCallback):
    """Seals every checkpoint when all processes have written their part."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Writes the seal, from one process."""
        machine.join_processes().wait_for_everyone()
        if state.is_world_process_zero:
            seal(Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")


def seal(folder: Path) -> None:
    """Notes what a checkpoint holds, once the disk has it.

    Args:
        folder: Of the checkpoint.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as place:
        ...     _ = (Path(place) / "weights").write_text("1 2 3")
        ...     seal(Path(place))
        ...     whole = find_damage(Path(place))
        ...     _ = (Path(place) / "weights").write_text("1 2 4")
        ...     whole, find_damage(Path(place))
        (None, 'weights is damaged')
    """
    flush(folder)
    write_whole(folder / SEAL, json.dumps(_digests(folder)))


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in a few words; None if nothing is.

    Args:
        folder: Of the checkpoint.
    """
    try:
        sealed = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        found = _digests(folder)
    except FileNotFoundError:
        return "it was cut short"
    except (OSError, ValueError):
        return f"{SEAL} is damaged"
    if not isinstance(sealed, dict):
        return f"{SEAL} is damaged"
    for name, digest in sealed.items():
        if found.get(name) != digest:
            return f"{name} is damaged" if name in found else f"{name} is missing"
    return None


def take_last_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole; newer ones are removed, since training will write them again.

    Args:
        folder: Holds checkpoints, or does not exist.

    Returns:
        The checkpoint, None if there is none, and what was wrong with each that was removed.
    """
    found = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.rpartition("-")[2].isdecimal()]
    removed: list[str] = []
    for checkpoint in sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        damage = find_damage(checkpoint)
        if damage is None:
            return checkpoint, removed
        removed.append(f"{checkpoint.name}: {damage}")
        shutil.rmtree(checkpoint)
    return None, removed


def _digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file() and path != folder / SEAL)
    return {path.relative_to(folder).as_posix(): _digest(path) for path in files}


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
