"""Writing files and folders so that no reader ever meets half of one."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import CraftError

PART = ".part"
"""What the name of a file ends with that is not whole yet."""


def write_whole(path: Path, text: str) -> None:
    """Writes a file that is never seen in part: beside its place, then renamed.

    Args:
        path: The file; is replaced if it is there.
        text: What is to be in it.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_whole(Path(folder) / "a.json", "{}")
        ...     [file.name for file in Path(folder).iterdir()]
        ['a.json']
    """
    part = path.with_name(path.name + PART)
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


@contextmanager
def written_at_once(folder: Path) -> Iterator[Path]:
    """A folder to write into, beside the one that it replaces in one step at the end; files of that are carried over.

    A process that is killed, or a full disk, leaves the old folder as it was.

    Args:
        folder: where it ends up; new, or replaced.

    Raises:
        CraftError: there is a file of that name.

    Example:
        >>> with tempfile.TemporaryDirectory() as place:
        ...     with written_at_once(Path(place) / "mine") as staged:
        ...         _ = (staged / "note").write_text("all of it")
        ...     os.listdir(place)
        ['mine']
    """
    if folder.exists() and not folder.is_dir():
        raise CraftError(f"{folder} is a file. Give a folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as staging:
        staged = Path(staging) / "folder"
        if folder.exists():
            shutil.copytree(folder, staged, symlinks=True)
        staged.mkdir(exist_ok=True)
        yield staged
        flush(staged)
        replace_folder(staged, folder)


def replace_folder(new: Path, old: Path) -> None:
    """Put a folder in the place of another in one step; the other ends up where the first was.

    Where the system has no such step (neither Linux nor macOS), the old one is out of its place for a moment.
    """
    if not old.exists():
        os.rename(new, old)
    elif not _exchange(new, old):
        aside = new.with_name(f"{new.name}-replaced")
        os.rename(old, aside)
        os.rename(new, old)


def _exchange(first: Path, second: Path) -> bool:
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform in ("linux", "darwin") else None
    names = os.fsencode(first), os.fsencode(second)
    if sys.platform == "linux" and hasattr(libc, "renameat2"):
        here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        failed = libc.renameat2(here, names[0], here, names[1], exchange)
    elif sys.platform == "darwin" and hasattr(libc, "renamex_np"):
        failed = libc.renamex_np(*names, 2)  # RENAME_SWAP
    else:
        return False
    if failed and ctypes.get_errno() not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):  # not on this file system
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(second))
    return not failed


def flush(folder: Path) -> None:
    """Have the disk hold what was written into a folder, before it takes the place of something else."""
    for path in [*folder.rglob("*"), folder]:
        if os.name == "posix" and not path.is_symlink():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
