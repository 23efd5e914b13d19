"""`craft-peft train`, `evaluate` and `predict`, one after the other and with everything that can be wrong."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_encoder import review, write_workshop

from craft_peft.cli.main import main

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small encoder with its tables, and the reviews as an official GLUE folder too."""
    folder = write_workshop(tmp_path_factory.mktemp("workshop"))
    (folder / "glue" / "SST-2").mkdir(parents=True)
    for name, numbers in (("train", range(32)), ("dev", range(32, 48))):
        rows = [f"{text}\t{int(label == 'good')}\n" for text, label in map(review, numbers)]
        (folder / "glue" / "SST-2" / f"{name}.tsv").write_text("sentence\tlabel\n" + "".join(rows))
    return folder


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*words: object) -> tuple[int, str, str]:
        status = main([str(word) for word in words])
        return (status, *capsys.readouterr())

    return run


def recipe(workshop: Path) -> list[object]:
    return ["--model", workshop / "encoder", "--epochs", 1, "--batch-size", 16, "--learning-rate", 0.01]


@pytest.fixture(scope="module")
def glue_run(workshop: Path) -> Path:
    folder = workshop / "runs" / "sst2"
    words = ["train", "--task", "sst2", "--data", workshop / "glue", "--output", folder, *recipe(workshop)]
    assert main([str(word) for word in [*words, "--ranks", "2,8,8", "--seed", 3]]) == 0
    return folder


@pytest.fixture(scope="module")
def pair_run(workshop: Path) -> Path:
    folder = workshop / "runs" / "pairs"
    words = ["train", "--data", workshop / "scores.tsv", "--text-columns", "first,second", "--label-column", "score"]
    words += ["--output", folder, "--method", "head", *recipe(workshop)]
    assert main([str(word) for word in words]) == 0
    return folder


class TestTrain:
    def test_options_reach_the_run(self, glue_run: Path) -> None:
        result = json.loads((glue_run / "result.json").read_text())
        assert (result["task"], result["method"], result["seed"]) == ("sst2", "craft", 3)
        assert result["config"]["ranks"] == [2, 8, 8]
        assert result["config"]["recipe"]["batch_size"] == 16
        assert result["parameters"]["adapter"] == 2 * (4 + 64 + 64)

    def test_budget_chooses_the_ranks(self, workshop: Path, tmp_path: Path, command: Command) -> None:
        words = ["--data", workshop / "train.csv", "--dev-data", workshop / "dev.csv", "--output", tmp_path / "run"]
        words += ["--method", "lora-xs", "--budget", 150, "--model", workshop / "encoder", "--epochs", 1]
        status, _, err = command("train", *words)
        assert status == 0
        assert "Chosen: lora-xs with r 6 trains 144 adapter parameters of a budget of 150 (6 left)." in err
        result = json.loads((tmp_path / "run" / "result.json").read_text())
        assert (result["config"]["ranks"], result["config"]["budget"]) == ([6], 150)
        assert (result["config"]["adapter"]["r"], result["parameters"]["adapter"]) == (6, 144)

    def test_a_rung_of_the_ladder_with_bases_from_the_data(
        self, workshop: Path, tmp_path: Path, command: Command
    ) -> None:
        words = ["--data", workshop / "train.csv", "--dev-data", workshop / "dev.csv", "--output", tmp_path / "run"]
        words += ["--ranks", "2,8,8", "--option", "tying=free", "--option", "basis=gradients"]
        assert command("train", *words, *recipe(workshop))[0] == 0
        result = json.loads((tmp_path / "run" / "result.json").read_text())
        assert result["config"]["adapter"]["tying"] == "free" and result["config"]["adapter"]["basis"] == "gradients"
        status, out, _ = command("evaluate", tmp_path / "run")
        assert status == 0 and f"{result['score']['last']:.4f}" in out

    def test_an_option_without_a_value(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit, match="2"):
            main(["train", "--model", "m", "--output", "o", "--option", "tying"])
        assert "'tying' is not of the form NAME=VALUE, such as tying=free" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("option", "message"),
        [
            ("tying=none", "`--option tying=none` is unknown. Use one of shared, diagonal, free"),
            ("tyin=free", "does not take these options"),
        ],
    )
    def test_bad_options(self, workshop: Path, tmp_path: Path, command: Command, option: str, message: str) -> None:
        words = ["train", "--data", workshop / "train.csv", "--output", tmp_path / "run", *recipe(workshop)]
        status, _, err = command(*words, "--option", option)
        assert status == 2 and message in err and not (tmp_path / "run").exists()

    def test_refuses_then_overwrites(self, workshop: Path, glue_run: Path, command: Command) -> None:
        words = ["train", "--task", "sst2", "--data", workshop / "glue", "--output", glue_run, *recipe(workshop)]
        status, out, err = command(*words)
        assert (status, out) == (2, "")
        assert err.startswith("error: The output folder") and "--overwrite" in err and err.count("\n") == 1

    def test_result_goes_to_standard_output(self, workshop: Path, tmp_path: Path, command: Command) -> None:
        words = ["--data", workshop / "train.csv", "--dev-data", workshop / "dev.csv", "--output", tmp_path / "run"]
        status, out, err = command("train", *words, "--method", "head", *recipe(workshop))
        score = json.loads((tmp_path / "run" / "result.json").read_text())["score"]["last"]
        assert status == 0
        assert f"score {score:.4f}" in out and str(tmp_path / "run") in out
        assert "64 train, 32 dev" in err and "64 train" not in out

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--task", "sst3"], "Unknown task `sst3`. Did you mean `sst2`?"),
            (["--task", "sst2", "--data", "absent"], "There is no folder absent"),
            (["--task", "rte", "--data", "glue"], "holds neither a folder RTE nor a file dev.tsv"),
            (["--data", "absent.csv"], "There is no file absent.csv"),
            (["--data", "train.csv", "--text-columns", "words"], "no column `words`. Columns found: `text`, `label`"),
            (
                ["--data", "train.csv", "--kind", "regression"],
                "train.csv, line 2: `good` in column `label` is not a number",
            ),
            (["--data", "bad_label.csv", "--dev-data", "dev.csv"], "dev.csv, line 2: unknown label `good`"),
            (["--data", "bad_row.csv"], "bad_row.csv, line 3: 3 fields, but the table has 2 columns"),
            (["--data", "empty.csv"], "empty.csv is empty"),
            (["--data", "latin.csv"], "latin.csv, line 2: byte 0xe9 is not valid UTF-8"),
            (["--data", "train.csv", "--method", "lorra"], "Unknown method `lorra`. Did you mean `lora`?"),
            (["--data", "train.csv", "--ranks", "8"], "`craft`, which takes 3 whole number(s)"),
            (["--data", "train.csv", "--ranks", "0,8,8"], "`--ranks 0,8,8` does not fit"),
            (["--data", "train.csv", "--ranks=-1,8,8"], "`--ranks -1,8,8` does not fit"),
            (["--data", "train.csv", "--ranks", "3,8,8"], "number 1 of `--ranks`, 3, keeps more layer directions"),
            (["--data", "train.csv", "--ranks", "2,17,8"], "number 2 of `--ranks`, 17, keeps more output directions"),
            (["--data", "train.csv", "--method", "head", "--ranks", "8"], "Method `head` adds nothing to the model"),
            (["--data", "train.csv", "--ranks", "2,8,8", "--budget", "90"], "Both `--ranks 2,8,8` and `--budget 90`"),
            (
                ["--data", "train.csv", "--budget", "11"],
                "which trains 12 adapter parameters. Give at least `--budget 12`",
            ),
            (["--data", "train.csv", "--budget", "0"], "`--budget 0` is no number of parameters"),
            (["--data", "train.csv", "--method", "head", "--budget", "9"], "Method `head` adds nothing to the model"),
            (["--data", "train.csv", "--target-modules", "nothing"], "nothing"),
            (["--data", "train.csv", "--target-modules", "LayerNorm"], "LayerNorm"),
            (["--data", "train.csv", "--model", "./absent"], "There is no model folder `./absent`"),
            (["--data", "train.csv", "--learning-rate", "-1"], "`--learning-rate -1.0` cannot be used"),
            (["--data", "train.csv", "--hold-out", "2"], "The share to hold out is 2.0"),
            (["--data", "train.csv", "--max-length", "4096"], "Use at most `--max-length 128`"),
        ],
    )
    def test_bad_input(
        self, workshop: Path, command: Command, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
    ) -> None:
        (workshop / "bad_label.csv").write_text("text,label\na,one\nb,two\n")
        (workshop / "bad_row.csv").write_text("text,label\na,one\nb,two,three\n")
        (workshop / "empty.csv").write_text("")
        (workshop / "latin.csv").write_bytes(b"text,label\ncaf\xe9,one\n")
        monkeypatch.chdir(workshop)
        status, out, err = command("train", "--output", "new", *recipe(workshop), *words)
        assert (status, out) == (2, "")
        assert message in err and err.splitlines()[-1].startswith("error: ") and "Traceback" not in err
        assert not (workshop / "new").exists()


class TestEvaluate:
    def test_same_score_as_after_training(self, glue_run: Path, command: Command) -> None:
        result = json.loads((glue_run / "result.json").read_text())
        status, out, err = command("evaluate", glue_run, "--json")
        assert (status, err) == (0, "")
        assert json.loads(out) == {"metrics": result["metrics"], "score": result["score"]["last"]}

    def test_table(self, glue_run: Path, command: Command) -> None:
        score = json.loads((glue_run / "result.json").read_text())["score"]["last"]
        status, out, _ = command("evaluate", glue_run)
        assert status == 0 and "accuracy" in out and f"score {score:.4f}" in out

    def test_other_data_of_the_same_task(self, glue_run: Path, workshop: Path, command: Command) -> None:
        status, out, _ = command(
            "evaluate", glue_run, "--task", "sst2", "--data", workshop / "glue" / "SST-2", "--json"
        )
        assert (
            status == 0
            and json.loads(out)["score"] == json.loads((glue_run / "result.json").read_text())["score"]["last"]
        )

    def test_own_table_under_other_names(self, pair_run: Path, tmp_path: Path, command: Command) -> None:
        (tmp_path / "other.csv").write_text(
            "a,b,y\nthe film was good,the plot was bad,1\nthe film,the plot was so so,0.5\n"
        )
        words = ["--data", tmp_path / "other.csv", "--text-columns", "a,b", "--label-column", "y", "--json"]
        status, out, _ = command("evaluate", pair_run, *words)
        assert status == 0 and set(json.loads(out)["metrics"]["dev"]) == {"pearson", "spearman", "score"}

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--task", "mnli"], "predicts the labels negative, positive, and task `mnli` has the labels entailment"),
            (["--data", "absent"], "There is no folder absent"),
            (["--model", "./absent"], "There is no model folder"),
        ],
    )
    def test_bad_input(self, glue_run: Path, command: Command, words: list[str], message: str) -> None:
        status, out, err = command("evaluate", glue_run, *words)
        assert (status, out) == (2, "") and message in err

    def test_not_a_run(self, tmp_path: Path, command: Command) -> None:
        status, _, err = command("evaluate", tmp_path)
        assert status == 2 and "is not a run of craft-peft" in err


class TestPredict:
    def test_text(self, glue_run: Path, command: Command) -> None:
        status, out, err = command("predict", glue_run, "--text", "the film was good", "--text", "the plot was dull")
        assert (status, err) == (0, "")
        first, second = out.splitlines()
        assert first.endswith("\tthe film was good") and second.endswith("\tthe plot was dull")
        label, share, other, rest = first.split("\t")[0].split()
        assert {label, other} == {"negative", "positive"}
        assert float(share) >= float(rest) and float(share) + float(rest) == pytest.approx(1, abs=2e-4)

    def test_json(self, glue_run: Path, command: Command) -> None:
        _, out, _ = command("predict", glue_run, "--text", "the film was good", "--json")
        row = json.loads(out)
        assert row["text"] == "the film was good"
        assert row["label"] == max(row["probabilities"], key=row["probabilities"].get)
        assert sum(row["probabilities"].values()) == pytest.approx(1)

    def test_official_test_file(self, glue_run: Path, tmp_path: Path, command: Command) -> None:
        (tmp_path / "test.tsv").write_text('index\tsentence\n0\tthe "film" was good\n1\tthe plot was bad\n')
        _, out, _ = command("predict", glue_run, tmp_path / "test.tsv", "--json")
        assert [json.loads(line)["text"] for line in out.splitlines()] == ['the "film" was good', "the plot was bad"]

    @pytest.mark.parametrize("file", [[], ["-"]])
    def test_standard_input(
        self, glue_run: Path, command: Command, monkeypatch: pytest.MonkeyPatch, file: list[str]
    ) -> None:
        monkeypatch.setattr("sys.stdin", io.StringIO("the film was good\n\nthe plot was bad\r\n"))
        _, out, _ = command("predict", glue_run, *file, "--json")
        texts = ["the film was good", "", "the plot was bad"]
        assert [json.loads(line)["text"] for line in out.splitlines()] == texts

    def test_pairs_of_a_regression(self, pair_run: Path, tmp_path: Path, command: Command) -> None:
        (tmp_path / "pairs.txt").write_text("the film was good\tthe plot was bad\n")
        _, from_file, _ = command("predict", pair_run, tmp_path / "pairs.txt", "--json")
        words = ["--text", "the film was good", "--text-pair", "the plot was bad"]
        _, from_words, _ = command("predict", pair_run, *words, "--json")
        _, plain, _ = command("predict", pair_run, *words)
        row = json.loads(from_words)
        assert from_file == from_words and row["text_pair"] == "the plot was bad"
        assert plain == f"{row['value']:.4f}\tthe film was good\tthe plot was bad\n"

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--text", "a", "--text-pair", "b"], "was trained on one text a row, and pairs of texts a row was given"),
            (["file.txt", "--text", "a"], "Both --text and a file were given"),
            (["--text-pair", "a"], "--text-pair was given without --text"),
            (["--text", "a", "--text", "b", "--text-pair", "c"], "2 --text and 1 --text-pair were given"),
            (["absent.txt"], "There is no file absent.txt"),
            (["absent.csv"], "There is no file absent.csv"),
        ],
    )
    def test_bad_input(self, glue_run: Path, command: Command, words: list[str], message: str) -> None:
        status, out, err = command("predict", glue_run, *words)
        assert (status, out) == (2, "") and message in err

    def test_bad_files(self, glue_run: Path, pair_run: Path, tmp_path: Path, command: Command) -> None:
        (tmp_path / "one.txt").write_text("a\tb\nonly one\n")
        (tmp_path / "blank.txt").write_text(" \n")
        (tmp_path / "other.csv").write_text("words\na\n")
        for folder, name, message in (
            (pair_run, "one.txt", "one.txt, line 2: 1 texts, but the model was trained on pairs"),
            (glue_run, "blank.txt", "blank.txt is empty"),
            (glue_run, "other.csv", "no column `sentence`. Columns found: `words`"),
        ):
            status, out, err = command("predict", folder, tmp_path / name)
            assert (status, out) == (2, "") and message in err

    def test_nothing_given_at_a_terminal(
        self, glue_run: Path, command: Command, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        terminal = io.StringIO()
        monkeypatch.setattr(terminal, "isatty", lambda: True)
        monkeypatch.setattr("sys.stdin", terminal)
        status, _, err = command("predict", glue_run)
        assert status == 2 and "No text was given. Give --text, a file, or texts on standard input." in err


class TestExport:
    def test_exact_export_is_a_lora(self, command: Command, glue_run: Path, tmp_path: Path) -> None:
        status, out, _ = command("export", glue_run, "--output", tmp_path / "lora")
        assert status == 0 and "LoRA of rank 8 (exact) for 4 layers" in out
        config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
        assert (config["peft_type"], config["r"]) == ("LORA", 8)
        assert (tmp_path / "lora" / "tokenizer.json").is_file()

    def test_smaller_rank_tells_its_error(self, command: Command, glue_run: Path, tmp_path: Path) -> None:
        status, out, _ = command("export", glue_run, "--output", tmp_path / "lora", "--rank", 2, "--dtype", "bfloat16")
        assert status == 0 and "What rank 2 leaves out" in out and "LoRA of rank 2 (relative error" in out

    def test_mistakes(self, command: Command, glue_run: Path, pair_run: Path, tmp_path: Path) -> None:
        (tmp_path / "taken").mkdir()
        (tmp_path / "taken" / "file").touch()
        for words, message in (
            ((glue_run, "--output", tmp_path / "taken"), "is there already and not an empty folder"),
            ((glue_run, "--output", tmp_path / "new", "--rank", 9), "`--rank 9` is outside 1..8"),
            ((pair_run, "--output", tmp_path / "new"), "has no adapter to export"),
        ):
            status, _, err = command("export", *words)
            assert status == 2 and err.startswith("error: ") and message in err
        assert not (tmp_path / "new").exists()
