"""The official metrics of GLUE, by scikit-learn and SciPy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import stats
from sklearn import metrics as sk

from .tasks import Task


def _matthews(predicted: np.ndarray, actual: np.ndarray) -> float:
    # Undefined when a side is constant; 0 by convention, said here because scikit-learn warns on its way there.
    if _constant(predicted) or _constant(actual):
        return 0.0
    return float(sk.matthews_corrcoef(actual, predicted))


def _accuracy(predicted: np.ndarray, actual: np.ndarray) -> float:
    return float(sk.accuracy_score(actual, predicted))


def _f1(predicted: np.ndarray, actual: np.ndarray) -> float:
    return float(sk.f1_score(actual, predicted, pos_label=1, average="binary", zero_division=0))


def _pearson(predicted: np.ndarray, actual: np.ndarray) -> float:
    return _correlation(stats.pearsonr, predicted, actual)


def _spearman(predicted: np.ndarray, actual: np.ndarray) -> float:
    return _correlation(stats.spearmanr, predicted, actual)


def _correlation(function: Callable, predicted: np.ndarray, actual: np.ndarray) -> float:
    # A model that predicts the mean everywhere has learned nothing: 0, not SciPy's NaN with a warning. Predictions
    # that differ in the last bit only are constant too, and their correlation would be noise.
    if _constant(predicted) or _constant(actual):
        return 0.0
    return float(function(predicted, actual).statistic)


def _constant(values: np.ndarray) -> bool:
    return bool(np.ptp(values) <= 1e-6 * max(1.0, float(np.abs(values).max())))


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "matthews": _matthews,
    "pearson": _pearson,
    "spearman": _spearman,
}


def compute_metrics(task: Task, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Measures the predictions for one data set.

    Args:
        task: Names the metrics.
        logits: What the model returned, one row a text.
        labels: Class numbers, or scores of a regression.

    Returns:
        Each metric of the task, and `score`, their mean.

    Example:
        >>> import numpy as np
        >>> from craft_peft.glue.metrics import compute_metrics
        >>> from craft_peft.glue.tasks import TASKS
        >>> compute_metrics(TASKS["rte"], np.array([[2.0, 1.0], [0.0, 3.0]]), np.array([0, 0]))
        {'accuracy': 0.5, 'score': 0.5}
    """
    logits = np.asarray(logits, dtype=np.float64)
    predicted = logits.reshape(-1) if task.is_regression else logits.argmax(axis=-1)
    values = {name: METRICS[name](predicted, np.asarray(labels)) for name in task.metrics}
    return {**values, "score": float(np.mean(list(values.values())))}


def mean_score(metrics: dict[str, dict[str, float]]) -> float:
    """The task's score: the mean over its development sets.

    Args:
        metrics: What `compute_metrics` returned, by development set.

    Returns:
        One number; MNLI's is the mean of matched and mismatched.

    Example:
        >>> from craft_peft.glue.metrics import mean_score
        >>> mean_score({"matched": {"score": 0.5}, "mismatched": {"score": 0.75}})
        0.625
    """
    return float(np.mean([values["score"] for values in metrics.values()]))
