"""The adapted linear layer: forward, merge and unmerge, once for all methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn
from torch.nn import functional as F

from ..adapters.base import StackAdapter
from ..errors import CraftError
from ..fused import autocasts, is_looked_into, thin_dtype
from .distributed import check_engine, refuse_replicas
from .quantization import PretrainedWeight, adapter_place, read_weight, weight_at_hand, write_weight
from .requests import compiled, is_off, request_of
from .rows import MixedBatch
from .stacks import oriented, weight_shape
from .tensor_names import container_names


class StackSlot(nn.Module):
    """One layer's place in a stack: the stack's adapter and the layer's index in it.

    The adapter is held without being registered. It is registered once, by the layer that owns it, so that its tensors
    appear once among the parameters and in the state dict. The index is registered by every layer: it tells PEFT, from
    the keys of a saved adapter, which layers have one.
    """

    def __init__(self, adapter: StackAdapter, layer: int, *, persistent: bool) -> None:
        super().__init__()
        self._unregistered = (adapter,)  # in a tuple, because a module that is set as an attribute gets registered
        self.layer = layer
        self.register_buffer("index", torch.tensor(layer), persistent=persistent)

    @property
    def adapter(self) -> StackAdapter:
        """The adapter of the stack."""
        return self._unregistered[0]

    def delta_output(self, x: Tensor) -> Tensor:
        """What the adapter adds to this layer's output."""
        if self.training and not torch.compiler.is_compiling():
            check_engine(self.adapter)
        if self.training and self.adapter.dropout > 0:  # it makes numbers larger, beyond the range of float16
            x = F.dropout(x.to(thin_dtype(x.dtype)), self.adapter.dropout)
        return self.registered(self.layer, x)

    def adapted_output(self, x: Tensor, base_layer: nn.Linear) -> Tensor:
        """The layer's output with what the adapter adds, in one step; only if `fuses_with` says so."""
        if self.training:
            check_engine(self.adapter)
        return self.registered(self.layer, x, base_layer)

    @property
    def registered(self) -> nn.Module:
        """The adapter as a module of the model, or what an engine has put around it."""
        holder, name = self.adapter.registered_in  # FSDP 1 has put a wrapper there, which has to be called
        return holder[name]

    def fuses_with(self, x: Tensor, base_layer: nn.Module) -> bool:
        """Whether base and adapter can be one step: a plain frozen layer that nobody watches."""
        if type(base_layer) is not nn.Linear or not self.adapter.fuses or x.is_nested or is_looked_into():
            return False
        weight, bias, trained = base_layer.weight, base_layer.bias, self.adapter.weight
        if trained is None:  # while FSDP 1 has its own tensors in the place of parameters
            return False
        trains_base = weight.requires_grad or (bias is not None and bias.requires_grad)
        autocast = autocasts(x.device.type)
        # Autocast leaves float64 alone; else the layer by itself says which dtypes do not go together.
        dtypes_fit = torch.float64 not in (x.dtype, weight.dtype) if autocast else x.dtype == weight.dtype
        # accelerate's offloading and DeepSpeed fetch the weights around a call of the layer.
        fetched = type(weight) is not nn.Parameter or hasattr(base_layer, "_hf_hook") or hasattr(weight, "ds_id")
        watched = base_layer._forward_hooks or base_layer._forward_pre_hooks or base_layer._backward_hooks
        drops = self.training and self.adapter.dropout > 0
        return dtypes_fit and not (trains_base or fetched or watched or drops)


class StackedLinear(nn.Module, BaseTunerLayer):
    r"""A linear layer whose adapters belong to stacks: :math:`y = x W_l^\top + b + \sum_a x (\Delta W_l^a)^\top`.

    Args:
        base_layer: the pretrained `torch.nn.Linear`, transformers' `Conv1D`, or a quantised one.
        prefix: the method's prefix in names of tensors, such as ``craft_``.
        quantization_backend: PEFT's access to the weight of a quantised layer.
    """

    # What an `AdapterBank` has put in the place of the active adapters for the whole model; a request may have its own.
    instead: tuple[StackSlot, ...] | None = None
    _pretrained: tuple[PretrainedWeight, ...] = ()  # while adapters are merged; in a tuple, as it is no part of this
    cast_input_dtype_enabled = True  # `peft.helpers.disable_input_dtype_casting` sets it; inputs are never cast here

    def __init__(
        self, base_layer: nn.Module, prefix: str, quantization_backend: QuantizationBackend | None = None
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.quantization_backend = quantization_backend  # PEFT's name: its statuses show it
        # PEFT finds a method's tensors by its prefix. `slots` has an entry for every adapter of this layer, `owned`
        # for those whose stack this layer is the first of.
        self._slots_name, self._owned_name = container_names(prefix)
        self.adapter_layer_names = (self._slots_name, self._owned_name)
        self.add_module(self._slots_name, nn.ModuleDict())
        self.add_module(self._owned_name, nn.ModuleDict())
        self.merged_adapters: list[str] = []
        self.train(base_layer.training)

    @property
    def slots(self) -> nn.ModuleDict:
        """This layer's place in the stack of each adapter, by adapter name."""
        return cast(nn.ModuleDict, getattr(self, self._slots_name))

    @property
    def owned(self) -> nn.ModuleDict:
        """The adapters whose stack this layer is the first of, by adapter name."""
        return cast(nn.ModuleDict, getattr(self, self._owned_name))

    @property
    def in_features(self) -> int:
        """As in the base layer; code that looks at a linear layer's sizes finds them."""
        return weight_shape(self.get_base_layer())[1]

    @property
    def out_features(self) -> int:
        """As in the base layer."""
        return weight_shape(self.get_base_layer())[0]

    def update_layer(self, adapter_name: str, slot: StackSlot, *, owner: bool) -> None:
        """Add an adapter: its place here, and, for the first layer of the stack, the adapter itself."""
        self.slots[adapter_name] = slot.train(self.training)
        if owner:
            self.owned[adapter_name] = slot.adapter.train(self.training)
            slot.adapter.registered_in = (self.owned, adapter_name)

    def forward(self, x: Tensor, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Tensor:
        """The base layer's output plus what every active adapter adds.

        Args:
            x: the input.
            args: passed on to the base layer.
            adapter_names: instead of the active adapters, one adapter for each row of the batch.
            kwargs: passed on to the base layer.

        Raises:
            CraftError: `adapter_names` of another length than the batch, or while an adapter is merged; in a replica
                of `torch.nn.DataParallel`.
        """
        refuse_replicas(self)
        if torch.compiler.is_dynamo_compiling() and compiled.has_to_ask:
            return self._forward_untraced(x, *args, adapter_names=adapter_names, **kwargs)
        request = request_of(self)
        off = is_off(self, request)
        if off and self.merged:
            self.unmerge()
        rows = request.batch_of(self) if request is not None and request.batch_of is not None else None
        rows = rows if adapter_names is None else MixedBatch(adapter_names)
        instead = self.instead if request is None else request.instead(self)
        if rows is None and not (off or self.merged or args or kwargs):
            used = self._used(instead)
            if len(used) == 1 and used[0].fuses_with(x, self.base_layer):
                return used[0].adapted_output(x, cast(nn.Linear, self.base_layer))
        result = self.base_layer(x, *args, **kwargs)
        if off:
            return result
        if rows is not None:
            return self._add_by_row(result, x, rows)
        if self.merged and instead is None:
            return result
        for slot in self._used(instead):
            result = result + slot.delta_output(x).to(result.dtype)
        return result

    @torch.compiler.disable
    def _forward_untraced(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.forward(*args, **kwargs)

    def _used(self, instead: Sequence[StackSlot] | None) -> Sequence[StackSlot]:
        if instead is not None:
            if self.merged:
                raise CraftError(
                    "A bank is in use and adapters are merged into the base weights. Call `unmerge_adapter`."
                )
            return instead
        slots = self.slots
        return [cast(StackSlot, slots[name]) for name in self.active_adapters if name in slots]

    def _add_by_row(self, result: Tensor, x: Tensor, rows: MixedBatch) -> Tensor:
        if self.merged:
            raise CraftError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        if len(rows.names) != len(x):
            raise CraftError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(rows.names)} and {len(x)} respectively."
            )
        return rows.add(self, result, x)

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """What the adapter adds to the base weight, in the base weight's layout."""
        slot = cast(StackSlot, self.slots[adapter_name])
        return oriented(self.get_base_layer(), slot.adapter.delta_weight(slot.layer))

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Yes: what is added to the weight is a matrix, which `peft.convert_to_lora` approximates."""
        return True

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the base weight plus what the adapters add in the place of the base weight, which is kept for `unmerge`.

        It is added in the higher precision of the two, and rounded once to that of the weight.

        Args:
            safe_merge: refuse, and change nothing, if the merged weight would hold NaN or infinity.
            adapter_names: which; default: the active ones.

        Raises:
            CraftError: with `safe_merge`, for a merged weight that is not finite; a weight that cannot be replaced.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.slots]
        if not names:
            return
        for slot in self.slots.values():  # what is still to be computed from the base weights is computed before
            with suppress(CraftError):
                cast(StackSlot, slot).adapter.make_ready()
        with weight_at_hand(self):
            weight = merged = read_weight(self.get_base_layer())
            for name in names:
                delta = self.get_delta_weight(name).detach().to(weight.device)
                merged = merged.to(torch.promote_types(merged.dtype, delta.dtype)) + delta
                if safe_merge and not torch.isfinite(merged.to(weight.dtype)).all():
                    raise CraftError(
                        f"NaNs detected in the merged weights. The adapter {name} seems to be broken; nothing was "
                        "merged into this layer."
                    )
            pretrained = self._pretrained if self.merged else (PretrainedWeight(self),)
            write_weight(self, merged.to(weight.dtype))
        self._pretrained = pretrained
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put back the weight that was there before `merge`, bit for bit."""
        if self.merged:
            with weight_at_hand(self):
                self._pretrained[0].put_back(self)
        self._pretrained = ()
        self.merged_adapters.clear()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> StackedLinear:
        for pretrained in self._pretrained:
            pretrained._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # As in PEFT, but without its cast to the base layer's dtype: transforms and factors stay in float32.
        target = device if device is not None else adapter_place(self.get_base_layer())[0]
        for name in self.adapter_layer_names:
            module = getattr(self, name)
            if adapter_name in module and not any(tensor.is_meta for tensor in module[adapter_name].parameters()):
                module[adapter_name].to(target)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.adapter_layer_names[0].split('_')[0]}) {super().__repr__()}"
