"""Ctrl-C: what is at work is finished or left as it was."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from torch import distributed
from transformers import TrainerCallback

#: Launchers pass a Ctrl-C on that the terminal has sent to every process already: within this time it is the same one.
SAME_SECONDS = 1.0
_NOTE = b"\ninterrupted: finishing this step and writing a state; Ctrl-C once more stops at once\n"


class StopOnInterrupt(TrainerCallback):
    """Ctrl-C finishes the step, saves the state and stops, in all processes; a second one stops at once."""

    def __init__(self) -> None:
        self.interrupted = False
        self._when = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.anywhere(args.device):
            control.should_save = True
            control.should_training_stop = True

    def anywhere(self, device: torch.device) -> bool:
        """Whether any process was interrupted; all must ask, and all get the same answer."""
        if distributed.is_available() and distributed.is_initialized():
            number = torch.tensor(float(self.interrupted), device=device)
            distributed.all_reduce(number, distributed.ReduceOp.MAX)
            if number:
                self._note()
        return self.interrupted

    def _note(self) -> None:
        if not self.interrupted:
            self.interrupted, self._when = True, time.monotonic()

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        def stop(number: int, frame: FrameType | None) -> None:
            if self.interrupted and time.monotonic() - self._when > SAME_SECONDS:
                raise KeyboardInterrupt
            if not self.interrupted:
                self._note()
                if os.environ.get("RANK", "0") == "0":
                    os.write(2, _NOTE)  # print may be what was interrupted

        before = signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """While several files are written that belong together: Ctrl-C takes effect afterwards."""
    waiting = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal waiting
        waiting = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if waiting:
        signal.raise_signal(signal.SIGINT)


@contextlib.contextmanager
def ignored() -> Iterator[None]:
    """While the last touches are made to what is done."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class IgnoredInWorkers:
    """A data loader's `worker_init_fn` that leaves Ctrl-C, which all processes get, to the one in charge."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __call__(self, worker: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if self.inner is not None:
            self.inner(worker)
