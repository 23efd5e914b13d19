"""Many adapters of one base in an `AdapterBank`: held, switched, mixed in a batch, kept on disk."""

import copy
import json

import pytest
import torch
from laws import TARGETS, assert_close
from method_table import METHODS
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from small_models import LAYERS, WIDTH, bert, gpt2, logits, tokens
from transformers import RobertaConfig, RobertaForSequenceClassification, T5Config, T5ForConditionalGeneration

from craft_peft import AdapterBank, CraftConfig, CraftError, LotrConfig
from craft_peft.plugin import requests
from craft_peft.plugin.layer import StackedLinear
from craft_peft.plugin.rows import FEW_TOKENS

CRAFT = [method for method in METHODS if method.name == "craft"]
SHARED = CRAFT[0]
every_craft = pytest.mark.parametrize("method", CRAFT, ids=str)
every_keep = pytest.mark.parametrize("keep", ["transforms", "middles"])
NAMES = ["alice", "bob", "carol"]


def tenants(folder, method=SHARED, make=bert, names=NAMES, base=None, scale=1.0, **fields):
    """Adapters of one base saved to folders, each away from its start and with a head of its own."""
    base = make() if base is None else base
    for seed, name in enumerate(names):
        fields = {"task_type": "SEQ_CLS" if make is bert else None, "target_modules": None, **fields}
        model = get_peft_model(copy.deepcopy(base), method.config(**fields, alpha=1.0 + seed)).eval()
        torch.manual_seed(seed)
        for key, parameter in model.named_parameters():
            if f".{method.name}_" in key or "modules_to_save" in key:
                parameter.data = scale * torch.randn_like(parameter)
        model.save_pretrained(folder / name)
    return base


def banked(saved, base, names=NAMES, **fields):
    """A model whose own adapter is the first, and a bank with all of them under their names."""
    model = PeftModel.from_pretrained(copy.deepcopy(base), saved / names[0]).eval()
    bank = AdapterBank(model, **fields)
    for name in names:
        bank.load(saved / name)
    return model, bank


def alone(folder, base, name, rows):
    return PeftModel.from_pretrained(copy.deepcopy(base), folder / name).eval()(rows).logits.detach()


def long_rows(count, length=FEW_TOKENS + 3):
    return torch.randint(0, 50, (count, length), generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------------------------------------------------------------
# Mixed batches
# ---------------------------------------------------------------------------------------------------------------------


@every_craft
@every_keep
@pytest.mark.parametrize("length", [5, FEW_TOKENS + 3])
def test_a_row_is_as_its_adapter_alone_makes_it(method, keep, length, tmp_path):
    base = tenants(tmp_path, method)
    model, _ = banked(tmp_path, base, keep=keep)
    names = ["carol", "__base__", "alice", "default", "bob", "alice"]
    rows = long_rows(len(names), length)
    expected = {name: alone(tmp_path, base, name, rows) for name in NAMES} | {"__base__": base(rows).logits.detach()}
    expected["default"] = expected["alice"]
    mixed = model(rows, adapter_names=names).logits.detach()
    for row, name in enumerate(names):
        assert_close(mixed[row], expected[name][row], products=2000)
    assert not torch.allclose(mixed[2], expected["bob"][2]) and not torch.allclose(mixed[2], expected["__base__"][2])


@pytest.mark.parametrize("length", [5, FEW_TOKENS + 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_the_base_are_the_bases_bit_for_bit(dtype, length, tmp_path):
    base = tenants(tmp_path).to(dtype)
    model, _ = banked(tmp_path, base)
    rows = long_rows(4, length)
    with model.disable_adapter():
        expected = model(rows).logits
    mixed = model(rows, adapter_names=["alice", "__base__", "bob", "__base__"]).logits
    assert torch.equal(mixed[[1, 3]], expected[[1, 3]]) and not torch.equal(mixed[0], expected[0])


@pytest.mark.parametrize("length", [5, FEW_TOKENS + 3])
@every_craft
def test_adapters_of_the_model_itself_on_one_basis_go_together(method, length, tmp_path):
    """Equal to the loop over adapters, which is what a model with other bases takes."""
    base = tenants(tmp_path, method)
    model = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "alice", "alice")
    for name in ("bob", "carol"):
        model.load_adapter(tmp_path / name, name)
    names, rows = ["carol", "alice", "__base__", "bob", "carol"], long_rows(5, length)
    layer = next(module for module in model.eval().modules() if isinstance(module, StackedLinear))
    calls = []
    for name in NAMES:
        layer.slots[name].register_forward_pre_hook(lambda *_: calls.append(1))
        original = layer.slots[name].delta_output
        layer.slots[name].delta_output = lambda x, f=original: calls.append(1) or f(x)
    together = model(rows, adapter_names=names).logits.detach()
    assert not calls
    for module in model.modules():  # another basis by a bit: each adapter by itself
        if isinstance(module, StackedLinear):
            for number, name in enumerate(NAMES):
                if name in module.owned:
                    module.owned[name].core[0, 0, 0] += 1e-7 * number * module.owned[name].core.abs().max()
    apart = model(rows, adapter_names=names).logits.detach()
    assert len(calls) == 3, "changed bases were not noticed"
    assert_close(together, apart, products=2000)


@every_keep
def test_each_tying_needs_its_own_bank_unless_middles_are_kept(keep, tmp_path):
    base = tenants(tmp_path, SHARED, names=["alice"])
    for tying in ("diagonal", "free"):
        tenants(tmp_path, SHARED, names=[tying], base=base, tying=tying)
    model, bank = banked(tmp_path, base, names=["alice"], keep=keep)
    if keep == "transforms":
        with pytest.raises(
            CraftError, match=r"The adapter 'free' cannot join the bank. .*another `tying`.*keep=\"midd"
        ):
            bank.load(tmp_path / "free")
        return
    names, rows = ["free", "alice", "diagonal"], long_rows(3)
    for name in ("free", "diagonal"):
        bank.load(tmp_path / name)
    mixed = model(rows, adapter_names=names).logits.detach()
    for row, name in enumerate(names):
        assert_close(mixed[row], alone(tmp_path, base, name, rows)[row], products=2000)


def sequence_to_sequence():
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, eos_token_id=None)).eval()


@every_keep
@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize(("make", "task"), [(gpt2, "CAUSAL_LM"), (sequence_to_sequence, "SEQ_2_SEQ_LM")])
def test_generation_mixes(make, task, beams, keep, tmp_path):
    base = tenants(tmp_path, SHARED, make, task_type=task, scale=30.0)  # so that they choose other tokens
    model, bank = banked(tmp_path, base, keep=keep)
    names = ["carol", "__base__", "alice", "bob"]
    rows = tokens()[0].repeat(len(names), 1)
    fields = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "num_beams": beams}
    mixed = model.generate(input_ids=rows, adapter_names=names, **fields)
    for row, name in zip(mixed, names, strict=True):
        with bank.use(name):
            assert torch.equal(row, model.generate(input_ids=rows, **fields)[0]), name
    assert len({tuple(row.tolist()) for row in mixed}) > 1


def test_a_batch_leaves_nothing_behind(tmp_path):
    base = tenants(tmp_path)
    model, _ = banked(tmp_path, base)
    before = logits(model)
    for names in (["alice", "bob"], ["alice"]):
        with pytest.raises(CraftError) if len(names) == 1 else torch.no_grad():
            model(tokens(), adapter_names=names)
        assert requests._current.get() is None and requests._special == []
    assert torch.equal(logits(model), before)


# ---------------------------------------------------------------------------------------------------------------------
# Switching and heads
# ---------------------------------------------------------------------------------------------------------------------


@every_craft
@every_keep
def test_switching_is_loading_that_adapter(method, keep, tmp_path):
    base = tenants(tmp_path, method)
    model, bank = banked(tmp_path, base, keep=keep)
    own, weights = logits(model), {n: p.clone() for n, p in model.named_parameters() if "base_layer" in n}
    bank.use("bob")
    assert_close(logits(model), alone(tmp_path, base, "bob", tokens()), products=2000)
    with bank.use("carol"):
        assert_close(logits(model), alone(tmp_path, base, "carol", tokens()), products=2000)
        with bank.use("__base__"):
            assert torch.equal(logits(model), logits(base))
        with model.disable_adapter():
            assert torch.equal(logits(model), logits(base))
    assert_close(logits(model), alone(tmp_path, base, "bob", tokens()), products=2000)
    bank.use(None)
    assert torch.equal(logits(model), own)
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters() if n in weights)


def roberta():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
    return RobertaForSequenceClassification(RobertaConfig(vocab_size=50, **sizes)).eval()


def test_heads_of_several_layers_are_mixed(tmp_path):
    base = tenants(tmp_path, base=roberta())
    model, bank = banked(tmp_path, base)
    mixed = model(tokens(), adapter_names=["carol", "bob"]).logits.detach()
    for row, name in enumerate(["carol", "bob"]):
        assert_close(mixed[row], alone(tmp_path, base, name, tokens())[row], products=5000)
    head = sum(p.numel() for p in base.classifier.parameters()) * 4
    assert bank.resident_bytes["heads"] == 3 * head


# ---------------------------------------------------------------------------------------------------------------------
# Memory and disk
# ---------------------------------------------------------------------------------------------------------------------


@every_keep
def test_an_adapter_takes_its_transforms_or_its_middles_and_no_more(keep, tmp_path):
    base = tenants(tmp_path)
    _, bank = banked(tmp_path, base, keep=keep)
    of_one = 2 * {"transforms": 2**2 + 4**2 + 3**2, "middles": LAYERS * 4 * 3}[keep] * 4
    assert bank.bytes_per_adapter == of_one
    assert bank.resident_bytes == {"adapters": 3 * of_one, "heads": 3 * (WIDTH * 2 + 2) * 4, "reserved": of_one}
    assert f"3 resident as {keep}" in repr(bank)


@every_keep
@pytest.mark.parametrize("save_factors", [True, False])
def test_evicted_adapters_come_back_bit_for_bit(save_factors, keep, tmp_path):
    base = tenants(tmp_path, save_factors=save_factors)
    model, bank = banked(tmp_path, base, keep=keep, folder=tmp_path / "bank")
    bank.add("copy/of alice", adapter_name="default")  # in memory alone
    names = [*NAMES, "copy/of alice"]
    rows = tokens()[0].repeat(4, 1)
    before = model(rows, adapter_names=names).logits
    for name in names:
        bank.evict(name)
    assert bank.resident == [] and bank.resident_bytes["adapters"] == 0 == bank.resident_bytes["heads"]
    assert torch.equal(model(rows, adapter_names=names).logits, before)
    assert bank.resident == names == bank.names


def test_the_least_recently_used_goes(tmp_path):
    base = tenants(tmp_path)
    model, bank = banked(tmp_path, base, max_resident=2)
    assert bank.names == NAMES and bank.resident == ["bob", "carol"]
    model(tokens(), adapter_names=["bob", "__base__"])
    bank.use("alice")
    assert bank.resident == ["bob", "alice"]
    with pytest.raises(CraftError, match=r"no room for .* max_resident=2, .*all 2 resident adapters are needed"):
        model(tokens()[0].repeat(3, 1), adapter_names=NAMES)
    size = bank.bytes_per_adapter + (WIDTH * 2 + 2) * 4
    _, bounded = banked(tmp_path, base, max_bytes=2 * size)
    assert bounded.resident == ["bob", "carol"]


def test_what_is_nowhere_on_disk_is_not_dropped(tmp_path):
    base = tenants(tmp_path)
    _, bank = banked(tmp_path, base, names=["alice"])
    bank.add("live", adapter_name="default")
    with pytest.raises(CraftError, match=r"The adapter 'live' was never saved.*folder="):
        bank.evict("live")
    assert "live" in bank.resident


@every_keep
@pytest.mark.parametrize("save_factors", [True, False])
def test_what_a_bank_saves_loads_in_peft(save_factors, keep, tmp_path):
    base = tenants(tmp_path, save_factors=save_factors)
    _, bank = banked(tmp_path, base, keep=keep)
    bank.save("carol", tmp_path / "again")
    found, expected = (alone(tmp_path, base, name, tokens()) for name in ("again", "carol"))
    if keep == "transforms":
        assert torch.equal(found, expected)
        files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("again", "carol")]
        assert files[0].keys() == files[1].keys() and all(torch.equal(files[0][k], files[1][k]) for k in files[0])
    assert_close(found, expected, products=2000)


def test_a_live_adapter_is_copied_as_it_is(tmp_path):
    base = tenants(tmp_path)
    model, bank = banked(tmp_path, base, names=["alice"])
    trained = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "bob", is_trainable=True)
    bank.add("trained", trained)
    for parameter in trained.parameters():
        parameter.data.zero_()
    mixed = model(tokens(), adapter_names=["trained", "alice"]).logits.detach()
    assert_close(mixed[0], alone(tmp_path, base, "bob", tokens())[0], products=2000)


def test_removed_places_are_used_again(tmp_path):
    base = tenants(tmp_path)
    model, bank = banked(tmp_path, base)
    reserved = sum(bank.resident_bytes.values())
    bank.remove("bob")
    assert "bob" not in bank and len(bank) == 2 and list(bank) == ["alice", "carol"]
    bank.load(tmp_path / "bob", "robert")
    assert sum(bank.resident_bytes.values()) == reserved
    mixed = model(tokens(), adapter_names=["robert", "carol"]).logits.detach()
    for row, name in enumerate(["bob", "carol"]):
        assert_close(mixed[row], alone(tmp_path, base, name, tokens())[row], products=2000)


def test_a_thousand_adapters(tmp_path):
    base = tenants(tmp_path, names=["alice"])
    model, bank = banked(tmp_path, base, names=["alice"])
    trained = model.peft_config["default"]
    parameters = [p for n, p in model.named_parameters() if ".craft_adapters." in n]
    expected = {}
    for number in range(1000):
        for parameter in parameters:
            parameter.data = parameter.data.roll(1)
        if number in (3, 500, 999):
            expected[number] = logits(model)
        bank.add(str(number), adapter_name="default")
    assert len(bank) == 1001 and trained.alpha == 1.0
    assert bank.resident_bytes["adapters"] == 1001 * bank.bytes_per_adapter == 1001 * 2 * 29 * 4
    mixed = model(tokens()[[0, 1, 0]], adapter_names=["3", "500", "999"]).logits
    assert_close(mixed[0], expected[3][0], products=2000)
    assert_close(mixed[1], expected[500][1], products=2000)
    assert_close(mixed[2], expected[999][0], products=2000)


def test_the_bank_follows_its_model(tmp_path):
    base = tenants(tmp_path)
    model, bank = banked(tmp_path, base)
    model.to(torch.float64)
    mixed = model(tokens(), adapter_names=["bob", "carol"]).logits.detach()
    assert mixed.dtype == torch.float64
    with bank.use("bob"):
        assert_close(model(tokens()).logits[0].detach().float(), mixed[0].float(), products=2000)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(tokens(), adapter_names=["bob", "carol"]).logits.detach(), mixed)
    assert twin.base_model.bank is not bank


# ---------------------------------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------------------------------


def other_base(folder, base):
    tenants(folder, names=["stranger"], base=bert(seed=1))


def other(**fields):
    return lambda folder, base: tenants(folder, names=["stranger"], base=base, **fields)


def more_labels(folder, base):
    wide = copy.deepcopy(base)
    wide.classifier = torch.nn.Linear(WIDTH, 3)
    wide.config.num_labels = wide.num_labels = 3
    tenants(folder, names=["stranger"], base=wide)


def lotr(folder, base):
    get_peft_model(copy.deepcopy(base), LotrConfig(r=2, target_modules=TARGETS)).save_pretrained(folder / "stranger")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            other_base,
            "base weights are not those that.*stack that begins with 'bert.encoder.layer.0.attention.self.query",
        ),
        (other(decomposition="hooi"), "bases computed from the weights are not those.*same decomposition"),
        (other(ranks=(2, 3, 3)), "the same ranks: make another model and bank"),
        (other(target_modules=["query"]), "no adapter for the stack .*self.value'.*same target modules"),
        (
            other(target_modules=["query", "value", "key"]),
            "self.key.*of a module that the model's adapter does not have",
        ),
        (other(bias="all"), "bias='all'.*load this one into the model itself"),
        (other(modules_to_save=["pooler"]), "pooler.*no place for that.*modules_to_save"),
        (more_labels, r"'classifier' has the tensors .*\(3, 16\).*number of labels"),
        (lotr, "is a LotrAdapter.*bank holds|other|another"),
        (lambda folder, base: None, "There is no folder .*stranger"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(make, message, tmp_path):
    base = tenants(tmp_path, decomposition="hosvd", names=["alice"])
    model, bank = banked(tmp_path, base, names=["alice"])
    make(tmp_path, base)
    with pytest.raises(CraftError, match=message):
        bank.load(tmp_path / "stranger")
    assert bank.names == ["alice"] == bank.resident
    model(tokens(), adapter_names=["alice", "__base__"])


def test_wrong_names_are_refused(tmp_path):
    base = tenants(tmp_path)
    model, bank = banked(tmp_path, base)
    with pytest.raises(
        CraftError, match=r"non-existing adapter\(s\): dave. The model has default and a bank of 3 others"
    ):
        model(tokens(), adapter_names=["alice", "dave"])
    for call in (bank.use, bank.remove, bank.evict, lambda name: bank.save(name, tmp_path / "dave")):
        with pytest.raises(CraftError, match=r"no adapter 'dave' in the bank. It has alice, bob, carol"):
            call("dave")
    with pytest.raises(CraftError, match=r"no adapter 'dave'. The model has default"):
        bank.add("new", adapter_name="dave")
    for name, message in (("alice", "bank has an adapter 'alice' already"), ("default", "model itself has an adapter")):
        with pytest.raises(CraftError, match=message):
            bank.add(name)
    with pytest.raises(CraftError, match="bank has an adapter 'alice' already"):
        model.load_adapter(tmp_path / "bob", "alice")
    bank.use("alice")
    with pytest.raises(CraftError, match="'alice' is in use"):
        bank.remove("alice")


def test_a_bank_needs_common_bases(tmp_path):
    with pytest.raises(CraftError, match="was given a BertForSequenceClassification"):
        AdapterBank(bert())
    with pytest.raises(CraftError, match=r"frozen bases. Those of adapter 'default' \(LotrAdapter\) are trained"):
        AdapterBank(get_peft_model(bert(), LotrConfig(r=2, target_modules=TARGETS)))
    model = get_peft_model(bert(), CraftConfig(ranks=(2, 4, 3), target_modules=TARGETS))
    for fields, message in (
        ({"keep": "all"}, "keep='all' is unknown"),
        ({"max_resident": 0}, "max_resident=0 has to be at least 1"),
        ({"bases_of": "none"}, "no adapter 'none'"),
    ):
        with pytest.raises(CraftError, match=message):
            AdapterBank(model, **fields)
    AdapterBank(model)
    with pytest.raises(CraftError, match="has a bank already"):
        AdapterBank(model)


def test_a_merged_model_is_not_switched(tmp_path):
    base = tenants(tmp_path)
    model, bank = banked(tmp_path, base)
    model.merge_adapter()
    with pytest.raises(CraftError, match="merged into the base weights"):
        bank.use("alice")
    model.unmerge_adapter()
    bank.use("alice")
    model.merge_adapter()
    with pytest.raises(CraftError, match="merged"):
        model(tokens())


def test_a_damaged_fingerprint_is_noticed(tmp_path):
    """As of a file whose factors had one column flipped, which turns what the transforms mean."""
    base = tenants(tmp_path)
    _, bank = banked(tmp_path, base, names=["alice"])
    path = tmp_path / "bob" / "adapter_model.safetensors"
    state = load_file(path)
    key = next(key for key in state if key.endswith("query.craft_adapters.fingerprint"))
    state[key][-1] *= -1
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(CraftError, match="SHA-256 differs"):
        bank.load(tmp_path / "bob")
    config = json.loads((tmp_path / "bob" / "adapter_config.json").read_text())
    (tmp_path / "bob" / "adapter_config.json").write_text(json.dumps({**config, "tensors_sha256": None}))
    with pytest.raises(CraftError, match="bases computed from the weights are not those"):
        bank.load(tmp_path / "bob")
