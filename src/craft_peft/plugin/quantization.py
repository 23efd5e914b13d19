"""The weight of a linear layer as plain numbers, read and written back, whatever back end stores it.

PEFT knows the back ends of quantised layers (`peft.utils.resolve_quantization_backend`). Some can turn their weight
into floating-point numbers and back (bitsandbytes, torchao, HQQ): such a layer is decomposed and merged into as a plain
one is, up to its own rounding. The others (GPTQ, AWQ, AQLM, EETQ, ...) only run: an adapter there needs saved factors.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, onload_layer
from peft.utils import get_quantization_kwargs, resolve_quantization_backend
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import CraftError
from .distributed import whole


def backend_of(module: nn.Module, model: nn.Module | None = None) -> QuantizationBackend | None:
    """PEFT's access to a quantised layer; None for a plain one.

    Args:
        module: a linear layer of the base model.
        model: the base model. Some back ends (torchao) quantise by what it says; without it they only read.
    """
    if type(getattr(module, "weight", None)) is nn.Parameter and type(module) in (nn.Linear, Conv1D):
        return None  # at once: PEFT would import every back end that is installed in order to ask it
    scheme = get_quantization_kwargs(model).get("get_apply_tensor_subclass")
    backend = resolve_quantization_backend(module, get_apply_tensor_subclass=scheme or _no_scheme)
    if getattr(backend, "get_apply_tensor_subclass", None) is _no_scheme:
        backend.supports_merge = False
    return backend


def quantization_of(modules: Iterable[nn.Module]) -> str | None:
    """The names of the back ends that hold the weights of some modules; None if all are plain."""
    backends = (backend_of(module) for module in modules)
    return ", ".join(sorted({backend.backend_name for backend in backends if backend is not None})) or None


def read_weight(module: nn.Module, name: str = "a layer") -> Tensor:
    """The weight in the module's own layout: itself if it is plain, else a new tensor of what it stands for.

    A weight that accelerate has offloaded is brought to where the layer computes.

    Args:
        module: a linear layer of the base model.
        name: what to call it in an error.

    Raises:
        CraftError: a back end that cannot turn its weight into floating-point numbers.

    Example:
        >>> read_weight(nn.Linear(3, 5)).shape
        torch.Size([5, 3])
    """
    offloading = _offloading_hook(module)
    if offloading is None or not _is_away(module):
        return _read_present_weight(module, name)
    offloading.pre_forward(module)
    try:
        return _read_present_weight(module, name)
    finally:
        offloading.post_forward(module, None)


def _read_present_weight(module: nn.Module, name: str) -> Tensor:
    backend = backend_of(module)
    weight = getattr(module, "weight", None)
    if backend is not None:
        try:
            return backend.get_base_weight(_unpacked(module)).detach()
        except (NotImplementedError, TypeError):  # the two that PEFT's back ends raise
            pass
    elif isinstance(weight, Tensor) and weight.is_floating_point() and weight.dtype.itemsize > 1:
        return whole(weight).detach()  # numbers of 8 bits mean nothing without the scale that is kept beside them
    raise CraftError(
        f"The weight of {name}, a {type(module).__name__}{f' ({backend.backend_name})' if backend else ''}, is "
        "quantised and cannot be turned back into floating-point numbers, so it can be neither decomposed nor merged "
        "into. Load an adapter that was saved with its factors (`save_factors=True`), or load the base model "
        "unquantised."
    )


def write_weight(layer: BaseTunerLayer, weight: Tensor) -> None:
    """Put another weight, in the layout of `read_weight`, into the base layer of an adapted one, quantised if that is.

    Nothing is written into the tensor that was there: another module may have it too, and it may be needed again, see
    `PretrainedWeight`.

    Raises:
        CraftError: a back end that cannot quantise the weight again; nothing is changed.
    """
    base, backend = layer.get_base_layer(), layer.quantization_backend
    # A weight of another class of tensor, which PEFT does not know, would ignore what it is given.
    if not (type(base.weight.data) is type(weight) if backend is None else backend.supports_merge):
        raise CraftError(
            f"Nothing can be merged into a {type(base).__name__} whose weight is a {type(base.weight).__name__}: it "
            "cannot be quantised again here. Load the base model through transformers with a `quantization_config=` "
            "of a back end that PEFT merges into (for torchao a `TorchAoConfig`), or unquantised."
        )
    if backend is not None:
        layer.set_base_weight(weight)
    elif "weight" in base._parameters:
        base.weight = nn.Parameter(weight, requires_grad=base.weight.requires_grad)
    else:
        raise CraftError(
            f"Nothing can be merged into a {type(base).__name__} whose weight is computed from other tensors, as "
            "`torch.nn.utils.parametrize` does it. Remove the parametrisation first."
        )


class PretrainedWeight(nn.Module):
    """The weight of an adapted layer's base as it is now, kept to be put back, bit for bit, when another was there.

    It is no part of the model, so that it is in no state dict and no saved file. Moving it is `Module.to`, as ever.

    Args:
        layer: the adapted layer.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> model = get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["0"]))
        >>> kept, layer = PretrainedWeight(model.base_model.model[0]), model.base_model.model[0]
        >>> write_weight(layer, torch.zeros(2, 2))
        >>> kept.put_back(layer)
        >>> layer.weight is kept.weight
        True
    """

    def __init__(self, layer: BaseTunerLayer) -> None:
        super().__init__()
        base = layer.get_base_layer()
        self._base = (base,)  # a tuple, because it is not to be a part; HQQ makes a new layer when it writes
        self.weight = getattr(base, "weight", None)
        # bitsandbytes writes into the attributes of the weight that was there, and keeps more beside it.
        self._of_weight = dict(vars(self.weight)) if self.weight is not None else {}
        self._beside = {name: copy.copy(vars(base)[name]) for name in ("state", "quant_state") if name in vars(base)}
        if _offloading_hook(base) is not None:  # what is elsewhere between calls for lack of room stays elsewhere
            self.to("cpu")

    def put_back(self, layer: BaseTunerLayer) -> None:
        """Make the base layer what it was."""
        layer.base_layer = base = self._base[0]
        if self.weight is not None:
            vars(self.weight).clear()
            vars(self.weight).update(self._of_weight)
            base.weight = self.weight
        vars(base).update(self._beside)


@contextmanager
def weight_at_hand(layer: BaseTunerLayer) -> Iterator[None]:
    """Within it the base weight of an adapted layer is where the layer computes, and afterwards back where it was kept.

    For weights that accelerate offloads; what is written within it is what is kept from then on, in the CPU's memory
    also where the weight was on disk. PEFT does the same around merging, but not around every call of a layer.
    """
    base = layer.get_base_layer()
    if _offloading_hook(base) is None or not _is_away(base):
        yield
        return
    with onload_layer(layer):
        yield


def adapter_place(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where an adapter of this layer belongs: the layer's device, and float32 (float64 beside a weight in float64)."""
    double = getattr(getattr(module, "weight", None), "dtype", None) == torch.float64
    offloading = _offloading_hook(module)
    if offloading is not None:
        device = torch.device(offloading.execution_device)
    else:
        device = next(chain(module.parameters(), module.buffers())).device
    return device, torch.float64 if double else torch.float32


def _offloading_hook(module: nn.Module) -> Any:
    """Accelerate's hook on a layer whose weight it keeps elsewhere (CPU or disk) between calls; None on others."""
    hook = getattr(module, "_hf_hook", None)
    return hook if getattr(hook, "offload", False) else None


def _is_away(module: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in module.parameters(recurse=False))


def _no_scheme() -> None:
    """Stands for the scheme that torchao needs to quantise again, where the model does not tell it."""


def _unpacked(module: Any) -> nn.Module:
    """The layer; or of one with a 4-bit weight in the order of a CPU with AVX512-BF16 a copy in that which PEFT reads.

    The first forward pass in evaluation packs the weight of bitsandbytes so, and rounds the scales to bfloat16. Saving
    unpacks it, but leaves the scales transposed, or rounds them once more if they are quantised too. The layer itself
    stays as it is, or it would compute something else.
    """
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    if not getattr(state, "packing_format_for_cpu", False):
        return module
    found, weight, state = copy.copy(module), copy.copy(module.weight), copy.copy(state)
    found._parameters = {**module._parameters, "weight": weight}
    weight.quant_state, state.original_nested = state, False
    found.state_dict()  # unpacks
    state.absmax = state.absmax.T.reshape(-1).float()
    return found
