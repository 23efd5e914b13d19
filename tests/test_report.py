"""From result files to tables and words: what is read, what is refused, what is computed, what is said."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_results import fake_result, write_results, write_run

from craft_peft.cli.main import main
from craft_peft.glue.checking import Unusable, parse_result
from craft_peft.glue.figures import as_field, from_field, read_stacks
from craft_peft.glue.report import words
from craft_peft.glue.report.grouping import SELECTIONS, make_grid, what_differs
from craft_peft.glue.report.page import make_report, render_markdown, render_page
from craft_peft.glue.report.pictures import draw_curves, draw_pareto
from craft_peft.glue.report.published import read_published
from craft_peft.glue.report.rates import RateChoice
from craft_peft.glue.report.reading import read_runs
from craft_peft.glue.report.significance import holm, paired_test, pairs_needed, smallest_p
from craft_peft.glue.results import EpochRecord, choose_scores

PROJECT = Path(__file__).resolve().parent.parent
TASKS = ("rte", "stsb")
LAST = SELECTIONS["last"]
SECONDS = {"startup": None, "setup": 10.0, "training": 80.0, "evaluation": 8.0, "saving": 2.0}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_results(tmp_path_factory.mktemp("results"), ("craft", "lora", "lora 8", "head"), TASKS)


def edited(change: Callable[[dict[str, Any]], object], name: str = "craft", task: str = "rte") -> str:
    fields = json.loads(json.dumps(dataclasses.asdict(fake_result(name, task, 0))))
    change(fields)
    return json.dumps(fields)


EDITS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a field is gone": (lambda f: f.pop("curve"), "has no field `curve`: written by craft-peft 0.1.0"),
    "a field of another type": (lambda f: f.update(seed="0"), '`seed` is "0"'),
    "an inner field": (lambda f: f["score"].pop("last"), "has no field `score.last`"),
    "another format": (lambda f: f.update(format="craft-peft result 9"), "another version: its format is"),
    "a better score": (lambda f: f["score"].update(last=0.99), "`score.last` is 0.99, by its curve it is"),
    "a better best": (lambda f: f["score"].update(best_epoch=1), "`score.best_epoch` is 1"),
    "no held-out score": (lambda f: f["score"].update(held_out=None), "`score.held_out` is None"),
    "a better curve": (lambda f: f["curve"][-1].update(score=0.99), "is not the mean over its development sets"),
    "a better metric": (lambda f: f["curve"][0]["metrics"]["dev"].update(score=0.9), "not the mean of its metrics"),
    "no share of the rows": (
        lambda f: f["curve"][0]["metrics"]["dev"].update(accuracy=0.5001, score=0.5001),
        "0.5001, is no share of 277 rows",
    ),
    "another metric": (
        lambda f: f["curve"][0]["metrics"].update(dev={"f1": 0.5, "score": 0.5}),
        "has the metrics ['f1'], task rte has ['accuracy']",
    ),
    "a score out of range": (
        lambda f: f["curve"][0]["metrics"].update(dev={"accuracy": 2.0, "score": 2.0}),
        "not between -1 and 1",
    ),
    "other last metrics": (lambda f: f["metrics"]["dev"].update(accuracy=0.1), "not that of the last epoch"),
    "another data set": (lambda f: f["data"].update(dev={"test": 277}), "measures ['dev'], and the data are ['test']"),
    "no rows": (lambda f: f["data"].update(train=None), "does not say how many rows"),
    "an epoch is gone": (lambda f: f["curve"].pop(1), "the epochs of the curve are [1, 3, 4, 5]"),
    "the end is gone": (lambda f: f["curve"].pop(), "the curve has 4 epochs, 5 were to be trained"),
    "no epoch": (lambda f: f["curve"].clear(), "the curve has no epoch"),
    "faster": (lambda f: f.update(seconds=1.0), "do not fit `seconds`, 1.0"),
    "never": (lambda f: f.update(seconds=float("nan")), "`seconds` is nan"),
    "fewer parameters": (lambda f: f["parameters"].update(adapter=-1), "do not fit together"),
    "more than the model": (lambda f: f["parameters"].update(head=10**9), "do not fit together"),
    "another sum": (lambda f: f["parameters"].update(trainable=7), "`parameters.trainable` is 7"),
    "another seed": (lambda f: f.update(seed=1), "`seed` is 1, and 0 in its settings"),
    "another method": (lambda f: f.update(method="lora"), "`method` is 'lora', and 'craft' in its settings"),
    "another task": (lambda f: f["config"].update(task="mrpc"), "`task` is 'rte', and 'mrpc' in its settings"),
    "steps go back": (lambda f: f["loss"].reverse(), "do not ascend"),
    "too many steps": (lambda f: f["loss"].append([10**6, 0.1, 0.0]), "the loss goes to step 1000000"),
    "held out without a score": (lambda f: f["data"].update(held_out=None), "held out without a score"),
    "no version": (lambda f: f["versions"].clear(), "which craft-peft wrote it"),
}


class TestChecking:
    @pytest.mark.parametrize("task", ["cola", "mrpc", "rte", "stsb", "sst2"])
    def test_a_whole_result_passes(self, task: str) -> None:
        result = fake_result("lora", task, 2)
        read, fields = parse_result(json.dumps({**dataclasses.asdict(result), "more": 1}))
        assert read == result and fields["more"] == 1

    @pytest.mark.parametrize(("change", "message"), EDITS.values(), ids=EDITS)
    def test_an_edited_one_does_not(self, change: Callable[[dict[str, Any]], object], message: str) -> None:
        with pytest.raises(Unusable, match=re.escape(message)):
            parse_result(edited(change))

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "not whole JSON"),
            ("[1]", "no JSON object"),
            ("{}", "has no field `task`: edited"),
            (edited(lambda fields: None)[:-200], "not whole JSON, cut short or edited"),
            (
                '{"task": "rte", "method": "lora", "diverged": "loss is nan"}',
                "it diverged, so has no score: loss is nan",
            ),
            ('{"kind": "failed", "reason": "disk full"}', "it failed, so has no score: disk full"),
        ],
    )
    def test_what_is_no_result(self, text: str, message: str) -> None:
        with pytest.raises(Unusable, match=re.escape(message)):
            parse_result(text)

    def test_the_committed_results_pass(self) -> None:
        found = read_runs([PROJECT / "results" / "default_recipe"])
        assert found.runs and not found.left_out


class TestReading:
    def test_folders_at_any_depth(self, tmp_path: Path) -> None:
        write_run(tmp_path / "a" / "b" / "run")
        write_results(tmp_path / "flat", ("lora",), ("rte",), (0,))
        (tmp_path / "a" / "begun").mkdir()
        (tmp_path / "a" / "begun" / "run.json").write_text("{}")
        (tmp_path / "a" / "begun" / "adapter_config.json").write_text("{}")
        (tmp_path / ".hidden").mkdir()
        (tmp_path / ".hidden" / "x.json").write_text("{}")
        found = read_runs([tmp_path])
        assert [run.result.method for run in found.runs] == ["craft", "lora"]
        assert [run.folder is not None for run in found.runs] == [True, False]
        assert found.unfinished == (tmp_path / "a" / "begun",) and not found.left_out

    def test_a_run_twice_counts_once_and_the_folder_is_kept(self, tmp_path: Path) -> None:
        published = write_results(tmp_path / "a", ("craft",), ("rte",), (0,))
        run = write_run(tmp_path / "b")
        found = read_runs([published, run])
        assert [each.path for each in found.runs] == [run / "result.json"]
        assert [(left.path.parent, left.reason[:17]) for left in found.left_out] == [(published, "the same run as /")]

    def test_a_folder_takes_the_name_of_its_published_copy(self, tmp_path: Path) -> None:
        write_run(tmp_path / "run")
        for name, chooses in (("a", True), ("b", False)):
            about = {"label": f"ours {name}", "chooses_rate": chooses}
            (tmp_path / f"{name}.json").write_text(edited(lambda fields, a=about: fields.update(experiment=a)))
        found = read_runs([tmp_path])
        (run,) = found.runs
        assert run.folder == tmp_path / "run" and run.experiment["label"] == "ours b" and not found.left_out

    def test_two_outcomes_of_one_seed(self, tmp_path: Path) -> None:
        write_results(tmp_path / "a", ("lora",), ("rte",), (0,))
        other = dataclasses.replace(fake_result("lora", "rte", 0), seconds=999.0)
        other.write(tmp_path / "b.json")
        grid, left_out = make_grid(read_runs([tmp_path]).runs)
        assert len(grid.runs) == 1
        assert "a second run of lora on rte with seed 0" in left_out[0].reason

    def test_bad_files_are_named_and_the_rest_is_used(self, results: Path, tmp_path: Path) -> None:
        (tmp_path / "cut.json").write_text(edited(lambda fields: None)[:500])
        (tmp_path / "latin.json").write_bytes(b'{"task": "\xe9"}')
        report = make_report([results, tmp_path])
        page, text = render_page(report), render_markdown(report)
        assert len(report.grid.runs) == 24
        for name in ("cut.json", "latin.json"):
            assert f"Left out: <code>{tmp_path / name}</code>" in page
            assert f"Left out: `{tmp_path / name}`" in text


def of_rate(fields: dict[str, Any], rate: float, held_out_score: float, about: dict[str, Any]) -> None:
    fields["config"]["recipe"]["learning_rate"] = rate
    fields["curve"][-1]["held_out_score"] = held_out_score
    fields["score"] = vars(choose_scores([EpochRecord(**record) for record in fields["curve"]]))
    fields.update(seconds=fields["seconds"] + rate, experiment=about)


class TestGrouping:
    def test_settings_make_variants_only_where_they_differ_on_a_task(self, tmp_path: Path) -> None:
        write_results(tmp_path, ("craft", "craft free", "craft hooi", "lora 8", "head"), TASKS)
        for seed in range(3):  # more epochs on a task: no other variant
            fake_result("lora", "rte", seed, epochs=7).write(tmp_path / f"long-{seed}.json")
        for seed in range(3):
            fake_result("lora", "stsb", seed).write(tmp_path / f"short-{seed}.json")
        grid, _ = make_grid(read_runs([tmp_path]).runs)
        labels = [variant.label for variant in grid.variants]
        assert labels == [
            "craft",
            "craft (tying free)",
            "craft (decomposition hooi)",
            "lora (r 4)",
            "lora (r 8)",
            "head",
        ]
        assert all(len(variant.runs) == 6 for variant in grid.variants)
        assert what_differs(grid) == ["RTE: the runs differ in epochs (5; 7)."]

    def test_names_of_an_experiment(self, tmp_path: Path) -> None:
        for name, label, chooses in (("craft", "ours", False), ("lora", "small", False), ("lora", "small", True)):
            about = {"label": label, "task": "rte from mnli", "chooses_rate": chooses}
            change = {"experiment": about, "seconds": 900.0 + chooses}
            (tmp_path / f"{name}-{chooses}.json").write_text(edited(lambda f, c=change: f.update(c), name))
        report = make_report([tmp_path])
        assert [variant.label for variant in report.grid.variants] == ["ours", "small"]
        assert report.grid.tasks == ("rte from mnli",) and len(report.grid.runs) == 2
        assert report.notes == ["Not compared: 1 run that chose a learning rate on held-out rows."]

    def test_rows_stand_by_name_in_whatever_order_files_are_found(self, tmp_path: Path) -> None:
        names = ("lora r=8", "lora r=16", "lora")
        for number, label in enumerate(names):
            about = {"experiment": {"label": label, "task": "rte", "chooses_rate": False}, "seconds": 900.0 + number}
            (tmp_path / f"{label}.json").write_text(edited(lambda f, a=about: f.update(a), "lora"))
        runs = read_runs([tmp_path]).runs
        for some in itertools.permutations(runs):
            assert [variant.label for variant in make_grid(some)[0].variants] == ["lora", "lora r=8", "lora r=16"]

    def test_rates_and_where_they_were_chosen_from(self, tmp_path: Path) -> None:
        held_out = {  # of RTE and STS-B at each rate; the mean decides
            "craft": {1e-3: (0.25, 0.50), 3e-3: (0.50, 0.75), 1e-2: (0.75, 0.25)},
            "lora": {4e-4: (0.25, 0.50), 4e-3: (0.50, 0.75), 1e-3: (0.75, None)},
        }
        for name, rate, task in itertools.product(held_out, (4e-4, 1e-3, 3e-3, 4e-3, 1e-2), TASKS):
            score = held_out[name].get(rate, (None, None))[TASKS.index(task)]
            chosen = rate in (3e-3, 4e-3)  # these lie there a second time, as runs of the comparison
            for chooses in (True, False) if chosen else (True,):
                if score is not None:
                    about = {"label": f"our {name}", "task": task, "chooses_rate": chooses}
                    text = edited(lambda f, r=rate, s=score, a=about: of_rate(f, r, s, a), name, task)
                    (tmp_path / f"{task}-{name}-{rate}-{chooses}.json").write_text(text)
        report = make_report([tmp_path])
        assert report.left_out == ()
        assert report.choices == (
            RateChoice("our craft", {1e-3: 37.5, 3e-3: 62.5, 1e-2: 50.0}, 3e-3),
            RateChoice("our lora", {4e-4: 37.5, 4e-3: 62.5}, 4e-3),
        )
        assert report.notes == [
            "Not compared: 7 runs that chose a learning rate on held-out rows.",
            "The chosen rate is the highest tried, so that a higher one may do better: our lora.",
        ]
        assert "| our lora | 0.004 (the highest tried) | 0.0004: 37.5, 0.004: 62.5 |" in render_markdown(report)
        assert "the highest tried" in render_page(report)

    def test_scores_by_seed_and_their_average(self, results: Path) -> None:
        grid, _ = make_grid(read_runs([results]).runs)
        craft = grid.find("craft")
        by_task = {task: [100 * fake_result("craft", task, seed).score.last for seed in range(3)] for task in TASKS}
        assert grid.tasks == ("stsb", "rte")
        assert list(craft.scores("rte", LAST).values()) == by_task["rte"]
        means = [statistics.mean(pair) for pair in zip(by_task["rte"], by_task["stsb"], strict=True)]
        assert list(grid.average(craft, LAST).values()) == pytest.approx(means)

    def test_no_average_without_all_tasks(self, tmp_path: Path) -> None:
        write_results(tmp_path, ("craft",), TASKS)
        write_results(tmp_path, ("lora",), ("rte",))
        fake_result("head", "rte", 0).write(tmp_path / "h0.json")
        fake_result("head", "stsb", 1).write(tmp_path / "h1.json")
        text = render_markdown(make_report([tmp_path]))
        rows = {line.split(" | ")[0]: line for line in reversed(text.splitlines()) if line.startswith("| ")}
        overview = text[text.index("## Scores of the last") :].splitlines()
        cells = {line.split(" | ")[0][2:]: line.rstrip(" |").split(" | ")[-1] for line in overview[4:7]}
        assert rows and cells["lora"] == "– (1 of 2 tasks)" and cells["head"] == "– (no common seed)"
        assert "– (no run)" in overview[5]

    def test_unlike_conditions_are_told(self, tmp_path: Path) -> None:
        write_results(tmp_path, ("craft",), ("rte",), (0,))
        other = fake_result("lora", "rte", 0)
        other = dataclasses.replace(
            other,
            model="another",
            loss=[],
            versions={"craft-peft": "0.2.0"},
            data={**other.data, "train": 2000},
            config={**other.config, "precision": "bf16"},
        )
        other.write(tmp_path / "other.json")
        notes = " ".join(make_report([tmp_path]).notes)
        for part in ("2 base models", "rows trained on (2,000; 2,490)", "precision (bf16; float32)", "(0.1.0, 0.2.0)"):
            assert part in notes


class TestSignificance:
    def test_p_counts_sign_patterns(self) -> None:
        differences = np.array([0.4, -0.1, 0.9, 0.3, 0.5])
        means = [np.mean(np.abs(differences) * signs) for signs in itertools.product((1, -1), repeat=5)]
        expected = np.mean([abs(mean) >= differences.mean() - 1e-12 for mean in means])
        assert paired_test(differences) == pytest.approx(expected)

    def test_the_smallest_p(self) -> None:
        for pairs in (2, 3, 6):
            assert paired_test(np.arange(1.0, pairs + 1)) == pytest.approx(smallest_p(pairs))
        assert smallest_p(pairs_needed(20)) * 20 < 0.05 <= smallest_p(pairs_needed(20) - 1) * 20

    def test_holm_never_falls_and_keeps_the_order(self) -> None:
        values = [0.04, 0.001, 0.03, 0.9]
        assert holm(values) == pytest.approx([0.09, 0.004, 0.09, 0.9])

    def test_pairs_are_common_seeds(self, tmp_path: Path) -> None:
        write_results(tmp_path, ("craft",), ("rte",), (0, 1, 2, 3))
        write_results(tmp_path, ("lora",), ("rte",), (2, 3, 4))
        found = make_report([tmp_path]).differences["lora", "rte"]
        expected = [
            100 * (fake_result("lora", "rte", seed).score.last - fake_result("craft", "rte", seed).score.last)
            for seed in (2, 3)
        ]
        assert found.pairs == 2 and found.mean == pytest.approx(statistics.mean(expected))

    def test_eleven_seeds_can_tell(self, tmp_path: Path) -> None:
        report = make_report([write_results(tmp_path, ("craft", "head"), ("rte",), range(11))])
        assert report.differences["head", "rte"].is_significant
        assert "Of 1 difference to craft on single tasks 1 is significant" in " ".join(report.summary)
        assert "Significant: head (p < 0.001)" in " ".join(report.by_task[0].sentences)


class TestWords:
    def test_where_the_baseline_loses_and_by_how_much(self, results: Path) -> None:
        report = make_report([results])
        grid, said = report.grid, " ".join(report.summary)
        for task, title in (("rte", "RTE"), ("stsb", "STS-B")):
            medians = {v.label: statistics.median(v.scores(task, LAST).values()) for v in grid.variants}
            best = max(medians, key=lambda label: medians[label])
            assert best != "craft" and f"on {title} by {medians[best] - medians['craft']:.1f} points to {best}" in said
        assert "With at most 3 seeds the smallest p-value that a paired test can give is 0.25" in said
        assert "no difference on a single task can be significant here" in said

    def test_where_it_wins(self, results: Path) -> None:
        said = " ".join(make_report([results], baseline="lora (r 8)").summary)
        assert "lora (r 8) has the best median on 2 of the 2 tasks" in said and "It loses" not in said

    def test_alone(self, tmp_path: Path) -> None:
        report = make_report([write_results(tmp_path, ("craft",), ("rte",), (0,))])
        assert "Best: craft, median" in " ".join(report.by_task[0].sentences)
        assert render_page(report) and "## Differences" not in render_markdown(report)

    def test_without_held_out_rows(self, tmp_path: Path) -> None:
        write_results(tmp_path, ("craft", "head"), ("rte",), hold_out=False)
        assert "no rows held out" in render_markdown(make_report([tmp_path]))
        said = words.by_task(*_all(make_report([tmp_path], selection="held_out")))
        assert said[0].sentences == ("No run has a score of the held-out choice.",)

    def test_no_difference_at_all(self, tmp_path: Path) -> None:
        craft = fake_result("craft", "rte", 0)
        craft.write(tmp_path / "a.json")
        dataclasses.replace(craft, method="lora", config={**craft.config, "method": "lora"}).write(tmp_path / "b.json")
        ((said,),) = [task.sentences[1:] for task in words.by_task(*_all(make_report([tmp_path])))]
        assert "lora ±0.0" in said

    def test_a_name_cannot_break_the_page(self, tmp_path: Path) -> None:
        odd = dataclasses.replace(fake_result("head", "rte", 0), model="<script>alert(1)</script> & co")
        odd.write(tmp_path / "odd.json")
        page = render_page(make_report([tmp_path]))
        assert "<script>alert" not in page and "&lt;script&gt;alert(1)" in page


def _all(report: Any) -> tuple[Any, ...]:
    return report.grid, report.baseline, report.selection, report.differences


class TestShowing:
    def test_published_figures_stand_apart(self, results: Path) -> None:
        rows = read_published("published")
        assert rows[0].scores["stsb"] == 91.2 and "qqp" not in rows[3].scores
        text = render_markdown(make_report([results], against="published"))
        assert text.count("Published figures: other models, other protocols") == 1
        assert (
            text.index("| craft |") < text.index("Published figures") < text.index("| BitFit, roberta-base (best epoch")
        )

    def test_transforms_of_an_adapter(self, tmp_path: Path) -> None:
        stacks = read_stacks(write_run(tmp_path / "run"))
        assert [stack.name for stack in stacks] == ["query", "value"]
        assert stacks[0].energy == pytest.approx(0.25)
        matrix = stacks[0].matrices["out"]
        assert stacks[0].moved["out"] == pytest.approx(np.sqrt((matrix**2).sum() / 8))
        page = render_page(make_report([tmp_path]))
        assert "Inside the adapters" in page and "craft on RTE, seed 0" in page and "25.0 %" in page

    def test_figures_of_an_adapter_in_a_published_file(self, tmp_path: Path) -> None:
        kept = {"query": {"energy": 0.5, "moved": {"out": 0.125}}}
        (tmp_path / "a.json").write_text(edited(lambda fields: fields.update(adapter_figures=kept)))
        assert "| craft | RTE | query | 1 | 50.0 | – | 0.125 | – |" in render_markdown(make_report([tmp_path]))

    def test_what_a_sweep_writes_of_an_adapter_is_read_again(self, tmp_path: Path) -> None:
        stacks = read_stacks(write_run(tmp_path / "run"))
        (tmp_path / "a.json").write_text(edited(lambda fields: fields.update(as_field(stacks))))
        assert from_field(json.loads((tmp_path / "a.json").read_text())) == stacks
        assert as_field(read_stacks(tmp_path)) == {}

    @pytest.mark.parametrize("wrong", [["query"], {"query": 1}, {"query": {"energy": "much"}}, {"query": {"moved": 2}}])
    def test_figures_of_another_form_are_named(self, tmp_path: Path, wrong: Any) -> None:
        (tmp_path / "a.json").write_text(edited(lambda fields: fields.update(adapter_figures=wrong)))
        report = make_report([tmp_path])
        assert "its field `adapter_figures` is not what a sweep writes" in report.left_out[0].reason
        assert len(report.grid.runs) == 1 and report.movement is None

    def test_movement_is_by_method_task_and_stack(self, tmp_path: Path) -> None:
        for seed in (0, 1):
            write_run(tmp_path / str(seed), seed=seed)
        moved = [[stack.moved["in"] for stack in read_stacks(tmp_path / str(seed))] for seed in (0, 1)]
        write_run(tmp_path / "stsb", task="stsb")
        table = make_report([tmp_path]).movement
        assert table is not None
        assert [(row[1].text, row[2].text) for row in table.rows] == [
            (task, stack) for task in ("STS-B", "RTE") for stack in ("query", "value")
        ]
        for number, row in enumerate(table.rows[2:]):
            assert row[3].value == 2 and row[7].value == pytest.approx((moved[0][number] + moved[1][number]) / 2)
            assert row[4].detail == "" and "–" in row[7].detail

    def test_one_epoch_is_no_curve(self, tmp_path: Path) -> None:
        write_results(tmp_path, ("craft",), ("rte",), (0,), epochs=1)
        assert "Learning curves" not in render_page(make_report([tmp_path]))
        write_results(tmp_path, ("craft",), ("stsb",), (0,), epochs=2)
        page = render_page(make_report([tmp_path]))
        assert "Learning curves" in page and draw_curves(make_report([tmp_path]).grid).count(">epoch<") == 1

    def test_no_adapter_stands_at_zero(self, tmp_path: Path) -> None:
        write_results(tmp_path, ("craft", "lora"), ("rte",), (0,))
        report = make_report([tmp_path])
        assert ">0<" not in draw_pareto(report.grid, report.selection)
        write_results(tmp_path, ("head",), ("rte",), (0,))
        report = make_report([tmp_path])
        assert ">0<" in draw_pareto(report.grid, report.selection)

    def test_a_broken_adapter_is_named(self, tmp_path: Path) -> None:
        (write_run(tmp_path / "run") / "adapter_model.safetensors").write_bytes(b"cut")
        report = make_report([tmp_path])
        assert "no figures of its adapter" in report.left_out[0].reason and len(report.grid.runs) == 1

    @pytest.mark.parametrize(("further", "share"), [({}, "12.0"), ({"fitting": 20.0}, "10.0")])
    def test_setup_share_where_it_is_known(self, tmp_path: Path, further: dict[str, float], share: str) -> None:
        (tmp_path / "a.json").write_text(edited(lambda fields: fields.update(time=SECONDS | further)))
        text = render_markdown(make_report([tmp_path]))
        assert "setup, %" in text and f"| {share} |" in text

    def test_the_page_needs_nothing_else(self, results: Path) -> None:
        page = render_page(make_report([results], against="published"))
        links = re.findall(r"""(?:src|href|action)=["']?([^"'\s>]+)|url\(([^)]+)\)|@import""", page)
        assert links and all((one or other).startswith(("#", "data:")) for one, other in links)


class TestCommand:
    def test_writes_and_says(
        self, results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "bad").mkdir()
        (tmp_path / "bad" / "cut.json").write_text("{")
        assert main(["report", str(results), "bad", "--baseline", "head"]) == 0
        out, err = capsys.readouterr()
        assert "Written: report.html" in out and (tmp_path / "report.html").is_file()
        assert "head has the best median on none of the 2 tasks" in out
        assert err.startswith("left out: bad/cut.json: not whole JSON")
        assert main(["report", str(results), "--markdown", "r.md", "--selection", "best"]) == 0
        assert (tmp_path / "r.md").read_text().count("## Scores of the best epoch") == 1

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            (["--baseline", "lorra"], "No result is of a method `lorra`. Did you mean `lora`?"),
            (["--baseline", "lora"], "several settings of `lora`: `lora (r 4)`, `lora (r 8)`. Name one"),
            (["--against", "publishd"], "no figures `publishd`. Did you mean `published`?"),
            (["--to", "no/such/page.html"], "there is no folder no/such"),
            (["--to", "."], "is a folder"),
        ],
    )
    def test_names_that_are_not_there(
        self, results: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["report", str(results), *more]) == 2
        assert message in capsys.readouterr().err

    def test_folders_that_hold_nothing(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "runs").mkdir()
        for folder, message in (("runs", "holds no result"), ("rums", f"Did you mean {tmp_path / 'runs'}?")):
            assert main(["report", str(tmp_path / folder)]) == 2
            assert message in capsys.readouterr().err
        (tmp_path / "runs" / "a.json").write_text("{}")
        assert main(["report", str(tmp_path / "runs")]) == 2
        assert "a.json: has no field `task`" in capsys.readouterr().err
