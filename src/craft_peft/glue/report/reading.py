"""Finds result files below folders, and says which of them cannot be used."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import CraftError
from ..checking import Unusable, parse_result
from ..results import Result
from ..runs import METADATA, RESULT


@dataclass(frozen=True)
class Run:
    """A result and where it was read.

    Args:
        path: The file.
        result: What it holds.
        fields: All fields of the file, for those that a `Result` need not have.
        chose_rate: Whether a learning rate was chosen by it, whatever else it is there for.
    """

    path: Path
    result: Result
    fields: dict[str, Any]
    chose_rate: bool = False

    @property
    def experiment(self) -> dict[str, Any]:
        """What the run was in an experiment: `label` of its method, `task`, `chooses_rate`; empty for a single run."""
        found = self.fields.get("experiment")
        return found if isinstance(found, dict) else {}

    @property
    def task(self) -> str:
        """The task, by its name in the experiment where there is one."""
        return str(self.experiment.get("task") or self.result.task)

    @property
    def folder(self) -> Path | None:
        """The run folder, or None for a published file by itself."""
        return self.path.parent if self.path.name == RESULT else None


@dataclass(frozen=True)
class LeftOut:
    """A file that the report does not use.

    Args:
        path: The file.
        reason: Why not.
    """

    path: Path
    reason: str


@dataclass(frozen=True)
class Found:
    """What folders hold.

    Args:
        runs: The usable results, in the order of their paths.
        left_out: The others.
        unfinished: Run folders without a result.
    """

    runs: tuple[Run, ...]
    left_out: tuple[LeftOut, ...]
    unfinished: tuple[Path, ...]


def read_runs(paths: Sequence[str | Path]) -> Found:
    """Reads all results below folders.

    A folder that holds `run.json` or `result.json` is a run; any other folder may hold runs, and results as single
    `.json` files. A result that is there twice counts once.

    Args:
        paths: Folders, or single files.

    Returns:
        The results, and what is left out.

    Raises:
        CraftError: A path that does not exist, or no usable result in all of them.
    """
    files: dict[Path, None] = {}
    unfinished: list[Path] = []
    for path in map(Path, paths):
        _require(path)
        found = [path] if path.is_file() else _walk(path, unfinished)
        files |= dict.fromkeys(found)
    runs: list[Run] = []
    left_out: list[LeftOut] = []
    for file in files:
        try:
            runs.append(Run(file, *parse_result(file.read_text(encoding="utf-8"))))
        except Unusable as error:
            left_out.append(LeftOut(file, str(error)))
        except (OSError, UnicodeDecodeError) as error:
            left_out.append(LeftOut(file, f"cannot be read: {error}"))
    runs, twice = _once(runs)
    if not runs:
        raise CraftError(_nothing(paths, left_out, unfinished))
    return Found(tuple(runs), (*left_out, *twice), tuple(unfinished))


def _require(path: Path) -> None:
    if path.exists():
        return
    parent = path.parent
    names = sorted(entry.name for entry in parent.iterdir() if entry.is_dir()) if parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    hint = f" Did you mean {parent / near[0]}?" if near else ""
    raise CraftError(f"There is no folder {path}.{hint} Give a folder of runs or of result files.")


def _walk(folder: Path, unfinished: list[Path]) -> Iterator[Path]:
    for path, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        here = Path(path)
        if RESULT in files:
            yield here / RESULT
        elif METADATA in files:
            unfinished.append(here)
        else:
            yield from (here / name for name in sorted(files) if name.endswith(".json") and not name.startswith("."))
            continue
        folders.clear()


def _once(runs: list[Run]) -> tuple[list[Run], list[LeftOut]]:
    """The runs without repetitions: the same training may lie there as a run folder and as published files.

    A copy of which something is used needs no mention: what the run was in its experiment, or that it chose a rate.
    """
    same: dict[str, list[Run]] = {}
    for run in runs:
        result = run.result
        key = repr((result.task, result.method, result.seed, result.curve, result.loss, result.seconds))
        same.setdefault(key, []).append(run)
    kept, twice = [], []
    for copies in same.values():
        # A run folder has the adapter as well; a published file says what the run was in its experiment.
        first = min(copies, key=lambda run: run.folder is None)
        choosing = [run for run in copies if run.experiment.get("chooses_rate")]
        told = min(copies, key=lambda run: (not run.experiment, run in choosing))
        fields = {**first.fields, "experiment": told.experiment}
        kept.append(Run(first.path, first.result, fields, chose_rate=bool(choosing)))
        used = [first, *choosing, *([told] if told.experiment else [])]
        others = (run for run in copies if not any(run is each for each in used))
        twice += [LeftOut(run.path, f"the same run as {first.path}") for run in others]
    return kept, twice


def _nothing(paths: Sequence[str | Path], left_out: list[LeftOut], unfinished: list[Path]) -> str:
    where = ", ".join(map(str, paths))
    text = f"{where} holds no result that can be used."
    if left_out:
        listed = "; ".join(f"{left.path}: {left.reason}" for left in left_out[:5])
        text += f" Left out: {listed}{' ...' if len(left_out) > 5 else ''}."
    if unfinished:
        text += f" {len(unfinished)} run(s) are not finished yet."
    return f"{text} Give a folder with finished runs (of `craft-peft train`) or published result files."
