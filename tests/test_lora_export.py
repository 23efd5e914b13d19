"""Export to LoRA: PEFT alone, in a process without this package, gives the same logits."""

import copy
import subprocess
import sys

import pytest
import torch
from laws import assert_close, moved
from method_table import METHODS
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from small_models import bert, gpt2, logits, roberta

from craft_peft import CraftError
from craft_peft.lora_export import to_lora
from craft_peft.plugin.layer import StackedLinear


def every_method(test):
    return pytest.mark.parametrize("method", METHODS, ids=str)(test)


def adapted(method, make, **fields):
    base = make()
    torch.manual_seed(1)
    return get_peft_model(copy.deepcopy(base), method.config(init_weights=False, **fields)).eval(), base


@pytest.mark.peft_feature("export to LoRA")
@every_method
@pytest.mark.parametrize("make", [bert, gpt2, lambda: roberta(3, 16)], ids=["bert", "gpt2 (Conv1D)", "roberta"])
def test_the_export_gives_the_same_logits(method, make, tmp_path):
    task = None if make is gpt2 else "SEQ_CLS"
    model, base = adapted(method, make, task_type=task, alpha=0.7)
    export = to_lora(model)
    export.save(tmp_path)
    assert export.total_error == 0 and set(export.errors.values()) == {0.0}
    assert_close(logits(PeftModel.from_pretrained(base, tmp_path)), logits(model), products=1000)


@pytest.mark.peft_feature("export to LoRA")
@pytest.mark.parametrize("method", list({m.name: m for m in reversed(METHODS)}.values()), ids=str)
def test_a_process_without_this_package_gives_the_same_logits(method, tmp_path):
    model, base = moved(method)
    base.save_pretrained(tmp_path / "base")
    to_lora(model).save(tmp_path / "lora")
    code = """
import sys, torch
sys.modules["craft_peft"] = None  # importing it is an error
from peft import AutoPeftModelForSequenceClassification
from safetensors.torch import save_file
torch.set_num_threads(1)
model = AutoPeftModelForSequenceClassification.from_pretrained(sys.argv[1] + "/lora").eval()
tokens = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(0))
save_file({"logits": model(tokens).logits.detach()}, sys.argv[1] + "/found.safetensors")
"""
    config = model.peft_config["default"]
    config.base_model_name_or_path = str(tmp_path / "base")
    to_lora(model).save(tmp_path / "lora")
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert_close(load_file(tmp_path / "found.safetensors")["logits"], logits(model), products=1000)


@every_method
def test_a_smaller_rank_is_the_best_fit_and_tells_its_error(method):
    model, _ = moved(method)
    exact = to_lora(model).config.r
    lost, energy = 0.0, 0.0
    export = to_lora(model, rank=exact - 1)
    for key, layer in model.get_base_model().named_modules():
        if not isinstance(layer, StackedLinear):
            continue
        delta = layer.get_delta_weight("default").detach().double()
        a, b = (export.tensors[f"base_model.model.{key}.lora_{name}.weight"].double() for name in "AB")
        values = torch.linalg.svdvals(delta)
        error = (delta - b @ a).norm()
        assert a.shape[0] == exact - 1
        torch.testing.assert_close(error, values[exact - 1 :].norm(), rtol=1e-4, atol=1e-6)
        assert export.errors[key] == pytest.approx((error / delta.norm()).item(), rel=1e-4, abs=1e-6)
        lost, energy = lost + error.square().item(), energy + delta.square().sum().item()
    assert export.total_error == pytest.approx((lost / energy) ** 0.5, rel=1e-4)


@every_method
def test_the_dtype_can_be_chosen(method):
    model, _ = moved(method)
    tensors = to_lora(model, dtype=torch.bfloat16).tensors
    assert {t.dtype for key, t in tensors.items() if ".lora_" in key} == {torch.bfloat16}


@every_method
def test_short_target_names_only_where_they_match_no_more(method):
    whole, _ = moved(method)
    assert to_lora(whole).config.target_modules == {"query", "value"}
    part, _ = moved(method, layers_to_transform=[0, 2])
    assert all(name.endswith((".query", ".value")) for name in to_lora(part).config.target_modules)


@every_method
def test_bad_input(method):
    model, _ = moved(method)
    exact = to_lora(model).config.r
    for rank in (0, exact + 1):
        with pytest.raises(CraftError, match=rf"rank={rank} is outside 1..{exact}; rank {exact} is exact already"):
            to_lora(model, rank=rank)
    with pytest.raises(CraftError, match=r"There is no adapter 'other'. The model has default"):
        to_lora(model, "other")
    lora = get_peft_model(bert(), LoraConfig(target_modules=["query"]))
    with pytest.raises(CraftError, match=r"is a PeftType.LORA adapter, not one of craft_peft"):
        to_lora(lora)


def test_nothing_is_left_of_the_stack_in_the_file(tmp_path):
    model, _ = moved(METHODS[0])
    to_lora(model).save(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert not any("craft" in key for key in keys)
    assert any("classifier" in key for key in keys)
