"""Train an adapter on several processes with accelerate.

    accelerate launch --config_file examples/accelerate/fsdp2.yaml examples/distributed.py --output adapter

The same script runs under every configuration in that folder, and by itself on one process. Without `--model` it
teaches a tiny Llama with random weights to count, so it needs no download.
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, set_seed
from peft import PeftConfig, get_peft_model
from peft.utils.other import fsdp_auto_wrap_policy
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from craft_peft import CraftConfig


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options; None reads those of the process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a causal language model: a name on the Hub or a folder (default: a tiny one)")
    parser.add_argument("--output", help="the folder to save the adapter in (default: not saved)")
    parser.add_argument("--checkpoint", help="a folder: save the state of training there after half of the steps")
    parser.add_argument("--resume", help="a folder with such a state: go on from there")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8, help="rows of one step, over all processes")
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def load_base(name: str | None) -> PreTrainedModel:
    """A pretrained model, or a tiny one that is not."""
    if name is not None:
        return AutoModelForCausalLM.from_pretrained(name)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, initializer_range=0.2, **sizes))


def counting_rows(number: int, vocabulary: int) -> list[torch.Tensor]:
    """Rows of twelve tokens, each the successor of the one before."""
    return list((torch.randint(vocabulary, (number, 1)) + torch.arange(12)) % vocabulary)


def train(arguments: argparse.Namespace, config: PeftConfig) -> tuple[torch.nn.Module, list[float]]:
    """Train and save; returns the model as accelerate has wrapped it, and the loss of each step."""
    accelerator = Accelerator()
    set_seed(arguments.seed)  # the same on all processes
    base = load_base(arguments.model)
    rows = counting_rows(arguments.steps * arguments.batch, base.config.vocab_size)
    loader = DataLoader(rows, batch_size=arguments.batch // accelerator.num_processes)
    model = get_peft_model(base, config)
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        # What is trained is wrapped apart from the frozen layer that it is in; transformers' Trainer does the same.
        accelerator.state.fsdp_plugin.auto_wrap_policy = fsdp_auto_wrap_policy(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], arguments.lr, weight_decay=0)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    half, first = arguments.steps // 2, 0
    if arguments.resume is not None:
        accelerator.load_state(arguments.resume)
        loader, first = accelerator.skip_first_batches(loader, half), half
    model.train()
    losses = []
    for step, batch in enumerate(loader, first + 1):
        loss = model(input_ids=batch, labels=batch).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())  # over the processes
        accelerator.print(f"step {step}: loss {losses[-1]:.6f}")
        if step == half and arguments.checkpoint is not None:
            accelerator.save_state(arguments.checkpoint)

    if arguments.output is not None:
        state = accelerator.get_state_dict(model)  # gathered by all processes, kept by the first
        if accelerator.is_main_process:
            accelerator.unwrap_model(model).save_pretrained(arguments.output, state_dict=state)
        accelerator.wait_for_everyone()
    return model, losses


if __name__ == "__main__":
    train(parse_arguments(), CraftConfig(task_type="CAUSAL_LM"))
    PartialState().destroy_process_group()
