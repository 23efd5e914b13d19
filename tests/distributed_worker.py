"""What `test_distributed` runs in each process: the example `examples/distributed.py`, on CPUs, with every method."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from accelerate import DistributedType, PartialState
from accelerate.state import AcceleratorState
from laws import SHAPE
from method_table import METHODS, Method
from transformers import PreTrainedModel

from craft_peft.errors import CraftError

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))
import distributed as example  # noqa: E402

ROWS = list({method.name: method for method in reversed(METHODS)}.values())[::-1]  # the first of each name
VARIED = [ROWS[0], ROWS[-1]]
TIMEOUT = timedelta(seconds=100)
PROBE = torch.arange(24).reshape(2, 12) % 64


def enter(rank: int, environment: dict[str, str], engine: str, base: Path, folder: Path) -> None:
    """The start of a process, in an environment such as torchrun leaves."""
    os.environ.update(environment)
    if "WORLD_SIZE" in environment:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    if "ACCELERATE_USE_FSDP" in environment:
        let_fsdp1_run_on_cpus()
    if "ACCELERATE_USE_DEEPSPEED" in environment:  # a speed-up that it would compile
        importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    for method in ROWS:
        found = run(method, engine, base, folder / method.name)
        found |= run_variants(method, engine, base)
        torch.save(found, folder / f"{method.name}-{rank}.pt")
    PartialState().destroy_process_group()


def let_fsdp1_run_on_cpus() -> None:
    """Step around three places where FSDP 1 takes for granted that the CPU is not the device of the model."""
    from torch.distributed.fsdp import _init_utils, _optim_utils
    from torch.distributed.fsdp._flat_param import FlatParamHandle

    _init_utils._get_device_from_device_id = lambda *_: None  # makes "cpu:0" of "cpu", then finds them different
    # It gathers a state, copies it to the CPU, and frees or overwrites the first: here that is the same memory.
    FlatParamHandle.to_cpu = lambda _: nullcontext()
    unflatten = _optim_utils._unflatten_orig_param_states
    _optim_utils._unflatten_orig_param_states = lambda *args: unflatten(*args[:-1], False)


def new_accelerator_state() -> None:
    """Forget the accelerator before, and make the next one use what the environment asks for, on CPUs with gloo."""
    AcceleratorState._reset_state()
    if "ACCELERATE_USE_DEEPSPEED" in os.environ:
        PartialState(backend="gloo", timeout=TIMEOUT)
    elif "WORLD_SIZE" in os.environ:
        PartialState(cpu=True, timeout=TIMEOUT)
    if "ACCELERATE_USE_FSDP" in os.environ:  # accelerate looks for it on accelerators only
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def run(method: Method, engine: str, base: Path, output: Path) -> dict:
    """Train and save, train again from half the way; gives what there is to compare."""
    if engine == "fsdp2":
        os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = f"LlamaDecoderLayer,{adapter_class(method)}"
    model, losses = train(method, engine, base, "--output", output / "adapter", "--checkpoint", output / "half")
    found = {"losses": losses, "logits": probe(model)}
    found["frozen"] = {name: tensor for name, tensor in model.named_buffers() if f".{method.name}_" in name}
    found["broadcast"] = list(getattr(model, "named_module_buffers", {}))  # those of DDP's last forward
    _, found["resumed"] = train(method, engine, base, "--output", output / "resumed", "--resume", output / "half")
    return found


def run_variants(method: Method, engine: str, base: Path) -> dict:
    """The losses of each variant, or the reason why it is refused."""
    found: dict[str, object] = {}
    changed = casts(engine) | (variants(engine) if method in VARIED else {})
    for name, changes in changed.items():
        with ExitStack() as stack:
            for change in changes:
                stack.enter_context(change)
            try:
                _, found[name] = train(method, engine, base)
            except CraftError as error:
                found[name] = str(error)
    return found


def adapter_class(method: Method) -> str:
    return type(method.adapter(SHAPE)).__name__


def train(method: Method, engine: str, base: Path, *options: object) -> tuple[torch.nn.Module, list[float]]:
    new_accelerator_state()
    fields = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]}
    if engine not in ("fsdp1", "alone, no head"):  # under FSDP 1, peft 0.21 saves a whole module with no method
        fields["modules_to_save"] = ["lm_head"]
    given = ["--model", base, "--steps", 4, "--batch", 4, *options]
    return example.train(example.parse_arguments([str(option) for option in given]), method.config(**fields))


@torch.no_grad()
def probe(model: torch.nn.Module) -> torch.Tensor:
    model.eval()  # DeepSpeed's returns nothing
    return model(input_ids=PROBE).logits


def casts(engine: str) -> dict[str, list[AbstractContextManager]]:
    """As `variants`: lower precision, in which engines cast parameters, buffers or both, or the base comes so."""
    found = {"mixed precision": [patch.dict(os.environ, ACCELERATE_MIXED_PRECISION="bf16")]}
    if engine == "zero3":  # it reads the base in bfloat16, and takes what is trained in one dtype only, of any method
        in_one_dtype = partial(example.get_peft_model, autocast_adapter_dtype=False)
        found["mixed precision"].append(patch.object(example, "get_peft_model", in_one_dtype))
    else:
        found["bfloat16 base"] = [base_becomes(PreTrainedModel.bfloat16)]
    return found


def variants(engine: str) -> dict[str, list[AbstractContextManager]]:
    """By name, what to change before training."""
    found = {
        "reentrant": [base_becomes(partial(checkpointed, reentrant=True))],
        "not reentrant": [base_becomes(partial(checkpointed, reentrant=False))],
    }
    if engine == "ddp":
        found["other weights"] = [base_becomes(other_on_other_processes)]
    if engine == "fsdp2":
        found["root"] = [patch.dict(os.environ, FSDP_AUTO_WRAP_POLICY="NO_WRAP")]
        found["with a layer"] = [patch.dict(os.environ, FSDP_TRANSFORMER_CLS_TO_WRAP="LlamaDecoderLayer")]
    return found


def base_becomes(change: Callable[[PreTrainedModel], None]) -> AbstractContextManager:
    def load(name: str) -> PreTrainedModel:
        base = load_base(name)
        change(base)
        return base

    load_base = example.load_base
    return patch.object(example, "load_base", load)


def checkpointed(base: PreTrainedModel, *, reentrant: bool) -> None:
    base.gradient_checkpointing_enable({"use_reentrant": reentrant})


@torch.no_grad()
def other_on_other_processes(base: PreTrainedModel) -> None:
    for parameter in base.parameters():
        parameter.mul_(1 + PartialState().process_index)
