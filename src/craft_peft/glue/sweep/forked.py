"""Runs a command in a fork of a process that has imported everything, so that a run does not begin with its imports."""

from __future__ import annotations

import atexit
import importlib
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess

import torch

from .commands import Command, Ended


def fork_server(preload: str) -> ForkServerContext | None:
    """What forks run from, for `run_forked`.

    Args:
        preload: The module that is imported once, before the first fork.

    Returns:
        The context; None on systems whose libraries do not bear a fork.
    """
    if sys.platform != "linux":
        return None
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    return context


def run_forked(
    context: ForkServerContext, command: Command, started: Callable[[ForkServerProcess], None] = lambda process: None
) -> Ended:
    """Does what `run_command` does, with a command that names a module.

    Args:
        context: From `fork_server`.
        command: What to run; its `module` is not None.
        started: Is told the process.

    Returns:
        How it ended.
    """
    command.folder.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    reader, writer = context.Pipe(duplex=False)
    with reader, writer:
        environment = {**os.environ, **command.environment}
        words = (command.module, command.words[-1], os.fspath(command.log), environment, reader)
        process = context.Process(target=_run_module, args=words)
        process.start()
        try:
            started(process)
            process.join()
        except BaseException:
            process.kill()
            process.join()
            raise
    assert process.exitcode is not None
    return Ended(process.exitcode, time.perf_counter() - start)


def _run_module(module: str, argument: str, log: str, environment: dict[str, str], alive: Connection) -> None:
    """Makes this process what `run_command` would have started: its input, output, environment, threads and end."""
    written = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    for number, source in enumerate((alive.fileno(), written, written)):
        os.dup2(source, number)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))  # which was read when torch was imported
    try:
        status = importlib.import_module(module).main([argument])
    finally:
        atexit._run_exitfuncs()  # a process of `multiprocessing` ends without; loggers finish their records there
    sys.exit(status)
