"""The package's sentences in the words of the command line: options in place of Python's arguments.

The library names what a user gave by its argument, as `name=value`, or `` `long_name` `` where there is no value. On
the command line the same sentence names the option. Columns, labels and files of the user's own are left alone.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import re
from typing import TYPE_CHECKING, Any

from .arguments import Several, named_value

if TYPE_CHECKING:
    from rich.console import Console

NAMED = re.compile(
    r"`(?P<quoted>[a-z]\w*)(?:\[(?P<item>\d+)\])?=(?P<exactly>[^`]*)`"
    r"|(?<![\w`./(=-])(?P<bare>[a-z]\w*)=(?P<value>\([^()]*\)|\[[^][]*\]|'[^']*'|\"[^\"]*\"|[\w.+-]*\w)(?![\w/])"
    r"|`(?P<long>[a-z]+_\w+)`(?: in `peft_config`)?"  # the end of PEFT's own sentence about missing targets
)


def in_options(text: str, arguments: argparse.Namespace) -> str:
    """Name options where a sentence names the arguments that they set.

    Args:
        text: A sentence of the library.
        arguments: What the command's parser returned.

    Returns:
        The sentence for somebody who typed the command.

    Example:
        >>> from craft_peft.cli.main import build_parser
        >>> typed = build_parser().parse_args(["train", "--model", "m", "--output", "runs/x"])
        >>> in_options("rows=0 cannot be used. Give `overwrite=True`, or `target_modules`, not column `rows`.", typed)
        '`--rows 0` cannot be used. Give `--overwrite`, or `--target-modules`, not column `rows`.'
    """
    names = option_names(arguments)

    def replace(match: re.Match[str]) -> str:
        option = names.get(match["quoted"] or match["bare"] or match["long"])
        if option is None:
            return match[0]
        value = _typed(match["exactly"] or match["value"] or "...")
        if match["item"]:
            return f"number {int(match['item']) + 1} of `{option.rstrip(' =')}`, {value},"
        return f"`{option}{value}`" if value else f"`{option.rstrip(' =')}`"

    return NAMED.sub(replace, text)


def option_names(arguments: argparse.Namespace) -> dict[str, str]:
    """What to write before a value, for each argument that an option of the command sets.

    The fields of the method's config are set by one option for all of them, and those that its ranks decide by another.
    """
    options: dict[str, argparse.Action] = getattr(arguments, "options", {})
    names = {name: f"{action.option_strings[0]} " for name, action in options.items()}
    fields = [action for action in options.values() if isinstance(action, Several) and action.read is named_value]
    if fields and "method" in names:
        from ..glue.methods import METHODS

        method = METHODS.get(arguments.method)
        if method is not None and method.config is not None:
            option = fields[0].option_strings[0]
            own = {field.name: f"{option} {field.name}=" for field in dataclasses.fields(method.config)}
            by_ranks = dict.fromkeys(method.setting.names, names["ranks"]) if len(method.setting.names) == 1 else {}
            names = own | by_ranks | names
    return names


def option_console(arguments: argparse.Namespace, **settings: Any) -> Console:
    """A console that names options in what the library prints to it.

    Args:
        arguments: What the command's parser returned.
        settings: As for every console.

    Returns:
        The console.
    """
    from rich.console import Console
    from rich.text import Text

    class OptionConsole(Console):
        def render_str(self, text: str, **style: Any) -> Text:
            return super().render_str(in_options(text, arguments), **style)

    return OptionConsole(**settings)


def _typed(value: str) -> str:
    """A value as it is typed; nothing for a switch, and for a value that is left open."""
    try:
        read = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value
    if read is True or read is None or read is ...:
        return ""
    if isinstance(read, dict):
        return " ".join(f"{name}={entry}" for name, entry in read.items())
    return ",".join(map(str, read)) if isinstance(read, tuple | list) else str(read)
