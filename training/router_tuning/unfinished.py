"""What `fit` has found behind its costs, on disk beside the output: an interrupted one goes on from it.

Which choice was best, patches that are fitted, and the steps that distilled them. It vanishes when the output is there.
"""

from __future__ import annotations

import contextlib
import io
import logging
import pickle
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from vllm_mod.files import replacing
from vllm_mod.tensors import Patch

from .costs_file import AT_RISK
from .ridge import Fitted

log = logging.getLogger(__name__)


class Unfinished:
    """Its attributes change between steps alone, so they can be written whenever a step is interrupted."""

    def __init__(self, path: Path, belongs_to: Mapping[str, str]) -> None:
        """belongs_to: name -> value, whatever it depends on. A file of anything else is one that another command left
        behind, and is written over."""
        self.path, self.belongs_to = path, dict(belongs_to)
        #: which of the choices, in words
        self.choice: str | None = None
        self.fitted: dict[int, Fitted] = {}
        #: see `distill`
        self.distillation: dict[str, Any] | None = None
        self._written = time.monotonic()
        if path.exists():
            self._read()

    def _read(self) -> None:
        try:
            stored = torch.load(self.path, map_location="cpu", weights_only=True)
            belongs_to = stored.pop("belongs_to")
        except (OSError, RuntimeError, EOFError, KeyError, AttributeError, pickle.UnpicklingError) as error:
            log.warning("%s cannot be read, and is begun anew: %s", self.path, error)
            return
        if belongs_to != self.belongs_to:
            return
        self.choice, self.distillation = stored["choice"], stored["distillation"]
        self.fitted = {
            layer: Fitted(Patch(**found["patch"]), found["ridge"], found["explained"], found["tokens"])
            for layer, found in stored["fitted"].items()
        }

    def write(self) -> None:
        """All of it, in one step. Raises ConfigError."""
        fitted = {layer: vars(found) | {"patch": dict(vars(found.patch))} for layer, found in self.fitted.items()}
        stored = {"choice": self.choice, "fitted": fitted, "distillation": self.distillation}
        torch.save(stored | {"belongs_to": self.belongs_to}, content := io.BytesIO())
        with replacing(self.path) as (temporary,):  # torch would not say what the system says of a full disk
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(content.getbuffer())
        self._written = time.monotonic()

    def write_now_and_then(self) -> None:
        """A killed process loses no more than half a minute."""
        if time.monotonic() - self._written >= AT_RISK:
            self.write()

    @contextlib.contextmanager
    def named_on_interrupt(self) -> Iterator[None]:
        try:
            yield
        except KeyboardInterrupt:
            if self.choice is not None:
                self.write()
                steps = 0 if self.distillation is None else self.distillation["done"]
                what = f"{len(self.fitted)} patches" + (f" and {steps} steps of their distillation" if steps else "")
                print(f"{what} are in {self.path}; the same command goes on from it", file=sys.stderr)
            raise

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
