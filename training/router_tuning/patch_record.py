"""`patches.json`: how a checkpoint's patches were fitted. Read by the model card, and by evaluations."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from vllm_mod.config import ModConfig, Strict
from vllm_mod.files import read_json, replace_json

from .ridge import Fitted

PATCHES_FILE = "patches.json"


class LayerRecord(Strict):
    """One layer's patch."""

    tokens: int = Field(ge=1, description="that it was fitted to")
    ridge: float | None = Field(None, description="chosen on held-out tokens; in units of the inputs' mean variance")
    explained: float = Field(description="share of the variance of the sublayer's output, on held-out tokens")


class Distilled(Strict):
    """What `distill` did to the patches that were fitted: before and after are equal where it took that back."""

    samples: int = Field(ge=1)
    passes: int = Field(ge=1)
    before: float = Field(description="KL to the dense model on answers held out, nats per token")
    after: float


class PatchRecord(Strict):
    command: str | None = Field(None, description="what was typed")
    data: list[str] = Field(default_factory=list)
    samples: int = Field(ge=1)
    rows: dict[str, Any] = Field(default_factory=dict, description="what became of the rows of the data")
    rank: int = Field(ge=0)
    layers: dict[str, LayerRecord]
    distilled: Distilled | None = Field(None, description="null: patches are as fitted")
    compared: dict[str, float] = Field(
        default_factory=dict,
        description="choice of what is skipped, in words -> KL as in `distilled`, where each skips as much",
    )
    prompts: list[str] = Field(
        default_factory=list, description="what routers and patches were fitted on, see `chat.prompt_digest`"
    )

    @classmethod
    def of(
        cls,
        fitted: Mapping[int, Fitted],
        rank: int,
        command: str,
        data: list[str],
        samples: Sequence[Mapping[str, Any]],
        rows: dict[str, Any],
        distilled: Distilled | None = None,
    ) -> PatchRecord:
        """samples: what it was fitted on; rows: what `Counts.to_dict` says of the data."""
        layers = {
            str(layer): LayerRecord(tokens=found.tokens, ridge=found.ridge, explained=found.explained)
            for layer, found in fitted.items()
        }
        return cls(
            command=command, data=list(data), samples=len(samples), rows=rows, rank=rank, layers=layers,
            distilled=distilled, prompts=sorted({sample["asked"] for sample in samples}),
        )  # fmt: skip

    def also_fitted_on(self, prompts: Iterable[str]) -> PatchRecord:
        return self.model_copy(update={"prompts": sorted({*self.prompts, *prompts})})

    def to_text(self) -> str:
        return json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"

    def write(self, directory: Path) -> None:
        replace_json(directory / PATCHES_FILE, self.model_dump(mode="json"))

    def report(self) -> None:
        """One line per layer, and what distillation gained."""
        for layer, found in self.layers.items():
            ridge = "" if found.ridge is None else f", ridge {found.ridge:g}"
            print(f"layer {layer:>3}: {found.explained:6.3f} of its output's variance on held-out tokens{ridge}")
        if self.distilled is not None:
            nats = f"{self.distilled.before:.4f} as fitted, {self.distilled.after:.4f} distilled"
            print(f"KL to the dense model on held-out answers: {nats}")


def fitted_on(directory: Path) -> frozenset[str]:
    """Digests of the prompts that a checkpoint's record names; empty where it has none, or is an older one."""
    path = directory / PATCHES_FILE
    return frozenset(PatchRecord.parse(read_json(path), str(path)).prompts) if path.is_file() else frozenset()


def section(directory: Path, config: ModConfig) -> str:
    """The model card's; empty where the checkpoint has no patches, or none of this record."""
    path = directory / PATCHES_FILE
    if config.patch is None or not path.is_file():
        return ""
    record = PatchRecord.parse(read_json(path), str(path))
    if record.rank != config.patch.rank:
        return ""
    lines = ["| layer | explained on held-out tokens | ridge |", "| --- | --- | --- |"]
    for layer, found in record.layers.items():
        ridge = "-" if found.ridge is None else f"{found.ridge:g}"
        lines.append(f"| {layer} | {found.explained:.3f} | {ridge} |")
    tokens = max(layer.tokens for layer in record.layers.values())
    nearer = "" if record.distilled is None else f" {_nearer(record.distilled)}{_compared(record.compared)}"
    return (
        f"## Patches\n\nOf rank {record.rank}, fitted to what the sublayers would have added, on {record.samples} "
        f"samples ({tokens} tokens). Explained is the share of that output's variance.{nearer}\n\n"
        + "\n".join(lines)
        + f"\n\n```console\n$ {record.command or 'router-tuning patch'}\n```"
    )


def _nearer(found: Distilled) -> str:
    return (
        f"Then distilled on {found.samples} of them: KL to the dense model on held-out answers {found.before:.3f} nats "
        f"per token before, {found.after:.3f} after."
    )


def _compared(nats: Mapping[str, float]) -> str:
    """Empty where nothing was."""
    if not nats:
        return ""
    found = ", ".join(f"{after:.3f} ({name})" for name, after in nats.items())
    return f" Of what was compared there, skipping as much: {found}."
