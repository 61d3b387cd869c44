"""A file that grows with the work, so that what is interrupted goes on from it."""

from __future__ import annotations

import contextlib
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vllm_mod.files import replacing

#: Seconds of work that a killed process may lose.
AT_RISK = 30.0


class KeptFile(ABC):
    def __init__(self, path: Path, belongs_to: Mapping[str, str]) -> None:
        """belongs_to: name -> value, whatever its content depends on."""
        self.path, self.belongs_to = path, dict(belongs_to)
        self._written = time.monotonic()
        self._removed = False

    @abstractmethod
    def write(self) -> None:
        """All that is known by now, in one step. Raises ConfigError."""

    @abstractmethod
    def contents(self) -> str:
        """What it has, in words; empty where that is nothing yet."""

    def _replace(self, save: Callable[[Path], Any]) -> None:
        """save: writes the content to the path that it is given."""
        with replacing(self.path) as (temporary,):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            save(temporary)
        self._written = time.monotonic()

    def write_now_and_then(self) -> None:
        """What is known by now, unless it was written a moment ago: all of the file is written each time."""
        if time.monotonic() - self._written >= AT_RISK:
            self.write()

    @contextlib.contextmanager
    def named_on_interrupt(self) -> Iterator[None]:
        try:
            yield
        except KeyboardInterrupt:
            if not self._removed and (contents := self.contents()):
                self.write()
                print(f"{contents} are in {self.path}; the same command goes on from it", file=sys.stderr)
            raise

    def remove(self) -> None:
        """What it was kept for is there. An interrupt that has waited for that writes it no more."""
        self._removed = True
        self.path.unlink(missing_ok=True)
