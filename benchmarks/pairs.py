"""What all benchmarks share: sides that take turns within one run, medians of pairs, a file that says where it ran.

A machine that others use is slow now and fast then. Sides that take turns meet the same conditions, so the ratio of two
sides is the median of the ratios within each round, not the ratio of two medians.
"""

import json
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from craft_peft.glue.machine import describe_processor, describe_versions, find_commit

Seconds = dict[str, list[float]]
Row = dict[str, Any]


def take_turns(sides: Mapping[str, Callable[[], Any]], rounds: int, device: str = "cpu", warm_up: int = 1) -> Seconds:
    """Seconds of each side in each round, in another order every round.

    Args:
        sides: what to time, by name.
        rounds: how many times each.
        device: "cuda" measures by the events of the GPU, which does not wait for the processor.
        warm_up: rounds before the first that counts.
    """
    seconds: Seconds = {name: [] for name in sides}
    for number in range(-warm_up, rounds):
        order = list(sides)
        random.Random(number).shuffle(order)
        for name in order:
            took = seconds_of(sides[name], device)
            if number >= 0:
                seconds[name].append(took)
    return seconds


def seconds_of(side: Callable[[], Any], device: str = "cpu") -> float:
    """Seconds of one call."""
    if device != "cuda":
        start = time.perf_counter()
        side()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    side()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000


def ratio(seconds: Mapping[str, list[float]], side: str, to: str) -> float:
    """The median over the rounds of one side's seconds by another's."""
    return statistics.median(a / b for a, b in zip(seconds[side], seconds[to], strict=True))


def describe_machine() -> dict[str, Any]:
    """Where, when the machine was how busy, and with what a benchmark ran."""
    return {
        "processor": describe_processor(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "versions": describe_versions(),
        "commit": find_commit(),
    }


def read(path: Path | None) -> dict[str, Any]:
    """What `write` left in a file; nothing if there is no path or no file."""
    return json.loads(path.read_text()) if path is not None and path.exists() else {}


def replaced(old: list[Row], new: list[Row], name: Callable[[Row], Any]) -> list[Row]:
    """The old rows and the new; what was measured again, by its name, takes the place of its old row."""
    again = [name(row) for row in new]
    return [row for row in old if name(row) not in again] + new


def write(path: Path | None, result: Mapping[str, Any]) -> None:
    """The result with the description of the machine, as JSON; nowhere if there is no path."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**result, "machine": describe_machine()}, indent=1) + "\n")
        print(f"written to {path}")
