"""What CRAFT would find in a model, before anything is trained: stacks, spectra, explained energy, parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor, nn

from ..plugin.craft_config import MODES, CraftConfig
from ..plugin.stacks import collect_stacks
from ..plugin.targets import find_targets, set_default_targets
from ..slices import unfold
from ..tucker import Tucker, hosvd
from ..weights import StackShape

Ranks = tuple[int, int, int]

BYTES = 4  # an adapter is saved in float32


@dataclass(frozen=True)
class StackReport:
    """One stack and its decomposition at full rank, from which every smaller rank can be read off.

    The factors of HOSVD are nested: the core at ranks (r1, r2, r3) is the leading block of the full core, and the
    norms of the full core's slices are the singular values of the unfoldings.

    Args:
        pattern: The modules' common path, with ``*`` for the layer index.
        shape: Number of layers and the sizes of their weights.
        ranks: The ranks that CRAFT would use, after the defaults.
        full: The decomposition at full rank.
    """

    pattern: str
    shape: StackShape
    ranks: Ranks
    full: Tucker

    def trained(self, ranks: Ranks | None = None) -> int:
        """Trained numbers: ``r1^2 + r2^2 + r3^2``."""
        return sum(rank * rank for rank in ranks or self.ranks)

    def stored_bytes(self, ranks: Ranks | None = None) -> int:
        """Size of the saved adapter of this stack in float32, frozen core and factors included."""
        layer, out, in_ = ranks or self.ranks
        frozen = layer * out * in_ + self.shape.layers * layer + self.shape.d_out * out + self.shape.d_in * in_
        return BYTES * (frozen + self.trained(ranks))

    def energy(self, ranks: Ranks | None = None) -> float:
        """Share of the stack's squared norm that the core holds, from 0 to 1."""
        layer, out, in_ = ranks or self.ranks
        return (self.full.core[:layer, :out, :in_].square().sum() / self.full.core.square().sum()).item()

    def layer_energies(self, ranks: Ranks | None = None) -> list[float]:
        """The same for the weight of each layer by itself: one minus the relative squared error."""
        layer, out, in_ = ranks or self.ranks
        whole = torch.tensordot(self.full.factors[0], self.full.core, dims=1)
        missing = whole.clone()
        missing[:, :out, :in_] -= torch.tensordot(
            self.full.factors[0][:, :layer], self.full.core[:layer, :out, :in_], dims=1
        )
        return (1 - missing.square().sum((1, 2)) / whole.square().sum((1, 2))).tolist()

    def singular_values(self, mode: int) -> Float[Tensor, " size"]:
        """The singular values of the unfolding along a mode, the largest first."""
        return unfold(self.full.core, mode).norm(dim=1)

    def rank_for(self, share: float) -> int:
        """The smallest r at which ranks (all layers, r, r) hold a share of the energy.

        Args:
            share: Between 0 and 1.
        """
        squares = self.full.core.double().square().sum(0)
        blocks = squares.cumsum(0).cumsum(1)
        sizes = range(1, max(squares.shape) + 1)
        held = (blocks[min(r, squares.shape[0]) - 1, min(r, squares.shape[1]) - 1].item() for r in sizes)
        target = share * blocks[-1, -1].item()
        return next((r for r, energy in zip(sizes, held, strict=True) if energy >= target), len(sizes))


def inspect_model(
    model: nn.Module, target_modules: Sequence[str] | str | None = None, ranks: tuple[int, ...] | str = "paper"
) -> list[StackReport]:
    """Finds the stacks of a model and decomposes each at full rank.

    Costs one HOSVD a stack, in float64: some seconds for 12 layers of 768 x 768.

    Args:
        model: A model with its weights.
        target_modules: Names, as in `CraftConfig`; None for query and value under their names in this model type.
        ranks: Three ranks, or "paper".

    Returns:
        One report a stack.

    Raises:
        CraftError: Targets that match nothing or cannot be stacked, weights that cannot be decomposed, or a rank above
            its mode's size.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16)
        >>> reports = inspect_model(BertModel(config), ranks=(3, 8, 8))
        >>> [(report.pattern, report.trained()) for report in reports]
        [('encoder.layer.*.attention.self.query', 137), ('encoder.layer.*.attention.self.value', 137)]
        >>> 0 < reports[0].energy((3, 8, 8)) < reports[0].energy((3, 16, 16)) < 1.0001
        True
    """
    names = list(target_modules) if target_modules and not isinstance(target_modules, str) else target_modules
    config = CraftConfig(target_modules=names or None, ranks=ranks)  # type: ignore[arg-type]
    set_default_targets(config, model)
    stacks = collect_stacks(find_targets(config, model))
    chosen = [config.resolve_ranks(stack.name, stack.shape) for stack in stacks]
    reports = []
    for stack, stack_ranks in zip(stacks, chosen, strict=True):
        full = hosvd(stack.read_weights(), (stack.shape.layers, *stack.shape.matrix), "hosvd")
        reports.append(StackReport(stack.pattern, stack.shape, stack_ranks, full))
    return reports


def candidate_ranks(reports: Sequence[StackReport]) -> list[int]:
    """Sizes r to compare for ranks (all layers, r, r): steps of about a half, up to the largest matrix size."""
    largest = max(max(report.shape.matrix) for report in reports)
    steps = [4, 8, 16, 32, 50, 75, 100, 150, 200, 300, 400, 600, 800, 1200, 1600, 2400, 3200]
    return [step for step in steps if largest / 24 <= step < largest]


def clip_ranks(report: StackReport, rank: int) -> Ranks:
    """Ranks (all layers, rank, rank), each at most the size of its mode."""
    return report.shape.layers, min(rank, report.shape.d_out), min(rank, report.shape.d_in)


def draw_spectra(reports: Sequence[StackReport], path: Path) -> None:
    """Draws the singular values of each mode, relative to the largest, with the chosen ranks marked.

    Args:
        reports: What `inspect_model` returned.
        path: A `.png` file to write.
    """
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    axes = figure.subplots(1, 3)
    for mode, axis in enumerate(axes):
        for report in reports:
            values = report.singular_values(mode)
            few = len(values) <= 32
            axis.plot(range(1, len(values) + 1), values / values[0], marker="o" if few else "", label=report.pattern)
        for rank in sorted({report.ranks[mode] for report in reports}):
            axis.axvline(rank, color="0.5", linestyle="--", linewidth=1)
            axis.annotate(f"rank {rank} ", (rank, 0.03), ha="right", color="0.4")
        axis.set(title=f"mode {mode}: {MODES[mode]}", xlabel="number", ylim=(0, 1.05))
    axes[0].set_ylabel("singular value / largest")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles[: len(reports)], labels[: len(reports)], loc="outside lower center", ncols=2, fontsize="small"
    )
    figure.savefig(path, dpi=120)
