"""Words on the command line: options of several values, and sentences that name options."""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest

import craft_peft
from craft_peft.cli.arguments import Several, words
from craft_peft.cli.main import build_parser
from craft_peft.cli.wording import in_options, option_console

PARSER = build_parser()


def subcommands() -> dict[str, argparse.ArgumentParser]:
    (action,) = (action for action in PARSER._actions if isinstance(action, argparse._SubParsersAction))
    return dict(action.choices)


def required(parser: argparse.ArgumentParser) -> list[str]:
    """Words that a command cannot do without, but for its positional arguments."""
    return [
        word
        for action in parser._actions
        if action.required and action.option_strings
        for word in (action.option_strings[0], "x")
    ]


SEVERAL = [
    (name, action.option_strings[0])
    for name, parser in subcommands().items()
    for action in parser._actions
    if isinstance(action, Several)
]
VALUES = {"--ranks": ["12", "100", "100"], "--option": ["a=1", "b=x,y"], "--task-run": ["rte=runs/a", "stsb=runs/b"]}
TOGETHER = {"--option", "--task-run", "--adopt"}
"""A value of these may hold a comma: they take spaces alone, and may be repeated."""


def parse(command: str, *given: str) -> argparse.Namespace:
    return PARSER.parse_args([command, *given])


def test_each_option_that_names_several_is_of_this_kind() -> None:
    lists = {"target_modules", "text_columns", "ranks", "methods", "only", "report_to", "adopt", "method_options"}
    found = {action.dest for parser in subcommands().values() for action in parser._actions}
    assert lists <= found
    for name, parser in subcommands().items():
        for action in parser._actions:
            several = isinstance(action.default, tuple | list) or action.dest in lists
            assert several == isinstance(action, Several), (name, action.dest)


@pytest.mark.parametrize(("command", "option"), SEVERAL)
def test_spaces_are_commas(command: str, option: str) -> None:
    """Wherever the option stands, and whatever positional arguments follow it."""
    parser = subcommands()[command]
    needed = [word for word in required(parser) if word != option]
    slots = [action for action in parser._get_positional_actions() if action.nargs in (None, "?")]
    places = [f"place{i}" for i in range(len(slots))]
    values = VALUES.get(option, ["a", "b", "c"])
    (dest,) = (action.dest for action in parser._actions if option in action.option_strings)
    ways = [[option, *values], *([] if option in TOGETHER else [[option, ",".join(values)]])]
    if option not in TOGETHER:
        ways += [[option, f"{values[0]},", *values[1:]], [f"{option}={','.join(values)}"]]
    else:
        ways.append([word for value in values for word in (option, value)])
    wanted = parse(command, *places, *needed, *ways[0])
    assert len(getattr(wanted, dest)) == len(values)
    for way, order in product(ways, range(3)):
        line = [[*way, *places, *needed], [*needed, *places, *way], [*way, *needed, *places]][order]
        assert parse(command, *line) == wanted, line
    assert [getattr(wanted, slot.dest) for slot in slots] == places


@pytest.mark.parametrize(("command", "option"), SEVERAL)
def test_one_word_is_followed_by_positional_arguments(command: str, option: str) -> None:
    """As it was when these options took one word."""
    parser = subcommands()[command]
    slots = [action for action in parser._get_positional_actions() if action.nargs in (None, "?")]
    value = VALUES.get(option, ["a"])[0]
    for count in range(len(slots) + 1):
        if count < sum(slot.nargs is None for slot in slots):
            continue
        places = [f"place{i}" for i in range(count)]
        found = parse(command, *required(parser), option, value, *places)
        assert [getattr(found, slot.dest) for slot in slots[:count]] == places


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("evaluate --text-columns a b runs/x --json", {"folder": "runs/x", "text_columns": ("a", "b")}),
        ("evaluate runs/x --text-columns a b", {"folder": "runs/x", "text_columns": ("a", "b")}),
        ("predict runs/x --text-columns a b t.csv", {"folder": "runs/x", "file": "t.csv", "text_columns": ("a", "b")}),
        ("predict runs/x --text-columns a t.csv", {"folder": "runs/x", "file": "t.csv", "text_columns": ("a",)}),
        (
            "predict --glue-submission o --task-run rte=a stsb=b runs",
            {"folder": "runs", "named": (("rte", "a"), ("stsb", "b"))},
        ),
        ("sweep --only a b --report-to wandb e.toml", {"file": "e.toml", "only": ("a", "b"), "report_to": ("wandb",)}),
        ("sweep --adopt a e.toml --adopt b,c", {"file": "e.toml", "adopt": ("a", "b,c")}),
        ("train --output o --model m --ranks 8 --ranks 4 5", {"ranks": (4, 5), "method_options": ()}),
        ("train --output o --model m --target-modules q , v", None),
        ("inspect --model m --ranks 1 two", None),
        ("evaluate --text-columns a", None),
        ("evaluate runs/x --text-columns", None),
        ("sweep --only ,  e.toml", None),
        ("predict --task-run rte", None),
    ],
)
def test_lines(line: str, expected: dict[str, object] | None, capsys: pytest.CaptureFixture[str]) -> None:
    if expected is None:
        with pytest.raises(SystemExit) as ended:
            parse(*line.split())
        assert ended.value.code == 2 and "error: " in capsys.readouterr().err
        return
    found = vars(parse(*line.split()))
    assert {name: found[name] for name in expected} == expected
    assert "several" not in found


def test_a_missing_positional_is_named_as_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("sweep", "--only", "a")
    assert "the following arguments are required: FILE" in capsys.readouterr().err
    assert "sweep [-h]" in (text := subcommands()["sweep"].format_usage()) and text.endswith(" FILE\n")
    assert words("a, b ,") == ("a", "b")


def python_names(text: str, command: str) -> list[str]:
    """Arguments of Python that a sentence names although the command has an option for them."""
    parser = subcommands().get(command)
    names = [action.dest for action in parser._actions if action.option_strings] if parser else []
    forms = [rf"(?<![\w-]){name}(?:\[\d+\])?=" for name in names] + [f"`{name}`" for name in names if "_" in name]
    return [found for form in forms for found in re.findall(form, text)]


@pytest.mark.parametrize(
    ("line", "text", "expected"),
    [
        ("params --model m", "rows=0 and `budget=-1`.", "rows=0 and `--budget -1`."),
        ("params --model m", "`target_modules=['q', 'v']` is", "`--target-modules q,v` is"),
        ("params --model m", "specify `target_modules` in `peft_config`", "specify `--target-modules`"),
        ("train --model m --output o", "Both `resume=True` and overwrite=True.", "Both `--resume` and `--overwrite`."),
        ("train --model m --output o", "seed=1 has no meaning", "`--seed 1` has no meaning"),
        (
            "train --model m --output o",
            "`ranks[1]=9` is. Use `ranks=(1, 2)`",
            "number 2 of `--ranks`, 9, is. Use `--ranks 1,2`",
        ),
        ("train --model m --output o", 'say `kind="regression"`', "say `--kind regression`"),
        ("train --model m --output o", "with `data=...`, tying='free'.", "with `--data`, `--option tying=free`."),
        ("train --model m --output o", "leave out `exclude_modules`", "leave out `--option exclude_modules`"),
        (
            "train --model m --output o --method lotr",
            "r=9 is. Use `r=4`, alpha=1.",
            "`--ranks 9` is. Use `--ranks 4`, `--option alpha=1`.",
        ),
        ("train --model m --output o --method head", "tying='free'", "tying='free'"),
        ("predict runs/x", "`named={'rte': 'runs/a'}` or `fill=True`", "`--task-run rte=runs/a` or `--fill-missing`"),
        # What is the user's own: a column, a label, a file.
        ("predict runs/x", "has no column `text`, `text_pair`. Columns found: `data`", None),
        ("train --model m --output o", "There is no folder runs/seed=0/x", None),
        ("train --model m --output o", "There is no folder seed=0/x", None),
        ("train --model m --output o", "unknown label `rows`; `CraftConfig(ranks=(1, 2, 3))`", None),
    ],
)
def test_arguments_are_named_as_options(line: str, text: str, expected: str | None) -> None:
    arguments = PARSER.parse_args(line.split())
    assert in_options(text, arguments) == (expected or text)


def test_a_console_names_options_in_tables_too(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.table import Table

    table = Table("note")
    table.add_row("`kind='regression'` decides")
    option_console(PARSER.parse_args(["train", "--model", "m", "--output", "o"])).print(table)
    assert "`--kind regression` decides" in capsys.readouterr().out


def sentences(path: Path) -> Iterator[str]:
    """The strings of a module but for its docstrings."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value.value = None
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def options_named(path: Path) -> list[str]:
    options = {
        word for parser in subcommands().values() for action in parser._actions for word in action.option_strings
    }
    return [
        word for text in sentences(path) for word in re.findall(r"(?<![\w-])--[a-z][\w-]*", text) if word in options
    ]


def test_the_library_names_no_option(tmp_path: Path) -> None:
    """What it says is read in Python as well; `in_options` makes options of arguments."""
    (tmp_path / "wrong.py").write_text('"""See --data."""\nx = f"give `--budget {1}`, not --error-unmatch"')
    assert options_named(tmp_path / "wrong.py") == ["--budget"]
    package = Path(craft_peft.__file__).parent
    library = [path for path in package.rglob("*.py") if path.relative_to(package).parts[0] != "cli"]
    assert len(library) > 50
    assert {str(path): found for path in library if (found := options_named(path))} == {}
