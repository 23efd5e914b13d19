"""Faults put into the code on purpose: at least one law has to catch each, or the laws prove nothing."""

import pytest
import torch
from laws import ADAPTER_LAWS, MODEL_LAWS
from method_table import METHODS

from craft_peft.adapters.base import FactoredStackAdapter
from craft_peft.adapters.craft import CraftAdapter
from craft_peft.plugin import layer as layer_module
from craft_peft.plugin.layer import StackedLinear

CRAFT = next(method for method in METHODS if method.name == "craft")


def keeps_the_principal_part(self, layer):
    """K_l without `- C_l(I)`: the principal part of the weight is added a second time."""
    j1, j2, j3 = self.transforms().values()
    return j2 @ torch.tensordot((self.layer_factor @ j1)[layer], self.core, dims=1) @ j3.T


def transposes_the_out_transform(self, layer):
    start = torch.tensordot(self.layer_factor[layer], self.core, dims=1)
    delta = torch.tensordot(self.layer_factor[layer] @ self.layer_transform, self.core, dims=1)
    start = start + delta
    turned = self.out_transform.T @ start
    return delta + turned + (start + turned) @ self.in_transform.T


def transposes_the_in_transform(self, layer):
    start = torch.tensordot(self.layer_factor[layer], self.core, dims=1)
    delta = torch.tensordot(self.layer_factor[layer] @ self.layer_transform, self.core, dims=1)
    start = start + delta
    turned = self.out_transform @ start
    return delta + turned + (start + turned) @ self.in_transform


def forgets_the_cross_term(self, layer):
    start = torch.tensordot(self.layer_factor[layer], self.core, dims=1)
    delta = torch.tensordot(self.layer_factor[layer] @ self.layer_transform, self.core, dims=1)
    start = start + delta
    return delta + self.out_transform @ start + start @ self.in_transform.T


def detaches_the_layer_transform(self, layer):
    start = torch.tensordot(self.layer_factor[layer], self.core, dims=1)
    delta = torch.tensordot(self.layer_factor[layer] @ self.layer_transform.detach(), self.core, dims=1)
    start = start + delta
    turned = self.out_transform @ start
    return delta + turned + (start + turned) @ self.in_transform.T


def takes_the_next_layer(self, layer, original=CraftAdapter.middle):
    return original(self, (layer + 1) % self.shape.layers)


def skips_the_scaling(self, x_or_layer, x=None):
    hidden = torch.nn.functional.linear(x, self.in_factor.T.to(x.dtype))
    hidden = torch.nn.functional.linear(hidden, self.middle(x_or_layer).to(x.dtype))
    return torch.nn.functional.linear(hidden, self.out_factor.to(x.dtype))


def adds_at_the_start(self, layer, original=CraftAdapter.middle):
    return original(self, layer) + 1e-12


def merges_twice(self, sign, name, original=StackedLinear._weight_plus):
    return self.get_base_layer().weight.data + 2 * (original(self, sign, name) - self.get_base_layer().weight.data)


def does_not_unmerge(self):
    self.merged_adapters.clear()


FAULTS = [
    (CraftAdapter, "middle", keeps_the_principal_part),
    (CraftAdapter, "middle", transposes_the_out_transform),
    (CraftAdapter, "middle", transposes_the_in_transform),
    (CraftAdapter, "middle", forgets_the_cross_term),
    (CraftAdapter, "middle", detaches_the_layer_transform),
    (CraftAdapter, "middle", takes_the_next_layer),
    (CraftAdapter, "middle", adds_at_the_start),
    (FactoredStackAdapter, "delta_output", skips_the_scaling),
    (StackedLinear, "_weight_plus", merges_twice),
    (StackedLinear, "unmerge", does_not_unmerge),
    (layer_module, "oriented", lambda module, matrix: matrix),
]


@pytest.mark.parametrize(("owner", "name", "fault"), FAULTS, ids=[fault.__name__ for _, _, fault in FAULTS])
def test_a_fault_breaks_a_law(owner, name, fault, monkeypatch):
    monkeypatch.setattr(owner, name, fault)
    broken = []
    for law in ADAPTER_LAWS + MODEL_LAWS:
        try:
            law(CRAFT)
        except (AssertionError, RuntimeError) as error:
            broken.append((law.__name__, error))
            break
    assert broken, f"no law noticed: {fault.__name__}"
