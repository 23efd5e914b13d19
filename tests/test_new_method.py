"""A method that this package does not have: what it takes to add one, and that all laws then hold for it.

FacT-TK (arXiv 2212.03145): the updates of all target matrices of one shape as a tensor in Tucker form, all trained,

    delta W_l = s * out_factor @ (sum_a layer_factor[l, a] * core[a]) @ in_factor.T.

An adapter, a config, a tuner that names the prefix, and a row for the table of methods; nothing else.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from laws import ADAPTER_LAWS, MODEL_LAWS, tolerance
from method_table import Method
from peft import PeftType
from torch import nn

from craft_peft import LotrConfig
from craft_peft.adapters.base import FactoredStackAdapter
from craft_peft.plugin.config import StackConfig
from craft_peft.plugin.registration import register_method
from craft_peft.plugin.tuner import StackTuner
from craft_peft.weights import StackShape

# The adapter: what is added to layer l's weight? -------------------------------------------------------------------


class FactAdapter(FactoredStackAdapter):
    def __init__(self, shape: StackShape, r: int, *, init_weights: bool = True, **base) -> None:
        super().__init__(shape, **base)
        start = torch.zeros if init_weights else torch.randn
        self.out_factor = nn.Parameter(start(shape.d_out, r))
        self.in_factor = nn.Parameter(torch.randn(shape.d_in, r) / shape.d_in**0.5)
        self.layer_factor = nn.Parameter(torch.randn(shape.layers, r) / r**0.5)
        self.core = nn.Parameter(torch.randn(r, r, r) / r)

    def initialise(self, read_weights) -> None:
        pass

    def layer_cores(self):
        return torch.tensordot(self.layer_factor, self.core, dims=1)


# The config, the tuner, and their names in PEFT --------------------------------------------------------------------


@dataclass
class FactConfig(StackConfig):
    r: int = field(default=8, metadata={"help": "The rank of every mode."})

    def __post_init__(self) -> None:
        self.peft_type = PeftType["FACT"]
        super().__post_init__()

    @property
    def together(self):
        return "shape"

    def build_adapter(self, name, shape, ranks=None):
        return FactAdapter(
            shape, ranks or self.r, init_weights=self.init_weights, scaling=self.alpha, dropout=self.dropout
        )


class FactModel(StackTuner):
    prefix = "fact_"


register_method("fact", FactConfig, FactModel)

# The row of the table ----------------------------------------------------------------------------------------------


def fact_config(**fields):
    return FactConfig(**{"r": 3, "alpha": 0.3, **fields})


def fact_count(projections: Sequence[StackShape]) -> int:
    r, matrices = 3, sum(shape.layers for shape in projections)
    return r * (sum(projections[0].matrix) + matrices) + r**3


def fact_naive_delta(adapter, layer):
    out_factor, in_factor = adapter.out_factor.detach(), adapter.in_factor.detach()
    layer_factor, core = adapter.layer_factor.detach(), adapter.core.detach()
    r, delta = len(core), torch.zeros(adapter.shape.matrix, dtype=core.dtype)
    for out in range(adapter.shape.d_out):
        for in_ in range(adapter.shape.d_in):
            for a in range(r):
                for b in range(r):
                    for c in range(r):
                        delta[out, in_] += (
                            layer_factor[layer, a] * core[a, b, c] * out_factor[out, b] * in_factor[in_, c]
                        )
    return adapter.scaling * delta


FACT = Method("fact", fact_config, fact_count, fact_naive_delta)


@pytest.mark.parametrize("law", ADAPTER_LAWS + MODEL_LAWS, ids=lambda law: law.__name__)
def test_law(law):
    law(FACT)


def test_with_a_core_a_matrix_it_is_lotr():
    """FacT's middle matrices are LoTR's cores, restricted to r combinations."""
    fact = FACT.adapter(StackShape.uniform(4, 7, 5), init_weights=False, alpha=1.0)
    lotr = LotrConfig(r=3, alpha=3.0).build_adapter("query", StackShape.uniform(4, 7, 5)).double()
    lotr.out_factor.data, lotr.in_factor.data = fact.out_factor.data, fact.in_factor.data
    lotr.core.data = torch.stack([fact.middle(layer).detach() for layer in range(4)])
    for layer in range(4):
        torch.testing.assert_close(
            fact.delta_weight(layer), lotr.delta_weight(layer), rtol=tolerance(torch.float64, 100), atol=1e-15
        )
