"""Time, peak extra memory and explained energy of Tucker decompositions of stacks of weights.

    python benchmarks/decompose.py --quick                                 # small shapes, in seconds: that it runs
    python benchmarks/decompose.py 12x768 24x1024 --output results/performance/decompose-cpu.json
    python benchmarks/decompose.py 32x4096 --sides auto hosvd --rounds 1 --output ...     # adds to the file
    python benchmarks/decompose.py --adapt --model MODEL_FOLDER --name all-MiniLM-L6-v2 --output ...
    python benchmarks/decompose.py 24x1024 --device cuda --output results/performance/decompose-cuda.json

Sides: the package's `hosvd` by its methods; `tensorly.decomposition.tucker` (backend PyTorch, float32, init "svd") as
HOSVD (no sweep) and HOOI (one sweep), each with its two kinds of SVD; and "stacked": a plain HOSVD of the whole tensor
in float64, by Gram matrices and `eigh`. In each round every side runs once, in another order. Peak memory is that of
one more run in a process of its own, beyond what it held before (the tensor in float32, Python, PyTorch after a
warm-up): of the resident set, by the kernel's high-water mark; with --device cuda of PyTorch's allocator. Ranks are
(24, 100, 100), each at most its mode's size.

Stacks: "flat" is Gaussian; "encoder" has the singular values of the first query matrix of the encoder in --model,
stretched to the width, half in directions that the layers share, half in a layer's own.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import linear_regression, median
from typing import Any

import torch
from pairs import ratio, read, replaced, take_turns, write
from rich.console import Console
from rich.table import Table
from torch import Tensor

from craft_peft import CraftConfig, Tucker, explained_energy, hosvd, project, unfold
from craft_peft.fastfood import hadamard

Ranks = tuple[int, int, int]
ENCODER_ENERGIES = ("hosvd", "auto", "randomized", "st-hosvd", "hooi")


def ours(method: str) -> Callable[[Tensor, Ranks], Tucker]:
    return lambda tensor, ranks: hosvd(tensor, ranks, method)  # type: ignore[arg-type]


def tensorly(sweeps: int, svd: str) -> Callable[[Tensor, Ranks], Tucker]:
    def decompose(tensor: Tensor, ranks: Ranks) -> Tucker:
        import tensorly
        from tensorly.decomposition import tucker

        with tensorly.backend_context("pytorch"):
            core, factors = tucker(tensor, ranks, init="svd", svd=svd, n_iter_max=sweeps, tol=0, random_state=0)
        return Tucker(core, tuple(factors))

    return decompose


def stacked(tensor: Tensor, ranks: Ranks) -> Tucker:
    """HOSVD as one writes it down: the whole tensor in float64."""
    tensor = tensor.double()
    factors = []
    for mode, rank in enumerate(ranks):
        matrix = unfold(tensor, mode)
        factors.append(torch.linalg.eigh(matrix @ matrix.T).eigenvectors[:, -rank:].flip(1))
    return project(tensor, factors)


SIDES: dict[str, Callable[[Tensor, Ranks], Tucker]] = {
    "auto": ours("auto"),
    "hosvd": ours("hosvd"),
    "randomized": ours("randomized"),
    "hooi": ours("hooi"),
    "tensorly HOSVD": tensorly(0, "truncated_svd"),
    "tensorly HOOI": tensorly(1, "truncated_svd"),
    "tensorly HOSVD, randomized_svd": tensorly(0, "randomized_svd"),
    "tensorly HOOI, randomized_svd": tensorly(1, "randomized_svd"),
    "stacked": stacked,
}


def ranks_of(shape: tuple[int, ...]) -> Ranks:
    return min(24, shape[0]), min(100, shape[1]), min(100, shape[2])


def make_stack(shape: tuple[int, ...], spectrum: str, model: str | None, device: str) -> Tensor:
    """A stack of weights in float32, from a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    stack = torch.empty(shape, device=device)
    values = encoder_spectrum(model, shape[1]).to(device) if spectrum == "encoder" else None
    shared = 0.0 if values is None else turned(values, generator, device)
    for layer in stack:
        own = torch.randn(shape[1:], generator=generator).to(device) if values is None else None
        layer.copy_(own if own is not None else turned(values, generator, device) + shared)
    return stack


def encoder_spectrum(model: str | None, size: int) -> Tensor:
    if model is None:
        raise SystemExit("the spectrum 'encoder' needs --model FOLDER")
    from transformers import AutoModel

    weights = dict(AutoModel.from_pretrained(model).named_parameters())
    first = next(weight for name, weight in weights.items() if name.endswith("query.weight"))
    values = torch.linalg.svdvals(first.detach())
    return torch.nn.functional.interpolate(values[None, None], size, mode="linear")[0, 0]


def turned(values: Tensor, generator: torch.Generator, device: str) -> Tensor:
    """A matrix with these singular values in random directions: Hadamard matrices where the size is a power of 2."""
    size = len(values)
    matrix = torch.diag(values)
    for _ in range(2):
        if size & (size - 1):
            matrix = torch.linalg.qr(torch.randn(size, size, generator=generator).to(device)).Q @ matrix
        else:
            for _ in range(2):  # twice with random signs: once is far from random
                signs = (torch.randint(2, (size,), generator=generator) * 2.0 - 1).to(device)
                matrix = hadamard((matrix * signs[:, None]).T.contiguous()).T
        matrix = matrix.T
    return matrix


def memory_now(field: str) -> int:
    """A line of the kernel's account of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def peak_extra_bytes(side: str, shape: tuple[int, ...], device: str) -> int:
    """Within a process of its own: what a decomposition holds at its most beyond the tensor."""
    SIDES[side](torch.randn(2, 130, 130, device=device), (2, 8, 8))  # warm-up: libraries load and take their buffers
    tensor = make_stack(shape, "flat", None, device)
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        SIDES[side](tensor, ranks_of(shape))
        return torch.cuda.max_memory_allocated() - before
    before = memory_now("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts here
    SIDES[side](tensor, ranks_of(shape))
    return memory_now("VmHWM") - before


def memory_in_a_process(side: str, shape: tuple[int, ...], device: str) -> int | None:
    command = [sys.executable, __file__, "x".join(map(str, shape)), "--memory-of", side, "--device", device]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    return int(ended.stdout.split()[-1]) if ended.returncode == 0 else None


def compare(shape: tuple[int, ...], spectrum: str, sides: list[str], arguments: argparse.Namespace) -> dict[str, Any]:
    """All sides on one stack, in turn."""
    tensor = make_stack(shape, spectrum, arguments.model, arguments.device)
    found: dict[str, Tucker] = {}

    def run(side: str, tensor: Tensor) -> None:
        found[side] = SIDES[side](tensor, ranks_of(shape))

    calls = {side: partial(run, side, tensor) for side in sides}
    seconds = take_turns(calls, arguments.rounds, arguments.device, warm_up=0)
    energies = {side: explained_energy(tensor, tucker).item() for side, tucker in found.items()}
    del tensor, calls
    return {
        "shape": list(shape),
        "ranks": list(ranks_of(shape)),
        "spectrum": spectrum,
        "threads": torch.get_num_threads(),
        "layer_bytes": 4 * shape[1] * shape[2],
        "sides": {
            side: {
                "seconds": seconds[side],
                "ratio_to_first": ratio(seconds, side, sides[0]),
                "energy": energies[side],
                "peak_extra_bytes": memory_in_a_process(side, shape, arguments.device)
                if side in arguments.memory
                else None,
            }
            for side in sides
        },
    }


def seconds_to_adapt(layers: int, repeats: int) -> list[float]:
    """Seconds of `get_peft_model` on a fresh RoBERTa-large shape, each time anew and without the cache."""
    import os

    from peft import get_peft_model
    from transformers import RobertaConfig, RobertaModel

    os.environ["CRAFT_CACHE"] = "off"
    config = RobertaConfig(
        vocab_size=100, hidden_size=1024, num_hidden_layers=layers, num_attention_heads=16, intermediate_size=1
    )
    found = []
    for _ in range(repeats):
        model = RobertaModel(config)
        start = time.perf_counter()
        get_peft_model(model, CraftConfig(target_modules=["query", "value"]))
        found.append(time.perf_counter() - start)
    return found


def kept_energy(folder: str) -> dict[str, dict[str, float]]:
    """Share of the energy of a real encoder's query and value stacks that each method keeps."""
    from transformers import AutoModel

    from craft_peft.plugin.stacks import collect_stacks

    model = AutoModel.from_pretrained(folder)
    targets = [(key, m) for key, m in model.named_modules() if key.endswith((".query", ".value"))]
    energies: dict[str, dict[str, float]] = {}
    for stack in collect_stacks(targets):
        weights, ranks = stack.read_weights(), CraftConfig().resolve_ranks(stack.name, stack.shape)
        energies[stack.name] = {
            method: explained_energy(weights, ours(method)(weights, ranks)).item()  # type: ignore[arg-type]
            for method in ENCODER_ENERGIES
        }
    return energies


def show(row: dict[str, Any]) -> None:
    title = f"{'x'.join(map(str, row['shape']))}, ranks {tuple(row['ranks'])}, {row['spectrum']} spectrum"
    table = Table("side", title=title)
    for heading in ("seconds (median)", "times the first", "energy", "extra memory in layers"):
        table.add_column(heading, justify="right")
    for side, found in row["sides"].items():
        extra = found["peak_extra_bytes"]
        table.add_row(
            side,
            f"{median(found['seconds']):.3g}",
            f"{found['ratio_to_first']:.2f}",
            f"{found['energy']:.5f}",
            "" if extra is None else f"{extra / row['layer_bytes']:.1f}",
        )
    Console().print(table)


def shape_of(text: str) -> tuple[int, int, int]:
    """A shape from "12x768" or "12x768x3072"."""
    layers, d_out, *d_in = map(int, text.split("x"))
    return layers, d_out, *(d_in or [d_out])  # type: ignore[return-value]


def with_rows(old: dict[str, Any], result: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What a file holds, with what was measured since."""
    rows = replaced(old.get("rows", []), rows, lambda row: (row["shape"], row["spectrum"]))
    rows.sort(key=lambda row: (row["shape"][1], row["shape"][0], row["spectrum"]))
    return {**old, **result, "rows": rows, "fitted": fit_depth(rows)}


def fit_depth(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Seconds of "auto" for 80 layers of width 8192, on the line through what fewer layers of that width took."""
    wide = [row for row in rows if row["shape"][1:] == [8192, 8192] and row["spectrum"] == "flat"]
    if len(wide) < 2:
        return None
    layers = [row["shape"][0] for row in wide]
    taken = [median(row["sides"]["auto"]["seconds"]) for row in wide]
    each, fixed = linear_regression(layers, taken)
    return {"layers": layers, "taken": taken, "each": each, "fixed": fixed, "seconds": fixed + 80 * each}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", type=shape_of, help="such as 24x1024 or 12x768x3072 (layers, out, in)")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), metavar="SIDE")
    parser.add_argument("--spectrum", choices=["flat", "encoder"], default="flat")
    parser.add_argument("--rounds", type=int, default=3, help="how often every side runs")
    parser.add_argument(
        "--memory", nargs="*", choices=SIDES, default=list(SIDES), metavar="SIDE", help="whose memory to measure"
    )
    parser.add_argument("--adapt", action="store_true", help="also time `get_peft_model` on a RoBERTa-large shape")
    parser.add_argument("--model", help="folder of a real encoder")
    parser.add_argument("--name", help="what to call that encoder (default: the folder's name)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--output", type=Path, help="add the figures to this JSON file")
    parser.add_argument("--quick", action="store_true", help="small shapes, once, all sides")
    parser.add_argument("--memory-of", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        print(peak_extra_bytes(arguments.memory_of, arguments.shapes[0], arguments.device))
        return
    if arguments.quick:
        arguments.shapes, arguments.rounds, arguments.memory = [(3, 96, 96), (2, 400, 400)], 1, []
    result: dict[str, Any] = {"device": arguments.device}
    if arguments.adapt or arguments.quick:
        layers, repeats = (2, 1) if arguments.quick else (24, 5)
        seconds = seconds_to_adapt(layers, repeats)
        result["adapt"] = {
            "shape": {"layers": layers, "width": 1024, "stacks": 2, "ranks": [min(24, layers), 100, 100]},
            "seconds": {"median": median(seconds), "all": seconds},
        }
        print(f"get_peft_model, query and value of {layers} x 1024: {median(seconds):.2f} s")
    if arguments.model and arguments.adapt:
        result["kept_energy"] = kept_energy(arguments.model)
        result["model"] = arguments.name or Path(arguments.model).name
    found = with_rows(read(arguments.output), result, [])
    write(arguments.output, found)
    for shape in arguments.shapes:
        row = compare(shape, arguments.spectrum, arguments.sides, arguments)
        show(row)
        found = with_rows(found, result, [row])
        write(arguments.output, found)


if __name__ == "__main__":
    main()
