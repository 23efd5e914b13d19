"""What a method's settings cost on a model, and which one a budget pays for: counted on adapters that are really built.

An adapter is built on a skeleton of its target modules on the meta device, so that a count is PEFT's own and takes a
tenth of a second for 24 layers, without weights.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from torch import nn

from ..adapters.base import still_deferred
from ..errors import CraftError
from .method_row import MethodOptions, Ranks
from .methods import METHODS, find_method, make_peft_config
from .models import add_adapter
from .targets import Targets


@dataclass(frozen=True)
class Choice:
    """A setting of a method on a model, and what it costs.

    Args:
        method: A key of `METHODS`.
        ranks: The setting.
        trainable: Trained numbers of the adapter, without the head.
        stored: Numbers in the saved adapter file, without the head; a method may keep frozen ones too.
        budget: What the setting was chosen for, or None for the user's or the default one.
        largest: Whether the search ended at the method's largest setting.
    """

    method: str
    ranks: Ranks | None
    trainable: int
    stored: int
    budget: int | None = None
    largest: bool = False

    @property
    def fits(self) -> bool:
        """Whether the setting is within its budget; if not, it is the method's smallest."""
        return self.budget is None or self.trainable <= self.budget

    @property
    def setting(self) -> str:
        """The setting in words."""
        return METHODS[self.method].setting.describe(self.ranks)

    def __str__(self) -> str:
        cost = f"{self.method} with {self.setting} trains {self.trainable:,} adapter parameters"
        if self.budget is None:
            return f"{cost}."
        end = ", its largest setting" if self.largest else ""
        return f"{cost} of a budget of {self.budget:,} ({self.budget - self.trainable:,} left{end})."


Offers = dict[str, Choice | CraftError]


def choose_setting(name: str, options: MethodOptions, targets: Targets) -> Choice:
    """Finds the setting that a method has on a model: the user's, the default, or the one that a budget pays for.

    Args:
        name: A key of `METHODS`, of a method with an adapter.
        options: The user's choices.
        targets: The modules to adapt.

    Returns:
        The setting and its cost.

    Raises:
        CraftError: A budget below the method's smallest setting (says what that costs, and what would fit), or options
            that do not fit the method or the model.

    Example:
        >>> from transformers import RobertaConfig, RobertaForSequenceClassification
        >>> from craft_peft.glue.targets import find_model_targets
        >>> with torch.device("meta"):
        ...     roberta_base = RobertaForSequenceClassification(RobertaConfig())
        >>> targets = find_model_targets(roberta_base)
        >>> print(choose_setting("craft", MethodOptions(budget=41_000), targets))
        craft with layer 12, out 100, in 100 trains 40,288 adapter parameters of a budget of 41,000 (712 left).
        >>> print(choose_setting("lora", MethodOptions(), targets))
        lora with r 8 trains 294,912 adapter parameters.
    """
    choice = price(name, options, targets)
    if not choice.fits:
        others = offers(dataclasses.replace(options, extra={}), targets)
        fitting = ", ".join(other for other, found in others.items() if isinstance(found, Choice) and found.fits)
        raise CraftError(
            f"`budget={options.budget}` is below the smallest setting of method `{name}` on this model, "
            f"{choice.setting}, which trains {choice.trainable:,} adapter parameters. Give at least "
            f"`budget={choice.trainable}`, or another method; within {options.budget:,} fit: {fitting or 'none'}."
        )
    return choice


def price(name: str, options: MethodOptions, targets: Targets) -> Choice:
    """As `choose_setting`, but a budget that is too small gives the smallest setting, which does not fit it."""
    method = find_method(name)
    if options.budget is None:
        ranks = method.setting.on(targets, options.ranks)
        return Choice(name, ranks, *_counts(_build(name, options, ranks, targets)))
    last, built = method.setting.last(targets), {}

    def trainable(step: int) -> int:
        built[step] = _build(name, options, method.setting.along(step, targets), targets)
        return _trainable(built[step])

    step = last_within(trainable, options.budget, last)
    chosen = max(step, 1)
    ranks = method.setting.along(chosen, targets)
    return Choice(name, ranks, *_counts(built[chosen]), budget=options.budget, largest=step == last)


def offers(options: MethodOptions, targets: Targets) -> Offers:
    """What every method with an adapter has for a model, in the order of the table.

    Args:
        options: A budget, or nothing for the default settings.
        targets: The modules to adapt.

    Returns:
        By method its setting (above the budget if its smallest is), or why it cannot adapt the model.
    """
    found: Offers = {}
    for name, method in METHODS.items():
        if method.config is None:
            continue
        try:
            found[name] = price(name, options, targets)
        except CraftError as problem:
            found[name] = problem
    return found


def last_within(cost: Callable[[int], int], budget: int, last: int) -> int:
    """The last step from 1 to `last` whose cost is within a budget, for a cost that never falls.

    A cost is asked for at few steps, since it may take long: five or so for a cost that is a power or a line.

    Args:
        cost: Of a step.
        budget: The most that it may cost.
        last: The last step, at least 1.

    Returns:
        The step, or 0 if the first costs more.

    Example:
        >>> last_within(lambda step: 5 + 3 * step * step, 1000, last=50)
        18
        >>> last_within(lambda step: 5 + 3 * step * step, 7, last=50)
        0
    """
    known = {1: cost(1)}
    if known[1] > budget:
        return 0
    low, high = 1, last + 1  # the budget pays for `low`, and not for `high` or that is out of range
    guess = budget // max(known[1], 1)
    while high - low > 1:
        guess = min(max(guess, low + 1), high - 1)
        known[guess] = cost(guess)
        if known[guess] <= budget:
            low = guess
        else:
            high = guess
        near = high if high in known else max(step for step in known if step < low)
        # A fourth guess in vain means a cost of another shape: halving always ends.
        guess = (low + high) // 2 if len(known) % 4 == 0 else _meets(budget, (low, known[low]), (near, known[near]))
    return low


def _meets(budget: int, one: tuple[int, int], other: tuple[int, int]) -> int:
    """Where a curve through two points (step, cost) meets a budget: a power if it grows faster than a line."""
    (step, low), (far, high) = one, other
    if low == high or min(low, high) == 0:
        return (step + far) // 2
    power = (math.log(high) - math.log(low)) / (math.log(far) - math.log(step))
    if power > 1:
        return int(step * (budget / low) ** (1 / power))
    return step + (budget - low) * (far - step) // (high - low)


def _counts(model: PeftModel) -> tuple[int, int]:
    # An adapter that was deferred has names and shapes, which is all that is wanted here.
    with still_deferred(model):
        stored = get_peft_model_state_dict(model, save_embedding_layers=False)
    return _trainable(model), sum(tensor.numel() for tensor in stored.values())


def _trainable(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _build(name: str, options: MethodOptions, ranks: Ranks | None, targets: Targets) -> PeftModel:
    wanted = MethodOptions(ranks=ranks, extra=options.extra)
    config = make_peft_config(name, wanted)
    if config is None:
        raise CraftError(f"Method `{name}` adds nothing to the model: it has no setting to count.")
    # A copy of a config counts as read from a file: a method of this package then expects to be loaded, and computes
    # nothing from the weights, of which there are none.
    config = dataclasses.replace(config, target_modules=targets.names, task_type=None)
    try:
        with torch.device("meta"):
            return add_adapter(targets.skeleton(), config)
    except NotImplementedError:
        # Something that it computes has no kernel for the meta device: what the modules do not hold is then real.
        return add_adapter(targets.skeleton(), config)
