"""Supervised fine-tuning of a causal language model with CRAFT, through TRL's `SFTTrainer`; then generation.

    python examples/sft_causal_lm.py                             a tiny random Llama: no download, a few seconds
    python examples/sft_causal_lm.py --model Qwen/Qwen3-0.6B     a model of the Hub, or a folder

Needs `pip install craft-peft trl`.
"""

from __future__ import annotations

import argparse

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from craft_peft import CraftConfig

CAPITALS = {"France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "Kenya": "Nairobi", "Peru": "Lima", "Spain": "Madrid"}
EXAMPLES = [
    {"prompt": f"The capital of {land} is", "completion": f" {capital} ."} for land, capital in CAPITALS.items()
]


def tiny_llama() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A Llama of 4 layers with random weights, and a tokenizer that knows the words of the examples."""
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    text = [example["prompt"] + example["completion"] for example in EXAMPLES]
    words.train_from_iterator(text, trainers.WordLevelTrainer(special_tokens=["<unk>", "<pad>", "<s>", "</s>"]))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config), tokenizer


def complete(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, prompt: str, use_cache: bool = True) -> str:
    """The most probable continuation of a prompt."""
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False, use_cache=use_cache)
    return tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a name of the Hub or a folder (default: a tiny random Llama)")
    parser.add_argument("--output", default="capitals-craft", help="where the adapter goes (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=20, help="(default: %(default)s)")
    args = parser.parse_args()

    if args.model is None:
        model, tokenizer = tiny_llama()
    else:
        model, tokenizer = AutoModelForCausalLM.from_pretrained(args.model), AutoTokenizer.from_pretrained(args.model)

    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(EXAMPLES),
        peft_config=CraftConfig(task_type="CAUSAL_LM"),
        args=SFTConfig(
            output_dir=args.output,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=len(EXAMPLES),
            learning_rate=2e-3,
            bf16=torch.cuda.is_available(),
            logging_steps=1,
            save_strategy="no",
            report_to="none",
        ),
    )
    trainer.train()
    trainer.save_model()

    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss: {losses[0]:.3f} -> {losses[-1]:.3f}")
    for example in EXAMPLES:
        print(example["prompt"], "->", complete(trainer.model.eval(), tokenizer, example["prompt"]))


if __name__ == "__main__":
    main()
