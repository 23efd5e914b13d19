"""`torch.compile` and `torch.jit.trace` in a process of their own: they cannot trace functions whose annotations are
checked, as conftest asks.

    python tests/compiled_laws.py

prints, as JSON, what went wrong with every law and method; an empty string where nothing did.
"""

from __future__ import annotations

import copy
import json
import tempfile
import warnings

import torch
from laws import assert_close
from method_table import METHODS, Method
from peft import get_peft_model
from small_models import bert, tokens
from torch import Tensor, nn

from craft_peft import AdapterBank

WIDTH, LAYERS = 16, 2  # two layers already share


class Blocks(nn.Module):
    """Layers with two projections each: what a transformer is to an adapter, and quick to trace."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH) for name in ("query", "value")}) for _ in range(LAYERS)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer["query"](x).tanh() * layer["value"](x)
        return x


def adapted(method: Method, base: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(base, method.config(target_modules=["query", "value"], init_weights=False))


def rows(count: int) -> Tensor:
    return torch.randn(count, 5, WIDTH, generator=torch.Generator().manual_seed(count))


def step(model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """The outputs, and in training the gradients too."""
    model.zero_grad()
    outputs = model(inputs)
    outputs = outputs if isinstance(outputs, Tensor) else outputs.logits
    if model.training:
        outputs.square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    return {"outputs": outputs.detach(), **gradients}


def is_one_graph_for_all_batches(model: nn.Module, batches: list[Tensor]) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    backend = "aot_eager" if model.training else "eager"  # the second traces no backward pass
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend=backend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in batches:
            torch._dynamo.mark_dynamic(batch, 0)
            expected, found = step(model, batch), step(compiled, batch)
            assert {name.removeprefix("_orig_mod.") for name in found} == expected.keys()
            for name, tensor in found.items():
                assert_close(tensor, expected[name.removeprefix("_orig_mod.")], products=1000)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def trains(method: Method) -> None:
    is_one_graph_for_all_batches(adapted(method, Blocks()).train(), [rows(2), rows(3), rows(7)])


def infers(method: Method) -> None:
    is_one_graph_for_all_batches(adapted(method, Blocks()).eval(), [rows(2), rows(3), rows(7)])


def trains_a_transformer(method: Method) -> None:
    model = adapted(method, bert(layers=LAYERS)).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    is_one_graph_for_all_batches(model, [torch.arange(14).reshape(2, 7), torch.arange(21).reshape(3, 7)])


class Logits(nn.Module):
    """A model whose output is a tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model(inputs).logits


@torch.no_grad()
def computes_the_same_when_traced(model: nn.Module, example: Tensor, inputs: Tensor) -> None:
    expected = model.eval()(inputs)
    with tempfile.NamedTemporaryFile() as file, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch prefers torch.compile and torch.export
        torch.jit.save(torch.jit.trace(model, example, strict=False), file.name)
        loaded = torch.jit.load(file.name)
    assert_close(loaded(inputs), expected, products=1000)


def is_traced(method: Method) -> None:
    model = adapted(method, Blocks())
    computes_the_same_when_traced(model, rows(8) + 1, rows(8))  # so many rows are one step of our own else
    computes_the_same_when_traced(model, rows(1) + 1, rows(1))


def is_traced_in_a_transformer(method: Method) -> None:
    base = bert(layers=LAYERS)
    base.set_attn_implementation("eager")
    computes_the_same_when_traced(Logits(adapted(method, base)), tokens(1), tokens())


def asks_for_requests(method: Method) -> None:
    """A compiled model of two adapters and a bank, for calls by name, in a block, for all, and for none of these."""
    model = adapted(method, Blocks()).eval()
    torch.manual_seed(1)
    model.add_adapter("other", method.config(target_modules=["query", "value"], init_weights=False))
    bank = AdapterBank(model)
    for name in ("default", "other"):
        bank.add(f"bank {name}", adapter_name=name)

    def answers() -> list[Tensor]:
        found = [model(rows(3)), model(rows(3), adapter_names=["other", "__base__", "bank default"])]
        with bank.use("bank other"):
            found.append(model(rows(3)))
        bank.use("bank other")
        found.append(model(rows(3)))
        bank.use(None)
        with model.disable_adapter():
            found.append(model(rows(3)))
        return found

    torch._dynamo.reset()
    expected = answers()
    model.base_model.model.compile(backend="eager")
    for found in answers(), answers():
        for logits, wanted in zip(found, expected, strict=True):
            assert_close(logits, wanted, products=1000)
    assert not torch.equal(expected[0], expected[2])


ONE_ROW_A_METHOD = [method for method in METHODS if not method.setting]
LAWS = {trains: METHODS, infers: ONE_ROW_A_METHOD, trains_a_transformer: ONE_ROW_A_METHOD}
LAWS[asks_for_requests] = [method for method in ONE_ROW_A_METHOD if method.name == "craft"]
CASES = [(law, method) for law, methods in LAWS.items() for method in methods]
TRACE_CASES = [
    (law, method)
    for law, methods in {is_traced: METHODS, is_traced_in_a_transformer: ONE_ROW_A_METHOD}.items()
    for method in methods
]


def outcome(law, method: Method) -> str:
    try:
        law(method)
    except Exception as error:  # whatever it is, the test that asked reports it
        return f"{type(error).__name__}: {error}"
    return ""


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({f"{law.__name__}-{method}": outcome(law, method) for law, method in CASES + TRACE_CASES}))
