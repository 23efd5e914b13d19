"""`fit_bases` counts tokens, not padding, and names the targets that no batch reached."""

import pytest
import torch
from peft import get_peft_model
from small_models import WIDTH, bert
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from craft_peft import CraftConfig, CraftError, fit_bases

SMALL = {"vocab_size": 50, "num_hidden_layers": 2}
IDS = torch.randint(1, 50, (3, 6), generator=torch.Generator().manual_seed(0))
LENGTH = IDS.shape[1]


def llama():
    sizes = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**SMALL, **sizes, max_position_embeddings=64))


def t5():
    sizes = {"d_model": WIDTH, "d_kv": 8, "d_ff": WIDTH, "num_heads": 2, "num_layers": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=50, **sizes, decoder_start_token_id=0))


def bart():
    sizes = {"d_model": WIDTH, "encoder_ffn_dim": WIDTH, "decoder_ffn_dim": WIDTH, "max_position_embeddings": 32}
    layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return BartForConditionalGeneration(BartConfig(vocab_size=50, **sizes, **layers))


def padded(tensor, side, by, value=0):
    pad = torch.full((len(tensor), by), value)
    return torch.cat([tensor, pad] if side == "right" else [pad, tensor], 1)


def text(side, by, **more):
    return {"input_ids": padded(IDS, side, by), "attention_mask": padded(torch.ones_like(IDS), side, by), **more}


def classified(side, by):
    return text(side, by, labels=torch.tensor([0, 1, 0]))


def continued(side, by):
    return text(side, by, labels=padded(IDS, side, by, value=-100))


def with_four_dimensions(side, by):
    batch = continued(side, by)
    seen = batch["attention_mask"][:, None, None, :].bool()
    causal = torch.ones(LENGTH + by, LENGTH + by, dtype=torch.bool).tril()
    added = torch.zeros(len(IDS), 1, *causal.shape).masked_fill(~(seen & causal), torch.finfo(torch.float32).min)
    return batch | {"attention_mask": added}


def translated(side, by):
    """The decoder is padded on its right, by another length or by the same."""
    target = padded(IDS[:, :4], "right", by, value=-100)
    return text(side, by, labels=target)


def translated_to_as_many(side, by):
    return text(side, by, labels=padded(IDS.flip(1), "right", by, value=-100))


def translated_with_a_mask(side, by):
    mask = padded(torch.ones_like(IDS), "right", by)
    ids = padded(IDS.flip(1), "right", by)
    labels = padded(IDS, "right", by, value=-100)
    return text(side, by, decoder_input_ids=ids, decoder_attention_mask=mask, labels=labels)


LEFT, RIGHT = "left", "right"
CASES = {
    "an encoder, padded on the right": (lambda: bert().bert, ["query", "value", "intermediate.dense"], text, RIGHT),
    "a classifier": (bert, ["query", "value"], classified, RIGHT),
    "a decoder, padded on the right": (llama, ["q_proj", "v_proj", "down_proj"], continued, RIGHT),
    "a decoder, padded on the left": (llama, ["q_proj", "v_proj", "down_proj"], continued, LEFT),
    "a mask of four dimensions": (llama, ["q_proj", "v_proj"], with_four_dimensions, RIGHT),
    "an encoder and a decoder": (t5, ["q", "v", "wo"], translated, RIGHT),
    "both of one length": (t5, ["q", "k", "v", "wo"], translated_to_as_many, RIGHT),
    "both with masks": (bart, ["q_proj", "v_proj", "fc1"], translated_with_a_mask, RIGHT),
}


def adapted(make, targets, basis="activations"):
    torch.manual_seed(0)
    return get_peft_model(make().eval(), CraftConfig(ranks=(2, 4, 4), target_modules=targets, basis=basis))


def bases_of(model):
    return {
        f"{key}.{name}": module.get_buffer(name) if name in module._buffers else getattr(module, name).detach()
        for key, module in model.named_modules()
        if hasattr(module, "bases") and hasattr(module, "in_factor")
        for name in ("layer_factor", "out_factor", "in_factor")
    }


def assert_same_spaces(found, expected):
    """Equal bases up to signs, within what attention over another length rounds; singular vectors magnify it."""
    assert found.keys() == expected.keys() and found
    for name, basis in expected.items():
        overlap = torch.linalg.svdvals(found[name].T @ basis)
        assert overlap.min() > 1 - 1e-4, f"{name}: {overlap}"


@pytest.mark.parametrize(
    ("case", "basis"),
    [(case, "activations") for case in CASES]
    + [(case, "gradients") for case, (*_, batch, _) in CASES.items() if batch is not text],  # those have no loss
)
def test_bases_are_those_without_padding(case, basis):
    make, targets, batch, side = CASES[case]
    found = []
    for by in (0, 9):
        model = adapted(make, targets, basis)
        fit_bases(model, [batch(side, by)])
        found.append(bases_of(model))
    assert_same_spaces(found[1], found[0])


def test_a_batch_without_a_mask_counts_in_full():
    found = []
    for batch in ({"input_ids": IDS}, {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}):
        model = adapted(lambda: bert().bert, ["query"])
        fit_bases(model, [batch])
        found.append(bases_of(model))
    assert all(torch.equal(found[0][name], basis) for name, basis in found[1].items())


class Sound(nn.Module):
    """Two samples of the input are one position of the layers, as in models of sound."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(2, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, sound, attention_mask):
        x = self.embed(sound.unflatten(1, (-1, 2)))
        for layer in self.layers:
            x = x + layer(x).tanh()
        return x


def sound(by):
    samples = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    return {
        "sound": torch.cat([samples, torch.ones(3, by)], 1),
        "attention_mask": torch.cat([torch.ones(3, 8), torch.zeros(3, by)], 1),
    }


def test_a_mask_that_the_user_gives(caplog):
    found = []
    for by, mask_of in ((0, None), (6, lambda batch: batch["attention_mask"][:, ::2]), (6, None)):
        model = adapted(Sound, [r"layers.0", "layers.1", "layers.2"])
        fit_bases(model, [sound(by)], mask_of=mask_of)
        found.append(bases_of(model))
    assert_same_spaces(found[1], found[0])
    with pytest.raises(AssertionError):
        assert_same_spaces(found[2], found[0])
    assert "All positions of 'layers.*' count in its bases: its input, of shape (3, 7, 16), is not" in caplog.text


class Layouts(nn.Module):
    """Layers whose inputs are laid out in other ways than (rows, positions)."""

    def __init__(self) -> None:
        super().__init__()
        self.swapped, self.flat, self.unpadded, self.first = (
            nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2)) for _ in range(4)
        )

    def forward(self, x, attention_mask):
        for layer in self.swapped:
            x = layer(x.transpose(0, 1)).transpose(0, 1)
        for layer in self.flat:
            x = layer(x.flatten(0, 1)).view(x.shape)
        tokens, first = x[attention_mask.bool()], x[:, 0]
        for layer in self.unpadded:
            tokens = layer(tokens)
        for layer in self.first:
            first = layer(first)
        return tokens.sum() + first.sum()


def test_inputs_in_other_layouts(caplog):
    x, found = torch.randn(3, 6, WIDTH, generator=torch.Generator().manual_seed(0)), []
    for by in (0, 5):
        batch = {"x": torch.cat([x, 9 * torch.ones(3, by, WIDTH)], 1)}
        batch["attention_mask"] = torch.cat([torch.ones(3, 6), torch.zeros(3, by)], 1)
        model = adapted(Layouts, ".*\\.[01]")
        fit_bases(model, [batch])
        found.append(bases_of(model))
    assert_same_spaces(found[1], found[0])
    assert "count in its bases" not in caplog.text


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({k: nn.Linear(8, 8, bias=False) for k in "ab"}) for _ in range(3))

    def forward(self, x, attention_mask=None):
        for layer in self.layers:
            x = x + layer["a" if x.mean() < 9 else "b"](x)
        return x


@pytest.mark.filterwarnings("ignore:In the first forward pass Router did not call:UserWarning")
@pytest.mark.parametrize(
    ("batch", "missed"),
    [
        ({"x": torch.ones(4, 2, 8)}, "modules 'layers.0.b', 'layers.1.b', 'layers.2.b', so"),
        ({"x": torch.ones(4, 2, 8), "attention_mask": torch.zeros(4, 2)}, "modules 'layers.0.a', .* and 3 more, so"),
    ],
)
def test_a_target_that_no_batch_reached_is_named(batch, missed):
    model = get_peft_model(Router(), CraftConfig(ranks=(2, 4, 4), target_modules=["a", "b"], basis="activations"))
    model.train().get_submodule("base_model.model.layers.1").eval()
    modes = [module.training for module in model.modules()]
    with pytest.raises(CraftError, match=f"No batch reached the target {missed}"):
        fit_bases(model, [batch])
    assert [module.training for module in model.modules()] == modes
    fit_bases(model, [{"x": torch.ones(4, 2, 8)}, {"x": 99 * torch.ones(4, 2, 8)}])


def test_a_batch_that_fails_leaves_the_model_as_it_was():
    model = adapted(bert, ["query"]).train()
    with pytest.raises((TypeError, ValueError)):
        fit_bases(model, [{"no_such_input": IDS}])
    assert all(module.training for module in model.modules())
    assert not any(m._forward_hooks for m in model.modules() if isinstance(m, nn.Linear))
