"""The folder of runs and the folder of results: what is finished, what failed, what is published."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ...errors import CraftError
from ...plugin.folders import write_whole
from ..checking import Unusable, parse_result
from ..figures import as_field, read_stacks
from ..pretrained import resolve_model_name
from ..results import as_lines
from ..runs import RESULT, RunFolder
from ..settings import identity
from .experiment import Experiment
from .plan import RATES, Planned

FAILED, DIVERGED = "failed", "diverged"
LOCK = ".lock"
COUNTS = ".counts.json"
TELLING = ("diverged", "curve", "seconds")
"""What tells a result from that of the same run done elsewhere."""


@dataclass(frozen=True)
class Record:
    """Why a run is not finished.

    Args:
        kind: `FAILED`, or `DIVERGED`, which is a result of its own kind.
        reason: In one line or a few.
        traceback: The file that has more, or None.
    """

    kind: str
    reason: str
    traceback: str | None = None


def write_record(folder: Path, kind: str, reason: str, traceback: str | None = None) -> None:
    """Writes why a run is not finished, beside its folder: the folder is the run's own.

    Args:
        folder: Of the run; need not exist.
        kind: `FAILED` or `DIVERGED`.
        reason: What happened.
        traceback: Goes into a file of its own.
    """
    kept = None
    if traceback is not None:
        kept = f"{folder.name}.traceback.txt"
        write_whole(folder.with_name(kept), traceback)
    text = json.dumps({"kind": kind, "reason": reason, "traceback": kept}, indent=1) + "\n"
    write_whole(folder.with_name(f"{folder.name}.{kind}.json"), text)


class Store:
    """What a sweep reads and writes.

    Args:
        runs: Folder of the run folders.
        published: Folder of the results.
    """

    def __init__(self, runs: Path, published: Path) -> None:
        self.runs, self.published = runs.resolve(), published
        self.finished: dict[str, Path] = {}
        """The file of the result of each finished run, by the run's identity."""
        self.diverged: dict[str, str] = {}
        self._results: dict[Path, dict[str, Any]] = {}
        self._look_into(self.runs)

    def adopt(self, folder: Path, model: str) -> list[str]:
        """Counts the finished runs of another folder as ours, as far as we have not got them.

        Args:
            folder: Of run folders, or of published results.
            model: The base model of the experiment, as resolved.

        Returns:
            Published results that cannot be used, each with the reason.
        """
        self._look_into(folder)
        unusable = []
        for path in (*sorted(folder.glob("[!.]*.json")), *sorted(folder.glob(f"{RATES}/[!.]*.json"))):
            try:
                self._take_published(path, model)
            except Unusable as error:
                unusable.append(f"{path}: {error}")
        return unusable

    def _take_published(self, path: Path, model: str) -> None:
        """Keeps a published result in mind.

        Raises:
            Unusable: The file is cut short or edited, or another version's.
        """
        try:
            text = path.read_text(encoding="utf-8")
            fields = json.loads(text)
        except (OSError, ValueError) as error:
            raise Unusable(f"cannot be read ({error})") from error
        if not isinstance(fields, dict) or not isinstance(about := fields.get("experiment"), dict):
            return  # what lies beside results: a record of a failure, for one
        if "diverged" not in fields:
            parse_result(text)
        config = found if isinstance(found := fields.get("config"), dict) else {}
        settings = {"task": None, **config, "model": model}
        settings.pop("adapter", None)  # what the method's config became: the settings decide it
        if identity(settings) != about.get("id"):
            raise Unusable("its settings are not those that it was published with: edited, or of another base model")
        if "diverged" in fields:
            self.diverged[about["id"]] = str(fields["diverged"])
        elif self.finished.setdefault(about["id"], path) == path:
            self._results[path] = fields

    def _look_into(self, folder: Path) -> None:
        for path in sorted(folder.iterdir()) if folder.is_dir() else []:
            if path.is_dir():
                self.look(path)

    def look(self, path: Path) -> bool:
        """Whether a finished run is in a folder; if so, it is kept in mind."""
        try:
            settings = RunFolder(path).read_finished()["settings"]
        except CraftError:
            return False
        if settings.get("task") is not None:
            self.finished.setdefault(identity(settings), path / RESULT)
        return True

    def folder(self, key: str) -> Path | None:
        """The folder of a finished run, or None where only its published result is there."""
        path = self.finished[key]
        return path.parent if path.name == RESULT else None

    def require_folder(self, key: str) -> None:
        """Forgets a finished run of which only the published result is there: its adapter is needed."""
        if key in self.finished and self.folder(key) is None:
            del self.finished[key]

    def result(self, key: str) -> dict[str, Any]:
        """The result of a finished run.

        Raises:
            CraftError: The file was cut short or changed.
        """
        path = self.finished[key]
        if path not in self._results:
            try:
                result = json.loads(path.read_text(encoding="utf-8"))
                assert {"curve", "score", "seconds", "parameters"} <= result.keys()
            except (OSError, ValueError, AttributeError, AssertionError) as error:
                raise CraftError(
                    f"{path} is not the result of a run ({error}). Remove the folder {path.parent}, and the run is "
                    "done again."
                ) from error
            self._results[path] = result
        return self._results[path]

    def record(self, planned: Planned) -> Record | None:
        """Why a run is not finished, if that is known."""
        if planned.id in self.diverged:
            return Record(DIVERGED, self.diverged[planned.id])
        for kind in (DIVERGED, FAILED):
            path = self.runs / f"{planned.name}.{kind}.json"
            if path.is_file():
                try:
                    return Record(**json.loads(path.read_text(encoding="utf-8")))
                except (OSError, ValueError, TypeError):
                    return Record(FAILED, f"{path} cannot be read")
        return None

    def forget(self, planned: Planned) -> None:
        """Removes the record of a failure, so that the run is done again."""
        for name in (f"{planned.name}.{FAILED}.json", f"{planned.name}.traceback.txt"):
            (self.runs / name).unlink(missing_ok=True)

    def publish(self, planned: Planned, experiment: Experiment, record: Record | None = None) -> bool:
        """Writes the result of a run where it is not written yet, without the paths of this machine.

        The same run may have been done elsewhere, with other scores; what was done here goes before that.

        Args:
            planned: The run.
            experiment: What it belongs to.
            record: For a diverged run, whose result is its reason.

        Returns:
            Whether anything was written.

        Raises:
            CraftError: The adapter cannot be read.
        """
        path = self.published / planned.file
        own = {"diverged": record.reason} if record else self.result(planned.id)
        if _is_published(path, planned.id, {name: own[name] for name in TELLING if name in own}):
            return False
        names = {resolve_model_name(experiment.model): experiment.model}
        if record is None:
            folder = self.folder(planned.id)
            result = {**own, **as_field(read_stacks(folder) if folder else ())}
        else:
            result = {"task": planned.config.task, "method": planned.config.method, "model": experiment.model}
            result |= {"seed": planned.config.seed, "config": planned.settings, **own}
        about: dict[str, Any] = {
            "name": experiment.name,
            "id": planned.id,
            "label": planned.cell.method,
            "task": planned.cell.task,
        }
        about |= {"setting": planned.setting, "chooses_rate": planned.cell.chooses}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, as_lines(without_paths({**result, "experiment": about}, names)))
        return True

    def take(self, files: dict[str, bytes]) -> None:
        """Writes what a run left on another machine; what says that it is finished comes last."""
        for name in sorted(files, key=lambda name: (Path(name).name == RESULT, name)):
            path = self.runs / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(files[name])

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keeps other sweeps out of the folder of runs; the lock dies with the process.

        Raises:
            CraftError: Another sweep is at work in the folder.
        """
        self.runs.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.runs / LOCK, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise CraftError(
                f"Another sweep is at work in {self.runs}. Wait for it, end it, or give another folder with `runs=...`."
            ) from None
        try:
            yield
        finally:
            lock.release()


def without_paths(value: Any, names: dict[str, str]) -> Any:
    """The same JSON value with every absolute path replaced by its name, or else by its last part.

    Example:
        >>> without_paths({"model": "/here/encoder", "data": ["/here/glue", 3]}, {"/here/encoder": "MiniLM"})
        {'model': 'MiniLM', 'data': ['glue', 3]}
    """
    if isinstance(value, dict):
        return {key: without_paths(inner, names) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_paths(inner, names) for inner in value]
    if isinstance(value, str) and Path(value).is_absolute():
        return names.get(value, Path(value).name)
    return value


def _is_published(path: Path, key: str, fields: dict[str, Any]) -> bool:
    """Whether a file is the result of a run with this identity and these fields."""
    try:
        published = json.loads(path.read_text(encoding="utf-8"))
        return published["experiment"]["id"] == key and fields.items() <= published.items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
