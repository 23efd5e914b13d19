"""Faults put into the code on purpose: at least one law has to catch each, or the laws prove nothing."""

import pytest
import torch
from laws import ADAPTER_LAWS, MODEL_LAWS
from method_table import METHODS

from craft_peft.adapters import superlora as superlora_module
from craft_peft.adapters.base import FactoredStackAdapter
from craft_peft.adapters.base import adapter as base_module
from craft_peft.adapters.craft import CraftAdapter
from craft_peft.adapters.lotr import LotrAdapter
from craft_peft.adapters.superlora import SuperLoraAdapter
from craft_peft.plugin import layer as layer_module
from craft_peft.plugin.layer import StackedLinear

CRAFT = next(method for method in METHODS if method.name == "craft")
LOTR, LOTR_SVD = (method for method in METHODS if method.name == "lotr")
ONE_GROUP, AS_LORA, PROJECTED = (method for method in METHODS if method.name == "superlora")


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


def transposes_the_core(self, layer):
    return self.core[layer].T


def uses_one_core_for_all(self, layer):
    return self.core[0]


def detaches_a_factor(self):
    return self.out_factor, self.in_factor.detach()


def starts_from_half_the_weights(self, layer, original=LotrAdapter.middle):
    blocks = original(self, layer).clone()
    blocks[self.r :, self.r :] /= 2
    return blocks


def adds_the_weights_themselves(self, layer, original=LotrAdapter.middle):
    blocks = original(self, layer).clone()
    blocks[self.r :, : self.r] += self.start_core[layer]
    return blocks


def turns_the_parts_around(self, original=SuperLoraAdapter.prepare):
    return original(self)[::-1]


def transposes_the_parts(self, original=SuperLoraAdapter.prepare):
    return tuple(part.T.reshape(part.shape) for part in original(self))


def swaps_the_kronecker_product(first, second, original=superlora_module._kronecker):
    return original(second, first)


def forgets_to_permute(self, vector):
    return vector


def permutes_back(self, vector):
    return vector[self._permutation.argsort()]


def projects_by_repeating(self, number, folded):
    repeated = -(-self.kinds[number].entries // folded.shape[1])
    return folded.repeat(1, repeated)[:, : self.kinds[number].entries]


def forgets_the_scaling_of_the_first_split(self, label, first, original=SuperLoraAdapter._tensor):
    return original(self, label, False)


def detaches_the_tensors(self, label, first, original=SuperLoraAdapter._tensor):
    return original(self, label, first).detach()


def takes_the_next_pair(self, layer, original=SuperLoraAdapter._thin_pair):
    return original(self, (layer + 1) % self.shape.layers)


def scales_twice(self, layer, x, original=SuperLoraAdapter.delta_output):
    return self.scaling * original(self, layer, x)


def keeps_what_it_computed(owner, compute, kept={}):  # noqa: B006 the fault is just this
    """Across forward passes: its graph is gone after the first backward pass, its values are those of old weights."""
    if owner not in kept:
        kept[owner] = compute()
    return kept[owner]


def merges_twice(self, *args, original=StackedLinear.merge, **kwargs):
    original(self, *args, **kwargs)
    for name in self.merged_adapters:
        self.get_base_layer().weight.data += self.get_delta_weight(name)


def does_not_unmerge(self):
    self.merged_adapters.clear()


FAULTS = [
    (CRAFT, CraftAdapter, "middle", keeps_the_principal_part),
    (CRAFT, CraftAdapter, "middle", transposes_the_out_transform),
    (CRAFT, CraftAdapter, "middle", transposes_the_in_transform),
    (CRAFT, CraftAdapter, "middle", forgets_the_cross_term),
    (CRAFT, CraftAdapter, "middle", detaches_the_layer_transform),
    (CRAFT, CraftAdapter, "middle", takes_the_next_layer),
    (CRAFT, CraftAdapter, "middle", adds_at_the_start),
    (CRAFT, FactoredStackAdapter, "delta_output", skips_the_scaling),
    (LOTR, LotrAdapter, "middle", transposes_the_core),
    (LOTR, LotrAdapter, "middle", uses_one_core_for_all),
    (LOTR, LotrAdapter, "factors", detaches_a_factor),
    (LOTR_SVD, LotrAdapter, "middle", starts_from_half_the_weights),
    (LOTR_SVD, LotrAdapter, "middle", adds_the_weights_themselves),
    (ONE_GROUP, SuperLoraAdapter, "prepare", turns_the_parts_around),
    (ONE_GROUP, SuperLoraAdapter, "prepare", transposes_the_parts),
    (ONE_GROUP, SuperLoraAdapter, "_tensor", forgets_the_scaling_of_the_first_split),
    (ONE_GROUP, SuperLoraAdapter, "_tensor", detaches_the_tensors),
    (ONE_GROUP, base_module, "compute_once", keeps_what_it_computed),
    (PROJECTED, superlora_module, "_kronecker", swaps_the_kronecker_product),
    (PROJECTED, SuperLoraAdapter, "_permute", forgets_to_permute),
    (PROJECTED, SuperLoraAdapter, "_permute", permutes_back),
    (PROJECTED, SuperLoraAdapter, "_project", projects_by_repeating),
    (AS_LORA, SuperLoraAdapter, "_thin_pair", takes_the_next_pair),
    (AS_LORA, SuperLoraAdapter, "delta_output", scales_twice),
    (CRAFT, StackedLinear, "merge", merges_twice),
    (CRAFT, StackedLinear, "unmerge", does_not_unmerge),
    (CRAFT, layer_module, "oriented", lambda module, matrix: matrix),
]


@pytest.mark.parametrize(("method", "owner", "name", "fault"), FAULTS, ids=[fault.__name__ for *_, fault in FAULTS])
def test_a_fault_breaks_a_law(method, owner, name, fault, monkeypatch):
    monkeypatch.setattr(owner, name, fault)
    broken = []
    for law in ADAPTER_LAWS + MODEL_LAWS:
        if law.__name__ in method.exceptions:
            continue
        try:
            law(method)
        except (AssertionError, RuntimeError) as error:
            broken.append((law.__name__, error))
            break
    assert broken, f"no law noticed: {fault.__name__}"
