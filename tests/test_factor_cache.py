"""Weights of a model read one by one, and the memory on disk of what was computed from them."""

import os
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from laws import assert_close
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from small_models import bert, logits
from test_streaming import random_tensor

import craft_peft.adapters.craft as craft_module
import craft_peft.plugin.base_weights as base_weights_module
import craft_peft.plugin.progress as progress_module
from craft_peft import CraftConfig, CraftError, hosvd
from craft_peft.plugin.factor_cache import FactorCache, key_of
from craft_peft.plugin.progress import Progress
from craft_peft.plugin.stacks import collect_stacks
from craft_peft.tucker import reads_of_each_slice

SHAPE, RANKS = (3, 8, 6), (3, 4, 4)
KEY = "0123"


@pytest.fixture
def decompositions(monkeypatch):
    """Counts how often anything is decomposed."""
    calls, original = [], craft_module.hosvd
    monkeypatch.setattr(craft_module, "hosvd", lambda *args, **kwargs: calls.append(args) or original(*args, **kwargs))
    return calls


@pytest.fixture
def cache_folder(monkeypatch, tmp_path):
    """A cache that also remembers what is computed at once."""
    monkeypatch.setenv("CRAFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(base_weights_module, "REMEMBERED_COST", 0)
    return tmp_path / "cache"


def adapted(base=None, **fields):
    config = CraftConfig(task_type="SEQ_CLS", target_modules=["query", "value"], init_weights=False, **fields)
    base = bert() if base is None else base
    torch.manual_seed(1)
    return get_peft_model(base, config).eval()


def stacks_of(model):
    targets = [(key, module) for key, module in model.named_modules() if key.endswith((".query", ".value"))]
    return collect_stacks(targets)


def test_the_second_adapter_on_a_base_decomposes_nothing(cache_folder, decompositions):
    first = logits(adapted())
    assert len(decompositions) == 2 and len(list(cache_folder.iterdir())) == 2
    assert torch.equal(logits(adapted()), first)
    assert len(decompositions) == 2
    adapted(ranks=(2, 4, 4))
    adapted(decomposition="hooi")
    assert len(decompositions) == 6 and len(list(cache_folder.iterdir())) == 6


@pytest.mark.parametrize("change", ["one bit", "layers swapped", "dtype"])
def test_another_base_is_another_key(cache_folder, decompositions, change):
    adapted()
    base = bert()
    query = base.bert.encoder.layer[1].attention.self.query.weight.data
    if change == "one bit":
        query[0, 1] = torch.nextafter(query[0, 1], torch.tensor(torch.inf))
    elif change == "layers swapped":
        base.bert.encoder.layer[0], base.bert.encoder.layer[1] = base.bert.encoder.layer[1], base.bert.encoder.layer[0]
    else:
        base.bfloat16()
    adapted(base)
    assert len(decompositions) == {"one bit": 3}.get(change, 4)


def test_a_key_depends_on_everything_that_the_factors_depend_on():
    tensor = random_tensor(SHAPE, dtype=torch.float32)
    keys = [
        key_of(tensor, RANKS, "hosvd"),
        key_of(tensor, RANKS, "hooi"),
        key_of(tensor, (2, 4, 4), "hosvd"),
        key_of(tensor.double(), RANKS, "hosvd"),
        key_of(tensor.reshape(3, 6, 8), RANKS, "hosvd"),
        key_of(tensor.flip(0), RANKS, "hosvd"),
    ]
    assert len(set(keys)) == len(keys)
    assert key_of(tensor.transpose(1, 2).contiguous().transpose(1, 2), RANKS, "hosvd") == keys[0]


def test_what_is_computed_at_once_leaves_no_file(monkeypatch, tmp_path):
    monkeypatch.setenv("CRAFT_CACHE", str(tmp_path / "cache"))
    adapted()
    assert not (tmp_path / "cache").exists()


def test_the_folder_follows_the_environment(monkeypatch, tmp_path):
    for switch in ("off", "OFF", "0", ""):
        monkeypatch.setenv("CRAFT_CACHE", switch)
        assert FactorCache.from_environment() is None
    monkeypatch.setenv("CRAFT_CACHE", "~/elsewhere")
    assert FactorCache.from_environment().folder == Path.home() / "elsewhere"
    monkeypatch.delenv("CRAFT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert FactorCache.from_environment().folder == tmp_path / "craft_peft"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert FactorCache.from_environment().folder == Path.home() / ".cache" / "craft_peft"


def stored(folder, key=KEY, seed=0):
    cache = FactorCache(folder)
    tucker = hosvd(random_tensor(SHAPE, seed, torch.float32), RANKS)
    cache.store(key, tucker)
    return cache, tucker


def test_what_is_loaded_is_what_was_stored(tmp_path):
    cache, tucker = stored(tmp_path)
    found = cache.load(KEY, SHAPE, RANKS)
    assert torch.equal(found.core, tucker.core)
    assert all(torch.equal(*pair) for pair in zip(found.factors, tucker.factors, strict=True))
    assert cache.load("4567", SHAPE, RANKS) is None


def cut(path):
    path.write_bytes(path.read_bytes()[:-10])


def flipped(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def emptied(path):
    path.write_bytes(b"")


def foreign(path):
    save_file({"weight": torch.ones(2)}, path)


def of_another_key(path):
    stored(path.parent, "4567")
    os.replace(path.parent / "4567.safetensors", path)


@pytest.mark.parametrize("harm", [cut, flipped, emptied, foreign, of_another_key], ids=lambda harm: harm.__name__)
def test_a_file_that_is_not_whole_is_a_warning_and_is_replaced(tmp_path, harm):
    cache, tucker = stored(tmp_path)
    path = tmp_path / f"{KEY}.safetensors"
    harm(path)
    with pytest.warns(UserWarning, match=rf"'{path}' cannot be used and is computed again"):
        assert cache.load(KEY, SHAPE, RANKS) is None
    cache.store(KEY, tucker)
    assert cache.load(KEY, SHAPE, RANKS) is not None


def test_an_adapter_is_made_in_spite_of_a_broken_file(cache_folder, decompositions):
    first = logits(adapted())
    for path in cache_folder.iterdir():
        cut(path)
    with pytest.warns(UserWarning, match="computed again"):
        assert torch.equal(logits(adapted()), first)
    assert len(decompositions) == 4
    assert torch.equal(logits(adapted()), first) and len(decompositions) == 4


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path):
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match=r"could not be cached in .*CRAFT_CACHE=off"):
        stored(tmp_path / "file")


def test_the_least_recently_used_files_go_first(tmp_path):
    for number, key in enumerate("abc"):
        stored(tmp_path, key, seed=number)
        os.utime(tmp_path / f"{key}.safetensors", (number, number))
    cache = FactorCache(tmp_path)
    assert cache.load("a", SHAPE, RANKS) is not None  # now it is the last used
    cache.most_bytes = 3 * (tmp_path / "a.safetensors").stat().st_size
    cache.store("d", hosvd(random_tensor(SHAPE, 3, torch.float32), RANKS))
    assert {path.stem for path in tmp_path.iterdir()} == {"a", "c", "d"}
    cache.most_bytes = 0
    cache.store("e", hosvd(random_tensor(SHAPE, 4, torch.float32), RANKS))
    assert {path.stem for path in tmp_path.iterdir()} == {"e"}


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def count_reads(monkeypatch):
    import craft_peft.plugin.stacks as stacks_module

    reads, original = [], stacks_module.read_weight
    monkeypatch.setattr(stacks_module, "read_weight", lambda *args: reads.append(args[1]) or original(*args))
    return reads


def test_each_weight_is_read_as_often_as_its_decomposition_needs(monkeypatch, cache_folder):
    reads = count_reads(monkeypatch)
    model = bert()
    shape = stacks_of(model)[0].shape
    sizes = (shape.layers, *shape.matrix)
    needed = reads_of_each_slice(sizes, CraftConfig().resolve_ranks("query", shape), "auto")
    adapted(model)
    names = set(reads)
    assert len(names) == 2 * shape.layers
    # One for the key; and the first of each stack once more for its shape.
    assert sorted(reads.count(name) - needed - 1 for name in names) == [0] * (2 * shape.layers - 2) + [1, 1]
    reads.clear()
    adapted()
    assert max(reads.count(name) for name in names) == 2


def test_nan_is_found_when_its_layer_is_read():
    model = bert()
    model.bert.encoder.layer[1].attention.self.value.weight.data[3, 2] = torch.nan
    weights = stacks_of(model)[1].read_weights()
    assert weights[0].shape == weights[2].shape
    with pytest.raises(CraftError, match=r"'bert.encoder.layer.1.attention.self.value' holds NaN"):
        weights[1]


def test_weights_that_accelerate_has_offloaded_are_read_and_adapted():
    expected = adapted()
    base = bert()
    cpu_offload(base, execution_device=torch.device("cpu"))
    assert base.bert.encoder.layer[0].attention.self.query.weight.is_meta
    found = adapted(base)
    assert base.bert.encoder.layer[0].attention.self.query.base_layer.weight.is_meta
    factors = [
        {name: buffer for name, buffer in model.named_buffers() if name.endswith(("core", "out_factor", "in_factor"))}
        for model in (found, expected)
    ]
    assert len(factors[0]) == 6 and factors[0].keys() == factors[1].keys()
    assert all(torch.equal(buffer, factors[1][name]) for name, buffer in factors[0].items())
    assert_close(logits(found), logits(expected), products=100)  # not bit by bit: only a layer that is there is fused


# ---------------------------------------------------------------------------------------------------------------------
# Progress
# ---------------------------------------------------------------------------------------------------------------------


def shown(capsys):
    return capsys.readouterr().err


def test_a_short_decomposition_shows_no_bar(capsys):
    adapted()
    assert "Decomposing" not in shown(capsys)


def test_a_long_one_shows_one_bar_for_all_stacks(capsys, monkeypatch):
    monkeypatch.setattr(progress_module, "DELAY", 0)
    adapted()
    err = shown(capsys)
    assert "Decomposing the base weights: 0 %" in err


def test_the_bar_goes_from_nothing_to_everything(capsys, monkeypatch):
    monkeypatch.setattr(progress_module, "DELAY", 0)
    progress, seen = Progress(stacks=2), []
    for _ in range(2):
        with progress.of_stack(reads=4):
            for _ in range(5):  # more than was said
                progress.read()
                seen.append(progress._bar.n)
    assert seen == [0.25, 0.5, 0.75, 1, 1, 1.25, 1.5, 1.75, 2, 2]
    assert progress._bar is None


def test_hugging_faces_switch_turns_the_bar_off(capsys, monkeypatch):
    from transformers.utils import logging

    monkeypatch.setattr(progress_module, "DELAY", 0)
    logging.disable_progress_bar()
    try:
        adapted()
    finally:
        logging.enable_progress_bar()
    assert "Decomposing" not in shown(capsys)


def test_a_file_holds_core_and_factors_alone(tmp_path):
    stored(tmp_path)
    assert set(load_file(tmp_path / f"{KEY}.safetensors")) == {"core", "factor_0", "factor_1", "factor_2"}
