"""An adapter that is loaded on other weights than it was trained on says so, however it is loaded; on the same weights,
rounded or quantised in whatever way, it says nothing (every warning is an error in these tests)."""

import copy
import json
import pickle

import pytest
import torch
from accelerate import init_empty_weights
from laws import SHAPE, TARGETS
from method_table import METHODS
from peft import PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils import set_peft_model_state_dict
from quantised_models import BACKENDS, WIDTH
from safetensors.torch import load_file
from small_models import bert, logits, tokens
from transformers import AutoModel, BertForSequenceClassification, BitsAndBytesConfig

from craft_peft import CraftConfig, CraftError

CRAFT = METHODS[0]
MESSAGE = r"trained on other weights than those of this base model \(seen in stack 'query'\)"

with_fingerprint = pytest.mark.parametrize(
    "method", [m for m in METHODS if hasattr(m.adapter(SHAPE), "fingerprint")], ids=str
)


def saved(method, base, folder, **fields):
    torch.manual_seed(1)
    model = get_peft_model(base, method.config(target_modules=TARGETS, init_weights=False, **fields)).eval()
    model.save_pretrained(folder)
    return model


def told(found):
    return sum("trained on other weights" in str(warning.message) for warning in found)


def through_peft(base, folder):
    return PeftModel.from_pretrained(base, folder)


def with_little_memory(base, folder):
    return PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=True)


def beside_another(base, folder):
    config = PeftConfig.from_pretrained(folder)
    config.craft_peft_version = None
    model = get_peft_model(base, type(config)(**{**config.to_dict(), "target_modules": ["key"]}))
    model.load_adapter(folder, "second")
    model.set_adapter("second")
    return model


def into_an_injected_one(base, folder):
    inject_adapter_in_model(PeftConfig.from_pretrained(folder), base)
    set_peft_model_state_dict(base, load_file(folder / "adapter_model.safetensors"))
    return base


def through_transformers(base, folder):
    base.load_adapter(folder)
    return base


LOADERS = [through_peft, with_little_memory, beside_another, into_an_injected_one, through_transformers]
every_loader = pytest.mark.parametrize("load", LOADERS, ids=lambda load: load.__name__)


def swapped(base):
    """The same model with two layers changed for each other: all norms are there, in another order."""
    layers = base.encoder.layer if hasattr(base, "encoder") else base.bert.encoder.layer
    layers[0], layers[2] = layers[2], layers[0]
    return base


@with_fingerprint
@every_loader
@pytest.mark.peft_feature("a warning on another base model")
def test_another_base_is_told_once(method, load, tmp_path):
    model = saved(method, bert(), tmp_path)
    loaded = load(bert(), tmp_path)
    assert torch.equal(logits(loaded.eval()), logits(model))
    for other in (bert(seed=1), swapped(bert())):
        with pytest.warns(UserWarning, match=MESSAGE) as found:
            loaded = load(other, tmp_path)
        assert told(found) == 1
        assert torch.isfinite(logits(loaded.eval())).all()


@with_fingerprint
def test_the_warning_names_the_base_models_and_paths_alone_do_not_matter(method, tmp_path):
    for name, base in (("trained", bert()), ("copied", bert().bfloat16()), ("other", bert(seed=1))):
        base.save_pretrained(tmp_path / name)

    def base(name, **fields):
        return BertForSequenceClassification.from_pretrained(tmp_path / name, **fields)

    saved(method, base("trained"), tmp_path / "adapter")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for name in ("trained", "copied"):
            PeftModel.from_pretrained(base(name, dtype=dtype), tmp_path / "adapter")
    with pytest.warns(UserWarning, match=rf"{MESSAGE}: on '.*trained', while this is '.*other'"):
        PeftModel.from_pretrained(base("other"), tmp_path / "adapter")


@with_fingerprint
def test_weights_that_were_trained_a_little_are_told_from_rounded_ones(method, tmp_path):
    saved(method, bert(), tmp_path)
    base = bert()
    optimizer = torch.optim.AdamW(base.parameters(), lr=2e-5)
    for _ in range(5):
        optimizer.zero_grad()
        base(tokens(), labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()
    with pytest.warns(UserWarning, match=MESSAGE):
        PeftModel.from_pretrained(base, tmp_path)


@with_fingerprint
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: f"{backend.name} {backend.dtype}")
def test_a_quantised_copy_is_the_same_and_another_model_is_not(method, backend, tmp_path):
    saved(method, bert(width=WIDTH), tmp_path / "plain")
    saved(method, backend.bert(), tmp_path / "quantised")
    for folder, name in (("plain", None), ("quantised", backend.name)):
        assert json.loads((tmp_path / folder / "adapter_config.json").read_text())["base_quantization"] == name
    for folder, base, other in (
        ("plain", backend.bert(), backend.quantise(bert(seed=1, width=WIDTH))),
        ("quantised", bert(width=WIDTH), bert(seed=1, width=WIDTH)),
        ("quantised", backend.bert(), backend.quantise(swapped(bert(width=WIDTH)))),
    ):
        PeftModel.from_pretrained(base, tmp_path / folder)
        with pytest.warns(UserWarning, match=MESSAGE) as found:
            PeftModel.from_pretrained(other, tmp_path / folder)
        assert told(found) == 1


def test_real_weights_rounded_and_quantised_are_the_same(minilm_folder, tmp_path):
    model = get_peft_model(AutoModel.from_pretrained(minilm_folder), CraftConfig(ranks=(2, 4, 4)))
    model.save_pretrained(tmp_path)
    eight, four = BitsAndBytesConfig(load_in_8bit=True), BitsAndBytesConfig(load_in_4bit=True)
    for fields in ({"dtype": torch.bfloat16}, {"quantization_config": eight}, {"quantization_config": four}):
        PeftModel.from_pretrained(AutoModel.from_pretrained(minilm_folder, device_map="cpu", **fields), tmp_path)
    for fields in ({}, {"quantization_config": four}):
        other = swapped(AutoModel.from_pretrained(minilm_folder, device_map="cpu", **fields))
        with pytest.warns(UserWarning, match=MESSAGE):
            PeftModel.from_pretrained(other, tmp_path)


@with_fingerprint
def test_weights_that_cannot_be_read_are_not_compared(method, tmp_path):
    saved(method, bert(), tmp_path)
    with init_empty_weights():
        empty = bert()
    PeftModel.from_pretrained(empty, tmp_path, low_cpu_mem_usage=True)
    sharded = bert(seed=1)
    for layer in sharded.bert.encoder.layer:
        for linear in (layer.attention.self.query, layer.attention.self.value):
            linear.weight.data = torch.empty(0)  # as DeepSpeed's ZeRO leaves it
    PeftModel.from_pretrained(sharded, tmp_path)


@with_fingerprint
def test_a_loaded_model_can_be_copied(method, tmp_path):
    model = saved(method, bert(), tmp_path)
    loaded = PeftModel.from_pretrained(bert(), tmp_path)
    for copied in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        assert torch.equal(logits(copied), logits(model))
        copied.load_adapter(tmp_path, "default")


@every_loader
def test_without_factors_another_base_is_refused(load, tmp_path):
    model = saved(CRAFT, bert(), tmp_path, save_factors=False)
    assert torch.equal(logits(load(bert(), tmp_path).eval()), logits(model))
    with pytest.raises(CraftError, match="base weights are not those that the adapter was trained with"):
        load(bert(seed=1), tmp_path)
