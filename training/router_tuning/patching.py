"""A command's patches: fitted, then distilled, kept meanwhile for when it is interrupted, and recorded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from vllm_mod.config import ModConfig

from .costs_file import fingerprint
from .distill import distill
from .layerwise import Batch
from .patch_record import PatchRecord
from .patches import fit_patches
from .routing import routing_of
from .unfinished import Unfinished


class Flags(Protocol):
    """Of each command that makes patches."""

    data: Any
    distilled_samples: int
    distilled_passes: int


def make_patches(
    model: Any,
    samples: Sequence[Mapping[str, Any]],
    batches: Sequence[Batch],
    rank: int,
    args: Flags,
    place: Path,
    command: str,
    rows: dict[str, Any],
    file: Unfinished,
) -> PatchRecord:
    """Give `model` its patches; returns how they were made.

    batches: of the samples, see `collate`. place: for hidden states. command: what was typed. rows: what became of the
    rows of the data. file: what it has is not made again; the caller removes it once the patches are written.
    """
    fitted = fit_patches(model, batches, rank, place, file=file)
    some = samples[: args.distilled_samples]
    nearer = distill(model, some, place, args.distilled_passes, file=file) if some else None
    return PatchRecord.of(fitted, rank, command, args.data, samples, rows, nearer)


def unfinished(
    path: Path, model: Any, samples: Sequence[Mapping[str, Any]], rank: int, args: Flags, batch_size: int
) -> Unfinished:
    """What an earlier run of the same command left in `path` of a routed model's patches, or nothing yet."""
    config: ModConfig = routing_of(model).config
    belongs_to = fingerprint(model, samples, config.policy.target, config.window, rank)
    flags = [args.distilled_samples, args.distilled_passes, batch_size]
    return Unfinished(path, belongs_to | {"routing": repr(config.to_dict()), "flags": repr(flags)})


def beside(output: Path) -> Path:
    """Where it lies of an output that is not there yet."""
    return output.with_name(f"{output.name}.unfinished")
