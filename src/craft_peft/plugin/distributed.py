"""What the engines for several processes (DDP, FSDP, DeepSpeed ZeRO) need from adapters that many layers share.

They gather the parameters of a module around calls of it, and send what changes: so the layers call an adapter as a
module, and what is frozen is kept out of the traffic. Where an engine cannot work with shared parameters, say so.
"""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext, suppress
from types import FrameType
from weakref import WeakSet

import torch
import torch.distributed as dist
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import gather_params_ctx
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import CheckpointFunction
from transformers.modeling_utils import is_fsdp_enabled, is_local_dist_rank_0

from ..adapters.base import StackAdapter
from ..errors import CraftError
from ..weights import ReadWeights

_handled: WeakSet[DistributedDataParallel] = WeakSet()


def whole(weight: Tensor) -> Tensor:
    """The weight in full: a copy where an engine has split it over the processes, which then all have to call this."""
    if hasattr(weight, "full_tensor"):  # a DTensor, of FSDP 2 or tensor parallelism
        return weight.full_tensor()
    if not hasattr(weight, "ds_id"):
        return weight
    with gather_params_ctx(weight):
        return weight.detach().clone()


def initialise(adapter: StackAdapter, read_weights: ReadWeights) -> None:
    """`adapter.initialise`, also where only the first process of a machine has the weights and FSDP will send them.

    Raises:
        CraftError: under FSDP 2, whose way to send them (accelerate 1.15) fails on models with buffers like ours.
    """
    arrive_later = False
    if is_fsdp_enabled():  # transformers means: enabled, with `cpu_ram_efficient_loading`
        if os.environ.get("FSDP_VERSION") == "2":
            raise CraftError(
                "FSDP 2 with `fsdp_cpu_ram_efficient_loading: true` cannot send the adapter's frozen factors to the "
                "other processes: accelerate takes every tensor of the model for a sharded parameter. Set "
                "`fsdp_cpu_ram_efficient_loading: false`, or use `fsdp_version: 1`."
            )
        arrive_later = not is_local_dist_rank_0()
    with suppress(CraftError) if arrive_later else nullcontext():  # no numbers, or none that can be decomposed
        adapter.initialise(read_weights)


def keep_frozen_tensors_out_of_ddp() -> None:
    """Call it within the model's forward: from the next on, DDP no longer broadcasts the adapters' buffers.

    DDP broadcasts all buffers before each forward, and these never change. Not by the model's own list of tensors to
    ignore: that would leave them out of the broadcast with which DDP makes the processes equal at its start, too.
    """
    ddp = DistributedDataParallel._get_active_ddp_module()
    if ddp is None or ddp in _handled:
        return
    _handled.add(ddp)
    for path, module in ddp.module.named_modules():
        if isinstance(module, BaseTunerLayer):
            for own in module.adapter_layer_names:
                frozen = module.get_submodule(own).named_buffers()
                ddp.parameters_to_ignore.update(f"{path}.{own}.{name}" for name, _ in frozen)


def check_engine(adapter: StackAdapter) -> None:
    """Call it before an adapter is used in training: refuse what engines cannot do with shared parameters.

    Raises:
        CraftError: reentrant gradient checkpoints on several processes, or an adapter that FSDP 2 has sharded together
            with one of the layers that share it.
    """
    sharded_alone = hasattr(adapter, "unshard")  # it is an FSDPModule
    if hasattr(adapter.weight, "full_tensor") and not sharded_alone:  # its parameters are DTensors
        raise CraftError(
            "FSDP 2 has sharded the adapter together with one layer, and other layers use it too. Shard it by itself: "
            f"add {type(adapter).__name__!r} to `fsdp_transformer_layer_cls_to_wrap`."
        )
    if not torch.is_grad_enabled() and _on_several_processes() and _inside_reentrant_checkpoint():
        # Wrong without a word under DDP and FSDP 2; with methods that share work also under DDP with a static graph.
        raise CraftError(
            "The model is trained on several processes with reentrant gradient checkpoints. They compute the gradient "
            "of an adapter in parts, one for each of the layers that share it, and DDP, FSDP and ZeRO may send the "
            "first part for the whole. Use the other kind of checkpoints: "
            '`gradient_checkpointing_kwargs={"use_reentrant": False}`.'
        )


def refuse_replicas(layer: nn.Module) -> None:
    """Call it in an adapted layer's forward: refuse `torch.nn.DataParallel`, which copies modules one by one.

    Raises:
        CraftError: the layer is such a copy: it would use the adapter on the first device.
    """
    if getattr(layer, "_is_replica", False):
        raise CraftError(
            "torch.nn.DataParallel, which Trainer uses by itself on a machine with several GPUs, copies layers without "
            "the adapter that they share. Start one process per GPU instead (`accelerate launch script.py`, or "
            "`torchrun`), or show the program one GPU (CUDA_VISIBLE_DEVICES=0)."
        )


def _on_several_processes() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _inside_reentrant_checkpoint() -> bool:
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not CheckpointFunction.forward.__code__:
        frame = frame.f_back
    return frame is not None
