"""Figures that other people published: for orientation, on other models and by other protocols."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from ...errors import CraftError, did_you_mean
from ..tasks import TASKS

FILES = {"published": Path(__file__).parent / "published.csv"}
"""What `against` may name: GLUE development results times 100. A blank is a figure that was not seen."""

STARTS = {"n": "", "mnli": "MRPC, RTE and STS-B started from MNLI"}


@dataclass(frozen=True)
class PublishedRow:
    """A method's published results.

    Args:
        model: The base model.
        method: The method and its setting.
        parameters: Trained parameters without the head.
        scores: By task, in percent; Matthews for CoLA, Pearson for STS-B, accuracy for the others.
        start: Where the runs started, if not at the pretrained model.
        selection: Which epoch was reported.
        source: Where the figures are from.
    """

    model: str
    method: str
    parameters: int
    scores: dict[str, float]
    start: str
    selection: str
    source: str

    @property
    def protocol(self) -> str:
        """Selection, start and source in one phrase."""
        return "; ".join(part for part in (self.selection, self.start, self.source) if part)


def read_published(name: str) -> list[PublishedRow]:
    """Reads published figures.

    Args:
        name: A key of `FILES`.

    Returns:
        The rows, in the order of the file.

    Raises:
        CraftError: No such figures.

    Example:
        >>> read_published("published")[0].scores["rte"]
        78.7
    """
    if name not in FILES:
        hint = did_you_mean(name, FILES)
        raise CraftError(f"There are no figures `{name}`.{hint} `against=...` takes: {', '.join(FILES)}.")
    with FILES[name].open(encoding="utf-8", newline="") as file:
        return [
            PublishedRow(
                model=row["model"],
                method=row["method"],
                parameters=int(row["trainable_params"]),
                scores={task: float(row[task]) for task in TASKS if row.get(task)},
                start=STARTS[row["init"]],
                selection=row["selection"],
                source=row["source"],
            )
            for row in csv.DictReader(file)
        ]
