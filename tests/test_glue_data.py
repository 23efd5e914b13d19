"""Reading GLUE in its official layout and tables of the user's own, and every file that cannot be used."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from craft_peft import CraftError
from craft_peft.glue.data import hold_out, read_glue, read_own
from craft_peft.glue.tables import read_table
from craft_peft.glue.tasks import TASKS, Task

PAIR_HEADER = "index\tsentence1\tsentence2\tlabel\n"


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def write_rte(folder: Path, **changed: str) -> Path:
    files = {
        "train": PAIR_HEADER + "0\ta\tb\tentailment\n1\tc\td\tnot_entailment\n",
        "dev": PAIR_HEADER + "0\te\tf\tentailment\n",
    }
    return write(folder, {f"RTE/{name}.tsv": text for name, text in (files | changed).items()})


class TestOfficialLayout:
    def test_root_and_task_folder_read_the_same(self, tmp_path: Path) -> None:
        root = write_rte(tmp_path)
        for folder in (root, root / "RTE"):
            data = read_glue(TASKS["rte"], folder)
            assert data.train.to_list() == [
                {"text": "a", "text_pair": "b", "label": 0},
                {"text": "c", "text_pair": "d", "label": 1},
            ]
            assert data.dev["dev"].features["label"].names == ["entailment", "not_entailment"]

    def test_without_training_set(self, tmp_path: Path) -> None:
        (write_rte(tmp_path) / "RTE" / "train.tsv").unlink()
        data = read_glue(TASKS["rte"], tmp_path, train=False)
        assert data.train is None and len(data.dev["dev"]) == 1

    def test_cola_has_no_header(self, tmp_path: Path) -> None:
        row = "gj04\t{}\t{}\tThe {} rode.\n"
        files = {
            "train.tsv": row.format(1, "", "sailors") + row.format(0, "*", "weights"),
            "dev.tsv": row.format(1, "", "x"),
        }
        data = read_glue(TASKS["cola"], write(tmp_path, files))
        assert data.train["text"] == ["The sailors rode.", "The weights rode."]
        assert data.train["label"] == [1, 0]

    def test_mrpc_has_a_byte_order_mark_and_literal_quotes(self, tmp_path: Path) -> None:
        text = '﻿Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\t" open\tan "" end\n'
        data = read_glue(TASKS["mrpc"], write(tmp_path, {"MRPC/train.tsv": text, "MRPC/dev.tsv": text}))
        assert data.train[0] == {"text": '" open', "text_pair": 'an "" end', "label": 1}

    def test_only_line_feeds_end_a_row(self, tmp_path: Path) -> None:
        text = "sentence\tlabel\r\none\u2028two\x85three\t1\r\n"
        data = read_glue(TASKS["sst2"], write(tmp_path, {"SST-2/train.tsv": text, "SST-2/dev.tsv": text}))
        assert data.train["text"] == ["one\u2028two\x85three"]

    def test_mnli_has_two_dev_sets_of_other_columns(self, tmp_path: Path) -> None:
        parses = [f"sentence{i}_{kind}" for kind in ("binary_parse", "parse") for i in (1, 2)]
        before = "\t".join(["index", "promptID", "pairID", "genre", *parses, "sentence1", "sentence2", "label1"])
        train = f"{before}\tgold_label\n" + "\t".join("0123456789") + "\tneutral\tcontradiction\n"
        dev = f"{before}\tlabel2\tgold_label\n" + "\t".join("0123456789") + "\tneutral\tneutral\t{}\n"
        files = {
            "train.tsv": train,
            "dev_matched.tsv": dev.format("neutral"),
            "dev_mismatched.tsv": dev.format("entailment"),
        }
        data = read_glue(TASKS["mnli"], write(tmp_path / "MNLI", files))
        assert data.train[0] == {"text": "8", "text_pair": "9", "label": 2}
        assert {name: rows["label"] for name, rows in data.dev.items()} == {"matched": [1], "mismatched": [0]}

    def test_qqp_leaves_broken_rows_out_and_says_so(self, tmp_path: Path) -> None:
        text = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\t3\tWhy?\tHow?\t0\n4\t5\t6\tcut\n off?\t1\n"
        data = read_glue(TASKS["qqp"], write(tmp_path, {"QQP/train.tsv": text, "QQP/dev.tsv": text}))
        assert data.train.to_list() == [{"text": "Why?", "text_pair": "How?", "label": 0}]
        assert "2 rows with a wrong number of fields left out (lines 3, 4" in data.notes[0]

    def test_stsb_scores_are_numbers(self, tmp_path: Path) -> None:
        text = "index\tsentence1\tsentence2\tscore\n0\ta\tb\t3.800\n"
        data = read_glue(TASKS["stsb"], write(tmp_path, {"STS-B/train.tsv": text, "STS-B/dev.tsv": text}))
        assert data.train["label"] == pytest.approx([3.8])

    @pytest.mark.parametrize(
        ("file", "text", "message"),
        [
            ("train", "", r"train\.tsv is empty"),
            ("dev", PAIR_HEADER, r"dev\.tsv holds a header and no row"),
            (
                "dev",
                "index\tsentence1\tlabel\n0\ta\t1\n",
                r"no column `sentence2`\. Columns found: `index`, `sentence1`, `label`",
            ),
            (
                "train",
                PAIR_HEADER + "0\ta\tb\tentailment\n1\ta\tb\n",
                r"train\.tsv, line 3: 3 fields, but the table has 4",
            ),
            (
                "train",
                PAIR_HEADER + "0\ta\tb\tmaybe\n",
                r"line 2: unknown label `maybe` in column `label`\. Known labels: `entailment`",
            ),
            ("train", PAIR_HEADER + "0\ta\tb\t \n", r"line 2: column `label` is empty"),
            ("train", "a\tlabel\tlabel\n1\t2\t3\n", r"line 1: column `label` appears more than once"),
        ],
    )
    def test_bad_file(self, tmp_path: Path, file: str, text: str, message: str) -> None:
        with pytest.raises(CraftError, match=message):
            read_glue(TASKS["rte"], write_rte(tmp_path, **{file: text}))

    def test_missing_file(self, tmp_path: Path) -> None:
        (write_rte(tmp_path) / "RTE" / "train.tsv").unlink()
        with pytest.raises(CraftError, match=r"There is no file .*train\.tsv"):
            read_glue(TASKS["rte"], tmp_path)

    def test_missing_folder(self, tmp_path: Path) -> None:
        with pytest.raises(CraftError, match=r"There is no folder .*absent"):
            read_glue(TASKS["rte"], tmp_path / "absent")

    def test_folder_without_the_task(self, tmp_path: Path) -> None:
        with pytest.raises(CraftError, match=r"neither a folder RTE nor a file dev\.tsv"):
            read_glue(TASKS["rte"], tmp_path)

    def test_not_utf8_names_the_line(self, tmp_path: Path) -> None:
        (write_rte(tmp_path) / "RTE" / "dev.tsv").write_bytes(PAIR_HEADER.encode() + b"0\tcaf\xe9\tb\tentailment\n")
        with pytest.raises(CraftError, match=r"dev\.tsv, line 2: byte 0xe9 is not valid UTF-8"):
            read_glue(TASKS["rte"], tmp_path)

    @pytest.mark.parametrize("score", ["high", "nan", "inf"])
    def test_score_that_is_no_number(self, tmp_path: Path, score: str) -> None:
        text = f"index\tsentence1\tsentence2\tscore\n0\ta\tb\t1.0\n0\ta\tb\t{score}\n"
        with pytest.raises(CraftError, match=f"line 3: `{score}` in column `score` is not a number"):
            read_glue(TASKS["stsb"], write(tmp_path, {"STS-B/train.tsv": text, "STS-B/dev.tsv": text}))


class TestHub:
    def test_hub_rows_get_the_uniform_columns(self, monkeypatch: pytest.MonkeyPatch) -> None:
        features = datasets.Features(
            {
                "premise": datasets.Value("string"),
                "hypothesis": datasets.Value("string"),
                "label": datasets.ClassLabel(names=["entailment", "neutral", "contradiction"]),
                "idx": datasets.Value("int32"),
            }
        )
        rows = datasets.Dataset.from_dict({"premise": ["p"], "hypothesis": ["h"], "label": [2], "idx": [0]}, features)
        asked = []

        def load_dataset(*names: str) -> dict[str, datasets.Dataset]:
            asked.append(names)
            return dict.fromkeys(("train", "validation_matched", "validation_mismatched"), rows)

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        data = read_glue(TASKS["mnli"])
        assert asked == [("nyu-mll/glue", "mnli")]
        assert data.train.to_list() == [{"text": "p", "text_pair": "h", "label": 2}]
        assert list(data.dev) == ["matched", "mismatched"]

    def test_no_connection(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def load_dataset(*names: str) -> None:
            raise ConnectionError("no route")

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        with pytest.raises(
            CraftError, match=r"Could not read `nyu-mll/glue` \(rte\) from the Hub: no route.*give its folder"
        ):
            read_glue(TASKS["rte"])


class TestOwnTables:
    def test_csv_has_csv_quoting(self, tmp_path: Path) -> None:
        text = 'text,label\n"one, ""two""\nthree",good\nfour,bad\n'
        path = write(tmp_path, {"t.csv": text}) / "t.csv"
        data = read_own(path, path)
        assert data.train.to_list() == [{"text": 'one, "two"\nthree', "label": 1}, {"text": "four", "label": 0}]

    def test_tsv_has_none(self, tmp_path: Path) -> None:
        path = write(tmp_path, {"t.tsv": 'text\tlabel\n"one\tgood\nfour"\tbad\n'}) / "t.tsv"
        assert read_own(path, path).train["text"] == ['"one', 'four"']

    def test_jsonl_of_any_label_type(self, tmp_path: Path) -> None:
        lines = [json.dumps({"a": f"x{i}", "b": "y", "ok": bool(i % 2)}) for i in range(4)]
        path = write(tmp_path, {"t.jsonl": "\n".join(lines) + "\n\n"}) / "t.jsonl"
        data = read_own(path, path, ("a", "b"), "ok")
        assert data.task.labels == ("false", "true")
        assert data.train[1] == {"text": "x1", "text_pair": "y", "label": 1}

    @pytest.mark.parametrize(
        ("labels", "kind", "expected"),
        [
            (["bad", "good"], "auto", ("bad", "good")),
            (["10", "9", "1"], "auto", ("1", "9", "10")),
            (["0.5", "1", "2"], "auto", ()),
            (["0.5", "1", "many"], "auto", ("0.5", "1", "many")),
            (["1", "2"], "regression", ()),
            (["0.5", "1.5"], "classification", ("0.5", "1.5")),
        ],
    )
    def test_kind_is_decided_by_the_labels_or_the_user(
        self, tmp_path: Path, labels: list[str], kind: str, expected: tuple[str, ...]
    ) -> None:
        path = write(tmp_path, {"t.csv": "text,label\n" + "".join(f"x,{label}\n" for label in labels)}) / "t.csv"
        data = read_own(path, path, kind=kind)
        assert data.task.labels == expected
        assert any("Read as a" in note for note in data.notes) == (kind == "auto")

    def test_development_set_is_held_out_when_there_is_none(self, tmp_path: Path) -> None:
        path = write(tmp_path, {"t.csv": "text,label\n" + "".join(f"x{i},{i % 2}\n" for i in range(40))}) / "t.csv"
        first, second = read_own(path, None), read_own(path, None)
        assert (len(first.train), len(first.dev["dev"])) == (36, 4)
        assert first.dev["dev"].to_list() == second.dev["dev"].to_list()
        assert not set(first.dev["dev"]["text"]) & set(first.train["text"])
        assert "4 of 40 training rows are held out" in first.notes[-1]

    def test_development_label_unknown_to_training(self, tmp_path: Path) -> None:
        write(tmp_path, {"t.csv": "text,label\na,good\nb,bad\n", "d.csv": "text,label\na,good\nb,ugly\n"})
        with pytest.raises(CraftError, match=r"d\.csv, line 3: unknown label `ugly`.*Known labels: `bad`, `good`"):
            read_own(tmp_path / "t.csv", tmp_path / "d.csv")

    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            ("t.csv", "text,label\na,b,c\n", r"t\.csv, line 2: 3 fields, but the table has 2 columns"),
            ("t.csv", 'text,label\n"a\nb",c\n"d,e\n', r"t\.csv, line 4: not valid CSV"),
            ("t.csv", "text,label\na,one\nb,one\n", r"the only label in column `label` is `one`"),
            ("t.csv", "text,label\na,\n", r"line 2: column `label` is empty"),
            ("t.csv", "words,label\na,b\n", r"no column `text`\. Columns found: `words`, `label`"),
            ("t.jsonl", '{"text": "a", "label": 1}\n{"text": }\n', r"t\.jsonl, line 2: not valid JSON"),
            ("t.jsonl", '["a", 1]\n', r"t\.jsonl, line 1: found list, one JSON object a line is required"),
            (
                "t.jsonl",
                '{"text": "a", "label": 1}\n{"text": "b"}\n',
                r"line 2: the fields are `text`, but the first row has",
            ),
            ("t.jsonl", '{"text": "a", "label": null}\n', r"line 1: column `label` is empty"),
            ("t.txt", "a", r"t\.txt is not one of \.csv, \.tsv, \.jsonl"),
        ],
    )
    def test_bad_table(self, tmp_path: Path, name: str, text: str, message: str) -> None:
        with pytest.raises(CraftError, match=message):
            read_own(write(tmp_path, {name: text}) / name, None)

    def test_regression_on_words(self, tmp_path: Path) -> None:
        path = write(tmp_path, {"t.csv": "text,label\na,good\n"}) / "t.csv"
        with pytest.raises(CraftError, match=r"line 2: `good` in column `label` is not a number"):
            read_own(path, path, kind="regression")

    def test_unknown_kind(self, tmp_path: Path) -> None:
        path = write(tmp_path, {"t.csv": "text,label\na,good\n"}) / "t.csv"
        with pytest.raises(CraftError, match=r"Unknown kind `ranking`\. Use one of auto, classification, regression"):
            read_own(path, path, kind="ranking")

    def test_three_text_columns(self, tmp_path: Path) -> None:
        path = write(tmp_path, {"t.csv": "text,label\na,good\n"}) / "t.csv"
        with pytest.raises(CraftError, match=r"3 text columns were named"):
            read_own(path, path, ("a", "b", "c"))

    def test_folder_instead_of_a_table(self, tmp_path: Path) -> None:
        (tmp_path / "t.csv").mkdir()
        with pytest.raises(CraftError, match=r"t\.csv is a folder; a file is required"):
            read_own(tmp_path / "t.csv", None)


class TestTable:
    @given(
        rows=st.lists(
            st.tuples(
                *[st.text(st.characters(exclude_characters="\0\t\n\r", exclude_categories=["Cs"]), min_size=1)] * 2
            ),
            min_size=1,
        )
    )
    def test_tsv_returns_what_was_written(self, tmp_path_factory: pytest.TempPathFactory, rows: list) -> None:
        path = tmp_path_factory.mktemp("tsv") / "t.tsv"
        path.write_bytes("".join(f"{a}\t{b}\n" for a, b in [("one", "two"), *rows]).encode())
        table = read_table(path)
        assert [tuple(row.fields.values()) for row in table.rows] == rows
        assert [row.line for row in table.rows] == list(range(2, len(rows) + 2))


def labelled(labels: list[int]) -> datasets.Dataset:
    features = datasets.Features({"label": datasets.ClassLabel(num_classes=3), "row": datasets.Value("int64")})
    return datasets.Dataset.from_dict({"label": labels, "row": list(range(len(labels)))}, features)


class TestHoldOut:
    def test_parts_are_disjoint_and_complete(self) -> None:
        rest, held = hold_out(labelled([0, 1] * 50))
        assert sorted([*rest["row"], *held["row"]]) == list(range(100))
        assert len(held) == 10

    def test_each_class_keeps_its_share(self) -> None:
        _, held = hold_out(labelled([0] * 80 + [1] * 20 + [2]), fraction=0.1)
        assert Counter(held["label"]) == {0: 8, 1: 2}

    def test_same_seed_same_rows_other_seed_others(self) -> None:
        rows = labelled([0, 1] * 50)
        assert hold_out(rows, seed=1)[1].to_list() == hold_out(rows, seed=1)[1].to_list()
        assert hold_out(rows, seed=1)[1].to_list() != hold_out(rows, seed=2)[1].to_list()

    @pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 3.0])
    def test_share_out_of_range(self, fraction: float) -> None:
        with pytest.raises(CraftError, match="it must lie between 0 and 1"):
            hold_out(labelled([0, 1] * 5), fraction)

    def test_share_that_leaves_a_part_empty(self) -> None:
        with pytest.raises(CraftError, match=r"A share of 0\.1 of 4 training rows holds 0 out and leaves 4"):
            hold_out(labelled([0, 1, 0, 1]), 0.1)


# Rows of the official development sets; training sets are counted in the file, since copies of MRPC differ by a row.
OFFICIAL_SIZES = {"cola": 1043, "mrpc": 408, "rte": 277, "sst2": 872, "stsb": 1500, "wnli": 71, "qnli": 5463}


@pytest.mark.parametrize("task", [TASKS[name] for name in OFFICIAL_SIZES], ids=list(OFFICIAL_SIZES))
def test_official_files(task: Task, glue_dir: Path) -> None:
    train = glue_dir / task.folder / "train.tsv"
    data = read_glue(task, glue_dir, train=train.is_file())
    assert {name: len(rows) for name, rows in data.dev.items()} == {"dev": OFFICIAL_SIZES[task.name]}
    assert data.notes == ()
    if data.train is not None:
        lines = [line for line in train.read_bytes().split(b"\n") if line]
        assert len(data.train) == len(lines) - (not task.header)
    if not task.is_regression:
        assert set(data.dev["dev"]["label"]) == set(range(len(task.labels)))
