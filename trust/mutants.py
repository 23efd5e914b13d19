"""Damaged and forged adapters, loaded one after the other: each either works or is one clear error.

    python trust/mutants.py --count 100000 --output results/trust.json     # 10 minutes on two cores
    python trust/mutants.py --count 300                                    # that it runs

A case is a saved adapter with one to three random changes: bits flipped, bytes cut, moved or repeated, in the config,
the table of the tensors and the tensors; fields and tables rewritten with values that lie; files that are missing,
folders, links out of the folder or pickles. For each case it is asserted that

- `load_adapter` returns, or raises a `CraftError`, and nothing else, within two seconds;
- after an error the base model is as before: modules, and weights bit for bit;
- an adapter that loads has the tensors that it was saved with, wherever its config still has their checksum;
- no file outside the adapter's folder is opened;
- the resident set grows by no more than twice the file's size, and 8 MiB that Python and PyTorch take and give back.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from record import keep, reset_peak, rss
from safetensors.torch import load as load_safetensors
from torch import nn

from craft_peft import CraftConfig, CraftError, LotrConfig, SuperLoraConfig, load_adapter, save_adapter

ALLOWANCE = 8 * 2**20
SECONDS = 2
TARGETS = ["0", "1", "2"]
METHODS = {
    "craft": CraftConfig(target_modules=TARGETS, ranks=(2, 6, 5), init_weights=False),
    "craft, without factors": CraftConfig(
        target_modules=TARGETS, ranks=(2, 6, 5), init_weights=False, save_factors=False
    ),
    "lotr": LotrConfig(target_modules=TARGETS, r=3, init_weights=False),
    "superlora": SuperLoraConfig(target_modules=TARGETS, r=3, init_weights=False),
    "lora": LoraConfig(target_modules=TARGETS, r=3, init_lora_weights=False),
}
ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 10**18, 1e308, -0.0, float("nan"), float("inf"), "", "0", "all", "x" * 5000),
    *("../../../../etc/passwd", "\u0000", "\ud83d\ude00", [], [0], [[[]]], [10**12] * 3, {}, {"a": {}}, ["0"] * 1000),
    *({"x": "/etc"}, "LORA", "XLORA", "PROMPT_TUNING", "BOFT", "ADALORA", "LN_TUNING", "P_TUNING", "TRAINABLE_TOKENS"),
    *("(.+)+x", ".*.*.*.*.*.*.*.*x", ".*[012]", "(x" * 300),
    *(".*", "(a+)+$", "F64", "BF16", "I8", [1, 2, 3], [-1, 5], [2**40, 2**40], [0, 2**63]),
]


class Hang(BaseException):
    """Raised by the alarm, past every `except Exception`."""


def base_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(24, 24) for _ in TARGETS))


def write_adapters(folder: Path) -> list[Path]:
    """One adapter of each method, as its user saves it."""
    for number, config in enumerate(METHODS.values()):
        save_adapter(get_peft_model(base_model(), config), folder / str(number))
    return [folder / str(number) for number in range(len(METHODS))]


def change_bytes(content: bytes, chance: random.Random) -> bytes:
    """One change of the kinds that disks, networks and fuzzers make."""
    if not content:
        return chance.randbytes(8)
    place, length = chance.randrange(len(content)), chance.choice([1, 2, 8, 64, 1000])
    part = content[place : place + length]
    kind = chance.randrange(6)
    if kind == 0:
        flipped = content[place] ^ (1 << chance.randrange(8))
        return content[:place] + bytes([flipped]) + content[place + 1 :]
    if kind == 1:
        return content[:place]
    if kind == 2:
        return content[:place] + content[place + length :]
    if kind == 3:
        return content[:place] + part * chance.choice([2, 3, 50]) + content[place + length :]
    if kind == 4:
        return content[:place] + chance.randbytes(length) + content[place + length :]
    other = chance.randrange(len(content))
    return content[:place] + content[other : other + length] + content[place + length :]


def change_value(value: Any, chance: random.Random) -> Any:
    """One place anywhere in a JSON value with something odd in it, or gone, or doubled."""
    if isinstance(value, dict) and value and chance.random() < 0.8:
        key, kind = chance.choice(list(value)), chance.randrange(6)
        if kind == 0:
            return {name: part for name, part in value.items() if name != key}
        if kind == 1:
            return {**value, chance.choice(["../x", "a" * 300, "", "new_field", "0.weight"]): chance.choice(ODD)}
        return {**value, key: change_value(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.5:
        place = chance.randrange(len(value))
        return [*value[:place], change_value(value[place], chance), *value[place + 1 :]]
    return chance.choice(ODD)


def change_config(folder: Path, chance: random.Random) -> None:
    path = folder / CONFIG_NAME
    if chance.random() < 0.4:
        path.write_bytes(change_bytes(path.read_bytes(), chance))
    else:
        with_values(path, lambda fields: change_value(fields, chance))


def forget_checksum(folder: Path, chance: random.Random) -> None:
    with_values(folder / CONFIG_NAME, lambda fields: {**fields, "tensors_sha256": None})


def with_values(path: Path, change: Callable[[Any], Any]) -> None:
    try:
        fields = json.loads(path.read_text())
    except ValueError:
        return
    if isinstance(fields, dict):
        path.write_text(json.dumps(change(fields)))


def change_tensors(folder: Path, chance: random.Random) -> None:
    path = folder / SAFETENSORS_WEIGHTS_NAME
    path.write_bytes(change_bytes(path.read_bytes(), chance))


def change_table(folder: Path, chance: random.Random) -> None:
    """The table of names, types, shapes and places, rewritten as valid JSON of the right length."""
    path = folder / SAFETENSORS_WEIGHTS_NAME
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    try:
        table = json.loads(content[8 : 8 + size])
    except ValueError:
        return
    written = json.dumps(change_value(table, chance)).encode()
    length = chance.choice([len(written)] * 9 + [2**63, 2**40, 0])
    path.write_bytes(length.to_bytes(8, "little") + written + content[8 + size :])


def change_files(folder: Path, chance: random.Random) -> None:
    name, kind = chance.choice([CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME]), chance.randrange(6)
    path = folder / name
    if kind == 0:
        path.unlink()
    elif kind == 1:
        path.unlink()
        path.mkdir()
    elif kind == 2:
        outside = folder.parent / "outside"
        shutil.copyfile(path, outside)
        path.unlink()
        path.symlink_to(outside)
    elif kind == 3:
        path.unlink()
        path.symlink_to(chance.choice(["/etc/passwd", "/dev/zero", "../nowhere", name, "/proc/self/mem"]))
    elif kind == 4:
        (folder / SAFETENSORS_WEIGHTS_NAME).rename(folder / WEIGHTS_NAME)
    else:
        path.write_bytes(b"" if chance.random() < 0.5 else chance.randbytes(chance.choice([7, 8, 9, 5000])))


CHANGES = [change_config, change_config, change_tensors, change_table, change_table, change_files, forget_checksum]


def mutate(folder: Path, chance: random.Random) -> list[str]:
    """Change a folder; the names of the changes."""
    made = []
    for _ in range(chance.choice([1, 1, 2, 3])):
        change = chance.choice(CHANGES)
        files = [folder / name for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)]
        if all(path.is_file() and not path.is_symlink() for path in files):
            change(folder, chance)
            made.append(change.__name__)
    return made


class Watch:
    """Notes files that are opened outside a folder, while it is armed."""

    def __init__(self) -> None:
        self.home: str | None = None
        self.outside: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.home is not None and event == "open" and isinstance(arguments[0], str | bytes):
            home, self.home = self.home, None
            path = os.path.realpath(os.fsdecode(arguments[0]))
            # Modules that are imported on the way are the interpreter's own business.
            if not path.startswith((home, sys.prefix, sys.base_prefix)):
                self.outside.append(path)
            self.home = home

    @contextmanager
    def at(self, folder: Path) -> Iterator[None]:
        self.home, self.outside = os.path.realpath(folder), []
        try:
            yield
        finally:
            self.home = None


def check(base: nn.Module, folder: Path, saved: bytes, watch: Watch) -> tuple[str, list[str], float, int]:
    """Load one case: how it ended, which promises it broke, seconds, and bytes that the process grew by."""
    before, weights = list(base._modules.items()), {key: value.clone() for key, value in base.state_dict().items()}
    size = sum(path.lstat().st_size for path in folder.iterdir())
    broken = []
    reset_peak()
    held = rss("VmRSS")
    start = time.perf_counter()
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    model, ended = None, "loaded"
    try:
        with watch.at(folder):
            model = load_adapter(base, folder)
    except CraftError:
        ended = "refused"
    except Hang:
        ended = "hang"
        broken.append(f"it took over {SECONDS} s")
    except BaseException as error:
        ended = "crash"
        broken.append(f"{type(error).__name__}: {error}")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    seconds, grown = time.perf_counter() - start, rss("VmHWM") - held
    broken += [f"it opened {path}" for path in watch.outside]
    if grown > 2 * size + ALLOWANCE:
        broken.append(f"it took {grown:,} bytes of memory for {size:,} on disk")
    if model is None:
        now = base.state_dict()
        same = list(base._modules.items()) == before and now.keys() == weights.keys()
        if not same or not all(torch.equal(now[key], value) for key, value in weights.items()):
            broken.append("the base model was changed")
    else:
        broken += differs_silently(folder, saved)
    return ended, broken, seconds, grown


def differs_silently(folder: Path, saved: bytes) -> list[str]:
    """An adapter that loads, with the checksum it was saved with, has the tensors it was saved with."""
    fields = json.loads((folder / CONFIG_NAME).read_bytes())
    if fields.get("tensors_sha256") is None:
        return []
    found, expected = load_safetensors((folder / SAFETENSORS_WEIGHTS_NAME).read_bytes()), load_safetensors(saved)
    same = found.keys() == expected.keys() and all(
        t.dtype == expected[name].dtype and torch.equal(t, expected[name]) for name, t in found.items()
    )
    return [] if same else ["it loaded tensors that differ from its checksum"]


def run(seed: int, count: int, kept: Path | None) -> dict[str, Any]:
    """So many cases in this process; folders that break a promise are copied to `kept`."""

    def hang(*_: Any) -> None:
        raise Hang

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, hang)
    chance, watch, ends, broken = random.Random(seed), Watch(), Counter[str](), []
    slowest, most = 0.0, 0
    with tempfile.TemporaryDirectory() as place:
        adapters = write_adapters(Path(place) / "saved")
        folder = Path(place) / "case"
        load_adapter(base_model(), adapters[0])  # what is imported and kept at first use
        base = base_model()
        for number in range(count):
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(adapter := chance.choice(adapters), folder)
            made = mutate(folder, chance)
            saved = (adapter / SAFETENSORS_WEIGHTS_NAME).read_bytes()
            ended, faults, seconds, grown = check(base, folder, saved, watch)
            if ended != "refused":
                base = base_model()
            ends[ended] += 1
            slowest, most = max(slowest, seconds), max(most, grown)
            if faults and kept is not None:
                shutil.copytree(folder, kept / f"{seed}-{number}", symlinks=True)
            broken += [f"seed {seed}, case {number} ({', '.join(made)}): {fault}" for fault in faults]
    return {"ends": dict(ends), "broken": broken, "slowest": slowest, "most_bytes": most}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000, help="how many cases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--keep", type=Path, metavar="DIR", help="copy the folders that break a promise")
    parser.add_argument("--output", type=Path, help="add the figures to this JSON file")
    arguments = parser.parse_args()
    start = time.perf_counter()
    shares = [
        arguments.count // arguments.processes + (number < arguments.count % arguments.processes)
        for number in range(arguments.processes)
    ]
    with multiprocessing.get_context("spawn").Pool(arguments.processes) as pool:
        seeds = [arguments.seed + number for number in range(arguments.processes)]
        found = pool.starmap(run, [(seed, share, arguments.keep) for seed, share in zip(seeds, shares, strict=True)])
    ends = sum((Counter(part["ends"]) for part in found), Counter[str]())
    broken = [line for part in found for line in part["broken"]]
    figures = {
        "count": arguments.count,
        "refused": ends["refused"],
        "loaded": ends["loaded"],
        "broken": broken[:20],
        "broken_count": len(broken),
        "slowest_seconds": round(max(part["slowest"] for part in found), 3),
        "most_bytes": max(part["most_bytes"] for part in found),
        "seconds": round(time.perf_counter() - start),
    }
    keep(arguments.output, "mutants", figures)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
