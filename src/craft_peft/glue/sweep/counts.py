"""What the methods of an experiment train on its model: counted once, then kept in a file beside the runs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ...errors import CraftError
from ...plugin.folders import write_whole
from .. import budgets, method_table
from ..method_row import MethodOptions, Ranks
from ..methods import METHODS
from ..pretrained import head_modules, resolve_model_name
from ..targets import empty_model, find_model_targets
from .experiment import MethodRow


@dataclass(frozen=True)
class Count:
    """What a method trains outside the head.

    Args:
        ranks: Its setting, as the budget or the default decided it.
        trainable: Trained numbers.
        setting: The setting in words.
    """

    ranks: Ranks | None
    trainable: int
    setting: str


class Counts:
    """Counts parameters of one model; reads them from a file where it can, for building models takes seconds.

    Args:
        model: The base model, as the experiment names it.
        cache: The file; need not be there.
    """

    def __init__(self, model: str, cache: Path) -> None:
        self.model = model
        self.cache = cache
        # Another base or another table of methods may count differently.
        table = hashlib.sha256(Path(method_table.__file__).read_bytes() + Path(budgets.__file__).read_bytes())
        self.key = f"{resolve_model_name(model)} {table.hexdigest()[:12]}"
        try:
            self.kept: dict[str, dict[str, Any]] = json.loads(cache.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self.kept = {}
        self.known = self.kept.setdefault(self.key, {})
        self.changed = False

    def of(self, row: MethodRow) -> Count:
        """The count of a method.

        Raises:
            CraftError: A setting or an option that does not fit the model; names the method's label.
        """
        wanted = {name: value for name, value in dataclasses.asdict(row).items() if name not in ("label", "recipe")}
        try:
            found = self._look_up(json.dumps(wanted, sort_keys=True), lambda: self._count(row))
        except CraftError as error:
            raise CraftError(f"methods.{row.label}: {error}") from error
        return Count(found["ranks"] and tuple(found["ranks"]), found["trainable"], found["setting"])

    def head(self, outputs: int) -> int:
        """Numbers of the head for a task with so many outputs."""

        def count() -> int:
            model = empty_model(self.model, outputs)
            return sum(p.numel() for name in head_modules(model) for p in getattr(model, name).parameters())

        return self._look_up(f"head {outputs}", count)

    @property
    def width(self) -> int:
        """The model's hidden size, by which the precision is chosen."""
        return self._look_up("width", lambda: getattr(self._empty.config, "hidden_size", 0))

    @property
    def layers(self) -> int:
        """Numbers of the encoder outside its embeddings: what a token is multiplied with."""

        def count() -> int:
            encoder = self._empty.base_model
            tables = sum(p.numel() for name, p in encoder.named_parameters() if "embedding" in name)
            return sum(p.numel() for p in encoder.parameters()) - tables

        return self._look_up("layers", count)

    def save(self) -> None:
        """Writes the file if anything is new in it, and its folder is there."""
        if self.changed and self.cache.parent.is_dir():
            write_whole(self.cache, json.dumps(self.kept, indent=1) + "\n")

    def _look_up(self, key: str, count: Any) -> Any:
        if key not in self.known:
            self.known[key] = count()
            self.changed = True
        return self.known[key]

    def _count(self, row: MethodRow) -> dict[str, Any]:
        method = METHODS[row.method]
        if method.config is None:
            trained = sum(p.numel() for p in self._empty.base_model.parameters()) if method.trains_base else 0
            return {"ranks": None, "trainable": trained, "setting": ""}
        options = MethodOptions(row.ranks, row.target_modules, row.options, row.budget)
        targets = find_model_targets(self._empty, row.target_modules)
        choice = budgets.choose_setting(row.method, options, targets)
        return {"ranks": choice.ranks, "trainable": choice.trainable, "setting": choice.setting}

    @cached_property
    def _empty(self) -> Any:
        return empty_model(self.model)
