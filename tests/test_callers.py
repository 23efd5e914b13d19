"""On every model accepted, merged is adapted and all that is trained has a gradient; what is passed by is told."""

import copy
import pickle
import warnings

import pytest
import torch
from laws import assert_close
from method_table import METHODS
from peft import get_peft_model, inject_adapter_in_model
from small_models import WIDTH
from torch import nn
from transformers import AlbertConfig, AlbertModel, T5Config, T5ForConditionalGeneration, WavLMConfig, WavLMModel

from craft_peft import CraftError

CRAFT = METHODS[0]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + self.out(torch.tanh(self.query(x)))


def blocks(count=4):
    return nn.Sequential(*(Block() for _ in range(count)))


def one_module_in_two_places():
    model = blocks()
    model[2].query = model[0].query
    return model


def one_weight_in_two_modules():
    model = blocks()
    model[2].query.weight = model[0].query.weight
    return model


def one_weight_in_and_outside_the_targets():
    model = blocks()
    model[2].out.weight = model[0].query.weight
    return model


def one_block_in_two_places():
    block = Block()
    return nn.Sequential(block, Block(), block)


class Named(nn.Module):
    """A block that is reached under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = blocks(2)
        self.alias = self.layers

    def forward(self, x):
        return self.alias(x)


class Experts(nn.Module):
    """Experts that get the inputs of one sign each."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Block() for _ in range(2))
        self.gates = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x):
        side = int(x.sum() > 1e9)
        return self.gates[side](self.experts[side](x))


class PassedBy(nn.Module):
    """A block that uses the weight of a layer without calling it, as WavLM's attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + self.out(nn.functional.linear(x, self.query.weight, self.query.bias))


def torch_encoder(**fields):
    fields = {"batch_first": True, "dropout": 0.0, **fields}
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, **fields)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)


class Encoder(nn.Module):
    """A transformer that takes embeddings and gives hidden states."""

    def __init__(self, model) -> None:
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(inputs_embeds=x).last_hidden_state


def albert():
    config = AlbertConfig(
        vocab_size=50, embedding_size=WIDTH, hidden_size=WIDTH, num_hidden_layers=4, num_attention_heads=2,
        num_hidden_groups=2, intermediate_size=WIDTH, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return Encoder(AlbertModel(config))


def t5_encoder():
    config = T5Config(vocab_size=50, d_model=WIDTH, d_kv=8, d_ff=WIDTH, num_layers=2, num_heads=2, dropout_rate=0.0)
    return Encoder(T5ForConditionalGeneration(config).encoder)


ACCEPTED = {
    "plain": (blocks, ["query", "out"]),
    "one weight in two modules": (one_weight_in_two_modules, ["query"]),
    "one weight in and outside the targets": (one_weight_in_and_outside_the_targets, ["query"]),
    "one block in two places": (one_block_in_two_places, ["query"]),
    "one block under two names": (Named, ["query"]),
    "experts of which one is used": (Experts, ["query", "out", "gates.0", "gates.1"]),
    "layers that are called beside some that are passed by": (lambda: nn.Sequential(PassedBy(), PassedBy()), ["out"]),
    "torch's encoder without its fast path": (lambda: torch_encoder(batch_first=False), ["linear1", "linear2"]),
    "torch's encoder with another activation": (lambda: torch_encoder(activation=torch.tanh), ["linear1", "linear2"]),
    "layers that share a block": (albert, ["query", "value"]),
    "an encoder by itself": (t5_encoder, ["q", "v", "wi", "wo"]),
}


def inputs():
    return torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1))


def adapted(method, make, targets, **fields):
    torch.manual_seed(0)
    return get_peft_model(make(), method.config(target_modules=targets, init_weights=False, **fields))


@pytest.mark.parametrize(
    ("case", "method"),
    [(case, CRAFT) for case in ACCEPTED] + [("one weight in two modules", method) for method in METHODS[1:]],
    ids=str,
)
def test_merged_is_adapted_and_all_that_is_trained_has_a_gradient(case, method):
    model, x = adapted(method, *ACCEPTED[case]), inputs()
    model.train()(x).square().sum().backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    with torch.no_grad():
        expected = model.eval()(x)
        with model.disable_adapter():
            plain = model(x)
        assert not torch.allclose(expected, plain)
        model.merge_adapter()
        assert_close(model(x), expected, products=2000)
        model.unmerge_adapter()
        assert torch.equal(model(x), expected)
        assert_close(model.merge_and_unload()(x), expected, products=2000)


REFUSED = {
    "one module in two places": (
        one_module_in_two_places,
        ["query"],
        r"'0.query' is one module in 2 places: '0.query', '2.query'.*`exclude_modules`",
    ),
    "torch's fast path": (
        torch_encoder,
        ["linear1", "linear2"],
        r"'layers.0.linear1' lies in a torch.nn.TransformerEncoderLayer, .*set_fastpath_enabled\(False\)",
    ),
    "torch's attention": (torch_encoder, ["out_proj"], "'layers.0.self_attn.out_proj' is the output projection of"),
}


@pytest.mark.peft_feature(
    "one linear module in two places of the model",
    no="PEFT adapts one of the places, and merging would change both; put a copy in the other.",
)
@pytest.mark.parametrize("case", REFUSED)
def test_an_adapter_that_would_be_passed_by_is_refused(case):
    make, targets, message = REFUSED[case]
    base = make()
    before = {name: type(module) for name, module in base.named_modules()}
    with pytest.raises(CraftError, match=message):
        get_peft_model(base, CRAFT.config(target_modules=targets))
    assert {name: type(module) for name, module in base.named_modules()} == before


def test_torchs_encoder_is_adapted_when_its_fast_path_is_off():
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        model, x = adapted(CRAFT, torch_encoder, ["linear1", "linear2"]).eval(), inputs()
        with torch.no_grad():
            expected = model(x)
            with model.disable_adapter():
                assert not torch.allclose(model(x), expected)
            assert_close(model.merge_and_unload()(x), expected, products=2000)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_two_modules_with_one_weight_are_told(caplog):
    adapted(CRAFT, one_weight_in_and_outside_the_targets, ["query"])
    adapted(CRAFT, blocks, ["query"])
    told = [record.message for record in caplog.records if "have one weight" in record.message]
    assert len(told) <= 1  # once a process
    adapted(CRAFT, lambda: nn.Sequential(blocks(), one_weight_in_two_modules()), ["query"])
    assert "The modules '1.0.query', '1.2.query' have one weight" in caplog.text


# ---------------------------------------------------------------------------------------------------------------------
# Seen in the first forward pass
# ---------------------------------------------------------------------------------------------------------------------


def wavlm():
    config = WavLMConfig(
        hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, intermediate_size=WIDTH, conv_dim=(8,),
        conv_stride=(4,), conv_kernel=(4,), num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, num_buckets=8,
        layerdrop=0.0, apply_spec_augment=False,
    )  # fmt: skip
    return WavLMModel(config)


def passed_by(record):
    return [str(w.message) for w in record if "did not call the adapted layers" in str(w.message)]


def told_by(use):
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        use()
    return passed_by(record)


@pytest.mark.peft_feature("a layer whose weight the model uses without calling it: a warning in the first forward pass")
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_wavlms_attention_is_told_once(mode):
    model = getattr(adapted(CRAFT, wavlm, ["q_proj", "v_proj", "intermediate_dense"]), mode)()
    sound = torch.randn(2, 64)
    told = told_by(lambda: model(sound))
    assert len(told) == 1
    assert "'encoder.layers.*.attention.v_proj' (2), 'encoder.layers.*.attention.q_proj' (2), though" in told[0]
    assert "intermediate_dense" not in told[0]
    assert not told_by(lambda: model(sound))


def injected(base):
    return inject_adapter_in_model(CRAFT.config(target_modules=["query"]), base)


@pytest.mark.parametrize(
    "copied", [lambda model: model, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_copies_that_were_made_before_the_first_pass_tell_too(copied):
    model = injected(nn.Sequential(PassedBy(), PassedBy()))
    twin = copied(model)
    for each in {model, twin}:
        told = told_by(lambda each=each: each(inputs()))
        assert len(told) == 1 and "'*.query' (2)" in told[0]
        assert not told_by(lambda each=each: each(inputs()))


def hooks_of(model):
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


def test_the_first_whole_pass_counts_and_leaves_no_hooks():
    model = injected(nn.Sequential(PassedBy(), Block()))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(torch.zeros(1, 1))
    model[1].query.register_forward_pre_hook(lambda *_: None)
    assert not told_by(lambda: model[0](inputs()))  # a part of the model
    assert told_by(lambda: model(inputs())) == []  # another layer of the same path was called
    sharing_alone = hooks_of(injected(blocks(2)))
    assert sum(hooks_of(model)) == sum(sharing_alone) - 1 + 1  # its watcher is gone, the hook from above is there


def test_a_model_that_is_unloaded_before_its_first_pass_is_watched_no_longer():
    base = nn.Sequential(PassedBy(), PassedBy())
    model = get_peft_model(base, CRAFT.config(target_modules=["query"]))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(torch.zeros(1, 1))
    plain = model.unload()
    assert not any(hooks_of(plain))
    assert not told_by(lambda: plain(inputs()))


QUIET = {
    "experts without tokens": (lambda: Experts(), ["query", "gates.0", "gates.1"]),
    "a layer that is dropped": (lambda: Dropped(), ["query"]),
    "an alternative block": (lambda: Either(), ["query"]),
}


class Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = blocks(3)

    def forward(self, x):
        return self.layers[2](self.layers[0](x))


class Either(nn.Module):
    """Two towers, as of text and pictures, of which the first batch needs one."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.vision = blocks(2), blocks(2)

    def forward(self, x):
        return self.text(x)


@pytest.mark.parametrize("case", QUIET)
def test_what_this_input_did_not_need_is_no_alarm(case):
    make, targets = QUIET[case]
    model = adapted(CRAFT, make, targets)
    assert not told_by(lambda: model(inputs()))


def test_generating_calls_the_encoder_by_itself():
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=50, d_model=WIDTH, d_kv=8, d_ff=WIDTH, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    for targets in (["q", "v"], ".*encoder.*\\.(q|v)"):
        model = get_peft_model(T5ForConditionalGeneration(config), CRAFT.config(target_modules=targets)).eval()
        with torch.no_grad():
            assert not told_by(lambda model=model: model.generate(torch.ones(2, 4, dtype=torch.long), max_new_tokens=3))
