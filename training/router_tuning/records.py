"""Records that training alone reads again: `training_args.json` of a checkpoint, `capacity.json` of a state.

Those that serving reads too are in `vllm_mod`: `trainer_log.py`, `evaluation.py`, `calibration.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field

from vllm_mod.config import Strict
from vllm_mod.evaluation import EVALUATION_FILE
from vllm_mod.files import read_json
from vllm_mod.trainer_log import LOG_FILE, Step

ARGUMENTS_FILE = "training_args.json"
STATE_FILE = "capacity.json"
#: What a checkpoint says of how its routers came about, and how good they are: theirs, wherever they go.
ROUTER_RECORDS = ("train_command.txt", ARGUMENTS_FILE, LOG_FILE, EVALUATION_FILE)


class Arguments(Strict):
    """What was set. All other keys are flags of transformers, and differ with its release."""

    model_config = ConfigDict(extra="allow")

    seed: int
    learning_rate: float
    per_device_train_batch_size: int
    lora_r: int = 0
    lora_alpha: int | None = None
    lora_learning_rate: float | None = None
    lora_target_modules: list[str] | None = None
    lora_layers: list[str] | None = None
    data: list[str] | None = None
    eval_fraction: float | None = None


class Controller(Strict):
    """Of the capacity loss."""

    weight: float = Field(description="lambda, nats per unit of a layer's kept ratio")
    scale: float


class State(Strict):
    """What a run goes on from, beside its tensors."""

    model_config = ConfigDict(ser_json_inf_nan="constants")  # a setting may be infinite, and must come back so

    capacity: Controller
    history: list[Step]
    settings: dict[str, Any] = Field(default_factory=dict, description="that a run which resumes must share")

    def write(self, directory: Path) -> None:
        """Into a state that is being written: the whole of it appears at once."""
        data = self.model_dump(mode="json", by_alias=True)
        (directory / STATE_FILE).write_text(json.dumps(data), encoding="utf-8")


def read_arguments(directory: Path) -> Arguments | None:
    """None where the checkpoint was not trained here; ConfigError names a wrong or missing key."""
    path = directory / ARGUMENTS_FILE
    return Arguments.parse(read_json(path), str(path)) if path.is_file() else None


def arguments_text(settings: Mapping[str, Any]) -> str:
    """Content of `training_args.json`; ConfigError where it could not be read again."""
    Arguments.parse(dict(settings), ARGUMENTS_FILE)
    return json.dumps(settings, indent=2, ensure_ascii=False) + "\n"


def read_state(directory: Path) -> State:
    """Raises ConfigError that names a wrong, missing or unknown key."""
    path = directory / STATE_FILE
    return State.parse(read_json(path), str(path))
