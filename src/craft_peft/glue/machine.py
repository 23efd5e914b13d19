"""Where a result comes from: versions, commit, processor, memory."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import psutil
import torch
from accelerate import PartialState

PACKAGES = ("craft-peft", "torch", "transformers", "peft", "accelerate", "datasets", "scikit-learn", "scipy", "numpy")


def describe_versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that can change a result."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def find_commit() -> str | None:
    """The commit of this package's source, with `-dirty` after local changes; None outside its repository."""
    source = Path(__file__).resolve()

    def git(*arguments: str) -> str | None:
        try:
            ended = subprocess.run(["git", *arguments], cwd=source.parent, capture_output=True, text=True, check=False)
        except OSError:
            return None
        return ended.stdout.strip() if ended.returncode == 0 else None

    # An environment may lie inside somebody else's repository: only one that tracks this very file is ours.
    if git("ls-files", "--error-unmatch", source.name) is None:
        return None
    commit = git("rev-parse", "HEAD")
    return f"{commit}-dirty" if commit and git("status", "--porcelain", "--", str(source.parents[1])) else commit


def describe_processor() -> str:
    """Name of the GPU if there is one, else of the processor, with the number of threads in use."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    return f"{name or platform.machine()}, {torch.get_num_threads()} threads"


def join_processes() -> PartialState:
    """This process and the others that `accelerate launch` made: how many, and which is the first.

    The first, or only one, prints and writes.
    """
    return PartialState(cpu=not torch.cuda.is_available())


def process_start() -> float:
    """When this process started, in seconds since 1970."""
    return psutil.Process().create_time()


def reset_peak_memory() -> None:
    """Starts the GPU's count again; the peak of a process cannot be, so that later runs in it inherit the largest."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory_bytes() -> int | None:
    """Peak memory of this process so far: of the CUDA allocator if a GPU is used, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextmanager
def free_threads(seconds: float = 0.5) -> Iterator[int]:
    """Compute in as many threads as processor cores are idle now; at least one, at most as many as PyTorch would take.

    The threads of one product wait for each other at its end, and spin. Beside another busy process one of them waits
    for its turn on a core while the others spin their own turns away: two threads on two cores of which one is busy
    take three times as long as one thread.

    Args:
        seconds: How long the cores are watched.

    Yields:
        The number of threads.
    """
    before = torch.get_num_threads()
    if before > 1:
        cores = psutil.cpu_count() or 1
        idle = cores * (1 - psutil.cpu_percent(seconds) / 100)
        torch.set_num_threads(max(1, min(before, int(idle + 0.25))))
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
