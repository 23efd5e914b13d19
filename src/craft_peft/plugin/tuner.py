"""The tuner: builds one adapter a stack and puts adapted layers into the model, once for all methods."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from ..adapters.base import StackAdapter, still_deferred
from ..errors import CraftError
from ..sharing import passes_end, share_work_in, shared_work, stop_sharing_work_in
from .bank_files import check_beside_bank
from .base_check import BaseCheck
from .beside_stacks import keep_biases_of_heads, refuse_nested_modules, refuse_to_merge_shared_tokens
from .callers import check_callers, refuse_lost_adapters, stop_watching, watch_first_pass
from .config import StackConfig
from .distributed import initialise, keep_frozen_tensors_out_of_ddp
from .layer import StackedLinear, StackSlot
from .mixed_batches import ServedModules, request_for, times_repeated
from .progress import Progress
from .quantization import adapter_place, backend_of, quantization_of
from .requests import Request, refuse_while_off
from .rows import Store
from .stacks import Stack, collect_stacks, path_pattern, say_once
from .targets import QUERY_AND_VALUE, find_targets, linear_modules, set_default_targets
from .tensor_names import (
    WRAPPERS,
    adapter_keys,
    current_names,
    put_back,
    refuse_names_that_hold,
    saved_modules,
    without_adapter_name,
)


class StackTuner(BaseTuner):
    """Wraps a model: finds the stacks, builds their adapters, replaces the modules.

    All checks and the decomposition run before the first module is replaced, so that a refused model is left as it was.
    A method is a subclass that says its `prefix`.
    """

    tuner_layer_cls = StackedLinear
    target_module_mapping = QUERY_AND_VALUE
    bank: Store | None = None
    _served: ServedModules | None = None
    _off: Request | None = None

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """As in PEFT. See `peft.tuners.tuners_utils.BaseTuner.inject_adapter`."""
        try:
            nn.ModuleDict({adapter_name: nn.Identity()})
        except KeyError as error:
            raise CraftError(f"An adapter cannot be called {adapter_name!r}: {error.args[0]}.") from None
        if self.bank is not None:
            self.bank.refuse_name(adapter_name)
            check_beside_bank({adapter_name: self.peft_config[adapter_name]})
        self._served = None
        # What the hooks below need to know of this one injection; PEFT does not pass it on to them.
        self._low_cpu_mem_usage, self._saved_modules = low_cpu_mem_usage, None
        refuse_names_that_hold(self.prefix, model)
        if state_dict is not None:
            paths = [WRAPPERS.sub("", path) for path, _ in linear_modules(model)]
            self._saved_modules = saved_modules(current_names(state_dict, model), self.prefix, paths)
            # PEFT takes what is before the prefix in a key for a module; the keys of heads may have it as well.
            state_dict = {f"{path}.{self.prefix}": torch.empty(0) for path in self._saved_modules}
        self._slots: dict[str, tuple[StackSlot, bool]] = {}
        super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        self._slots = {}
        keep_biases_of_heads(model)
        # On the model, not on this tuner: it may be used without one (`inject_adapter_in_model`, `add_adapter`).
        share_work_in(model)
        watch_first_pass(model)
        ServedModules.of(model)  # which makes saved modules ask, before anything else is hung on them

    def _prepare_adapter_config(self, peft_config: StackConfig, model_config: dict[str, Any]) -> StackConfig:
        set_default_targets(peft_config, self.model, self.target_module_mapping)
        return peft_config

    @torch.inference_mode(False)  # training may come after, whatever mode this is called in
    def _prepare_model(self, peft_config: StackConfig, model: nn.Module) -> None:
        """PEFT calls this before it replaces anything: build all adapters here, so that errors come first."""
        refuse_nested_modules(model, peft_config.modules_to_save)
        targets = find_targets(peft_config, model, self._saved_modules)
        check_callers(model, targets)
        stacks = collect_stacks(targets, peft_config.together, peft_config.ranks_of)
        _check_rank_pattern(peft_config, targets)
        adapters = [peft_config.build_adapter(stack.name, stack.shape, stack.ranks) for stack in stacks]
        if not peft_config._read_from_file:
            for stack in stacks:
                for sentence in peft_config.explain_defaults(stack.name, stack.shape, stack.ranks):
                    say_once(sentence)
            peft_config.base_quantization = quantization_of(module for stack in stacks for module in stack.modules)
        # What a file holds is not computed first: such an adapter is about to be loaded. Nor is anything else, while
        # there are no weights to compute it from.
        is_loaded = peft_config._read_from_file or self._low_cpu_mem_usage or self._saved_modules is not None
        check = BaseCheck.between(peft_config, self.model)
        progress = Progress(len(stacks))
        adapted = {module.get_base_layer(): module for module in model.modules() if isinstance(module, StackedLinear)}
        for stack, adapter in zip(stacks, adapters, strict=True):
            _place(adapter, stack, self._low_cpu_mem_usage)
            adapter.watch_loading(partial(check.compare, stack))
            waits = is_loaded and (peft_config.saves_what_it_derived or stack.is_empty)
            twin = _twin_of(adapter, stack, adapted)
            if twin is not None:
                adapter.defer(partial(adapter.take_frozen, twin))
                if not (waits or twin.is_deferred):
                    adapter.make_ready()
            elif waits:
                adapter.defer(partial(adapter.initialise, stack.read_weights))
            else:
                initialise(adapter, partial(stack.read_weights, progress))
            for layer, key in enumerate(stack.keys):
                slot = StackSlot(adapter, layer, persistent=peft_config.saves_what_it_derived)
                if self._low_cpu_mem_usage and peft_config.saves_what_it_derived:
                    slot.to("meta")
                self._slots[key] = (slot, layer == 0)

    def _create_and_replace(
        self,
        peft_config: StackConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional_kwargs: Any,
    ) -> None:
        slot, owner = self._slots[current_key]
        if not isinstance(target, StackedLinear):
            target = StackedLinear(target, self.prefix, backend_of(target, self.model))
            self._replace_module(parent, target_name, target, target)
        target.update_layer(adapter_name, slot, owner=owner)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's version also copies the child's weight and moves the adapter. Ours has nothing to copy, its adapters
        # are made in their place, and copying fails on heads without a weight of their own.
        setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # PEFT makes adapters in the dtype of the base weights and casts them to float32 here, unless told not to. Ours
        # are made in float32, so that the decomposition loses nothing, and cast down here where that is asked for.
        if autocast_adapter_dtype:
            return
        for module in self.model.modules():
            if isinstance(module, StackedLinear) and adapter_name in module.owned:
                weight = cast(Tensor, module.get_base_layer().weight)
                if weight.is_floating_point():
                    module.owned[adapter_name].to(weight.dtype)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float | int],
        adapter_name: str,
        combination_type: str = "linear",
    ) -> None:
        r"""Add an adapter that is a weighted sum of others: :math:`\Delta W_l = \sum_i w_i \Delta W_l^i`, exactly.

        The sum of CRAFT adapters on the same bases is one with ``tying="free"``. Heads and other saved modules are
        not summed, as in `peft.LoraModel`.

        Args:
            adapters: names of adapters of one method on the same modules.
            weights: one a adapter.
            adapter_name: of the new adapter; it does not become active.
            combination_type: only "linear".

        Raises:
            CraftError: a name that does not exist, or exists already; another number of weights; another
                combination; adapters whose sum is no adapter of their method, or that have trained biases or tokens.
        """
        unknown = [name for name in adapters if name not in self.peft_config]
        if unknown or not adapters:
            raise CraftError(
                f"There is no adapter {unknown or '(none given)'}. The model has {', '.join(self.peft_config)}."
            )
        if adapter_name in self.peft_config:
            raise CraftError(f"There is an adapter '{adapter_name}' already. Give the sum another name.")
        if len(weights) != len(adapters):
            raise CraftError(f"{len(weights)} weights were given for {len(adapters)} adapters; one each is needed.")
        if combination_type != "linear":
            raise CraftError(f"combination_type={combination_type!r} is not supported. Use 'linear', which is exact.")
        _check_no_biases_or_tokens(self.peft_config, adapters)
        layers = [module for module in self.model.modules() if isinstance(module, StackedLinear)]
        _check_same_stacks(layers, adapters)
        config = cast(StackConfig, self.peft_config[adapters[0]]).weighted_sum()
        config._read_from_file = True  # nothing to compute: all tensors are set below
        self.peft_config[adapter_name] = config
        try:
            self.inject_adapter(self.model, adapter_name)
            for slots in (layer.slots for layer in layers if adapter_name in layer.slots):
                if slots[adapter_name].layer == 0:
                    slots[adapter_name].adapter.become_weighted_sum([slots[n].adapter for n in adapters], weights)
        except CraftError:
            self.delete_adapter(adapter_name)
            raise

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        refuse_to_merge_shared_tokens(self.model)

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """As in PEFT; what is refused in one layer is merged into none."""
        before = [(m, list(m.merged_adapters)) for m in self.model.modules() if isinstance(m, StackedLinear)]
        with shared_work():
            try:
                super().merge_adapter(*args, **kwargs)
            except CraftError:
                for layer, merged in before:
                    if layer.merged_adapters != merged:
                        layer.unmerge()
                        layer.merge(adapter_names=merged)
                raise

    def unmerge_adapter(self) -> None:
        """As in PEFT."""
        with shared_work():
            super().unmerge_adapter()

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        with shared_work():
            model = super()._unload_and_optionally_merge(*args, **kwargs)
        stop_sharing_work_in(model)
        stop_watching(model)
        return model

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # PEFT enters this around forward and generate with their arguments.
        names = kwargs.get("adapter_names")
        if torch.compiler.is_compiling() and names is None:  # the modules find no request, and use what the model does
            yield
            return
        if not torch.compiler.is_compiling():
            keep_frozen_tensors_out_of_ddp()
        own, is_off = self.peft_config, self._off is not None
        request = request_for(self.served_modules(), names, own, self.bank, times_repeated(kwargs), is_off)
        with passes_end(), request.under_way():
            yield

    def disable_adapter_layers(self) -> None:
        """As in PEFT. If there are several adapters, other threads and tasks can begin no requests until `enable_...`.

        Raises:
            CraftError: another thread or task has switched them off.
        """
        refuse_while_off(self.model)
        if self._off is None:
            self._frozen = {name for name, p in self.model.named_parameters() if not p.requires_grad}
            self._active = self.active_adapters
        super().disable_adapter_layers()
        if self._off is None:
            several = len(self.peft_config) > 1 or self.bank is not None
            self._off = Request(self.served_modules().modules, off=True, block=True, alone=several)
            self._off.begin()

    def enable_adapter_layers(self) -> None:
        """As in PEFT, which would train whatever is active: what was frozen before stays frozen."""
        super().enable_adapter_layers()
        if self._off is not None:
            self._off.end()
            self._off = None
            for name, parameter in self.model.named_parameters() if self._active == self.active_adapters else ():
                if name in self._frozen:
                    parameter.requires_grad_(False)

    def served_modules(self) -> ServedModules:
        """The modules that ask what their request uses; found once, and again after a change of the model."""
        if self._served is None or self._served.model is not self.model:
            self._served = ServedModules.of(self.model)
        return self._served

    def delete_adapter(self, adapter_name: str) -> None:
        """As in PEFT."""
        # PEFT passes over modules whose path holds the prefix, which a base model's may; no path holds this one.
        self.__dict__["prefix"] = "/"
        try:
            super().delete_adapter(adapter_name)
        finally:
            del self.__dict__["prefix"]

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, state_dict: dict[str, Tensor], unwanted_adapter_names: list[str], **kwargs: Any
    ) -> dict[str, Tensor]:
        kwargs |= {"model": model, "state_dict": state_dict, "unwanted_adapter_names": unwanted_adapter_names}
        if unwanted_adapter_names:
            put_back(state_dict, model, unwanted_adapter_names)  # PEFT goes on with the same dict
        refuse_lost_adapters(model)
        # PEFT 0.21 looks for the paths of adapted layers, into which FSDP 1 puts wrappers: it would save nothing.
        own = adapter_keys(state_dict, model, cls.tuner_layer_cls)
        return super()._get_adapter_state_dict(**kwargs) | {key: state_dict[key] for key in state_dict if key in own}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # PEFT goes by the place in the key, which the name of a module may have.
        return without_adapter_name(key, adapter_name, cls.prefix)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, state_dict: dict[str, Tensor], **kwargs: Any
    ) -> dict[str, Tensor]:
        # PEFT reads the names in `model.state_dict()` here, not the values: what is about to be loaded stays deferred.
        with still_deferred(model):
            return super()._remap_adapter_state_dict_for_load(
                model=model, state_dict=current_names(state_dict, model), **kwargs
            )


def _check_no_biases_or_tokens(configs: Mapping[str, StackConfig], adapter_names: Collection[str]) -> None:
    for name in adapter_names:
        bias, indices = configs[name].bias, configs[name].trainable_token_indices
        if bias != "none" or indices:
            raise CraftError(
                f"The adapter '{name}' was trained with bias={bias!r}, trainable_token_indices={indices!r}, which have "
                "no place in a sum of adapters. Merge it into a model of its own (`merge_and_unload`)."
            )


def _check_same_stacks(layers: Collection[StackedLinear], adapter_names: Collection[str]) -> None:
    for layer in layers:
        slots = [layer.slots[name] for name in adapter_names if name in layer.slots]
        kinds = {(type(slot.adapter), slot.adapter.shape, slot.layer) for slot in slots}
        if slots and (len(slots) < len(adapter_names) or len(kinds) > 1):
            raise CraftError(
                f"The adapters {', '.join(adapter_names)} are not of one method on the same modules, so that they have "
                "no sum. Keep them apart and make them active together (`base_model.set_adapter([...])`)."
            )


def _check_rank_pattern(config: StackConfig, targets: Collection[tuple[str, nn.Module]]) -> None:
    used = {config.matching_pattern(key) for key, _ in targets}
    for pattern in config.rank_pattern:
        if pattern not in used:
            keys = ", ".join(f"'{key}'" for key in dict.fromkeys(path_pattern(key) for key, _ in targets))
            raise CraftError(
                f"`rank_pattern` has ranks for '{pattern}', which matches no target module, or only such that an "
                f"earlier pattern matches. The target modules are {keys}."
            )


def _twin_of(adapter: StackAdapter, stack: Stack, adapted: Mapping[nn.Module, StackedLinear]) -> StackAdapter | None:
    """An adapter that the same stack has already, with the very frozen tensors that this one is to have; or None."""
    places: list[Any] = [adapted[module].slots if module in adapted else {} for module in stack.modules]
    for name, slot in places[0].items():
        twin, wanted = slot.adapter, (type(adapter), adapter.shape, adapter.derived_from)
        same_layers = (name in slots and slots[name].adapter is twin for slots in places)
        if adapter.derived_from and (type(twin), twin.shape, twin.derived_from) == wanted and all(same_layers):
            return twin
    return None


def _place(adapter: StackAdapter, stack: Stack, low_cpu_mem_usage: bool) -> None:
    """Put a new adapter where the base weights are, in at least float32; on the meta device if loading will fill it."""
    device, dtype = adapter_place(stack.modules[0])
    # The parameters are there already when PEFT builds the whole tuner under accelerate's `init_empty_weights`.
    empty = low_cpu_mem_usage or any(parameter.is_meta for parameter in adapter.parameters())
    adapter.to(device="meta" if empty else device, dtype=dtype)
