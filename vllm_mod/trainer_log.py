"""`trainer_log.json`: what `router-tuning train` measured. Written by training, read by reports and model cards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import Field

from .files import read_json
from .schema import Strict

LOG_FILE = "trainer_log.json"


class Step(Strict):
    """One optimizer step."""

    step: int
    loss: float = Field(description="nats per supervised token, without the capacity loss")
    kept: float = Field(description="mean over the routed layers")
    price: float = Field(alias="lambda", description="nats per unit of a layer's kept ratio")
    scale: float = Field(description="root mean square of what keeping is worth to the loss, nats")
    kept_per_layer: dict[str, float]


class HeldOut(Strict):
    """At the end of training, on held-out samples. Losses are nats per answer token."""

    loss: float
    perplexity: float
    kept: float
    kept_per_layer: dict[str, float]
    dense_loss: float = Field(description="of the base model, on the same samples")
    dense_perplexity: float = Field(gt=0)
    #: Per layer; None: that expert was never selected.
    kept_per_expert: dict[str, list[float | None]] | None = None
    selected_per_expert: dict[str, list[int]] | None = None


class Table(Strict):
    """One source of rows."""

    name: str
    rows: int | None = None
    portion: float | None = Field(default=None, description="of its training rows that are taken; or")
    samples: int | None = Field(default=None, description="how many of them")
    fields_not_read: dict[str, int] = Field(default_factory=dict, description="field -> rows that have it")


class RowCounts(Strict):
    """What became of rows; 0.1 told fewer reasons apart."""

    read: int
    used: int
    no_answer: int = 0
    unreadable: int = 0
    bad_value: int = 0
    template_refused: int = 0
    tokenizer_failed: int = 0
    unverified: int = 0
    too_long: int = 0
    truncated: int = 0
    duplicates: int = 0
    reasons: dict[str, str] = Field(default_factory=dict)
    not_shown: dict[str, int] = Field(default_factory=dict)


class Data(Strict):
    """What was trained and measured on."""

    sources: list[str]
    tables: list[Table] = Field(default_factory=list)
    training: RowCounts
    held_out: RowCounts


class TrainerLog(Strict):
    """The whole file."""

    target_capacity: float
    held_out: HeldOut
    data: Data
    log: list[dict[str, Any]] = Field(description="of transformers' Trainer, as it is")
    steps: list[Step]

    def to_text(self) -> str:
        """The file's content."""
        data = self.model_dump(mode="json", by_alias=True, exclude_unset=True)
        return json.dumps(data, indent=2, ensure_ascii=False) + "\n"


def read_log(directory: str | Path) -> TrainerLog | None:
    """The log of a checkpoint; None: it was not trained here. ConfigError names a wrong, missing or unknown key."""
    path = Path(directory) / LOG_FILE
    return TrainerLog.parse(read_json(path), str(path)) if path.is_file() else None
