"""Ctrl-C in training: the step ends, a checkpoint is saved, and the run can go on from there."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class StopOnInterrupt(TrainerCallback):
    """Turns the first Ctrl-C into a checkpoint after the step that is under way; the second one stops at once.

    Args:
        console: Where it says so.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.asked = False
        self.saved = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within it Ctrl-C is ours; at its end the interruption goes on as `KeyboardInterrupt`.

        Where Ctrl-C is not this thread's to hear, or nobody's (a process in the background), it changes nothing.
        """
        ours = threading.current_thread() is threading.main_thread()
        before = signal.getsignal(signal.SIGINT) if ours else None
        if before is not signal.default_int_handler:
            yield
            return
        signal.signal(signal.SIGINT, self._hear)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
        if self.saved:
            raise KeyboardInterrupt

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        self.console.print("Stopping after this step. Press Ctrl-C again to stop at once.")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Saves and stops within an epoch; at its end scores and checkpoint come first, as ever."""
        assert state.epoch is not None
        if self.asked and not float(state.epoch).is_integer():
            # With what the loss was since the last log: the trainer does not keep it.
            control.should_log = control.should_save = control.should_training_stop = self.saved = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """No scores of an epoch that was cut short; nothing to stop after the last."""
        if self.saved:
            control.should_evaluate = control.should_save = control.should_log = False
        elif self.asked and state.global_step < state.max_steps:
            control.should_training_stop = self.saved = True
