"""Saving and loading in all of PEFT's ways, and configs, for every method."""

import copy
import json
import pickle
from unittest import mock

import pytest
import torch
import transformers.utils.hub
from laws import TARGETS, moved
from method_table import METHODS
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from peft.helpers import check_if_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from small_models import bert, gpt2, logits
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from craft_peft.plugin.config import StackConfig

pytestmark = pytest.mark.parametrize("method", METHODS, ids=str)


def load(base, folder, **options):
    return PeftModel.from_pretrained(copy.deepcopy(base), folder, **options)


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.peft_feature("`save_pretrained(selected_adapters=[...])`")
def test_chosen_adapters_are_saved_each_in_its_folder(method, tmp_path):
    model, base = moved(method)
    names = ["default2", "other_default", "efaul"]  # parts of each other
    for seed, name in enumerate(names):
        torch.manual_seed(seed)
        model.add_adapter(name, method.config(task_type="SEQ_CLS", target_modules=["key"], init_weights=False))
    model.save_pretrained(tmp_path / "all")
    model.save_pretrained(tmp_path / "two", selected_adapters=["default", "efaul"])
    assert {path.name for path in (tmp_path / "two").iterdir() if path.is_dir()} == {"efaul"}
    state = load_file(tmp_path / "two" / "adapter_model.safetensors")
    assert state.keys() == get_peft_model_state_dict(model).keys()
    loaded = load(base, tmp_path / "all")
    for name in names:
        loaded.load_adapter(tmp_path / "all" / name, adapter_name=name)
    for name in ["default", *names]:
        model.set_adapter(name)
        loaded.set_adapter(name)
        assert torch.equal(logits(loaded.eval()), logits(model.eval()))


@pytest.mark.peft_feature("`from_pretrained(subfolder=...)`")
def test_an_adapter_is_loaded_from_a_subfolder(method, tmp_path):
    model, base = moved(method)
    model.save_pretrained(tmp_path / "inner")
    assert torch.equal(logits(load(base, tmp_path, subfolder="inner")), logits(model))


@pytest.mark.peft_feature("`save_embedding_layers`")
def test_embeddings_are_saved_where_asked_or_resized(method, tmp_path):
    def saved(model, option):
        model.save_pretrained(tmp_path / "adapter", save_embedding_layers=option)
        state = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        return {name for name in state if f".{method.name}_" not in name}

    embeddings = {"base_model.model.transformer.wte.weight", "base_model.model.lm_head.weight"}
    gpt2().save_pretrained(tmp_path / "base")
    config = method.config(task_type="CAUSAL_LM", init_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), copy.deepcopy(config))
    for option, expected in ((True, embeddings), (False, set()), ("auto", set())):
        assert saved(model, option) == expected
    resized = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    resized.resize_token_embeddings(60)
    model = get_peft_model(resized, config).eval()
    with pytest.warns(UserWarning, match="embedding layer has been resized"):
        assert saved(model, "auto") == embeddings
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    other.resize_token_embeddings(60)
    assert torch.equal(logits(PeftModel.from_pretrained(other, tmp_path / "adapter")), logits(model))


@pytest.mark.peft_feature("`save_pretrained(safe_serialization=False)`, `torch.save` of a state dict")
def test_pickled_files_work_too(method, tmp_path):
    model, base = moved(method)
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").exists() and not (tmp_path / "adapter_model.safetensors").exists()
    assert torch.equal(logits(load(base, tmp_path)), logits(model))
    torch.save(model.state_dict(), tmp_path / "state.pt")
    config = method.config(task_type="SEQ_CLS", target_modules=TARGETS)
    other = get_peft_model(copy.deepcopy(base), config).eval()
    assert not torch.equal(logits(other), logits(model))
    result = other.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert not result.missing_keys and not result.unexpected_keys
    assert torch.equal(logits(other), logits(model))


@pytest.mark.peft_feature("`low_cpu_mem_usage`")
def test_every_way_of_loading_can_start_without_memory(method, tmp_path):
    gpt2().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    model = get_peft_model(base, method.config(task_type="CAUSAL_LM", init_weights=False)).eval()
    model.save_pretrained(tmp_path / "adapter")
    auto = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", low_cpu_mem_usage=True)
    loaded = PeftModel.from_pretrained(gpt2(), tmp_path / "adapter", low_cpu_mem_usage=True)
    loaded.load_adapter(tmp_path / "adapter", adapter_name="beside", low_cpu_mem_usage=True)
    for found in (auto, loaded):
        assert not any(tensor.is_meta for tensor in [*found.parameters(), *found.buffers()])
        assert torch.equal(logits(found.eval()), logits(model))
    loaded.set_adapter("beside")
    assert torch.equal(logits(loaded.eval()), logits(model))


@pytest.mark.peft_feature("`from_pretrained(config=...)`")
def test_a_config_can_be_passed_along(method, tmp_path):
    model, base = moved(method)
    model.save_pretrained(tmp_path)
    config = method.config(task_type="SEQ_CLS", target_modules=TARGETS)
    loaded = load(base, tmp_path, config=config)
    assert loaded.peft_config["default"] is config and config.inference_mode
    assert torch.equal(logits(loaded), logits(model))
    assert not any(p.requires_grad for p in loaded.parameters())
    assert any(p.requires_grad for p in load(base, tmp_path, is_trainable=True).parameters())


@pytest.mark.peft_feature("`ephemeral_gpu_offload`", no="PEFT does it for DoRA alone; it warns and loads as ever.")
def test_offloading_is_ignored_with_a_warning(method, tmp_path):
    model, base = moved(method)
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="Ephemeral GPU offloading is not supported for this model"):
        loaded = load(base, tmp_path, ephemeral_gpu_offload=True)
    assert torch.equal(logits(loaded), logits(model))


# ---------------------------------------------------------------------------------------------------------------------
# The Hub
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.peft_feature("`push_to_hub`")
def test_an_adapter_is_pushed_with_its_config_and_card(method, monkeypatch):
    model, _ = moved(method)
    hub = mock.MagicMock()
    hub.create_repo.return_value.repo_id = "someone/adapter"
    monkeypatch.setattr(transformers.utils.hub, "hf_api", lambda: hub)
    monkeypatch.setattr(transformers.utils.hub, "create_and_tag_model_card", mock.MagicMock())
    model.push_to_hub("someone/adapter")
    files = {operation.path_in_repo for operation in hub.create_commit.call_args.kwargs["operations"]}
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= files


@pytest.mark.peft_feature("loading from the Hub")
def test_an_adapter_is_loaded_by_its_name_on_the_hub(method, tmp_path):
    """From the cache that a download fills, as there is no network here."""
    model, base = moved(method)
    repository = tmp_path / "models--someone--adapter"
    model.save_pretrained(repository / "snapshots" / "0123abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abc")
    loaded = load(base, "someone/adapter", cache_dir=tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert isinstance(PeftConfig.from_pretrained("someone/adapter", cache_dir=tmp_path), StackConfig)


@pytest.mark.peft_feature("`create_or_update_model_card`")
def test_a_card_is_written_and_kept(method, tmp_path):
    bert().save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, method.config(target_modules=TARGETS))
    model.create_or_update_model_card(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "library_name: peft" in card and f"base_model: {tmp_path / 'base'}" in card
    (tmp_path / "README.md").write_text(card + "\nWhat I found.\n")
    model.create_or_update_model_card(tmp_path)
    assert "What I found." in (tmp_path / "README.md").read_text()


@pytest.mark.peft_feature("`check_if_peft_model`")
def test_a_folder_is_told_from_others(method, tmp_path):
    model, _ = moved(method)
    model.save_pretrained(tmp_path / "adapter")
    assert check_if_peft_model(tmp_path / "adapter")
    bert().save_pretrained(tmp_path / "base")
    assert not check_if_peft_model(tmp_path / "base")


# ---------------------------------------------------------------------------------------------------------------------
# Configs
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.peft_feature("configs: copies, pickle, files")
def test_a_config_is_itself_after_every_trip(method, tmp_path):
    config = method.config(target_modules=["query"], exclude_modules=["value"], trainable_token_indices=[1, 2])
    for other in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert other == config
    config.save_pretrained(tmp_path)
    for kind in (type(config), PeftConfig):
        assert kind.from_pretrained(tmp_path) == config
    plain = method.config()
    plain.save_pretrained(tmp_path)
    assert type(config).from_json_file(tmp_path / "adapter_config.json") == plain.to_dict()


@pytest.mark.peft_feature("configs of later versions: unknown fields are left out with a warning")
def test_fields_of_a_later_version_are_left_out(method, tmp_path):
    config = method.config(target_modules=["query"])
    config.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "of_next_year": 1, "of_the_year_after": [2]}))
    for kind in (type(config), PeftConfig):
        with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['of_next_year', 'of_the_year_after'\]"):
            assert kind.from_pretrained(tmp_path) == config


@pytest.mark.peft_feature("`task_type`")
def test_an_unknown_task_is_refused(method):
    assert method.config(task_type="SEQ_CLS").task_type == "SEQ_CLS"
    with pytest.raises(ValueError, match="Invalid task type: 'TELEPATHY'"):
        method.config(task_type="TELEPATHY")
