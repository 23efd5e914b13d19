"""Requests that overlap: each is answered by its own adapter, and leaves the model as it was, however it ends."""

import asyncio
import contextvars
import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import combinations, product

import pytest
import torch
from laws import TARGETS, assert_close
from method_table import METHODS
from peft import PeftModel, get_peft_model
from small_models import gpt2, tokens
from torch.utils.checkpoint import checkpoint
from transformers import RobertaConfig, RobertaForSequenceClassification

from craft_peft import AdapterBank, CraftError, sharing
from craft_peft.adapters.base import deferred as adapters_base
from craft_peft.plugin import requests
from craft_peft.plugin.layer import StackedLinear
from craft_peft.plugin.mixed_batches import ServedHead

CRAFT = next(method for method in METHODS if method.name == "craft")
NAMES = ["alice", "bob", "carol", "dave"]
ROWS = tokens()


def base_model():
    """With a head of several layers."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    return RobertaForSequenceClassification(RobertaConfig(vocab_size=50, **sizes)).eval()


def save_tenants(folder, base, names=NAMES, scale=1.0, **fields):
    for seed, name in enumerate(names):
        model = get_peft_model(copy.deepcopy(base), CRAFT.config(**fields)).eval()
        torch.manual_seed(seed)
        for key, parameter in model.named_parameters():
            if ".craft_" in key or "modules_to_save" in key:
                parameter.data = scale * torch.randn_like(parameter)
        model.save_pretrained(folder / name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tenants")
    save_tenants(folder, base_model(), task_type="SEQ_CLS", target_modules=TARGETS)
    return folder


def served(saved, base=None, **fields):
    """A model with two adapters of its own, alice's and bob's, and a bank with all tenants."""
    model = PeftModel.from_pretrained(base or base_model(), saved / "alice", "own").eval()
    model.load_adapter(saved / "bob", "other")
    bank = AdapterBank(model.eval(), **fields)
    for name in NAMES:
        bank.load(saved / name)
    return model, bank


def answer(model, **fields):
    with torch.no_grad():
        return model(ROWS, **fields).logits


def using(name):
    def request(model):
        with model.base_model.bank.use(name):
            return answer(model)

    return request


def nested(model):
    with model.base_model.bank.use("alice"), model.base_model.bank.use("dave"):
        return answer(model)


def without_adapter(model):
    with model.disable_adapter():
        return answer(model)


REQUESTS = {
    "plain": answer,
    "own": lambda model: answer(model, adapter_names=["other", "own"]),
    "bank": lambda model: answer(model, adapter_names=["carol", "dave"]),
    "mixed": lambda model: answer(model, adapter_names=["other", "carol"]),
    "base": lambda model: answer(model, adapter_names=["__base__", "alice"]),
    "use": using("carol"),
    "use nested": nested,
    "use base": using("__base__"),
    "use own": using(None),
    "disabled": without_adapter,
}
BLOCKS = {"use", "use nested", "use base", "use own"}


def is_refused(first, second):
    """Whether the second request has to say more when it begins while the first is under way."""
    return first == "disabled" or (first in BLOCKS and second == "plain")


def expected_of(model):
    expected = {name: request(model) for name, request in REQUESTS.items()}
    assert len({tuple(logits.flatten().tolist()) for logits in expected.values()}) == len(expected) - 2
    assert torch.equal(expected["plain"], expected["use own"])
    assert torch.equal(expected["disabled"], expected["use base"])
    return expected


def state_of(model):
    """What a request could have changed: of the modules, and of the books about requests."""
    modules = [(vars(m).keys(), len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]
    asking = [m for m in model.modules() if isinstance(m, StackedLinear | ServedHead)]
    return (
        [(set(keys), *hooks) for keys, *hooks in modules],
        [(m.instead, m.disable_adapters, m.active_adapters) for m in asking],
        (list(requests._special), dict(requests._unsettled), requests.compiled.has_to_ask, requests._current.get()),
    )


WAIT = 60  # seconds; only a failure takes so long


def overlap(gate, first, second, crossed):
    """What two requests return or raise, the second of which begins when the first is at the gate.

    Args:
        gate: a module; a request stops before it.
        first: a call.
        second: a call; the first goes on when it is over; or `crossed`, when it is at the gate too, and then it goes on
            when the first is over.
        crossed: see there.
    """
    here = {name: threading.Event() for name in ("first", "second")}  # at the gate, or over
    over = {name: threading.Event() for name in here}
    found = {}

    def stop(*_):
        name = threading.current_thread().name
        if name in here and not here[name].is_set():
            here[name].set()
            if name == "first":
                assert (here if crossed else over)["second"].wait(WAIT)
            elif crossed:
                assert over["first"].wait(WAIT)

    def run(name, request):
        try:
            if name == "second":
                assert here["first"].wait(WAIT)
            found[name] = request()
        except BaseException as error:
            found[name] = error
        finally:
            here[name].set()
            over[name].set()

    hook = gate.register_forward_pre_hook(stop)
    threads = [threading.Thread(target=run, args=pair, name=pair[0]) for pair in (("first", first), ("second", second))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * WAIT)
    hook.remove()
    return found["first"], found["second"]


GATES = {
    "a layer": lambda model: model.base_model.model.roberta.encoder.layer[1],
    "the head": lambda model: model.base_model.model.classifier,
    "within the head": lambda model: model.base_model.model.classifier.original_module.out_proj,
}


def check_overlaps(model, pairs, crossed, gate):
    """Each is exact, or is refused where it says too little; and so is every later request."""
    expected = expected_of(model)
    before = state_of(model)
    for first, second in pairs:
        found = overlap(gate(model), partial(REQUESTS[first], model), partial(REQUESTS[second], model), crossed)
        for name, logits in zip((first, second), found, strict=True):
            if isinstance(logits, CraftError):
                assert logits is found[1] and is_refused(first, second), f"{first}, {second}: {logits}"
                assert "another thread or task" in str(logits).lower()
            else:
                assert isinstance(logits, torch.Tensor), f"{first}, {second}: {logits!r}"
                assert torch.equal(logits, expected[name]), f"{name} of {first}, {second}"
        assert state_of(model) == before, f"{first}, {second}"
    for name, request in REQUESTS.items():
        assert torch.equal(request(model), expected[name]), f"{name} afterwards"


@pytest.mark.parametrize("crossed", [False, True], ids=["inside", "crossed"])
def test_overlapping_requests_have_each_their_own_adapter(crossed, folder):
    model, _ = served(folder)
    check_overlaps(model, product(REQUESTS, REQUESTS), crossed, GATES["a layer"])


@pytest.mark.parametrize("crossed", [False, True], ids=["inside", "crossed"])
@pytest.mark.parametrize("gate", ["the head", "within the head"])
def test_overlapping_requests_have_each_their_own_head(gate, crossed, folder):
    model, _ = served(folder)
    check_overlaps(model, product(["plain", "bank", "mixed", "use", "disabled"], repeat=2), crossed, GATES[gate])


class _OfTheModule:
    """As a context variable, but one for all threads."""

    def __init__(self):
        self.value = None

    def get(self):
        return self.value

    def set(self, value):
        self.value = value


def test_the_law_of_overlaps_sees_state_that_threads_share(folder, monkeypatch):
    model, _ = served(folder)
    monkeypatch.setattr(requests, "_current", _OfTheModule())
    with pytest.raises(AssertionError, match=r"own of own, bank|bank of own, bank"):
        check_overlaps(model, [("own", "bank")], True, GATES["a layer"])


def test_overlapping_requests_have_each_their_own_trained_tokens():
    """PEFT's other wrapper asks too. One adapter is on fewer layers."""
    base = base_model()
    model = get_peft_model(
        base, CRAFT.config(target_modules=TARGETS, trainable_token_indices=[1, 2], task_type="SEQ_CLS")
    )
    model.add_adapter(
        "other", CRAFT.config(target_modules=["query"], trainable_token_indices=[1, 2], task_type="SEQ_CLS")
    )
    torch.manual_seed(0)
    for key, parameter in model.eval().named_parameters():
        if ".craft_" in key or "token_adapter" in key or "modules_to_save" in key:
            parameter.data = torch.randn_like(parameter)
    batches = [["default", "other"], ["other", "__base__"], ["__base__", "default"]]
    expected = [answer(model, adapter_names=names) for names in batches]
    calls = [partial(answer, model, adapter_names=names) for names in batches]
    for crossed in (False, True):
        for one, two in product(range(3), repeat=2):
            found = overlap(model.base_model.model.roberta.embeddings, calls[one], calls[two], crossed)
            assert torch.equal(found[0], expected[one]) and torch.equal(found[1], expected[two])


def test_overlapping_generations_have_each_their_own_adapter(tmp_path):
    save_tenants(tmp_path, gpt2(), scale=30.0, task_type="CAUSAL_LM", target_modules=None)
    model, bank = served(tmp_path, gpt2())
    fields = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}

    def generate(**more):
        return model.generate(input_ids=ROWS, **fields, **more)

    def generate_in_block():
        with bank.use("dave"):
            return generate()

    calls = [
        lambda: generate(adapter_names=["other", "own"]),
        lambda: generate(adapter_names=["carol", "bob"]),
        lambda: generate(adapter_names=["carol", "__base__"], num_beams=2),
        generate_in_block,
    ]
    expected = [call() for call in calls]
    for crossed in (False, True):
        for one, two in combinations(range(4), 2):
            found = overlap(model.base_model.model.transformer.h[1], calls[one], calls[two], crossed)
            assert torch.equal(found[0], expected[one]) and torch.equal(found[1], expected[two]), (one, two)


# ---------------------------------------------------------------------------------------------------------------------
# The bank changes while requests run
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", ["transforms", "middles"])
@pytest.mark.parametrize("gate", GATES)
def test_what_a_request_uses_stays_to_its_end(gate, keep, folder, tmp_path):
    """Another thread evicts, removes and loads what goes into the same places, and lets the bank grow."""
    for request in (REQUESTS["bank"], REQUESTS["mixed"], REQUESTS["use"]):
        model, bank = served(folder, keep=keep)
        expected, places = request(model), bank._places

        def change(bank=bank):
            for name in ("carol", "dave"):
                bank.evict(name)
            if not requests.blocks_of(bank._tuner.model):
                bank.remove("carol")
            for number in range(5):
                bank.load(folder / "alice", f"alice {number}")
                bank.add(f"own {number}", adapter_name="other")
                bank.save(f"own {number}", tmp_path / "saved")
            for number in range(5):
                bank.remove(f"own {number}")
                bank.remove(f"alice {number}")

        found, outcome = overlap(GATES[gate](model), partial(request, model), change, False)
        assert outcome is None and torch.equal(found, expected)
        assert bank._places > places
        free = sorted(bank._free)
        assert len(free) + len(bank.resident) == bank._places and free == sorted(set(free))  # no place is lost


def test_many_requests_of_four_threads_to_a_bank_with_two_places(folder, tmp_path):
    model, bank = served(folder, max_resident=2, folder=tmp_path)
    expected = {name: using(name)(model) for name in NAMES}
    several = threading.Barrier(4, timeout=WAIT)

    def serve(thread):
        several.wait()
        for number in range(40):
            one, two = NAMES[(number + thread) % 4], NAMES[(number * (thread + 1)) % 4]
            if number % 3 == 0:
                found, names = using(one)(model), [one, one]
            else:
                found, names = answer(model, adapter_names=[one, two]), [one, two]
            for row, name in enumerate(names):
                assert_close(found[row], expected[name][row], products=2000)
            if number % 10 == thread:
                bank.load(folder / one, f"{thread} {number}")
                bank.evict(f"{thread} {number}")
                bank.remove(f"{thread} {number}")
        return 40

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(serve, range(4))) == 160
    assert len(bank.resident) == 2 and sorted(bank.names) == NAMES
    for name in NAMES:
        assert_close(using(name)(model), expected[name], products=2000)


def test_a_removed_name_is_refused_and_not_the_base(folder):
    """Removed between the check of the names and their use."""
    model, bank = served(folder)
    hold = bank.hold

    def late(names):
        bank.remove("carol")
        return hold(names)

    bank.hold = late
    with pytest.raises(CraftError, match=r"non-existing adapter\(s\): carol"):
        answer(model, adapter_names=["carol", "bob"])


def test_a_bank_works_in_and_out_of_inference_mode(folder):
    model = PeftModel.from_pretrained(base_model(), folder / "alice", "own").eval()
    with torch.inference_mode():
        bank = AdapterBank(model)
        for name in NAMES:
            bank.load(folder / name)
        found = REQUESTS["bank"](model)
        bank.evict("carol")
    bank.use("carol")
    embeddings = torch.randn(2, 5, 16, requires_grad=True)
    model(inputs_embeds=embeddings).logits.sum().backward()
    bank.use(None)
    assert embeddings.grad is not None and torch.equal(REQUESTS["bank"](model), found)


# ---------------------------------------------------------------------------------------------------------------------
# Endings
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, asyncio.CancelledError])
def test_after_an_error_in_any_layer_the_model_is_as_it_was(error, folder):
    model, _ = served(folder)
    expected, before = expected_of(model), state_of(model)
    places = [m.base_layer for m in model.modules() if isinstance(m, StackedLinear)]
    classifier = model.base_model.model.classifier
    places += [head.dense for head in (classifier.original_module, *classifier.modules_to_save.values())]

    def fail(*_):
        raise error("in the middle")

    for place in places:
        hook = place.register_forward_pre_hook(fail)
        failed = 0
        for request in REQUESTS.values():
            try:
                request(model)
            except error:
                failed += 1
        hook.remove()
        assert failed > 0 and state_of(model) == before
    for name, request in REQUESTS.items():
        assert torch.equal(request(model), expected[name]), name


def test_a_pass_that_is_interrupted_is_over(folder):
    """Else it would hand out what it computed to layers that are called by themselves, after the next training step."""
    model, _ = served(folder)

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = model.base_model.model.roberta.encoder.layer[1].register_forward_pre_hook(interrupt)
    for name in ("plain", "own", "use"):
        with pytest.raises(KeyboardInterrupt):
            REQUESTS[name](model)
        assert sharing._current.get() is None, name
    hook.remove()


def test_blocks_end_in_any_order_and_in_any_thread(folder):
    model, bank = served(folder)
    expected, before = expected_of(model), state_of(model)

    def stream(name):
        with bank.use(name):
            while True:
                yield answer(model)

    streams = [stream(name) for name in ("carol", "dave")]
    assert torch.equal(next(streams[0]), expected["use"])
    assert torch.equal(next(streams[1]), expected["use nested"])
    streams[0].close()
    assert torch.equal(answer(model), expected["use nested"])
    thread = threading.Thread(target=streams[1].close)
    thread.start()
    thread.join()
    assert torch.equal(answer(model), expected["plain"])
    requests._current.set(None)  # it was not set back in this thread, where it is over all the same
    assert state_of(model) == before


def test_tasks_have_each_their_own_adapter_and_may_be_cancelled(folder):
    model, bank = served(folder)
    expected, before = expected_of(model), state_of(model)

    async def tenant(name, entered, wait_for):
        with bank.use(name):
            entered.set()
            await wait_for.wait()
            return answer(model), await asyncio.to_thread(answer, model)

    async def serve():
        entered, go = [asyncio.Event() for _ in range(3)], asyncio.Event()
        tasks = [
            asyncio.create_task(tenant(n, e, go)) for n, e in zip(("carol", "dave", "alice"), entered, strict=True)
        ]
        for event in entered:
            await event.wait()
        tasks[2].cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks[2]
        with pytest.raises(CraftError, match="another thread or task"):
            answer(model)
        found = answer(model, adapter_names=["carol", "dave"])
        go.set()
        return found, *(await tasks[0]), *(await tasks[1])

    found = asyncio.run(serve())
    for logits, name in zip(found, ["bank", "use", "use", "use nested", "use nested"], strict=True):
        assert torch.equal(logits, expected[name])
    assert torch.equal(answer(model), expected["plain"]) and state_of(model) == before


def in_thread(call):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


def test_a_statement_is_for_all_threads_until_the_next(folder):
    model, bank = served(folder)
    bank.use(None)
    expected, before = expected_of(model), state_of(model)
    model.base_model.bank.use("carol")
    assert torch.equal(in_thread(lambda: answer(model)), expected["use"])
    assert torch.equal(answer(model.base_model.model), expected["use"])  # of the base model itself, too
    encoded = model.base_model.model.roberta(ROWS).last_hidden_state
    with bank.use("dave"):
        assert torch.equal(answer(model), expected["use nested"])
        assert torch.equal(answer(model.base_model.model), expected["use nested"])
        assert not torch.equal(model.base_model.model.roberta(ROWS).last_hidden_state, encoded)
        bank.use("__base__")  # a statement in a block is the block's
        assert torch.equal(answer(model), expected["disabled"])
        with bank.use("carol"):
            assert torch.equal(answer(model), expected["use"])
        assert torch.equal(answer(model), expected["disabled"])
    assert torch.equal(in_thread(lambda: answer(model)), expected["use"])
    kept = bank.use("dave")  # its result kept, and not entered
    assert torch.equal(answer(model), expected["use nested"])
    assert torch.equal(in_thread(lambda: answer(model)), expected["use nested"])
    kept.close()
    assert torch.equal(in_thread(lambda: answer(model)), expected["use"])
    bank.use(None)
    assert torch.equal(in_thread(lambda: answer(model)), expected["plain"]) and state_of(model) == before


def test_a_statement_does_not_change_a_call_under_way(folder):
    model, bank = served(folder)
    expected = expected_of(model)
    for gate in ("a layer", "the head"):
        for name in ("plain", "own", "use"):
            found, _ = overlap(
                GATES[gate](model), partial(REQUESTS[name], model), lambda: bank.use("dave") and None, False
            )
            assert torch.equal(found, expected[name]), name
            bank.use(None)


def test_threads_do_not_inherit_a_block_unless_they_run_in_its_context(folder):
    model, bank = served(folder)
    expected = expected_of(model)
    with bank.use("carol"):
        with pytest.raises(CraftError, match="Threads do not inherit a `with`"):
            in_thread(lambda: answer(model))
        with pytest.raises(CraftError, match="Threads do not inherit a `with`"):
            in_thread(lambda: model.base_model.model.roberta(ROWS))
        context = contextvars.copy_context()
        found = in_thread(lambda: context.run(answer, model))
    assert torch.equal(found, expected["use"])
    with model.disable_adapter():
        with pytest.raises(CraftError, match="has switched the adapters off"):
            in_thread(lambda: answer(model, adapter_names=["carol", "dave"]))
        with pytest.raises(CraftError, match="has switched the adapters off"):
            in_thread(lambda: without_adapter(model))
        with bank.use("carol"):
            assert torch.equal(answer(model), expected["disabled"])
    assert torch.equal(answer(model, adapter_names=["carol", "dave"]), expected["bank"])


def test_one_adapter_alone_is_switched_off_for_all_threads_as_in_peft(folder):
    model = PeftModel.from_pretrained(base_model(), folder / "alice").eval()
    own, off = answer(model), without_adapter(model)
    with model.disable_adapter():
        assert torch.equal(in_thread(lambda: answer(model)), off)
    found = overlap(GATES["a layer"](model), lambda: answer(model), lambda: without_adapter(model), True)
    assert torch.equal(found[0], own) and torch.equal(found[1], off) and torch.equal(answer(model), own)


def test_a_checkpoint_in_a_block_is_run_again_with_its_adapter(folder):
    """Autograd may run it in a thread of its own, as it does on a GPU."""
    model, bank = served(folder)
    layer = model.base_model.model.roberta.encoder.layer[0].attention.self.query
    x = torch.randn(2, 5, 16, requires_grad=True)
    with bank.use("carol"):
        (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
        loss = checkpoint(layer, x, use_reentrant=False).square().sum()
        (found,) = in_thread(lambda: torch.autograd.grad(loss, x))
    assert_close(found, expected, products=100)


def test_copies_have_requests_of_their_own(folder):
    model, bank = served(folder)
    expected = expected_of(model)
    with bank.use("carol"):
        twin = copy.deepcopy(model)
        assert torch.equal(answer(twin), expected["plain"])
        with twin.base_model.bank.use("dave"):
            assert torch.equal(answer(twin), expected["use nested"])
            assert torch.equal(answer(model), expected["use"])


def test_an_adapter_whose_computation_is_interrupted_is_computed_by_the_next_call(folder):
    model = PeftModel.from_pretrained(base_model(), folder / "alice").eval()
    expected = answer(model)
    adapter = model.base_model.model.roberta.encoder.layer[0].attention.self.query.slots["default"].adapter
    computed, errors = adapter.core.clone(), [KeyboardInterrupt]
    adapter.core.zero_()

    def compute():
        if errors:
            raise errors.pop()
        adapter.core.copy_(computed)

    adapter.defer(compute)
    with pytest.raises(KeyboardInterrupt):
        answer(model)
    assert torch.equal(answer(model), expected)


class _Watched:
    """A lock that tells when a second thread asks for it."""

    def __init__(self, met):
        self.lock, self.met, self.first = threading.RLock(), met, None

    def __enter__(self):
        self.first = self.first or threading.get_ident()
        if threading.get_ident() != self.first:
            self.met.set()
        self.lock.acquire()

    def __exit__(self, *_):
        self.lock.release()


def test_nobody_uses_an_adapter_that_another_thread_is_still_computing(folder, monkeypatch):
    """Of two first calls the second waits until what the first computes is there."""
    model = PeftModel.from_pretrained(base_model(), folder / "alice").eval()
    expected = answer(model)
    query = model.base_model.model.roberta.encoder.layer[0].attention.self.query
    adapter = query.slots["default"].adapter
    began, met, computed = threading.Event(), threading.Event(), adapter.core.clone()
    adapter.core.zero_()

    def compute():
        began.set()
        assert met.wait(WAIT)
        adapter.core.copy_(computed)

    adapter.defer(compute)
    monkeypatch.setattr(adapters_base, "_filling", _Watched(met))
    query.register_forward_hook(lambda *_: met.set())  # reached before the core is there only if nobody waits
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(answer, model)
        assert began.wait(WAIT)
        second = pool.submit(answer, model)
        assert torch.equal(first.result(), expected) and torch.equal(second.result(), expected)
