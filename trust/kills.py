"""Training runs that are killed again and again, and resumed: they end in the bits of the run that nobody killed.

    python trust/kills.py --kills 200 --output results/trust.json     # minutes
    python trust/kills.py --kills 6 --clock 0                         # that it runs

A run is killed with SIGKILL up to five times, each time at a random moment: of the clock, or of what it does to files
(each one it opens, makes, renames or removes in its folder is a moment). Each next attempt is the same command with
`--resume`, and one that does not go on ends the script with its log; the last one is left alone. Then weights, scores,
losses and metrics are compared.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
from record import keep
from rich.console import Console
from tiny_encoder import settings, write_workshop

from craft_peft.glue.checkpoints import SEAL
from craft_peft.glue.training import TrainingConfig, train

KILLS_A_RUN = 5
METHODS = ("craft", "lotr", "lora", "full")
EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "shutil.move")


def count_events(output: Path, limit: int | None) -> list[int]:
    """Counts what this process does to files in a folder; at the given number it kills itself."""
    counted, home = [0], str(output)

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        if event in EVENTS and str(arguments[0]).startswith(home):
            counted[0] += 1
            if counted[0] == limit:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hear)
    return counted


def attempt(workshop: Path, output: Path, method: str, event: int | None = None) -> int:
    """Start a run in a child process, or go on with it; the child's number."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        # For whoever reads the log of a failure.
        os.dup2(os.open(output.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        torch.set_num_threads(1)
        counted = count_events(output, event)
        config = TrainingConfig(**settings(workshop, output, method=method, epochs=3, resume=True))
        train(config, console=Console(quiet=True))
        output.with_suffix(".events").write_text(str(counted[0]))
        status = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        os._exit(status)


def outcome(output: Path) -> dict[str, Any]:
    """Everything that a run leaves, but times, places and what the machine was."""
    result = json.loads((output / "result.json").read_text())
    kept = {name: result[name] for name in ("score", "metrics", "loss", "parameters")}
    kept["curve"] = [{k: v for k, v in record.items() if k != "seconds"} for record in result["curve"]]
    kept["weights"] = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in output.glob("*.safetensors")
    }
    assert kept["weights"], f"{output} holds no weights"
    return kept


def stage(output: Path) -> str:
    """What a run was at when it was killed, by what lies in its folder."""
    checkpoints = output / "checkpoints"
    if not (output / "run.json").exists():
        return "reading data and model"
    if (output / "result.json").exists():
        return "after the result"
    if (checkpoints / "finished").exists():
        return "final save"
    found = list(checkpoints.glob("checkpoint-*"))
    if any(not (checkpoint / SEAL).exists() for checkpoint in found):
        return "checkpoint"
    return "training and evaluation"


def one_run(
    workshop: Path, output: Path, method: str, kills: int, known: dict[str, Any], seed: int, clock: float
) -> Counter[str]:
    """One run, killed so many times; where."""
    chance, stages = random.Random(seed), Counter[str]()
    while sum(stages.values()) < kills:
        by_event = chance.random() >= clock
        event = chance.randint(1, known["events"]) if by_event else None
        child = attempt(workshop, output, method, event)
        if not by_event:
            time.sleep(chance.uniform(0, known["seconds"]))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            stages[stage(output)] += 1
        elif os.WEXITSTATUS(status):
            raise RuntimeError(f"{output.name} did not resume: {output.with_suffix('.log').read_text()}")
        if (output / "result.json").exists():
            return stages  # it was done before it could be killed again
    finish(workshop, output, method)
    return stages


def finish(workshop: Path, output: Path, method: str) -> None:
    _, status = os.waitpid(attempt(workshop, output, method), 0)
    if status:
        raise RuntimeError(f"{output.name} did not end: {output.with_suffix('.log').read_text()}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--clock", type=float, default=0.5, help="share of the kills whose moment is one of the clock")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="add the figures to this JSON file")
    arguments = parser.parse_args()
    start = time.perf_counter()
    stages, differ, runs = Counter[str](), [], 0
    processes = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as place, processes.Pool(len(os.sched_getaffinity(0))) as pool:
        child = os.fork()  # this process computes nothing: the threads of a computation cannot be forked
        if not child:
            write_workshop(Path(place))
            os._exit(0)
        os.waitpid(child, 0)
        known: dict[str, dict[str, Any]] = {}
        for method in METHODS:
            output, began = Path(place) / f"whole-{method}", time.perf_counter()
            finish(Path(place), output, method)
            events = int(output.with_suffix(".events").read_text())
            known[method] = {"events": events, "seconds": time.perf_counter() - began, "outcome": outcome(output)}
        while sum(stages.values()) < arguments.kills:
            left = arguments.kills - sum(stages.values())
            planned = []
            for number in range(runs, runs + max(1, -(-left // KILLS_A_RUN))):
                kills = min(KILLS_A_RUN, left)
                left -= kills
                method = METHODS[number % len(METHODS)]
                output = Path(place) / f"run-{number}"
                seed = arguments.seed * 10**6 + number
                case = (Path(place), output, method, kills, known[method], seed, arguments.clock)
                ended = pool.apply_async(one_run, case)
                planned.append((output, method, ended))
            for output, method, ended in planned:
                stages += ended.get()
                runs += 1
                if outcome(output) != known[method]["outcome"]:
                    differ.append(output.name)
    figures = {
        "kills": sum(stages.values()),
        "runs": runs,
        "stages": dict(stages.most_common()),
        "moments": {method: known[method]["events"] for method in METHODS},
        "differ": differ,
        "seconds": round(time.perf_counter() - start),
    }
    keep(arguments.output, "kills", figures)
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
