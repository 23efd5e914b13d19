"""Methods, bases and training loops together: what holds of each holds of every pair."""

import copy
import sys
from collections.abc import Callable
from functools import cache
from itertools import combinations, product
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from method_table import METHODS, Method
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from quantised_models import BACKENDS
from transformers import Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from craft_peft.lora_export import to_lora
from craft_peft.plugin.layer import StackedLinear
from craft_peft.plugin.quantization import read_weight

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from sft_causal_lm import EXAMPLES, tiny_llama

TARGETS = ["q_proj", "v_proj"]
IDS = torch.arange(24).reshape(2, 12) % 17 + 4  # no padding, whose embedding is 0


@cache
def _base(dtype_or_backend):
    model, _ = tiny_llama()
    if isinstance(dtype_or_backend, torch.dtype):
        return model.to(dtype_or_backend)
    return dtype_or_backend.quantise(model)


BASES = [torch.float32, torch.bfloat16, torch.float16, *{b.name: b for b in BACKENDS}.values()]


def adapted(base, config):
    if getattr(base, "is_quantized", False):
        base = prepare_model_for_kbit_training(base)
    torch.manual_seed(1)
    return get_peft_model(base, config)


def plain_loop(base, config, mixed, folder):
    model = adapted(base, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def arguments(kind, mixed, folder, **more):
    return kind(
        output_dir=folder, max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, bf16=mixed, use_cpu=True,
        save_strategy="no", report_to="none", disable_tqdm=True, logging_strategy="no", **more,
    )  # fmt: skip


def trainer_loop(base, config, mixed, folder):
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    model = adapted(base, config)
    Trainer(model, arguments(TrainingArguments, mixed, folder), train_dataset=rows).train()
    return model


def sft_loop(base, config, mixed, folder):
    """TRL wraps the model, casts what is trained on 4 and 8 bits, and checkpoints gradients."""
    torch.manual_seed(1)
    trainer = SFTTrainer(
        base, arguments(SFTConfig, mixed, folder), train_dataset=Dataset.from_list(EXAMPLES),
        processing_class=tiny_llama()[1], peft_config=config,
    )  # fmt: skip
    trainer.train()
    return trainer.model


def dpo_loop(base, config, mixed, folder):
    """TRL copies the adapter, by its config and its parameters, for a reference."""
    rows = [{**row, "chosen": row["completion"], "rejected": " no ."} for row in EXAMPLES]
    pairs = Dataset.from_list(rows).remove_columns("completion")
    model = adapted(base, config)
    trainer = DPOTrainer(
        model, args=arguments(DPOConfig, mixed, folder), train_dataset=pairs, processing_class=tiny_llama()[1]
    )
    trainer.train()
    model.set_adapter("default")
    return model


Loop = Callable[..., torch.nn.Module]
LOOPS: list[Loop] = [plain_loop, trainer_loop, sft_loop, dpo_loop]
SOME = [METHODS[0], METHODS[2], METHODS[4], METHODS[5], METHODS[6]]
# Every method on every base; the rest in turn, so that each pair of any two choices comes up.
CASES = [
    (method, base, LOOPS[(m + b) % len(LOOPS)], (m + b // 2 + (m + b) // len(LOOPS)) % 2 == 0)
    for (m, method), (b, base) in product(enumerate(SOME), enumerate(BASES))
]


def name_of(part: object) -> str:
    if isinstance(part, bool):
        return "mixed" if part else "not mixed"
    return str(part) if isinstance(part, Method) else getattr(part, "__name__", getattr(part, "name", str(part)))


def test_every_pair_is_covered():
    names = [[name_of(part) for part in case] for case in CASES]
    for first, second in combinations(range(4), 2):
        found = {(case[first], case[second]) for case in names}
        assert found == set(product(*({case[place] for case in names} for place in (first, second)))), (first, second)


@pytest.mark.parametrize(("method", "kind", "loop", "mixed"), CASES, ids=name_of)
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.filterwarnings("ignore:.*:FutureWarning")
@pytest.mark.peft_feature(
    "Trainer, `SFTTrainer` and `DPOTrainer` on plain and quantised bases, in mixed precision or not"
)
def test_what_a_loop_trained_is_saved_merged_and_exported(method, kind, loop, mixed, tmp_path):
    base = copy.deepcopy(_base(kind))
    config = method.config(task_type="CAUSAL_LM", target_modules=TARGETS)
    model = loop(base, config, mixed, str(tmp_path / "run")).eval()
    layers = {name: module for name, module in model.named_modules() if isinstance(module, StackedLinear)}
    assert len(layers) == 2 * 4
    for name, layer in layers.items():
        untouched = _base(kind).get_submodule(name.removeprefix("base_model.model."))
        assert torch.equal(read_weight(layer.base_layer), read_weight(untouched)), "the base has moved"
        delta = layer.get_delta_weight("default")
        assert torch.isfinite(delta).all() and delta.abs().max() > 0, "nothing was learned"

    assert torch.isfinite(model(input_ids=IDS).logits).all()

    # The trained one may be left in autocast, so that what is added to each weight is compared, not logits.
    model.save_pretrained(tmp_path / "saved", selected_adapters=["default"])
    loaded = PeftModel.from_pretrained(copy.deepcopy(_base(kind)), tmp_path / "saved")
    exported = to_lora(model).tensors
    for name, layer in layers.items():
        delta = layer.get_delta_weight("default")
        assert_near(loaded.get_submodule(name).get_delta_weight("default"), delta)
        assert_near(exported[f"{name}.lora_B.weight"] @ exported[f"{name}.lora_A.weight"], delta)


def assert_near(found, expected):
    """The same products in float32, from tensors that may have been cast on the way."""
    assert (found - expected).norm() <= 1e-5 * expected.norm()
