"""Adapters that every released version wrote load, and compute what they computed then."""

from importlib.metadata import version

import pytest
import torch
from laws import tolerance
from peft import PeftModel
from released_adapters import EXPECTED, FOLDER, LAYERS, SIZE, base_model, configs, inputs
from safetensors.torch import load_file

from craft_peft import load_adapter

ADAPTERS = sorted(path.parent for path in FOLDER.glob("*/*/adapter_config.json"))


@pytest.mark.parametrize("folder", ADAPTERS, ids=lambda path: f"{path.parent.name}-{path.name}")
@pytest.mark.parametrize("load", [load_adapter, PeftModel.from_pretrained])
def test_it_computes_what_it_did(folder, load):
    expected = load_file(folder.parent / EXPECTED)[folder.name]
    with torch.no_grad():
        found = load(base_model(), folder).eval()(inputs())
    # Of other versions of torch, sums may be in another order.
    bound = tolerance(torch.float32, SIZE * LAYERS * 10) * expected.abs().max()
    assert (found - expected).abs().max() <= bound


def test_this_version_is_among_them():
    """A test of what is written now is a test of what later versions must read."""
    assert {path.name for path in ADAPTERS if path.parent.name == version("craft-peft")} == set(configs())
