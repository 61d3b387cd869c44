"""What a command that makes patches has of them, on disk: an interrupted one goes on from it.

Which choice was best (`fit`), patches that are fitted, and the steps that distilled them. It vanishes when the output
is there.
"""

from __future__ import annotations

import io
import logging
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vllm_mod import __version__
from vllm_mod.tensors import Patch

from .kept_file import KeptFile
from .ridge import Fitted

log = logging.getLogger(__name__)


class Unfinished(KeptFile):
    """Its attributes change between steps alone, so they can be written whenever a step is interrupted."""

    def __init__(self, path: Path, belongs_to: Mapping[str, str]) -> None:
        """belongs_to: name -> value, whatever it depends on. A file of anything else is one that another command left
        behind, and is written over; so is one of another version."""
        super().__init__(path, {**belongs_to, "version": __version__})
        #: which of the choices, in words
        self.choice: str | None = None
        self.fitted: dict[int, Fitted] = {}
        #: see `distill`
        self.distillation: dict[str, Any] | None = None
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

    def begin(self, choice: str) -> None:
        """Patches of this one will follow; of another one they are forgotten."""
        if choice != self.choice:
            self.choice, self.fitted, self.distillation = choice, {}, None
        self.write()

    def write(self) -> None:
        """All of it, in one step. Raises ConfigError."""
        fitted = {layer: vars(found) | {"patch": dict(vars(found.patch))} for layer, found in self.fitted.items()}
        stored = {"choice": self.choice, "fitted": fitted, "distillation": self.distillation}
        torch.save(stored | {"belongs_to": self.belongs_to}, content := io.BytesIO())
        # Not to the file itself: torch would not say what the system says of a full disk.
        self._replace(lambda path: path.write_bytes(content.getbuffer()))

    def contents(self) -> str:
        if self.choice is None and not self.fitted:
            return ""
        steps = 0 if self.distillation is None else self.distillation["done"]
        return f"{len(self.fitted)} patches" + (f" and {steps} steps of their distillation" if steps else "")
