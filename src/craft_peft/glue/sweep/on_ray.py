"""Where runs are run: on the nodes of a Ray cluster, the same command as on one machine."""

from __future__ import annotations

import logging
import runpy
import warnings
from concurrent.futures import Future
from typing import Any

from ...errors import CraftError
from . import commands
from .commands import Command, Ended

RETRIES = 3
"""How often a run is started again after its node or the process that watches it died."""


class RayExecutor:
    """Runs commands on a Ray cluster.

    A run that dies with its node is started again on another and goes on from its checkpoint, where both see the folder
    of runs; otherwise it starts again. What is written on a node that does not see the folder is brought back.

    Args:
        address: Of the cluster; None for one on this machine that ends with this process.
        cpus: Processor cores of a run, and its threads.
        gpus: GPUs of a run.
        memory: Bytes of memory of a run, or None.
        jobs: The most runs at a time; None for as many as the cluster's resources allow.

    Raises:
        CraftError: No cluster at the address.
    """

    def __init__(
        self,
        address: str | None = None,
        cpus: int = 1,
        gpus: float = 0,
        memory: int | None = None,
        jobs: int | None = None,
    ) -> None:
        import ray

        self.ray: Any = ray
        self.cpus, self.gpus, self.jobs = cpus, gpus, jobs
        self.started = not ray.is_initialized()
        if self.started:
            try:
                with warnings.catch_warnings():
                    # Ray says that it will no longer hide GPUs from tasks that ask for none.
                    warnings.filterwarnings("ignore", "Tip: In future versions of Ray", FutureWarning)
                    ray.init(address, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
            except (ConnectionError, ValueError) as error:
                raise CraftError(
                    f"No Ray cluster at `{address}`: {error} Start one with `ray start --head`."
                ) from error
        # Sent by value, since it is of no module: a node needs no import of this package to watch over a process.
        self.plain = runpy.run_path(commands.__file__, run_name="watched")
        wanted = {"num_cpus": cpus, "num_gpus": gpus, **({} if memory is None else {"memory": memory})}
        self.run = ray.remote(max_retries=RETRIES, **wanted)(self.plain["run_command"])

    @property
    def slots(self) -> int:
        """How many runs the cluster's resources allow; nodes may come and go."""
        found = self.ray.cluster_resources()
        fit = [int(found.get("CPU", 0) // self.cpus)]
        if self.gpus:
            fit.append(int(found.get("GPU", 0) // self.gpus))
        return max(1, min(fit if self.jobs is None else [*fit, self.jobs]))

    def submit(self, command: Command) -> Future[Ended]:
        """Starts a command when its resources are free."""
        command.environment["OMP_NUM_THREADS"] = str(max(1, self.cpus))
        return self.run.remote(self.plain["Command"](**vars(command))).future()

    def close(self) -> None:
        """Ends what still runs, and the cluster if it was ours."""
        if self.started:
            self.ray.shutdown()
