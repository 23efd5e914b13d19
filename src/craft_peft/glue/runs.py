"""The folder of a run: who may write into it, what is ours in it, and where training resumes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from ..errors import CraftError
from ..plugin.folders import PART, write_whole
from .checkpoints import take_last_whole

METADATA = "run.json"
RESULT = "result.json"
CHECKPOINTS = "checkpoints"
LOGS = "logs"
STAGED = "finished"
FORMAT = "craft-peft run 1"


class RunFolder:
    """An output folder.

    A folder is a run of ours if it holds a `run.json` that says so; that file also lists the files that we wrote, and
    nothing else is ever deleted. It is finished once it holds `result.json`.

    Args:
        path: The folder; need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()

    @property
    def checkpoints(self) -> Path:
        """Where training keeps what `resume` needs; gone when the run is finished."""
        return self.path / CHECKPOINTS

    @property
    def logs(self) -> Path:
        """Where a logger writes that keeps files."""
        return self.path / LOGS

    @property
    def is_finished(self) -> bool:
        """Whether a run of ours ended here."""
        return self._metadata() is not None and (self.path / RESULT).is_file()

    def check(self, resume: bool, overwrite: bool) -> None:
        """Refuses a folder that must not be written into; changes nothing.

        Args:
            resume: The user asked to go on with an interrupted run.
            overwrite: The user asked to replace an earlier run.

        Raises:
            CraftError: The folder holds a run and nothing was asked, or it holds something else.
        """
        if resume and overwrite:
            raise CraftError("Both `resume=True` and `overwrite=True` were given. Choose one of them.")
        if self.path.exists() and not self.path.is_dir():
            raise CraftError(f"The output {self.path} is a file. Give a folder that is new or empty.")
        if overwrite and self._metadata() is not None:
            return
        # A file cut short is what a run leaves that was killed as it claimed the folder.
        if not self.path.exists() or all(file.name == METADATA + PART for file in self.path.iterdir()):
            return
        if self._metadata() is None:
            raise CraftError(
                f"The output folder {self.path} holds files that are not a run of craft-peft; they are left alone. "
                "Give a folder that is new or empty."
            )
        if self.is_finished:
            hint = "It is finished, so that there is nothing to resume. " if resume else ""
            raise CraftError(
                f"The output folder {self.path} already holds a finished run. {hint}Give another folder, or "
                "`overwrite=True` to replace the run."
            )
        if not resume:
            raise CraftError(
                f"The output folder {self.path} already holds an interrupted run. Give `resume=True` to go on with it, "
                "`overwrite=True` to start again, or another folder."
            )

    def claim(self, settings: dict[str, Any], task: dict[str, Any], resume: bool) -> tuple[Path | None, list[str]]:
        """Makes the folder ours: keeps an interrupted run that is resumed, removes a run that is replaced.

        Args:
            settings: The resolved settings of the run.
            task: What it is trained for.
            resume: Whether to go on with an interrupted run.

        Returns:
            The checkpoint to resume from, or None to start at the beginning; and what was wrong with later ones.

        Raises:
            CraftError: The interrupted run had other settings.
        """
        earlier = self._metadata()
        wanted = json.loads(json.dumps({"format": FORMAT, "settings": settings, "task": task, "files": []}))
        if resume and earlier is not None:
            _require_equal(earlier, wanted, self.path)
            return take_last_whole(self.checkpoints)
        if earlier is not None:
            self._remove(earlier)
        self.path.mkdir(parents=True, exist_ok=True)
        self._write_metadata(wanted)
        return None, []

    def stage(self) -> Path:
        """Makes the empty folder in which the files of the finished run are written first."""
        staged = self.checkpoints / STAGED
        if staged.exists():
            shutil.rmtree(staged)
        staged.mkdir(parents=True)
        return staged

    def publish(self) -> None:
        """Moves the staged files to their place, the result last, and removes the checkpoints.

        The list of files is written before the first one is moved, so that a run that dies in between can still be
        removed completely by `overwrite`.
        """
        metadata = self._metadata()
        assert metadata is not None, "publish before claim"
        staged = self.checkpoints / STAGED
        names = sorted((file.name for file in staged.iterdir()), key=lambda name: (name == RESULT, name))
        self._write_metadata({**metadata, "files": names})
        for name in names:
            shutil.move(staged / name, self.path / name)
        shutil.rmtree(self.checkpoints)

    def read_finished(self) -> dict[str, Any]:
        """Reads the metadata of a finished run.

        Returns:
            Settings, task and list of files.

        Raises:
            CraftError: No such folder, not a run of ours, or not finished.
        """
        if not self.path.is_dir():
            raise CraftError(f"There is no folder {self.path}. Give the output folder of a training run.")
        metadata = self._metadata()
        if metadata is None:
            raise CraftError(f"{self.path} is not a run of craft-peft (it has no {METADATA}). Give its output folder.")
        if not self.is_finished:
            raise CraftError(f"The run in {self.path} is not finished. Give its training again, and let it resume.")
        return metadata

    def _metadata(self) -> dict[str, Any] | None:
        try:
            metadata = json.loads((self.path / METADATA).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return metadata if isinstance(metadata, dict) and metadata.get("format") == FORMAT else None

    def _write_metadata(self, metadata: dict[str, Any]) -> None:
        write_whole(self.path / METADATA, json.dumps(metadata, indent=2) + "\n")

    def _remove(self, metadata: dict[str, Any]) -> None:
        # The result goes first: without it the folder no longer passes for a finished run, whatever happens next.
        for name in (RESULT, *metadata["files"]):
            (self.path / Path(name).name).unlink(missing_ok=True)
        for folder in (self.checkpoints, self.logs):
            if folder.is_dir():
                shutil.rmtree(folder)


def _require_equal(earlier: dict[str, Any], wanted: dict[str, Any], path: Path) -> None:
    old, new = earlier["settings"], wanted["settings"]
    different = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    if different:
        listed = "; ".join(f"{key}: {old.get(key)!r} then, {new.get(key)!r} now" for key in different)
        raise CraftError(
            f"The interrupted run in {path} had other settings ({listed}). Resume with the same ones, or start again "
            "with `overwrite=True`."
        )
    if earlier["task"] != wanted["task"]:
        raise CraftError(
            f"The interrupted run in {path} was trained for other labels or columns. Has the data changed? Start again "
            "with `overwrite=True`."
        )
