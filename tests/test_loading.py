"""Adapters from strangers: what is whole loads, what is not is one clear error and leaves the base model as it was."""

import copy
import json
import os
import shutil

import pytest
import torch
from laws import TARGETS, moved
from method_table import METHODS
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from small_models import bert, logits
from transformers import LlamaConfig, LlamaForCausalLM

from craft_peft import CraftConfig, CraftError, load_adapter, save_adapter

every_method = pytest.mark.parametrize("method", METHODS, ids=str)
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with an adapter, its model's outputs, and the base model."""
    folder = tmp_path_factory.mktemp("adapters") / "saved"
    model, base = moved(METHODS[0])
    model.save_pretrained(folder)
    return folder, logits(model), base


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved[0], tmp_path / "adapter")


def state(model):
    """Everything by which a model could differ: modules, hooks, tensors, what is trained, attributes."""
    return (
        [(name, type(module), sorted(module.__dict__)) for name, module in model.named_modules()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        [(name, parameter.requires_grad) for name, parameter in model.named_parameters()],
    )


def assert_refused(base, folder, match, name="default"):
    before, weights = state(base), {k: v.clone() for k, v in base.state_dict().items()}
    with pytest.raises(CraftError, match=match):
        load_adapter(base, folder, name)
    assert state(base) == before
    assert all(torch.equal(value, weights[key]) for key, value in base.state_dict().items())


def edit(folder, **fields):
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def change_tensors(folder, change, checked=True):
    tensors = load_file(folder / TENSORS)
    tensors = {key: tensor for key, tensor in change(tensors).items() if tensor is not None}
    save_file(tensors, folder / TENSORS)
    if not checked:
        edit(folder, tensors_sha256=None)


@every_method
def test_what_was_saved_is_loaded(method, tmp_path):
    model, base = moved(method)
    save_adapter(model, tmp_path / "mine")
    loaded = load_adapter(copy.deepcopy(base), tmp_path / "mine")
    assert torch.equal(logits(loaded), logits(model)) and not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    second = load_adapter(loaded, tmp_path / "mine", "second", is_trainable=True)
    second.set_adapter("second")
    assert second is loaded and torch.equal(logits(loaded.eval()), logits(model))
    assert any(p.requires_grad for n, p in loaded.named_parameters() if ".second" in n)


@pytest.mark.parametrize("start", [True, "pissa"])
def test_adapters_of_peft_itself(start, tmp_path):
    base = bert()
    config = LoraConfig(task_type="SEQ_CLS", target_modules=TARGETS, init_lora_weights=start)
    model = get_peft_model(copy.deepcopy(base), config).eval()
    save_adapter(model, tmp_path / "lora")
    assert torch.equal(logits(load_adapter(copy.deepcopy(base), tmp_path / "lora")), logits(model))
    change_tensors(tmp_path / "lora", lambda t: {k: v[None] for k, v in t.items()})
    assert_refused(base, tmp_path / "lora", "ask for")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda f: (f / CONFIG).unlink(), "holds no adapter_config.json"),
        (lambda f: (f / TENSORS).unlink(), "holds no adapter_model.safetensors"),
        (lambda f: (f / TENSORS).rename(f / "adapter_model.bin"), "pickle file"),
        (lambda f: (f / CONFIG).write_text("{"), "not a JSON file"),
        (lambda f: (f / CONFIG).write_text("[" * 100_000), "not a JSON file"),
        (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe{}"), "not a JSON file"),
        (lambda f: (f / CONFIG).write_text("[]"), "no `peft_type`"),
        (lambda f: (f / CONFIG).write_text(" " * 2_000_000), "at most 1,000,000"),
        (lambda f: edit(f, peft_type="HEIST"), "unknown method 'HEIST'"),
        (lambda f: edit(f, run_this="rm"), "does not know: 'run_this'"),
        (lambda f: edit(f, ranks=[3, 4]), "three whole numbers"),
        (lambda f: edit(f, ranks=[3, 4, 10**9]), "Use `ranks="),
        (lambda f: edit(f, ranks="paper"), "ask for"),
        (lambda f: edit(f, alpha="1"), "alpha='1' has the wrong type"),
        (lambda f: edit(f, alpha=float("nan")), "alpha=nan has the wrong type"),
        (lambda f: edit(f, save_factors=1), "save_factors=1 has the wrong type"),
        (lambda f: edit(f, target_modules=[1]), "target_modules"),
        (lambda f: edit(f, target_modules=["querry"]), "matches no module"),
        (lambda f: edit(f, target_modules=r"(.+)+x"), "may take for ever to match"),
        (lambda f: edit(f, exclude_modules=r".*.*.*.*.*x"), "may take for ever to match"),
        (lambda f: edit(f, rank_pattern={"(a|a)*b": [1, 1, 1]}), "may take for ever to match"),
        (lambda f: edit(f, target_modules="(query"), "is not a regular expression"),
        (lambda f: edit(f, modules_to_save=["pooler"]), "lacks the tensors"),
        (lambda f: (f / TENSORS).write_bytes((f / TENSORS).read_bytes()[:-1]), "not a whole safetensors file"),
        (lambda f: (f / TENSORS).write_bytes(b""), "not a whole safetensors file"),
        (lambda f: (f / TENSORS).write_bytes(b"\xff" * 100), "not a whole safetensors file"),
        (lambda f: change_tensors(f, lambda t: {k: v + 1 for k, v in t.items()}), "SHA-256 differs"),
        (lambda f: change_tensors(f, lambda t: {k + "x": v for k, v in t.items()}, False), "lacks the tensors"),
        (lambda f: change_tensors(f, lambda t: {**t, "roberta.weight": torch.ones(2)}, False), "does not ask for"),
        (lambda f: change_tensors(f, lambda t: {k: v[None] for k, v in t.items()}, False), "ask for"),
        (lambda f: change_tensors(f, lambda t: {k: v.int() for k, v in t.items()}, False), "ask for"),
        (lambda f: change_tensors(f, lambda t: {k: v / 0 for k, v in t.items()}, False), "NaN or infinity"),
    ],
)
def test_what_is_refused(change, match, folder, saved):
    change(folder)
    assert_refused(copy.deepcopy(saved[2]), folder, match)
    adapted = get_peft_model(copy.deepcopy(saved[2]), CraftConfig(target_modules=TARGETS))
    assert_refused(adapted, folder, match, "second")


@pytest.mark.parametrize(
    "fields",
    [
        {"peft_type": "LORA", "megatron_config": {"a": 1}, "megatron_core": "antigravity"},
        {"peft_type": "XLORA", "adapters": {"0": "/elsewhere"}},
        {"peft_type": "PROMPT_TUNING", "tokenizer_name_or_path": "/elsewhere", "prompt_tuning_init": "TEXT"},
        {"peft_type": "MULTITASK_PROMPT_TUNING", "prompt_tuning_init_state_dict_path": "/elsewhere"},
    ],
    ids=lambda fields: fields["peft_type"],
)
def test_configs_that_reach_elsewhere(fields, folder, saved):
    (folder / CONFIG).write_text(json.dumps({"task_type": "SEQ_CLS", **fields}))
    assert_refused(copy.deepcopy(saved[2]), folder, "makes PEFT read other files than the adapter's, or import modules")


def test_links_out_of_the_folder(folder, saved, tmp_path):
    (folder / TENSORS).rename(tmp_path / "elsewhere")
    (folder / TENSORS).symlink_to(tmp_path / "elsewhere")
    assert_refused(copy.deepcopy(saved[2]), folder, "outside the adapter's folder")


def test_links_within_the_cache_of_the_hub(folder, saved, tmp_path):
    blobs, snapshot = tmp_path / "models--me--mine" / "blobs", tmp_path / "models--me--mine" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for name in (CONFIG, TENSORS):
        (folder / name).rename(blobs / name)
        (snapshot / name).symlink_to(os.path.relpath(blobs / name, snapshot))
    assert torch.equal(logits(load_adapter(copy.deepcopy(saved[2]), snapshot)), saved[1])


@pytest.mark.parametrize("what", ["missing", "fifo"])
def test_what_is_no_folder_or_file(what, folder, saved):
    if what == "missing":
        assert_refused(copy.deepcopy(saved[2]), folder / "nowhere", "There is no folder")
    else:
        (folder / TENSORS).unlink()
        os.mkfifo(folder / TENSORS)
        assert_refused(copy.deepcopy(saved[2]), folder, "not a regular file")


def test_a_name_that_is_taken(folder, saved):
    adapted = get_peft_model(copy.deepcopy(saved[2]), CraftConfig(target_modules=TARGETS))
    assert_refused(adapted, folder, "already")


def test_a_failure_late_in_loading(folder, saved, monkeypatch):
    """Whatever PEFT may raise after it changed the model."""

    def fail(*args, **kwargs):
        raise RuntimeError("the disk is on fire\nand more")

    monkeypatch.setattr("craft_peft.plugin.loading.set_peft_model_state_dict", fail)
    assert_refused(copy.deepcopy(saved[2]), folder, "this base model: the disk is on fire$")


def test_saving_replaces_a_folder_at_once(folder, saved, tmp_path):
    other, _ = moved(METHODS[0], alpha=2.0)
    (folder / "notes.txt").write_text("mine")
    save_adapter(other, folder)
    assert torch.equal(logits(load_adapter(copy.deepcopy(saved[2]), folder)), logits(other))
    assert (folder / "notes.txt").read_text() == "mine"
    assert os.listdir(tmp_path) == ["adapter"]


@pytest.mark.parametrize("step", ["save_pretrained", "fsync", "rename"])
def test_saving_that_fails_leaves_the_old_adapter(step, folder, saved, tmp_path, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    other, _ = moved(METHODS[0], alpha=2.0)
    if step == "save_pretrained":
        monkeypatch.setattr(PeftModel, "save_pretrained", fail)
    else:
        monkeypatch.setattr("craft_peft.plugin.folders." + {"fsync": "flush", "rename": "replace_folder"}[step], fail)
    with pytest.raises(OSError, match="No space left"):
        save_adapter(other, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert os.listdir(tmp_path) == ["adapter"]


def test_saving_another_adapter_than_the_default(tmp_path, saved):
    model, base = moved(METHODS[0])
    model.add_adapter("second", CraftConfig(target_modules=TARGETS, task_type="SEQ_CLS", init_weights=False))
    save_adapter(model, tmp_path / "second", "second")
    model.set_adapter("second")
    assert torch.equal(logits(load_adapter(base, tmp_path / "second")), logits(model.eval()))
    with pytest.raises(CraftError, match="no adapter 'third'"):
        save_adapter(model, tmp_path / "third", "third")


def test_a_field_of_a_newer_peft_is_not_blamed_on_this_package(folder, saved):
    config = json.loads((folder / CONFIG).read_text())
    config["field_of_a_newer_peft"] = None
    config["peft_version"] = "9.9"
    (folder / CONFIG).write_text(json.dumps(config))
    with pytest.raises(CraftError, match=r"craft-peft 0\.\S+ \(here 0\.\S+\) and peft 9\.9 \(here 0\.\S+\)\. Update"):
        load_adapter(copy.deepcopy(saved[2]), folder)


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, num_key_value_heads=2, **sizes)).eval()


@every_method
@pytest.mark.parametrize("resized", [True, False], ids=["a resized vocabulary", "an adapted head"])
def test_embeddings_that_peft_saves_beside_an_adapter_are_loaded(method, resized, tmp_path):
    base, targets = llama(), ["q_proj", "v_proj"]
    if resized:
        base.resize_token_embeddings(53)
    config = method.config(task_type="CAUSAL_LM", target_modules=targets, init_weights=False)
    model = get_peft_model(base, config).eval()
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    fresh = llama()
    if resized:
        torch.manual_seed(9)
        fresh.resize_token_embeddings(53)
    assert torch.equal(logits(load_adapter(fresh, tmp_path)), logits(model))
