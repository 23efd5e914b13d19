"""Work that layers share is done once a forward pass, and gradients are those of doing it in every layer."""

import copy
import pickle

import pytest
import torch
from laws import TARGETS, assert_close, moved
from method_table import METHODS
from peft import get_peft_model, inject_adapter_in_model
from small_models import gpt2, logits, tokens
from torch import nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from craft_peft import sharing
from craft_peft.adapters.base import StackAdapter
from craft_peft.plugin.layer import StackedLinear

LAYERS, WIDTH = 5, 8


class Shared(nn.Module):
    """One computation for all layers, which counts how often it is done."""

    def __init__(self):
        super().__init__()
        self.left = nn.Parameter(torch.randn(LAYERS * WIDTH, 2, dtype=torch.float64))
        self.right = nn.Parameter(torch.randn(2, WIDTH, dtype=torch.float64))
        self.times = 0

    def compute(self):
        self.times += 1
        return (self.left.tanh() @ self.right).split(WIDTH)


class Layer(nn.Module):
    def __init__(self, shared, place):
        super().__init__()
        self.unregistered = (shared, place)

    def forward(self, x):
        shared, place = self.unregistered
        return linear(x, sharing.compute_once(shared, shared.compute)[place]).tanh()


class Model(nn.Module):
    """Layers that share, of which those in `checkpointed` are run again in the backward pass."""

    def __init__(self, checkpointed=(), reentrant=False, hooked=True):
        super().__init__()
        torch.manual_seed(0)
        self.shared = Shared()
        self.layers = nn.ModuleList(Layer(self.shared, place) for place in range(LAYERS))
        self.checkpointed, self.reentrant = checkpointed, reentrant
        if hooked:
            sharing.share_work_in(self)

    def forward(self, x):
        for place, layer in enumerate(self.layers):
            x = checkpoint(layer, x, use_reentrant=self.reentrant) if place in self.checkpointed else layer(x)
        return x.square().sum()

    def gradients(self, steps=1):
        x = torch.randn(3, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
        for _ in range(steps):
            self(x).backward()
        return [self.shared.left.grad, self.shared.right.grad, x.grad]


EXPECTED = Model(hooked=False).gradients()


@pytest.mark.parametrize("hooked", [True, False])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("checkpointed", [(), (0,), (1, 3), range(LAYERS)], ids=str)
def test_gradients_are_those_of_separate_work(checkpointed, reentrant, hooked):
    model = Model(checkpointed, reentrant, hooked)
    for found, expected in zip(model.gradients(steps=2), EXPECTED, strict=True):
        assert_close(found, 2 * expected, products=1000)
    assert sharing._current.get() is None and not sharing._repeated


@pytest.mark.parametrize(
    ("checkpointed", "reentrant", "times"),
    [
        ((), False, 1),
        # Once in the forward pass and once for all that the backward pass runs again ...
        (range(LAYERS), False, 2),
        ((1, 3), False, 2),
        # ... and, where each layer is backpropagated by itself, once with a graph for all their gradients.
        (range(LAYERS), True, 3),
        ((1, 3), True, 3),
    ],
)
def test_work_is_done_once_a_pass(checkpointed, reentrant, times):
    model = Model(checkpointed, reentrant)
    model.gradients(steps=3)
    assert model.shared.times == 3 * times


def test_a_second_backward_pass_through_a_kept_graph():
    x = torch.randn(3, WIDTH, dtype=torch.float64)
    model = Model(range(LAYERS))
    loss = model(x)
    loss.backward(retain_graph=True)
    once = model.shared.left.grad.clone()
    loss.backward()
    assert_close(model.shared.left.grad, 2 * once, products=10)


# The outer checkpoint runs the inner one first without gradients.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
def test_a_checkpoint_in_a_checkpoint():
    """The layers of the inner one are run again within what the outer one runs again."""
    expected = EXPECTED[:2]
    for outer in (False, True):
        for inner in (False, True):
            model = Model(range(LAYERS), reentrant=inner)
            x = torch.randn(3, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
            checkpoint(model, x, use_reentrant=outer).backward()
            for found, wanted in zip([model.shared.left.grad, model.shared.right.grad], expected, strict=True):
                assert_close(found, wanted, products=1000)


def test_a_checkpoint_around_half_of_the_layers():
    model = Model()

    def half(first):
        def run(x):
            for layer in model.layers[first : first + 3]:
                x = layer(x)
            return x

        return run

    for reentrant in (False, True):
        model.zero_grad()
        x = torch.randn(3, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with sharing.shared_work():
            for first in (0, 3):
                x = checkpoint(half(first), x, use_reentrant=reentrant)
        x.square().sum().backward()
        for found, wanted in zip([model.shared.left.grad, model.shared.right.grad], EXPECTED, strict=False):
            assert_close(found, wanted, products=1000)


def test_nothing_is_kept_between_passes():
    model = Model()
    x = torch.ones(1, WIDTH, dtype=torch.float64)
    before = model(x)
    with torch.no_grad():
        model.shared.left.zero_()
        assert model(x) == 0 != before
        model.shared.left.data.fill_(1)  # behind the back of autograd's version counter
        assert model(x) != 0
    assert model.shared.times == 3


def test_a_pass_without_gradients_has_no_graph_and_one_inside_it_has():
    model = Model()
    x = torch.ones(1, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        assert not model(x).requires_grad
        with sharing.shared_work():
            model.layers[0](x)
            with torch.enable_grad():
                assert model.layers[0](x).requires_grad


def test_an_error_ends_the_pass():
    model = Model()
    with pytest.raises(RuntimeError):
        model(torch.ones(1, WIDTH + 1, dtype=torch.float64))
    assert sharing._current.get() is None


def test_an_interrupted_pass_is_forgotten_by_the_next():
    model = Model()

    def interrupt(module, args):
        raise KeyboardInterrupt

    handle = model.layers[2].register_forward_pre_hook(interrupt)
    x = torch.ones(1, WIDTH, dtype=torch.float64)
    with pytest.raises(KeyboardInterrupt):
        model(x)
    handle.remove()
    with torch.no_grad():
        model.shared.left.zero_()
    assert model(x) == 0 and sharing._current.get() is None


def test_one_model_in_another():
    """A pass of one model within that of another; each shares its own."""
    inner, outer = Model(), Model()
    outer.layers[1].register_forward_pre_hook(lambda module, args: inner(*args) and None)
    outer.gradients()
    assert inner.shared.times == outer.shared.times == 1


def test_a_model_that_fails_before_its_pass_ends_no_other():
    inner, outer = Model(), Model()

    def fail(module, args):
        raise ArithmeticError

    def try_inner(module, args):
        with pytest.raises(ArithmeticError):
            inner(*args)

    inner.register_forward_pre_hook(fail, prepend=True)
    outer.layers[1].register_forward_pre_hook(try_inner)
    outer.gradients()
    assert outer.shared.times == 1 and sharing._current.get() is None


def test_a_backward_pass_that_failed_leaves_nothing_to_the_next():
    model = Model(range(LAYERS))

    def fail(gradient):
        raise ArithmeticError

    x = torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True)
    x.register_hook(fail)
    with pytest.raises(ArithmeticError):
        model(x).backward()
    model.zero_grad()
    with torch.no_grad():
        model.shared.left.mul_(2)
    expected = Model(hooked=False)
    with torch.no_grad():
        expected.shared.left.mul_(2)
    for found, wanted in zip(model.gradients(), expected.gradients(), strict=True):
        assert_close(found, wanted, products=1000)


def test_hooks_come_once_and_go():
    model = nn.Linear(2, 2)
    sharing.share_work_in(model)
    sharing.share_work_in(model)
    assert len(model._forward_pre_hooks) == len(model._forward_hooks) == 1
    sharing.stop_sharing_work_in(model)
    assert not model._forward_pre_hooks and not model._forward_hooks and not model._forward_hooks_always_called


def test_transforms_of_functions():
    """`torch.func` differentiates a pass as autograd does."""
    model = Model()
    x = torch.randn(3, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    parameters = dict(model.named_parameters())
    found = torch.func.grad(lambda values: torch.func.functional_call(model, values, (x,)))(parameters)
    for name, expected in zip(("shared.left", "shared.right"), EXPECTED, strict=False):
        assert_close(found[name], expected, products=1000)


# ---------------------------------------------------------------------------------------------------------------------
# In a model, for every method
# ---------------------------------------------------------------------------------------------------------------------


every_method = pytest.mark.parametrize("method", METHODS, ids=str)


@pytest.fixture
def times(monkeypatch):
    """Counts how often each adapter prepares its layers."""
    found = {}
    original = StackAdapter._prepare

    def prepare(self):
        found[self] = found.get(self, 0) + 1
        return original(self)

    monkeypatch.setattr(StackAdapter, "_prepare", prepare)
    return found


def adapters_of(model, name):
    return {m.owned[name] for m in model.modules() if isinstance(m, StackedLinear) and name in m.owned}


@every_method
def test_a_forward_pass_prepares_once(method, times):
    model, base = moved(method)
    injected = inject_adapter_in_model(method.config(target_modules=TARGETS), copy.deepcopy(base))
    plain = copy.deepcopy(base)
    plain.add_adapter(method.config(target_modules=TARGETS), adapter_name="mine")
    for one in (model, injected, plain, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        times.clear()
        logits(one)
        one(tokens(), labels=torch.tensor([0, 1])).loss.backward()
        assert set(times.values()) == {2}


@every_method
@pytest.mark.parametrize(("reentrant", "expected"), [(False, 2), (True, 3)])
def test_checkpointing_prepares_once_more(method, reentrant, expected, times):
    gradients = []
    for checkpointing in (False, True):
        model, _ = moved(method)
        if checkpointing:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        times.clear()
        model.train()(tokens(), labels=torch.tensor([0, 1])).loss.backward()
        assert set(times.values()) == {expected if checkpointing else 1}
        gradients.append({n: p.grad for n, p in model.named_parameters() if f".{method.name}_" in n})
    for name, gradient in gradients[0].items():
        assert_close(gradients[1][name], gradient, products=100)


@every_method
@pytest.mark.parametrize(("checkpointing", "expected"), [(False, 1), (True, 2)])
def test_distributed_data_parallel_prepares_as_often(method, checkpointing, expected, times, process_group):
    gradients = []
    for wrap in (lambda model: model, nn.parallel.DistributedDataParallel):
        model, _ = moved(method)
        if checkpointing:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        times.clear()
        torch.manual_seed(0)
        wrap(model.train())(tokens(), labels=torch.tensor([0, 1])).loss.backward()
        assert set(times.values()) == {expected}
        gradients.append({n: p.grad for n, p in model.named_parameters() if f".{method.name}_" in n})
    for name, gradient in gradients[0].items():
        assert_close(gradients[1][name], gradient, products=1)


@every_method
def test_a_mixed_batch_prepares_each_adapter_at_most_once(method, times):
    """Adapters on common bases are not prepared at all: the rows go through their transforms."""
    model, _ = moved(method)
    model.add_adapter("second", method.config(task_type="SEQ_CLS", target_modules=["key", "value"], init_weights=False))
    times.clear()
    model.eval()(tokens(), adapter_names=["default", "second"])
    adapters = adapters_of(model, "default") | adapters_of(model, "second")
    assert set(times) <= adapters and set(times.values()) == {1}
    assert set(times) == adapters or method.name == "craft"


@every_method
def test_generation_prepares_once_a_token(method, times):
    model = get_peft_model(gpt2(), method.config(init_weights=False, task_type="CAUSAL_LM")).eval()
    model.generate(input_ids=tokens(), max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)
    assert set(times.values()) == {5}


@every_method
def test_merging_prepares_once(method, times):
    model, _ = moved(method)
    for act, expected in ((model.merge_adapter, {1}), (model.unmerge_adapter, set()), (model.merge_and_unload, {1})):
        times.clear()
        act()
        assert set(times.values()) == expected  # unmerging puts back what was there


@every_method
def test_a_submodule_called_by_itself_is_right(method):
    """Without the hooks of the whole model, with checkpointing of both kinds."""
    model, _ = moved(method)
    encoder = model.get_base_model().bert.encoder
    x = torch.randn(2, 7, 16, requires_grad=True)
    weights = torch.randn(2, 7, 16)  # the squares of a normalised output would add up to the same whatever is trained
    found = []
    for kwargs in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        model.zero_grad()
        if kwargs is not None:
            model.get_base_model().gradient_checkpointing_enable(kwargs)
        for module in model.train().modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        (encoder(x).last_hidden_state * weights).sum().backward()
        found.append(torch.cat([p.grad.flatten() for n, p in model.named_parameters() if f".{method.name}_" in n]))
    for gradient in found[1:]:
        assert_close(gradient, found[0], products=1000)


@every_method
def test_unloading_leaves_no_hooks(method):
    model, base = moved(method)
    unloaded = model.unload()
    assert len(unloaded._forward_pre_hooks) == len(base._forward_pre_hooks)
    assert len(unloaded._forward_hooks) == len(base._forward_hooks)
