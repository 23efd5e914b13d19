"""The metrics against their definitions, and on predictions that define nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest

from craft_peft.glue.metrics import METRICS, compute_metrics, mean_score
from craft_peft.glue.tasks import TASKS

PREDICTED = np.array([1, 1, 0, 1, 0, 0, 1, 1])
ACTUAL = np.array([1, 0, 0, 1, 1, 0, 1, 0])
TP, FP, FN, TN = 3, 2, 1, 2


def test_class_metrics_by_their_definitions() -> None:
    matthews = (TP * TN - FP * FN) / math.sqrt((TP + FP) * (TP + FN) * (TN + FP) * (TN + FN))
    expected = {"accuracy": (TP + TN) / 8, "f1": 2 * TP / (2 * TP + FP + FN), "matthews": matthews}
    assert {name: METRICS[name](PREDICTED, ACTUAL) for name in expected} == pytest.approx(expected)


def test_correlations_by_their_definitions() -> None:
    x, y = np.array([0.1, 0.4, 0.35, 2.0]), np.array([1.0, 3.0, 2.0, 4.0])
    pearson = ((x - x.mean()) * (y - y.mean())).sum() / math.sqrt(
        ((x - x.mean()) ** 2).sum() * ((y - y.mean()) ** 2).sum()
    )
    assert METRICS["pearson"](x, y) == pytest.approx(pearson)
    assert METRICS["spearman"](x, y) == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["matthews", "pearson", "spearman"])
def test_constant_predictions_score_zero(name: str) -> None:
    assert METRICS[name](np.full(4, 1), np.array([0, 1, 1, 0])) == 0.0


@pytest.mark.parametrize("name", ["pearson", "spearman"])
def test_predictions_constant_up_to_rounding_score_zero(name: str) -> None:
    predicted = 2.7 + np.array([0, 1, 0, 2]) * 1e-9
    assert METRICS[name](predicted, np.array([0.0, 3.0, 1.0, 5.0])) == 0.0


def test_f1_without_positives_is_zero() -> None:
    assert METRICS["f1"](np.zeros(3, dtype=int), np.array([0, 1, 0])) == 0.0


def test_score_is_the_mean_of_the_metrics() -> None:
    values = compute_metrics(TASKS["mrpc"], np.eye(2)[PREDICTED], ACTUAL)
    assert values == pytest.approx({"accuracy": 0.625, "f1": 2 / 3, "score": (0.625 + 2 / 3) / 2})


def test_regression_takes_the_single_output() -> None:
    values = compute_metrics(TASKS["stsb"], np.array([[1.0], [2.0], [4.0]]), np.array([2.0, 4.0, 8.0]))
    assert values == pytest.approx({"pearson": 1.0, "spearman": 1.0, "score": 1.0})


def test_task_score_is_the_mean_over_the_development_sets() -> None:
    assert mean_score({"matched": {"accuracy": 1.0, "score": 0.8}, "mismatched": {"score": 0.6}}) == pytest.approx(0.7)
