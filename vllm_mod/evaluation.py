"""`evaluation.json`: what `python -m benchmarks.quality` measured of a checkpoint, for reports and model cards."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from .config import Cutoffs, Thresholds
from .files import read_json, replace_json
from .schema import Strict

EVALUATION_FILE = "evaluation.json"


class Task(Strict):
    """Mean of a metric, and its standard error (None: of a single document), of each system that was measured."""

    metric: str
    shots: int
    samples: int
    base: float
    base_stderr: float | None
    checkpoint: float
    checkpoint_stderr: float | None
    checkpoint_difference: float | None = Field(None, description="to the base, on the same documents")
    checkpoint_difference_stderr: float | None = None
    static: float | None = None
    static_stderr: float | None = None
    static_difference: float | None = None
    static_difference_stderr: float | None = None
    truncated: float | None = Field(None, description="share of requests that were longer than the model allows")
    in_window: float | None = Field(None, description="share of requests that ended within the decision window")
    kept_ratio: float | None = Field(None, description="in vLLM, during this task")


class Point(Strict):
    """Perplexity of held-out answers at one kept ratio."""

    system: Literal["routed", "static"]
    kept: float | None
    threshold: Thresholds | None = Field(None, description="of `routed`: None is the stored one; or")
    cutoff: Cutoffs | None = None
    layers: list[int] | None = Field(None, description="of `static`: those dropped")
    perplexity: float | None = None
    standard_error: float | None = None
    ratio_to_base: float
    ratio_standard_error: float = 0.0


class Evaluation(Strict):
    """The whole file."""

    command: str
    machine: dict[str, Any] = Field(default_factory=dict)
    tasks: dict[str, Task]
    recovery: float | None = Field(
        description="mean over tasks of checkpoint / base, of those whose requests skip; None: there is none"
    )
    static_recovery: float | None
    kept_ratio: float | None = Field(description="in vLLM, during all tasks")
    perplexity: dict[str, float | None] = Field(default_factory=dict, description="of held-out answers, by system")
    curve: list[Point] = Field(default_factory=list)


def read_evaluation(directory: str | Path) -> Evaluation | None:
    """The evaluation of a checkpoint; None where there is none. ConfigError names a wrong, missing or unknown key."""
    path = Path(directory) / EVALUATION_FILE
    return Evaluation.parse(read_json(path), str(path)) if path.is_file() else None


def write_evaluation(directory: str | Path, evaluation: Evaluation) -> None:
    """Write it in one step; ConfigError, with the old one as it was, on a full disk."""
    replace_json(Path(directory) / EVALUATION_FILE, evaluation.model_dump(mode="json", exclude_unset=True))
