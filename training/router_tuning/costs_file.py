"""Measured costs on disk: an interrupted `fit` goes on from them, and other kept ratios measure nothing again."""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vllm_mod.config import ConfigError
from vllm_mod.files import replacing

#: Numbers of a parameter that tell it from another one's.
_TOLD_BY = 64


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


class CostsFile:
    """A safetensors file with `Rows`, and in its metadata what they belong to."""

    def __init__(self, path: Path, belongs_to: Mapping[str, str]) -> None:
        """belongs_to: name -> value, see `fingerprint`. Raises ConfigError if the file is of anything else."""
        self.path, self.belongs_to = path, dict(belongs_to)
        self.rows: Rows | None = self._read() if path.exists() else None

    def _read(self) -> Rows:
        try:
            with safe_open(self.path, "pt") as file:
                stored = file.metadata() or {}
                rows = {name: file.get_tensor(name) for name in Rows.__dataclass_fields__}
        except (OSError, SafetensorError) as error:
            raise ConfigError(
                f"{self.path}: not a file of measured costs: {error}; name another, or delete it"
            ) from None
        other = [name for name, value in self.belongs_to.items() if stored.get(name) != value]
        if other:
            raise ConfigError(f"{self.path}: measured with another {', '.join(other)}; name another file, or delete it")
        return Rows(**rows)

    def write(self, rows: Rows) -> None:
        """All that is known by now, in one step. Raises ConfigError."""
        self.rows = rows
        with replacing(self.path) as (temporary,):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            save_file(vars(rows), temporary, metadata=self.belongs_to)

    @contextlib.contextmanager
    def named_on_interrupt(self) -> Iterator[None]:
        try:
            yield
        except KeyboardInterrupt:
            if self.rows is not None and self.path.exists():
                number = len(self.rows.sample)
                print(
                    f"costs of {number} samples are in {self.path}; the same command goes on from it", file=sys.stderr
                )
            raise

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def fingerprint(
    model: Any, samples: Sequence[Mapping[str, Any]], target: str, window: int | None, rank: int | None
) -> dict[str, str]:
    """What measured costs depend on: the model's weights and dtype, all samples, and what is skipped how."""
    weights, data = hashlib.sha256(), hashlib.sha256()
    for name, tensor in model.state_dict().items():
        some = tensor.flatten()[:: max(tensor.numel() // _TOLD_BY, 1)].cpu()
        weights.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {some.tolist()}".encode())
    for sample in samples:
        data.update(repr([list(sample[name]) for name in ("input_ids", "labels")] + [sample["prompt_len"]]).encode())
    return {
        "model": weights.hexdigest(), "samples": data.hexdigest(),
        "granularity": target, "window": str(window), "patch rank": str(rank),
    }  # fmt: skip
