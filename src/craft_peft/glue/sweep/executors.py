"""Where runs are run: on this machine, each in a process of its own, as many at a time as fit."""

from __future__ import annotations

import os
import queue
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, runtime_checkable

import psutil
import torch

from .commands import Command, Ended, run_command
from .forked import fork_server, run_forked

BYTES_A_NUMBER = 16
"""Weights, and what a step keeps beside them, roughly."""
JOB = "craft_peft.glue.sweep.job"
"""The module that is a run."""
PROCESS_BYTES = 1_500_000_000
"""Of a process that trains a model of no size."""


@runtime_checkable
class Executor(Protocol):
    """Runs commands."""

    @property
    def slots(self) -> int:
        """How many commands can run at a time, now."""

    def submit(self, command: Command) -> Future[Ended]:
        """Starts a command when a slot is free."""

    def close(self) -> None:
        """Ends what still runs."""


@runtime_checkable
class Process(Protocol):
    """A process, of `subprocess` or of `multiprocessing`."""

    def kill(self) -> None:
        """Ends it, if it still runs."""


class LocalExecutor:
    """Runs commands on this machine.

    Args:
        jobs: How many at a time; None for as many as fit.
        threads: Processor threads of each.
        need: Bytes of memory that one takes.
    """

    def __init__(self, jobs: int | None = None, threads: int = 1, need: int = PROCESS_BYTES) -> None:
        devices = torch.cuda.device_count()
        self.slots = jobs or how_many_fit(threads, need, devices)
        self.environment = {"OMP_NUM_THREADS": str(threads)}
        self.pool = ThreadPoolExecutor(self.slots)
        self.processes: set[Process] = set()
        self.closed = False
        self.forks = None if devices else fork_server(JOB)  # the driver of a GPU does not survive a fork
        # Each slot has a GPU of its own, as far as there are some.
        self.devices: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        for slot in range(self.slots):
            self.devices.put(str(slot % devices) if devices else None)

    def submit(self, command: Command) -> Future[Ended]:
        """Starts a command when a slot is free."""
        return self.pool.submit(self._run, command)

    def _run(self, command: Command) -> Ended:
        device = self.devices.get()
        own = {} if device is None else {"CUDA_VISIBLE_DEVICES": device}
        command.environment.update({**self.environment, **own})
        try:
            if self.forks is not None and command.module is not None:
                return run_forked(self.forks, command, self._started)
            return run_command(command, self._started)
        finally:
            self.devices.put(device)

    def _started(self, process: Process) -> None:
        self.processes.add(process)
        if self.closed:
            process.kill()

    def close(self) -> None:
        """Ends what still runs; it can be resumed."""
        self.closed = True
        self.pool.shutdown(wait=False, cancel_futures=True)
        for process in list(self.processes):
            process.kill()  # which does nothing to one that has ended
        self.pool.shutdown()


def how_many_fit(threads: int, need: int, devices: int) -> int:
    """Runs that fit on this machine at a time: one a GPU; without GPUs by its cores and its free memory."""
    if devices:
        return devices
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores // threads, psutil.virtual_memory().available // need))


def memory_need(numbers: int) -> int:
    """Bytes that a run takes, before any has been measured.

    Args:
        numbers: Of the model's layers.
    """
    return PROCESS_BYTES + BYTES_A_NUMBER * numbers
