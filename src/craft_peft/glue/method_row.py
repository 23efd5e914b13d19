"""What the table of methods knows of each method, and what a user may choose about one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig

from ..errors import CraftError
from .recipes import Recipe
from .targets import Targets

Ranks = tuple[int, ...]


@dataclass(frozen=True)
class Setting:
    """The numbers that `ranks` sets, and how they grow when a budget chooses them.

    Args:
        names: What the numbers are called.
        default: Their values when the user says nothing; None leaves them to the config.
        fit: Makes the default values fit a model that they may be too large for.
        along: The values at step 1, 2, ... of the search for a budget; the trained numbers grow with the step.
        last: The last step that makes sense on a model.
    """

    names: tuple[str, ...] = ("r",)
    default: Ranks | None = (8,)
    fit: Callable[[Ranks | None, Targets], Ranks | None] = lambda ranks, targets: ranks
    along: Callable[[int, Targets], Ranks] = lambda step, targets: (step,)
    last: Callable[[Targets], int] = lambda targets: targets.smallest_side

    def on(self, targets: Targets, ranks: Ranks | None = None) -> Ranks | None:
        """The user's ranks, or the default ones as they fit a model."""
        return self.fit(self.default, targets) if ranks is None else ranks

    def describe(self, ranks: Ranks | None) -> str:
        """The values with their names, in words.

        Example:
            >>> Setting(("vectors", "length")).describe((90, 256))
            'vectors 90, length 256'
        """
        if ranks is None:
            return "left to the method"
        return ", ".join(f"{name} {rank:,}" for name, rank in zip(self.names, ranks, strict=True))


@dataclass(frozen=True)
class MethodOptions:
    """What a user may choose about a method.

    Args:
        ranks: One whole number or more, as the method takes them; None for its default.
        target_modules: Names of the modules to adapt; None for query and value.
        extra: Further fields of the method's PEFT config.
        budget: The most adapter parameters to train, instead of `ranks`: the ranks that come closest from below.

    Raises:
        CraftError: Ranks and a budget, or a budget below 1.
    """

    ranks: Ranks | None = None
    target_modules: tuple[str, ...] | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    budget: int | None = None

    def __post_init__(self) -> None:
        if self.ranks is not None and self.budget is not None:
            raise CraftError(
                f"Both `ranks={self.ranks}` and `budget={self.budget}` were given: a budget "
                "chooses the ranks. Give one of them."
            )
        if self.budget is not None and self.budget < 1:
            raise CraftError(f"`budget={self.budget}` is no number of parameters: it must be 1 or more.")


@dataclass(frozen=True)
class Method:
    """A way to adapt a model.

    Args:
        summary: One line for help texts.
        recipe: Its default recipe.
        config: Its PEFT config, or None when the method adds nothing to the model.
        fields: The config's fields at given ranks, with all that the method fixes.
        setting: What the ranks are.
        formula: How many numbers are trained, for T matrices of d_out x d_in of n_p projections, in G groups of one
            shape; in Python but for `^`.
        trains_base: Whether the pretrained weights are trained as well.
        scale_rate: The factor on the recipe's learning rate at other ranks than the method's default.
    """

    summary: str
    recipe: Recipe
    config: type[PeftConfig] | None = None
    fields: Callable[..., dict[str, Any]] = lambda r: {"r": r}
    setting: Setting = Setting()
    formula: str = ""
    trains_base: bool = False
    scale_rate: Callable[[Ranks], float] = lambda ranks: 1.0
