"""A progress bar for decompositions that take long."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from huggingface_hub.utils import tqdm

DELAY = 5.0
"""Seconds after which the bar appears."""


class Progress:
    """One bar on stderr for all stacks of an injection; it appears late and obeys Hugging Face's switches.

    (`transformers.utils.logging.disable_progress_bar`, `huggingface_hub.utils.disable_progress_bars`, the environment
    variable ``HF_HUB_DISABLE_PROGRESS_BARS``.) Of several processes the first shows it.

    Args:
        stacks: how many stacks there are to decompose.
    """

    def __init__(self, stacks: int = 1) -> None:
        self._stacks = stacks
        self._done = 0
        self._step = 0.0
        self._bar: tqdm | None = None

    @contextmanager
    def of_stack(self, reads: int) -> Iterator[None]:
        """Within it one stack is decomposed.

        Args:
            reads: how many weights are read for that.
        """
        if self._bar is None:
            self._bar = tqdm(
                total=self._stacks,
                desc="Decomposing the base weights",
                bar_format="{desc}: {percentage:.0f} %|{bar}| {elapsed}<{remaining}",
                delay=DELAY,
                leave=False,
                disable=dist.is_available() and dist.is_initialized() and dist.get_rank() > 0,
            )
        self._step = 1 / reads
        try:
            yield
        finally:
            self._step = 0.0
            self._done += 1
            self._bar.update(self._done - self._bar.n)
            if self._done == self._stacks:
                self._bar.close()
                self._bar = None

    def read(self) -> None:
        """A weight was read."""
        if self._bar is not None:
            self._bar.update(max(0.0, min(self._step, self._done + 1 - self._bar.n)))
