"""`torch.compile` without graph breaks or recompilation, `torch.jit.trace` and `torch.export`, for every method."""

import json
import subprocess
import sys

import compiled_laws
import pytest
import torch
from compiled_laws import CASES, TRACE_CASES, Blocks, adapted, rows
from laws import assert_close
from method_table import METHODS


@pytest.fixture(scope="module")
def outcomes():
    done = subprocess.run([sys.executable, compiled_laws.__file__], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.peft_feature("`torch.compile(fullgraph=True)`, one graph for all batch sizes")
@pytest.mark.parametrize(("use", "method"), CASES, ids=lambda part: getattr(part, "__name__", str(part)))
def test_compiles_to_one_graph(use, method, outcomes):
    assert outcomes[f"{use.__name__}-{method}"] == ""


@pytest.mark.peft_feature("`torch.jit.trace`: saved, loaded, the same outputs")
@pytest.mark.parametrize(("use", "method"), TRACE_CASES, ids=lambda part: getattr(part, "__name__", str(part)))
def test_a_trace_computes_the_same(use, method, outcomes):
    assert outcomes[f"{use.__name__}-{method}"] == ""


@pytest.mark.peft_feature("`torch.export`, adapted and merged")
@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("merged", [False, True], ids=["adapted", "merged"])
def test_exports_to_a_program_with_the_same_outputs(method, merged):
    model = adapted(method, Blocks()).eval()
    with torch.no_grad():
        expected = model(rows(3))
        model = model.merge_and_unload() if merged else model
        sizes = {0: torch.export.Dim("rows")}
        sizes = (sizes,) if merged else ((sizes,),)  # a PeftModel takes *args
        program = torch.export.export(model, (rows(2),), dynamic_shapes=sizes).module()
        assert_close(program(rows(3)), expected, products=200)
