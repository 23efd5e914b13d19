"""DDP, FSDP 1 and 2 and DeepSpeed ZeRO-3 on two processes, with the configurations of `examples/accelerate`."""

import importlib.util
import multiprocessing
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import distributed_worker as worker
import pytest
import torch
from accelerate.commands.launch import launch_command, launch_command_parser
from laws import SHAPE, assert_close
from method_table import Method
from peft import PeftModel
from safetensors.torch import load_file
from torch.multiprocessing import start_processes
from transformers import AutoModelForCausalLM

from craft_peft.errors import CraftError
from craft_peft.plugin import distributed

has_deepspeed = importlib.util.find_spec("deepspeed") is not None
feature = pytest.mark.peft_feature
ENGINES = {"ddp": "DDP", "fsdp1": "FSDP 1", "fsdp2": "FSDP 2", "zero3": "DeepSpeed ZeRO-3"}
for_all_methods = pytest.mark.parametrize("method", worker.ROWS, ids=str)


def for_engines(*names: str, shown: bool = True) -> pytest.MarkDecorator:
    """Run with what these engines left behind; `shown` if that the test passes shows that the engine works."""
    chosen = []
    for name in names or ENGINES:
        skip = [pytest.mark.skipif(name == "zero3" and not has_deepspeed, reason="deepspeed is not installed")]
        chosen.append(pytest.param(name, marks=[feature(ENGINES[name]), *skip] if shown else skip))
    return pytest.mark.parametrize("engine", chosen, indirect=True, scope="module")


@dataclass(frozen=True)
class Ran:
    """What an engine's processes left behind.

    Args:
        folder: where; holds a folder of adapters and checkpoints a method.
        alone: one process that trained the same.
    """

    engine: str
    folder: Path
    alone: "Ran | None" = None

    def reports(self, method: Method) -> list[dict]:
        return [torch.load(path, weights_only=True) for path in sorted(self.folder.glob(f"{method.name}-*.pt"))]

    def expected(self, method: Method) -> dict:
        assert self.alone is not None
        return self.alone.reports(method)[0]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    worker.example.load_base(None).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def process_server() -> Iterator[None]:
    """The processes are forks of a server that has imported everything: each would spend ten seconds on that."""
    preload = ["distributed_worker", "datasets", "deepspeed"]  # what is not there is left out
    multiprocessing.get_context("forkserver").set_forkserver_preload(preload)
    settings = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    with patch.dict(os.environ, settings | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}):
        yield


@pytest.fixture(scope="module")
def alone(base, tmp_path_factory, process_server) -> Ran:
    return run_alone("alone", base, tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module")
def alone_without_head(base, tmp_path_factory, process_server) -> Ran:
    return run_alone("alone, no head", base, tmp_path_factory.mktemp("alone"))


def run_alone(engine: str, base: Path, folder: Path) -> Ran:
    start_processes(worker.enter, (dict(os.environ), engine, base, folder), nprocs=1, start_method="forkserver")
    return Ran(engine, folder)


@pytest.fixture(scope="module")
def engine(request, base, tmp_path_factory) -> Ran:
    """`accelerate launch` with the example's configuration, but for torchrun's processes, which are ours."""
    folder = tmp_path_factory.mktemp(request.param)

    def start(args) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        environment = {**os.environ, **address, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        assert args.nproc_per_node == "2"
        start_processes(worker.enter, (environment, request.param, base, folder), nprocs=2, start_method="forkserver")

    expected = request.getfixturevalue("alone_without_head" if request.param == "fsdp1" else "alone")
    options = ["--config_file", config_of(request.param), "--main_process_port", "0", worker.example.__file__]
    with patch("torch.distributed.run.run", start):
        launch_command(launch_command_parser().parse_args(options))
    return Ran(request.param, folder, expected)


def config_of(engine: str) -> str:
    return str(worker.EXAMPLES / "accelerate" / f"{engine}.yaml")


def assert_same_losses(found: object, expected: list[float]) -> None:
    assert isinstance(found, list), f"refused: {found}"
    # Each of the steps rounds some thousand products and starts from the rounding of the one before.
    assert_close(torch.tensor(found), torch.tensor(expected), products=100)


@for_engines()
@for_all_methods
def test_losses_are_those_of_one_process(engine, method):
    assert len(engine.reports(method)) == 2
    for report in engine.reports(method):
        assert_same_losses(report["losses"], engine.expected(method)["losses"])


@for_engines()
@for_all_methods
def test_processes_stay_equal(engine, method):
    """The frozen tensors are also those of one process: each process decomposes, and finds the same."""
    first, second = engine.reports(method)
    assert torch.equal(first["logits"], second["logits"])
    for report in (first, second):
        found = {re.sub(r"_fsdp_wrapped_module\.|^module\.", "", n): tensor for n, tensor in report["frozen"].items()}
        assert found.keys() == engine.expected(method)["frozen"].keys()
        assert all(torch.equal(found[n], tensor) for n, tensor in engine.expected(method)["frozen"].items())


@for_engines()
@for_all_methods
def test_saved_adapter_gives_the_same_logits_alone(engine, method, base):
    adapter = str(engine.folder / method.name / "adapter")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    # Some engines keep base and adapter from being one step, which rounds in another order.
    assert_close(worker.probe(loaded), engine.reports(method)[0]["logits"], products=1000)


@for_engines()
@for_all_methods
def test_resuming_ends_with_the_same_weights(engine, method):
    for report in engine.reports(method):
        assert report["resumed"] == report["losses"][2:]
    files = [engine.folder / method.name / name / "adapter_model.safetensors" for name in ("adapter", "resumed")]
    whole, resumed = map(load_file, files)
    assert whole and whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


for_varied_methods = pytest.mark.parametrize("method", worker.VARIED, ids=str)


@for_engines()
@for_varied_methods
def test_gradient_checkpoints_change_no_loss(engine, method):
    for report in engine.reports(method):
        assert_same_losses(report["not reentrant"], engine.expected(method)["losses"])


@feature("reentrant gradient checkpoints on one process")
@for_varied_methods
def test_reentrant_checkpoints_change_no_loss_alone(alone, method):
    (report,) = alone.reports(method)
    assert_same_losses(report["reentrant"], report["losses"])


@feature(
    "reentrant gradient checkpoints on several processes",
    no="the engines could send a part of the gradient of what layers share; the other kind of checkpoints works",
)
@for_engines(shown=False)
@for_varied_methods
def test_reentrant_checkpoints_are_refused(engine, method):
    for report in engine.reports(method):
        assert isinstance(report["reentrant"], str), "not refused"
        assert 'gradient_checkpointing_kwargs={"use_reentrant": False}' in report["reentrant"]


def assert_lost_in_rounding(engine: Ran, method: Method, cast: str) -> None:
    for report in engine.reports(method):
        found, expected = torch.tensor(report[cast]), torch.tensor(engine.expected(method)["losses"])
        assert ((found - expected).abs() <= 8 * torch.finfo(torch.bfloat16).eps * expected).all()


@for_engines()
@for_all_methods
def test_mixed_precision_loses_what_its_rounding_loses(engine, method):
    """FSDP casts parameters and buffers, DeepSpeed the whole model, DDP nothing."""
    assert_lost_in_rounding(engine, method, "mixed precision")


@for_engines("ddp", "fsdp1", "fsdp2")
@for_all_methods
def test_a_bfloat16_base_loses_what_its_rounding_loses(engine, method):
    assert_lost_in_rounding(engine, method, "bfloat16 base")


@for_engines("ddp")
@for_varied_methods
def test_ddp_makes_processes_equal_that_began_with_other_weights(engine, method):
    for report in engine.reports(method):
        assert_same_losses(report["other weights"], engine.expected(method)["losses"])


@for_engines("ddp")
@for_all_methods
def test_ddp_sends_no_frozen_tensor_before_each_forward(engine, method):
    for report in engine.reports(method):
        assert report["broadcast"], "nothing at all is sent, though the base model has buffers"
        assert not [name for name in report["broadcast"] if f".{method.name}_" in name]


@for_engines("fsdp2")
@for_varied_methods
def test_fsdp2_shards_adapters_by_themselves_or_with_the_root(engine, method):
    for report in engine.reports(method):
        assert_same_losses(report["root"], engine.expected(method)["losses"])
        wanted = f"add '{worker.adapter_class(method)}' to `fsdp_transformer_layer_cls_to_wrap`"
        assert wanted in report["with a layer"]


@feature("DDP")
def test_the_command_of_the_example(tmp_path, base):
    """As users run it, in processes of torchrun."""
    settings = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config_of("ddp")]
    options = ["--main_process_port", "0", worker.example.__file__, "--steps", "2", "--output", tmp_path / "adapter"]
    done = subprocess.run([*launcher, *options], env={**os.environ, **settings}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^step \d: loss \d+\.\d+$", done.stdout, re.MULTILINE)) == 2
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_only_the_first_process_needs_weights_where_fsdp_sends_them(monkeypatch):
    adapter = worker.ROWS[0].config().build_adapter("query", SHAPE)
    monkeypatch.setattr(distributed, "is_fsdp_enabled", lambda: True)
    monkeypatch.setattr(distributed, "is_local_dist_rank_0", lambda: False)
    distributed.initialise(adapter, refuse_to_read)
    monkeypatch.setattr(distributed, "is_local_dist_rank_0", lambda: True)
    with pytest.raises(CraftError, match="no numbers"):
        distributed.initialise(adapter, refuse_to_read)
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(CraftError, match="fsdp_cpu_ram_efficient_loading: false"):
        distributed.initialise(adapter, refuse_to_read)


def refuse_to_read() -> list[torch.Tensor]:
    raise CraftError("no numbers")
