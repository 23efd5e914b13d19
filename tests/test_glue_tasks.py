"""The table of GLUE tasks, and what its rows say."""

from __future__ import annotations

import pytest

from craft_peft import CraftError
from craft_peft.glue.metrics import METRICS
from craft_peft.glue.tasks import TASKS, Task, find_task


def test_all_nine_tasks_with_their_official_metrics() -> None:
    assert {name: task.metrics for name, task in TASKS.items()} == {
        "cola": ("matthews",),
        "sst2": ("accuracy",),
        "mrpc": ("accuracy", "f1"),
        "stsb": ("pearson", "spearman"),
        "qqp": ("accuracy", "f1"),
        "mnli": ("accuracy",),
        "qnli": ("accuracy",),
        "rte": ("accuracy",),
        "wnli": ("accuracy",),
    }


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_row_is_consistent(task: Task) -> None:
    assert set(task.metrics) <= set(METRICS)
    assert 1 <= len(task.text_columns) <= 2
    assert len(task.file_labels) in (0, len(task.labels))
    assert len(task.hub_text_columns) in (0, len(task.text_columns))
    assert task.is_regression == (task.name == "stsb")
    assert task.outputs == (len(task.labels) if task.labels else 1)


def test_mnli_has_two_development_sets() -> None:
    assert [dev.file for dev in TASKS["mnli"].dev_sets] == ["dev_matched.tsv", "dev_mismatched.tsv"]


@pytest.mark.parametrize("name", ["sst2", "SST-2", "sst_2"])
def test_names_of_the_folders_work_too(name: str) -> None:
    assert find_task(name) is TASKS["sst2"]


def test_unknown_task_names_the_nearest_and_all() -> None:
    with pytest.raises(CraftError, match=r"Unknown task `rtee`\. Did you mean `rte`\?.*cola, sst2, mrpc"):
        find_task("rtee")


def test_unknown_task_far_from_all_names_none() -> None:
    with pytest.raises(CraftError, match=r"Unknown task `xyzxyz`\. The tasks are"):
        find_task("xyzxyz")
