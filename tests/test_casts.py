"""Others cast, copy and step parameters, and know nothing of buffers: what they do to an adapter leaves it whole."""

import copy
import importlib

import pytest
import torch
from laws import TARGETS, assert_close, moved
from method_table import METHODS
from peft import PeftConfig, PeftModel, get_peft_model
from small_models import WIDTH, bert, logits, tokens
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from craft_peft import AdapterBank, CraftError, fit_bases, load_adapter
from craft_peft.lora_export import to_lora
from craft_peft.plugin.layer import StackedLinear

CRAFT = METHODS[0]
LABELS = torch.tensor([0, 1])
every_method = pytest.mark.parametrize("method", METHODS, ids=str)


def adapters_of(model):
    return [adapter for m in model.modules() if isinstance(m, StackedLinear) for adapter in m.owned.values()]


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, StackedLinear)]


# ---------------------------------------------------------------------------------------------------------------------
# Casts
# ---------------------------------------------------------------------------------------------------------------------


def cast_trained(model, dtype):
    """As TRL does on a base in 4 or 8 bits."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def cast_adapters(model, dtype):
    for adapter in adapters_of(model):
        for parameter in adapter.parameters():
            parameter.data = parameter.data.to(dtype)


def cast_buffers(model, dtype):
    """As FSDP's mixed precision does."""
    for adapter in adapters_of(model):
        for name, buffer in list(adapter.named_buffers()):
            if buffer.is_floating_point():
                setattr(adapter, name, buffer.to(dtype))


def cast_all(model, dtype):
    """As `model.half()` and Trainer's `bf16_full_eval` do."""
    model.to(dtype)


CASTS = [
    (cast_adapters, torch.bfloat16),
    (cast_buffers, torch.bfloat16),
    (cast_all, torch.bfloat16),
    (cast_adapters, torch.float16),
    (cast_buffers, torch.float16),
    (cast_all, torch.float16),
]
every_cast = pytest.mark.parametrize(("cast", "dtype"), CASTS, ids=lambda part: getattr(part, "__name__", str(part)))


def deltas(model):
    return torch.stack([layer.get_delta_weight("default").detach() for layer in layers_of(model)])


def assert_near(found, expected, dtype, roundings=8):
    """Equal but for some roundings to a dtype: relative to the whole, since cancellation is not at stake here."""
    error = (found.double() - expected.double()).norm() / expected.double().norm()
    assert error <= roundings * torch.finfo(dtype).eps, f"{error:.3g} of it is lost"


@every_method
@every_cast
@pytest.mark.parametrize("used", [False, True], ids=["before its first use", "after"])
def test_a_cast_adapter_is_the_same_adapter_rounded(method, cast, dtype, used, tmp_path):
    model, base = moved(method)
    expected = deltas(model)
    if used:
        logits(model)
    else:  # loading postpones what the file is going to bring, a cast before that meets nothing
        model.save_pretrained(tmp_path / "whole")
        model = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "whole", is_trainable=True).eval()
    cast(model, dtype)
    assert_near(deltas(model), expected, dtype)
    (layer, *_) = layers_of(model)
    x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0)).to(layer.base_layer.weight.dtype)
    weight = layer.base_layer.weight + layer.get_delta_weight("default")
    assert_near(layer(x).detach(), x.double() @ weight.double().T + layer.base_layer.bias.double(), dtype)

    # What is saved is what is in memory.
    model.save_pretrained(tmp_path / "cast")
    base_like = copy.deepcopy(base).to(layer.base_layer.weight.dtype)
    for load in (PeftModel.from_pretrained, load_adapter):
        assert_near(logits(load(copy.deepcopy(base_like), tmp_path / "cast")), logits(model), dtype)
    export = to_lora(model)
    for key, part in {key: key.replace("lora_A", "lora_B") for key in export.tensors if ".lora_A." in key}.items():
        path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        delta = model.get_base_model().get_submodule(path).get_delta_weight("default").detach()
        assert_close(export.tensors[part] @ export.tensors[key], delta, products=100)
    model.merge_adapter()
    model.unmerge_adapter()

    # And it trains.
    model.train()(input_ids=tokens(), labels=LABELS).loss.backward()
    gradients = [p.grad for adapter in adapters_of(model) for p in adapter.parameters() if p.grad is not None]
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert any(gradient.abs().max() > 0 for gradient in gradients)


@every_cast
def test_a_cast_model_without_factors_loads_on_its_base(cast, dtype, tmp_path):
    """What tells the base is no floating-point number, which a cast would round."""
    model, base = moved(CRAFT, save_factors=False)
    cast(model, dtype)
    model.save_pretrained(tmp_path)
    for load in (PeftModel.from_pretrained, load_adapter):
        loaded = load(copy.deepcopy(base), tmp_path)
        assert_near(deltas(loaded), deltas(model), dtype)
    with pytest.raises(CraftError, match="in the dtype that this had when the adapter was made"):
        load_adapter(copy.deepcopy(base).to(torch.bfloat16), tmp_path)


@every_method
def test_a_saved_adapter_in_float16_is_loaded_in_the_dtypes_of_its_places(method, tmp_path):
    """The adapter in float32, the head in the base's."""
    model, base = moved(method)
    model.half().save_pretrained(tmp_path)
    expected = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    loaded = load_adapter(copy.deepcopy(base), tmp_path)
    dtypes = [{name: tensor.dtype for name, tensor in one.state_dict().items()} for one in (loaded, expected)]
    assert dtypes[0] == dtypes[1]
    assert torch.equal(logits(loaded), logits(expected))


# ---------------------------------------------------------------------------------------------------------------------
# Modes of the caller
# ---------------------------------------------------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("mode", [torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)], ids=["infer", "auto"])
def test_what_is_made_in_the_first_callers_mode_is_as_made_in_none(method, mode, tmp_path):
    """A sanity check before training is the first use of an adapter from a config that was saved."""
    model, base = moved(method)
    model.save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    config.inference_mode = False
    found = []
    for first_use in (mode, torch.enable_grad()):
        torch.manual_seed(0)
        fresh = get_peft_model(copy.deepcopy(base), config)
        with first_use:
            fresh(tokens())
        found.append(
            torch.cat([b.flatten() for adapter in adapters_of(fresh) for b in adapter.buffers()] or [tokens()])
        )
        fresh.train()(tokens(), labels=LABELS).loss.backward()
    assert torch.equal(*found)


@every_method
def test_a_double_adapter_trains_after_inference_mode(method):
    """What is made anew for another dtype or device is kept, and was made in the first caller's mode."""
    torch.manual_seed(0)
    model = get_peft_model(bert(torch.float64), method.config(target_modules=TARGETS, init_weights=False))
    with torch.inference_mode():
        model(tokens())
    model.train()(tokens(), labels=LABELS).loss.backward()


# ---------------------------------------------------------------------------------------------------------------------
# Copies
# ---------------------------------------------------------------------------------------------------------------------


def copied_by_parameters(model):
    """As trainers of preferences make their reference."""
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    model.set_adapter("ref")
    return model.eval()


@every_method
def test_a_copy_by_config_and_parameters_is_the_same_adapter(method):
    model, _ = moved(method)
    expected = logits(model)
    assert torch.equal(logits(copied_by_parameters(model)), expected)


@every_method
def test_a_copy_of_a_loaded_adapter_on_a_rounded_base_is_the_same_adapter(method, tmp_path):
    """Its bases are those of the file, which the rounded base would not give again."""
    model, base = moved(method)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base).to(torch.bfloat16), tmp_path, is_trainable=True).eval()
    expected = logits(loaded)
    assert torch.equal(logits(copied_by_parameters(loaded)), expected)


@pytest.mark.parametrize("basis", ["activations", "gradients"])
@pytest.mark.parametrize("fitted_first", [True, False])
def test_a_copy_has_bases_that_no_config_tells(basis, fitted_first):
    torch.manual_seed(1)
    config = CRAFT.config(task_type="SEQ_CLS", target_modules=TARGETS, basis=basis, init_weights=False)
    model = get_peft_model(bert(), config).eval()
    batches = [{"input_ids": tokens(), "labels": LABELS}]
    if fitted_first:
        fit_bases(model, batches)
        expected = logits(model)
        copied_by_parameters(model)
    else:
        copied_by_parameters(model)
        model.set_adapter("default")
        fit_bases(model, batches)
        expected = logits(model)
        model.set_adapter("ref")
    assert torch.equal(logits(model), expected)


def test_a_second_adapter_is_not_decomposed_again(monkeypatch):
    model, _ = moved(CRAFT)
    monkeypatch.setattr("craft_peft.adapters.craft.hosvd", None)
    model.add_adapter("same", model.peft_config["default"])
    with pytest.raises(TypeError):  # of another decomposition it would be another's bases
        model.add_adapter("other", CRAFT.config(target_modules=TARGETS, decomposition="hooi"))


# ---------------------------------------------------------------------------------------------------------------------
# What many layers share
# ---------------------------------------------------------------------------------------------------------------------


def step_in_hooks(model, reentrant, in_hooks):
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    trained = [p for adapter in adapters_of(model) for p in adapter.parameters()]
    optimizers = {parameter: torch.optim.AdamW([parameter], lr=1e-2) for parameter in trained}

    def step(parameter):
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    if in_hooks:
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(step)
    model.train()(input_ids=tokens(), labels=LABELS).loss.backward()
    if not in_hooks:
        for parameter in trained:
            if parameter.grad is not None:
                step(parameter)
    return torch.cat([parameter.detach().flatten() for parameter in trained])


@every_method
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.peft_feature("optimizers that step in gradient hooks, during the backward pass")
def test_a_gradient_comes_in_one_piece(method, reentrant):
    found = [step_in_hooks(moved(method)[0], reentrant, in_hooks) for in_hooks in (True, False)]
    assert torch.equal(*found)


@every_method
def test_what_layers_share_has_memory_of_its_own(method):
    """Engines for several processes free the parameters after each layer."""
    adapter = method.adapter(next(iter(adapters_of(moved(method)[0]))).shape, init_weights=False)
    own = {tensor.untyped_storage().data_ptr() for tensor in adapter.prepare()}
    assert own.isdisjoint(parameter.untyped_storage().data_ptr() for parameter in adapter.parameters())


@every_method
@pytest.mark.peft_feature(
    "`nn.DataParallel`, Trainer's default on several GPUs",
    no="its replicas hold one layer each, and would compute with what the first device has of the adapter",
)
def test_replicas_are_refused(method, monkeypatch):
    replicate = importlib.import_module("torch.nn.parallel.replicate")
    monkeypatch.setattr(  # which only GPUs have
        replicate,
        "_broadcast_coalesced_reshape",
        lambda tensors, devices, detach=False: [list(tensors) for _ in devices],
    )
    model, _ = moved(method)
    for replica in replicate.replicate(model, [0, 1]):
        with pytest.raises(CraftError, match=r"DataParallel.*accelerate launch.*CUDA_VISIBLE_DEVICES"):
            replica(tokens())


def test_a_bank_takes_adapters_in_inference_mode(tmp_path):
    model, _ = moved(CRAFT)
    model.save_pretrained(tmp_path / "one")
    bank = AdapterBank(model)
    with torch.inference_mode():
        for number in range(3):
            bank.load(tmp_path / "one", f"tenant {number}")
    bank.load(tmp_path / "one", "later")
    with bank.use("later"):
        assert_close(logits(model), logits(PeftModel.from_pretrained(bert(), tmp_path / "one")), products=1000)


# ---------------------------------------------------------------------------------------------------------------------
# Several devices, sharded weights
# ---------------------------------------------------------------------------------------------------------------------


@every_method
def test_layers_of_a_stack_may_be_on_several_devices(method):
    """The meta device stands for another one: it refuses to mix as well."""
    model, _ = moved(method)
    layer = layers_of(model)[-1]
    layer.base_layer.to("meta")
    out = layer(torch.randn(2, 5, WIDTH, device="meta"))
    assert out.shape == (2, 5, WIDTH) and out.is_meta
    assert not any(parameter.is_meta for adapter in adapters_of(model) for parameter in adapter.parameters())


@every_method
@pytest.mark.parametrize("making", ["get_peft_model", "from_pretrained"])
def test_what_is_made_in_inference_mode_trains(method, making, tmp_path):
    model, base = moved(method)
    model.save_pretrained(tmp_path)
    base = copy.deepcopy(base)
    with torch.inference_mode():
        if making == "get_peft_model":
            model = get_peft_model(base, method.config(target_modules=TARGETS, init_weights=False))
        else:
            model = PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    for name, parameter in model.named_parameters():
        if f".{method.name}_" in name and parameter.is_inference():
            pytest.fail(f"{name} is an inference tensor")
    layers_of(model)[0](torch.randn(2, WIDTH)).sum().backward()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_base_that_is_sharded_already_is_decomposed_whole(process_group):
    base = bert()
    expected = get_peft_model(copy.deepcopy(base), CRAFT.config(target_modules=TARGETS))
    fully_shard(base, mesh=init_device_mesh("cpu", (1,)))
    model = get_peft_model(base, CRAFT.config(target_modules=TARGETS))
    for found, wanted in zip(adapters_of(model), adapters_of(expected), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found.buffers(), wanted.buffers(), strict=True))
    model.train()(tokens(), labels=LABELS).loss.backward()


@every_method
def test_a_model_whose_first_layer_was_cut_off_is_not_saved_without_its_adapter(method, tmp_path):
    model, _ = moved(method)
    encoder = model.get_base_model().bert.encoder
    encoder.layer = encoder.layer[1:]
    with pytest.raises(CraftError, match="Cut the base model first"):
        model.save_pretrained(tmp_path)
