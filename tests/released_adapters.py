"""Small adapters as each released version wrote them, with what they computed: `python tests/released_adapters.py`
writes those of the installed version, once, before its release; they are never written again."""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

import torch
from peft import PeftConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn

from craft_peft import CraftConfig, LotrConfig, SuperLoraConfig, save_adapter

FOLDER = Path(__file__).parent / "released"
SIZE, LAYERS = 16, 3
TARGETS = [str(layer) for layer in range(LAYERS)]
EXPECTED = "expected.safetensors"


def wave(*shape: int, step: float) -> Tensor:
    """Numbers between -1 and 1 that no random generator has a say in."""
    count = torch.Size(shape).numel()
    return torch.cos(torch.arange(count, dtype=torch.float64) * step).reshape(shape)


def base_model() -> nn.Module:
    model = nn.Sequential(*(nn.Linear(SIZE, SIZE) for _ in TARGETS))
    for number, layer in enumerate(model):
        layer.weight.data = (wave(SIZE, SIZE, step=1.7 + number) / 4).float()
        layer.bias.data = wave(SIZE, step=0.9 + number).float()
    return model


def inputs() -> Tensor:
    return wave(4, SIZE, step=2.3).float()


def configs() -> dict[str, PeftConfig]:
    craft = {"target_modules": TARGETS, "ranks": (2, 4, 3), "init_weights": False}
    return {
        "craft": CraftConfig(**craft),
        "craft-scaled": CraftConfig(**craft, alpha=0.5),
        "craft-without-factors": CraftConfig(**craft, save_factors=False),
        "craft-diagonal": CraftConfig(**craft, tying="diagonal"),
        "craft-free": CraftConfig(**craft, tying="free"),
        "craft-random-bases": CraftConfig(**craft, basis="random"),
        "lotr": LotrConfig(target_modules=TARGETS, r=3, init_weights=False),
        "superlora": SuperLoraConfig(target_modules=TARGETS, r=3, init_weights=False),
        "superlora-projected": SuperLoraConfig(
            target_modules=TARGETS, r=3, init_weights=False, projection="fastfood", projection_ratio=0.5
        ),
    }


def write(folder: Path) -> None:
    """The adapters of the installed version, each with the output of its model."""
    outputs = {}
    for name, config in configs().items():
        torch.manual_seed(0)
        model = get_peft_model(base_model(), config).eval()
        save_adapter(model, folder / name)
        (folder / name / "README.md").unlink(missing_ok=True)  # PEFT's model card
        with torch.no_grad():
            outputs[name] = model(inputs())
    save_file(outputs, folder / EXPECTED)


if __name__ == "__main__":
    target = FOLDER / version("craft-peft")
    if target.exists():
        sys.exit(f"{target} is there already: what a released version wrote stays as it is")
    write(target)
