"""Whether a result file is whole and agrees with itself: what was cut short or edited by hand does not."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

from pydantic import TypeAdapter, ValidationError

from .metrics import mean_score
from .results import FORMAT, EpochRecord, Result, choose_scores
from .tasks import TASKS

FAILURES = ("failed", "diverged")
"""What a file that stands for a run without a result says of it."""

_RESULT = TypeAdapter(Result)
_SHARES = ("accuracy",)
"""Metrics that are a whole number of rows out of all."""


class Unusable(Exception):
    """A file that is no result; says why."""


def parse_result(text: str) -> tuple[Result, dict[str, Any]]:
    """Reads a result file.

    Args:
        text: What the file holds.

    Returns:
        The result, and all fields of the file, for those that a result need not have.

    Raises:
        Unusable: Not JSON, not a result of this version, or a result that contradicts itself.

    Example:
        >>> try:
        ...     parse_result('{"task": "rte"')
        ... except Unusable as error:
        ...     print(error)
        not whole JSON, cut short or edited (EOF while parsing an object at line 1 column 14)
    """
    try:
        result = _RESULT.validate_json(text, strict=True)
    except ValidationError as error:
        raise Unusable(_explain(error, text)) from error
    fields = json.loads(text)
    written = fields.get("format", FORMAT)
    if written != FORMAT:
        raise Unusable(f"written by another version: its format is {written!r}, this version reads {FORMAT!r}")
    trainable = fields["parameters"].get("trainable", result.parameters.trainable)
    if trainable != result.parameters.trainable:
        raise Unusable(
            f"contradicts itself: `parameters.trainable` is {trainable}, adapter and head make "
            f"{result.parameters.trainable}"
        )
    for fault in faults(result):
        raise Unusable(f"contradicts itself: {fault}")
    return result, fields


def _explain(error: ValidationError, text: str) -> str:
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "json_invalid":
        return f"not whole JSON, cut short or edited ({first['ctx']['error']})"
    if not where:
        return "not a result: no JSON object"
    fields = json.loads(text)
    if reason := fields.get("diverged") or (fields.get("reason") if fields.get("kind") in FAILURES else None):
        return (
            f"it {'diverged' if 'diverged' in (*fields, fields.get('kind')) else 'failed'}, so has no score: {reason}"
        )
    version = _version(fields)
    if first["type"] == "missing":
        return f"has no field `{where}`: {version} or no result at all"
    return f"`{where}` is {json.dumps(first['input'])[:60]}, {first['msg'][0].lower()}{first['msg'][1:]}: {version}"


def _version(fields: dict[str, Any]) -> str:
    versions = fields.get("versions")
    version = versions.get("craft-peft") if isinstance(versions, dict) else None
    return f"written by craft-peft {version} and not as this version does, edited," if version else "edited,"


def faults(result: Result) -> Iterator[str]:
    """What in a result does not fit the rest of it.

    Args:
        result: A result with fields of the right types.

    Yields:
        One sentence a fault.
    """
    yield from _names(result)
    yield from _numbers(result)
    if not result.curve:
        yield "the curve has no epoch"
        return
    for record in result.curve:
        yield from _record(result, record)
    yield from _whole_curve(result)
    yield from _steps(result)


def _names(result: Result) -> Iterator[str]:
    for name in ("method", "seed"):
        said = result.config.get(name)
        if said != getattr(result, name):
            yield f"`{name}` is {getattr(result, name)!r}, and {said!r} in its settings"
    if result.config.get("task") not in (None, result.task):
        yield f"`task` is {result.task!r}, and {result.config['task']!r} in its settings"
    if "craft-peft" not in result.versions:
        yield "`versions` does not say which craft-peft wrote it"


def _numbers(result: Result) -> Iterator[str]:
    counts = result.parameters
    if min(counts.adapter, counts.head, counts.total, counts.stored_bytes) < 0 or counts.trainable > counts.total:
        yield f"adapter {counts.adapter}, head {counts.head} and total {counts.total} do not fit together"
    if not math.isfinite(result.seconds) or result.seconds < 0:
        yield f"`seconds` is {result.seconds}"
    sizes = result.data.get("dev")
    rows = [*sizes.values()] if isinstance(sizes, dict) else []
    if not rows or not all(isinstance(size, int) and size > 0 for size in (*rows, result.data.get("train"))):
        yield "`data` does not say how many rows there were"


def _record(result: Result, record: EpochRecord) -> Iterator[str]:
    sizes = result.data.get("dev", {})
    if set(record.metrics) != set(sizes):
        yield f"epoch {record.epoch} measures {sorted(record.metrics)}, and the data are {sorted(sizes)}"
        return
    for name, values in record.metrics.items():
        if not all(math.isfinite(value) and -1 <= value <= 1 for value in values.values()):
            yield f"a metric of epoch {record.epoch} is not between -1 and 1"
            return
        task = TASKS.get(result.task)
        found = sorted(metric for metric in values if metric != "score")
        if task and found != sorted(task.metrics):
            yield f"epoch {record.epoch} has the metrics {found}, task {result.task} has {sorted(task.metrics)}"
            return
        if not found or not _close(values.get("score"), sum(values[metric] for metric in found) / len(found)):
            yield f"the score of epoch {record.epoch} on {name} is not the mean of its metrics"
        for metric in set(found) & set(_SHARES):
            if isinstance(sizes[name], int) and abs(values[metric] * sizes[name] % 1 - 0.5) < 0.499:
                yield f"the {metric} of epoch {record.epoch}, {values[metric]}, is no share of {sizes[name]} rows"
    scored = record.metrics and all("score" in values for values in record.metrics.values())
    if scored and not _close(record.score, mean_score(record.metrics)):
        yield f"the score of epoch {record.epoch} is not the mean over its development sets"


def _whole_curve(result: Result) -> Iterator[str]:
    epochs = [record.epoch for record in result.curve]
    if epochs != list(range(1, len(epochs) + 1)):
        yield f"the epochs of the curve are {epochs}"
    planned = recipe_of(result).get("epochs")
    if planned is not None and planned != len(epochs):
        yield f"the curve has {len(epochs)} epochs, {planned} were to be trained"
    times = [record.seconds for record in result.curve]
    if times != sorted(times) or result.seconds < times[-1] - 1e-6:
        yield f"the seconds of the curve, {times}, do not fit `seconds`, {result.seconds}"
    if result.metrics != result.curve[-1].metrics:
        yield "`metrics` is not that of the last epoch"
    chosen = choose_scores(result.curve)
    for name in ("last", "best", "best_epoch", "held_out", "held_out_epoch"):
        said, found = getattr(result.score, name), getattr(chosen, name)
        if not (said is found or _close(said, found)):
            yield f"`score.{name}` is {said}, by its curve it is {found}"
    if (result.data.get("held_out") is None) != (result.score.held_out is None):
        yield "it has rows held out without a score on them, or the reverse"


def _steps(result: Result) -> Iterator[str]:
    steps = [step for step, _, _ in result.loss]
    if steps != sorted(set(steps)) or any(step < 1 for step in steps):
        yield "the steps of the loss do not ascend"
    recipe, rows = recipe_of(result), result.data.get("train")
    if steps and isinstance(rows, int) and isinstance(recipe.get("batch_size"), int):
        most = math.ceil(rows / recipe["batch_size"]) * len(result.curve)
        if steps[-1] > most:
            yield f"the loss goes to step {steps[-1]}, {rows} rows make at most {most} steps"


def recipe_of(result: Result) -> dict[str, Any]:
    """The recipe in a result's settings; nothing where there is none."""
    recipe = result.config.get("recipe")
    return recipe if isinstance(recipe, dict) else {}


def _close(one: float | int | None, other: float | int | None) -> bool:
    return one is not None and other is not None and math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-9)
