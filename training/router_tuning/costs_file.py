"""Measured costs on disk: an interrupted `fit` goes on from them, and other kept ratios measure nothing again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vllm_mod.config import ConfigError
from vllm_mod.tensors import Patch

from .kept_file import KeptFile

#: Numbers of a parameter that tell it from another one's.
_TOLD_BY = 64
#: Before the names of patches' tensors.
_PATCH = "patch."


@dataclass
class Rows:
    """What was found of some samples, in the order in which they were measured."""

    #: int64 `[M]`: which sample
    sample: Tensor
    #: float64 `[M, layers]`, see `selection.Measured`
    nats: Tensor
    #: float64 `[M]`
    tokens: Tensor
    #: float32 `[M, layers, hidden]`
    inputs: Tensor

    def __add__(self, more: Rows) -> Rows:
        return Rows(**{name: torch.cat([mine, vars(more)[name]]) for name, mine in vars(self).items()})


class CostsFile(KeptFile):
    """A safetensors file with `Rows` and the patches they were measured with; its metadata say what they belong to."""

    def __init__(self, path: Path, belongs_to: Mapping[str, str]) -> None:
        """belongs_to: name -> value, see `fingerprint`. Raises ConfigError if the file is of anything else."""
        super().__init__(path, belongs_to)
        #: None: nothing was measured yet
        self.rows: Rows | None = None
        #: per layer; empty where none were fitted
        self.patches: dict[int, Patch] = {}
        if path.exists():
            self._read()

    def _read(self) -> None:
        try:
            with safe_open(self.path, "pt") as file:
                stored = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except (OSError, SafetensorError) as error:
            raise ConfigError(
                f"{self.path}: not a file of measured costs: {error}; name another, or delete it"
            ) from None
        other = [name for name, value in self.belongs_to.items() if stored.get(name) != value]
        if other:
            raise ConfigError(f"{self.path}: measured with another {', '.join(other)}; name another file, or delete it")
        parts: dict[int, dict[str, Tensor]] = {}
        for name in [name for name in tensors if name.startswith(_PATCH)]:
            layer, part = name.removeprefix(_PATCH).split(".")
            parts.setdefault(int(layer), {})[part] = tensors.pop(name)
        self.patches = {layer: Patch(**found) for layer, found in parts.items()}
        self.rows = Rows(**tensors) if tensors else None

    def write(self) -> None:
        """All that is known by now, in one step. Raises ConfigError."""
        tensors = {} if self.rows is None else dict(vars(self.rows))
        for layer, patch in self.patches.items():
            tensors |= {f"{_PATCH}{layer}.{part}": found for part, found in vars(patch).items() if found is not None}
        self._replace(lambda path: save_file(tensors, path, metadata=self.belongs_to))

    def contents(self) -> str:
        number = 0 if self.rows is None else len(self.rows.sample)
        return f"costs of {number} samples" if self.rows is not None or self.patches else ""


def told_by(model: Any) -> str:
    """Equal for models of the same weights, by some of them."""
    weights = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        some = tensor.flatten()[:: max(tensor.numel() // _TOLD_BY, 1)].cpu()
        weights.update(f"{name} {tuple(tensor.shape)} {some.tolist()}".encode())
    return weights.hexdigest()


def fingerprint(
    model: Any, samples: Sequence[Mapping[str, Any]], target: str, window: int | None, rank: int | None
) -> dict[str, str]:
    """What measured costs depend on: the model's weights and dtype, all samples, and what is skipped how."""
    data = hashlib.sha256()
    for sample in samples:
        data.update(repr([list(sample[name]) for name in ("input_ids", "labels")] + [sample["prompt_len"]]).encode())
    return {
        "model": told_by(model), "precision": str(model.dtype), "samples": data.hexdigest(),
        "granularity": target, "window": str(window), "patch rank": str(rank),
    }  # fmt: skip
