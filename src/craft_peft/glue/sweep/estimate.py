"""How long runs will take: as long as finished ones did, or else by counting operations."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from functools import cached_property
from typing import Any

import torch

from ..methods import METHODS
from .plan import Plan, Planned

SIZES = {
    "cola": (8551, 1043, 12),
    "sst2": (67349, 872, 13),
    "mrpc": (3668, 408, 53),
    "stsb": (5749, 1500, 28),
    "qqp": (363846, 40430, 31),
    "mnli": (392702, 19647, 39),
    "qnli": (104743, 5463, 51),
    "rte": (2490, 277, 67),
    "wnli": (635, 71, 37),
}
"""By task the rows of train and of all development sets, and the mean tokens of a row (of BERT's vocabulary)."""

EFFICIENCY = 0.5
"""Share of the speed of one big matrix product that training reaches."""


class Estimates:
    """Seconds of the runs of a plan.

    Args:
        plan: The plan.
        threads: Of each run.
    """

    def __init__(self, plan: Plan, threads: int = 1) -> None:
        self.plan = plan
        self.threads = threads
        self.measured: dict[tuple, list[float]] = defaultdict(list)

    def learn(self, planned: Planned, result: dict[str, Any]) -> None:
        """Takes the time of a finished run into account."""
        for key in self._keys(planned):
            self.measured[key].append(result["seconds"])

    def seconds(self, planned: Planned) -> tuple[float, bool]:
        """How long a run will take.

        Returns:
            Seconds, and whether finished runs say so: of the same method and task, else of the same task.
        """
        for key in self._keys(planned):
            if key in self.measured:
                return statistics.median(self.measured[key]), True
        return self._operations(planned) / self.speed, False

    def _keys(self, planned: Planned) -> list[tuple]:
        recipe = planned.settings["recipe"]
        task = (planned.config.task, planned.config.rows, recipe["epochs"], recipe["max_length"])
        return [(*task, planned.cell.method), task]

    def _operations(self, planned: Planned) -> float:
        """Two a number of the layers and token forward; as many for the gradient of the inputs, and of the weights."""
        assert planned.config.task is not None
        train, dev, tokens = SIZES[planned.config.task]
        rows = planned.config.rows or train
        held_out = rows * planned.config.hold_out
        method = METHODS[planned.config.method]
        passes = 1 + (method.config is not None) + 2 * method.trains_base
        work = planned.settings["recipe"]["epochs"] * ((rows - held_out) * passes + dev + held_out)
        return 2.0 * self.plan.counts.layers * tokens * work

    @cached_property
    def speed(self) -> float:
        """Operations a second of one process here, as a product of matrices reaches them for a tenth of a second."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        size = 4096 if device == "cuda" else 512
        type_ = torch.bfloat16 if self.plan.precision == "bf16" else torch.float32
        matrix = torch.ones(size, size, device=device, dtype=type_)
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            (matrix @ matrix).sum().item()
            start, count = time.perf_counter(), 0
            while time.perf_counter() - start < 0.1:
                (matrix @ matrix).sum().item()
                count += 1
            return EFFICIENCY * count * 2 * size**3 / (time.perf_counter() - start)
        finally:
            torch.set_num_threads(before)


def duration(seconds: float) -> str:
    """Seconds in words.

    Example:
        >>> duration(42.0), duration(242.0), duration(7300.0)
        ('42 s', '4 min', '2.0 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
