"""An adapter's tensors are told by the modules that hold them, whatever base modules and adapters are called."""

import copy
import json

import pytest
import torch
import transformers as hf
from laws import TARGETS, assert_close, moved
from method_table import METHODS
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from small_models import bert, logits
from test_architectures import GROUPED
from torch import nn

from craft_peft import AdapterBank, CraftError, load_adapter, save_adapter
from craft_peft.lora_export import to_lora
from craft_peft.plugin import tensor_names
from craft_peft.plugin.layer import StackedLinear

over_methods = pytest.mark.parametrize("method", METHODS, ids=str)


class Named(nn.Module):
    """Blocks whose modules and parameters are called as a method calls its own, with or without what comes below."""

    def __init__(self, prefix: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = {"query": nn.Linear(16, 16), "value": nn.Linear(16, 16), f"{prefix}adapters": nn.Linear(16, 16)}
        self.names = f"{prefix}block", f"{prefix}slots", f"{prefix}head", f"{prefix}scale"
        self.add_module(self.names[0], nn.ModuleList(nn.ModuleDict(copy.deepcopy(layer)) for _ in range(3)))
        self.add_module(self.names[1], nn.ModuleDict({"inner": nn.Linear(16, 16)}))
        self.add_module(self.names[2], nn.Sequential(nn.Linear(16, 4)))
        self.register_parameter(self.names[3], nn.Parameter(torch.ones(16)))
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        block, slots, head, scale = (getattr(self, name) for name in self.names)
        for layer in block:
            for part in layer.values():
                x = x + part(x).tanh()
        return head(slots["inner"](x) * scale)


INPUTS = torch.randn(5, 16, generator=torch.Generator().manual_seed(2))


def named(method, prefix=None, adapter_name="default", **fields):
    """The model with that prefix, the method's own if None, and an adapter and a head that have moved."""
    base = Named(f"{method.name}_" if prefix is None else prefix)
    torch.manual_seed(1)
    config = method.config(target_modules=TARGETS, init_weights=False, modules_to_save=[base.names[2]], **fields)
    model = get_peft_model(copy.deepcopy(base), config, adapter_name=adapter_name).eval()
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data += 0.1
    return model, base


def renamed(keys, method):
    """Keys of the model whose names say nothing, as those of the model with the method's names."""
    own = f"{method.name}_"
    return {key.replace("plain_", own) for key in keys}


@over_methods
@pytest.mark.parametrize("bias", ["none", "all", "only"])
def test_only_the_adapter_is_trained_and_saved(method, bias):
    bias = f"{method.name}_only" if bias == "only" else bias
    model, plain = named(method, bias=bias)[0], named(method, "plain_", bias=bias)[0]
    trained, expected = ({n for n, p in m.named_parameters() if p.requires_grad} for m in (model, plain))
    assert trained == renamed(expected, method)
    assert get_peft_model_state_dict(model).keys() == renamed(get_peft_model_state_dict(plain), method)


@over_methods
def test_files_merging_export_and_deletion(method, tmp_path):
    model, base = named(method)
    adapted = model(INPUTS)
    assert torch.equal(adapted, named(method, "plain_")[0](INPUTS))
    save_adapter(model, tmp_path / "adapter")
    for load in (PeftModel.from_pretrained, load_adapter):
        for name in ("default", "another"):
            loaded = load(copy.deepcopy(base), tmp_path / "adapter", adapter_name=name)
            assert torch.equal(loaded.eval()(INPUTS), adapted)
    state = {key.removeprefix("base_model.model."): t for key, t in get_peft_model_state_dict(model).items()}
    config = copy.copy(model.peft_config["default"])
    config.modules_to_save = None
    injected = inject_adapter_in_model(config, copy.deepcopy(base), state_dict=state)
    assert len([module for module in injected.modules() if isinstance(module, StackedLinear)]) == 6
    export = to_lora(model)
    export.save(tmp_path / "lora")
    lora = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora")
    assert_close(lora(INPUTS), adapted, products=1000)
    merged = copy.deepcopy(model).merge_and_unload()
    assert_close(merged(INPUTS), adapted, products=1000)
    model.add_adapter("second", method.config(target_modules=TARGETS))
    with pytest.warns(UserWarning, match="Setting active adapter to second"):
        model.delete_adapter("default")
    layers = [module for module in model.modules() if isinstance(module, StackedLinear)]
    assert {name for layer in layers for held in (layer.slots, layer.owned) for name in held} == {"second"}
    assert {name for layer in layers for name in layer.active_adapters} == {"second"}


def test_a_bank_holds_the_adapter_of_such_a_base(tmp_path):
    model, base = named(METHODS[0])
    save_adapter(model, tmp_path)
    bank = AdapterBank(PeftModel.from_pretrained(base, tmp_path))
    bank.load(tmp_path, "tenant")
    with bank.use("tenant"):
        assert_close(bank.model(INPUTS), model(INPUTS), products=1000)


def test_old_peft_and_such_a_base_do_not_go_together(monkeypatch):
    monkeypatch.setattr(tensor_names, "BaseTuner", object)  # as of peft 0.20, which has no structural rules
    with pytest.raises(CraftError, match=r"'craft_scale' has 'craft_' in its name, by which peft 0.20"):
        named(METHODS[0])
    model, _ = named(METHODS[0], "plain_")
    model.add_adapter("second", METHODS[0].config(target_modules=TARGETS))


# ---------------------------------------------------------------------------------------------------------------------
# Names of adapters
# ---------------------------------------------------------------------------------------------------------------------


@over_methods
@pytest.mark.peft_feature("several adapters")
@pytest.mark.parametrize("name", ["0", "query", "index", "core", "weight"])
def test_an_adapter_called_like_a_part_of_a_path_takes_nothing_from_others(method, name, tmp_path):
    model, base = named(method)
    first, adapted = get_peft_model_state_dict(model), model(INPUTS)
    save_adapter(model, tmp_path / "first")
    model.load_adapter(tmp_path / "first", name)
    for key, parameter in model.named_parameters():
        if f"_adapters.{name}." in key:
            parameter.data += 0.1
    model.set_adapter(name)
    second = model.eval()(INPUTS)
    assert not torch.allclose(second, adapted)
    for saved, expected in (("default", adapted), (name, second)):
        assert get_peft_model_state_dict(model, adapter_name=saved).keys() == first.keys()
        save_adapter(model, tmp_path / "again", saved)
        assert torch.equal(load_adapter(copy.deepcopy(base), tmp_path / "again")(INPUTS), expected)


def test_what_cannot_be_put_back_is_refused():
    model, _ = moved(METHODS[0])
    model.add_adapter("query", METHODS[0].config(target_modules=TARGETS))
    gathered = {key: tensor.clone() for key, tensor in model.state_dict().items()}  # as FSDP and ZeRO hand it over
    with pytest.raises(CraftError, match=r"has the name of another adapter in it.* called 'query'"):
        get_peft_model_state_dict(model, state_dict=gathered)


# ---------------------------------------------------------------------------------------------------------------------
# Modules that transformers has moved
# ---------------------------------------------------------------------------------------------------------------------

VISION = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 8}
LANGUAGE = r".*language_model.*\.(q_proj|v_proj)"


def llava() -> nn.Module:
    torch.manual_seed(0)
    vision, text = hf.CLIPVisionConfig(**VISION, patch_size=4), hf.LlamaConfig(**{**GROUPED, "vocab_size": 51})
    return hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=50)
    ).eval()


def older(folder):
    """Give the tensors of a saved adapter the names that Llava's language model had before transformers 4.52."""
    tensors = load_file(folder / "adapter_model.safetensors")
    old = {key.replace("model.language_model.", "language_model.model."): t for key, t in tensors.items()}
    assert old.keys().isdisjoint(tensors)
    save_file(old, folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["tensors_sha256"] = None
    (folder / "adapter_config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return old


@pytest.mark.parametrize("method", [*METHODS, None], ids=str)
@pytest.mark.peft_feature("adapters saved before transformers moved a model's modules")
def test_an_adapter_with_the_names_of_an_older_transformers_loads(method, tmp_path):
    config = LoraConfig(target_modules=LANGUAGE) if method is None else method.config(target_modules=LANGUAGE)
    model = get_peft_model(llava(), config).eval()
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    adapted = logits(model)
    model.save_pretrained(tmp_path)
    old = older(tmp_path)
    assert torch.equal(logits(load_adapter(llava(), tmp_path)), adapted)
    if method is not None:
        assert torch.equal(logits(PeftModel.from_pretrained(llava(), tmp_path)), adapted)  # and does not warn
        state = {key.removeprefix("base_model.model."): tensor for key, tensor in old.items()}
        injected = inject_adapter_in_model(config, llava(), state_dict=state)
        set_peft_model_state_dict(injected, state)
        assert torch.equal(logits(injected.eval()), adapted)
    if method is METHODS[0]:
        bank = AdapterBank(PeftModel.from_pretrained(llava(), tmp_path))
        bank.load(tmp_path, "tenant")
        with bank.use("tenant"):
            assert_close(logits(bank.model), adapted, products=1000)


@over_methods
def test_current_names_stay(method):
    model, _ = moved(method)
    state = get_peft_model_state_dict(model)
    assert tensor_names.current_names(state, bert()).keys() == state.keys()
