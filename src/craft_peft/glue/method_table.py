"""The rows of the table of methods; nothing outside this table asks for a method's name."""

from __future__ import annotations

import math
from typing import Any

from peft import (
    FourierFTConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PsoftConfig,
    TinyLoraConfig,
    UniLoraConfig,
    VBLoRAConfig,
    VeraConfig,
)
from peft.tuners.lokr.layer import factorization

from ..folding import fold_sizes
from ..plugin.craft_config import PAPER_RANKS, CraftConfig
from ..plugin.lotr_config import LotrConfig
from ..plugin.superlora_config import SuperLoraConfig
from .method_row import Method, Ranks, Setting
from .recipes import Recipe
from .targets import Targets

MANY = 2**16
"""The last step of a search where the method itself sets no limit."""

LOKR_FACTOR = 8
VBLORA_RANK = UNILORA_RANK = 4


def _craft_along(step: int, targets: Targets) -> Ranks:
    # Every layer direction up to the paper's 24 is kept: they cost r1^2 a stack, little beside the other two.
    return min(PAPER_RANKS[0], *(stack.shape.layers for stack in targets.stacks)), step, step


def _craft_default(ranks: Ranks | None, targets: Targets) -> Ranks | None:
    """What the paper's ranks become; None, for the config to decide by stack, where they become different ones."""
    become = {CraftConfig().resolve_ranks(stack.name, stack.shape) for stack in targets.stacks}
    return become.pop() if len(become) == 1 else None


def _craft_rate(ranks: Ranks) -> float:
    # A step of Adam moves a transform by up to rate x rank in spectral norm; the recipe's rate belongs to rank 100.
    return 100 / max((1, *ranks[1:]))


def _at_most_a_side(ranks: Ranks | None, targets: Targets) -> Ranks:
    return (min(*(ranks or ()), targets.smallest_side),)


def _folded(targets: Targets) -> tuple[int, ...]:
    """The sizes of the tensor into which SuperLoRA folds all matrices, in ascending order."""
    return fold_sizes(sum(d_out * d_in for d_out, d_in in targets.shapes), 3)


def _lora_fields(r: int, **fixed: Any) -> dict[str, Any]:
    # alpha = r (scaling 1) is the LoRA paper's setting for GLUE, and the one that the rate of its recipe belongs to.
    return {"r": r, "lora_alpha": r, **fixed}


def _vector_length(targets: Targets) -> int:
    """The paper's 256, or the largest number below it that divides every side, as VB-LoRA needs it."""
    common = math.gcd(*(side for shape in targets.shapes for side in shape))
    return max(length for length in range(1, 257) if common % length == 0)


def _smallest_matrix(targets: Targets) -> int:
    return min(d_out * d_in for d_out, d_in in targets.shapes)


def _lokr_last(targets: Targets) -> int:
    """The last rank at which the second factor is still a product: above it PEFT makes it a full matrix."""
    longer = [max(factorization(side, LOKR_FACTOR)[1] for side in shape) for shape in targets.shapes]
    return max(1, math.ceil(min(longer) / 2) - 1)


def _unilora_entries(targets: Targets) -> int:
    """The entries of all low-rank factors: a vector longer than this has numbers that nothing uses."""
    return UNILORA_RANK * sum(sum(shape) for shape in targets.shapes)


# The rates: of the protocol where it has one; else of the paper's own GLUE runs; else, as said there, from a comparison
# with LoRA's rate. docs/methods-from-peft.md has the sources.
METHODS: dict[str, Method] = {
    "craft": Method(
        summary="CRAFT: transforms of a frozen Tucker core, shared by all layers",
        recipe=Recipe(learning_rate=1e-3),
        config=CraftConfig,
        fields=lambda *ranks: {"ranks": ranks},
        # A budget moves the out and in rank together; the layer rank stays at all layers, 24 at most.
        setting=Setting(("layer", "out", "in"), default=None, fit=_craft_default, along=_craft_along),
        formula="n_p*(layer^2 + out^2 + in^2)",
        scale_rate=_craft_rate,
    ),
    "lotr": Method(
        summary="LoTR: two trained factors shared by all matrices of one shape, one small core a matrix",
        recipe=Recipe(learning_rate=1e-3),
        config=LotrConfig,
        # Factors with columns of unit length and a scaling of 1: the rate of the protocol belongs to them.
        fields=lambda r: {"r": r, "alpha": r, "init_std": None},
        formula="G*r*(d_out + d_in) + T*r^2",
    ),
    "superlora": Method(
        summary="SuperLoRA: all updates folded into one tensor, a dense core with a factor for each of three modes",
        recipe=Recipe(learning_rate=2e-3),
        config=SuperLoraConfig,
        fields=lambda r: {"r": r, "alpha": r},
        setting=Setting(last=lambda targets: _folded(targets)[0]),
        formula="r*(d_1 + d_2 + d_3) + r^3",
    ),
    "lora": Method(
        summary="LoRA: two thin matrices a layer",
        recipe=Recipe(learning_rate=4e-4),
        config=LoraConfig,
        fields=_lora_fields,
        formula="T*r*(d_out + d_in)",
    ),
    "pissa": Method(
        summary="PiSSA: LoRA that starts from the largest singular vectors of the weights",
        recipe=Recipe(learning_rate=2e-4),
        config=LoraConfig,
        fields=lambda r: _lora_fields(r, init_lora_weights="pissa"),
        formula="T*r*(d_out + d_in)",
    ),
    "dora": Method(
        summary="DoRA: LoRA for the direction of the weights, a vector a layer for their size",
        recipe=Recipe(learning_rate=4e-4),
        config=LoraConfig,
        fields=lambda r: _lora_fields(r, use_dora=True),
        formula="T*(r*(d_out + d_in) + d_out)",
    ),
    "rslora": Method(
        summary="rsLoRA: LoRA scaled with 1 / sqrt(r), for high ranks",
        # The first steps are those of LoRA at rank 8: scaling times rate is the same.
        recipe=Recipe(learning_rate=1.4e-4),
        config=LoraConfig,
        fields=lambda r: _lora_fields(r, lora_alpha=8, use_rslora=True),
        formula="T*r*(d_out + d_in)",
    ),
    "lora-xs": Method(
        summary="LoRA-XS: one square matrix a layer, between frozen singular vectors",
        recipe=Recipe(learning_rate=1e-3),
        # PSOFT without what it adds: R is free instead of orthogonal, and there are no scaling vectors.
        config=PsoftConfig,
        fields=lambda r: {
            "r": r,
            "psoft_alpha": r,
            "psoft_orth": False,
            "psoft_mag_a": False,
            "psoft_mag_b": False,
        },
        setting=Setting(default=(16,), fit=_at_most_a_side),
        formula="T*r^2",
    ),
    "vera": Method(
        summary="VeRA: two scaling vectors a layer, around random matrices that all layers share",
        recipe=Recipe(learning_rate=1e-2),
        config=VeraConfig,
        setting=Setting(default=(256,), last=lambda targets: MANY),
        formula="T*(d_out + r)",
    ),
    "vblora": Method(
        summary="VB-LoRA: low-rank matrices composed of vectors from one bank",
        # The paper's 1e-3 for the bank and 1e-2 for the logits, in one: the runner has one rate for an adapter.
        recipe=Recipe(learning_rate=3e-3),
        config=VBLoRAConfig,
        fields=lambda vectors, length: {"r": VBLORA_RANK, "num_vectors": vectors, "vector_length": length, "topk": 2},
        setting=Setting(
            ("vectors", "length"),
            default=(90, 256),
            fit=lambda ranks, targets: (90, _vector_length(targets)),
            along=lambda step, targets: (step + 1, _vector_length(targets)),  # at least the two that are mixed
            last=lambda targets: MANY,
        ),
        formula=f"vectors*(length + {VBLORA_RANK}*T*(d_out + d_in)/length)",
    ),
    "fourierft": Method(
        summary="FourierFT: a few coefficients of each weight's discrete Fourier transform",
        recipe=Recipe(learning_rate=5e-2),
        config=FourierFTConfig,
        # From zero, where the paper starts from noise: the head is fitted on the model as it was pretrained.
        fields=lambda n_frequency: {"n_frequency": n_frequency, "scaling": 150.0, "init_weights": True},
        setting=Setting(
            ("n_frequency",),
            default=(1000,),
            fit=lambda ranks, targets: (min(1000, _smallest_matrix(targets)),),
            last=_smallest_matrix,
        ),
        formula="T*n_frequency",
    ),
    "loha": Method(
        summary="LoHa: the entrywise product of two low-rank matrices a layer",
        recipe=Recipe(learning_rate=2e-3),
        config=LoHaConfig,
        fields=lambda r: {"r": r, "alpha": r},
        setting=Setting(default=(4,)),
        formula="2*T*r*(d_out + d_in)",
    ),
    "lokr": Method(
        summary="LoKr: the Kronecker product of a small and a low-rank matrix a layer",
        recipe=Recipe(learning_rate=1e-3),
        config=LoKrConfig,
        fields=lambda r, factor: {"r": r, "alpha": r, "decompose_factor": factor},
        setting=Setting(
            ("r", "factor"),
            default=(8, LOKR_FACTOR),
            along=lambda step, targets: (step, LOKR_FACTOR),
            last=_lokr_last,
        ),
        formula="T*(factor^2 + r*(d_out + d_in)/factor)",
    ),
    "tinylora": Method(
        summary="TinyLoRA: LoRA-XS whose square matrix is a fixed random map of a short vector",
        recipe=Recipe(learning_rate=3e-3),
        config=TinyLoraConfig,
        # A vector longer than r^2 reaches no further matrices, so the frozen rank grows with it (the paper's is 2).
        fields=lambda u: {"u": u, "r": max(2, math.isqrt(u - 1) + 1)},
        # The file holds u * r^2 numbers of the random map a layer: at 256 they are 65,536 already.
        setting=Setting(("u",), default=(64,), last=lambda targets: 256),
        formula="T*u",
    ),
    "unilora": Method(
        summary="Uni-LoRA: one vector for all layers, spread over LoRA's matrices by a fixed random map",
        recipe=Recipe(learning_rate=5e-3),
        config=UniLoraConfig,
        fields=lambda length: {"r": UNILORA_RANK, "theta_d_length": length},
        setting=Setting(
            ("length",),
            default=(23040,),
            fit=lambda ranks, targets: (min(23040, _unilora_entries(targets)),),
            last=_unilora_entries,
        ),
        formula="length",
    ),
    "head": Method(summary="the classification head alone, on the frozen model", recipe=Recipe()),
    "full": Method(summary="full fine-tuning", recipe=Recipe(learning_rate=2e-5), trains_base=True),
}
