"""What has to be settled before anything heavy is imported, where this process is the command `craft-peft`.

PEFT and transformers import torchao, bitsandbytes and DeepSpeed where they find them, and these tell at once which
kernels for other hardware they cannot load. No command uses them: their complaints would only hide what it says. In a
program that uses this package as a library they are left alone.
"""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

COMPLAINERS = ("torchao", "torch.utils._pytree", "bitsandbytes", "DeepSpeed")
"""The loggers: the second one speaks of the types that torchao registers with PyTorch."""


def is_command(words: Sequence[str]) -> bool:
    """Whether the words that started an interpreter are those of the command.

    Args:
        words: `sys.orig_argv`.

    Returns:
        True for the installed script and for `python -m craft_peft.cli.main`, by itself or under a launcher.

    Example:
        >>> is_command(["python", "/usr/bin/craft-peft", "train"]), is_command(["python", "-m", "pytest"])
        (True, False)
    """
    return any(Path(word).stem == "craft-peft" for word in words[:2]) or "craft_peft.cli.main" in words


if is_command(sys.orig_argv):
    for name in COMPLAINERS:
        logging.getLogger(name).setLevel(logging.CRITICAL)
        logging.getLogger(name).addFilter(lambda record: record.levelno >= logging.CRITICAL)  # DeepSpeed sets its level
