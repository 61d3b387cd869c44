"""Which values of a flag are right, where its type does not say it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any


def _at_least(least: float) -> tuple[Callable[[Any], bool], str]:
    return lambda value: least <= value < math.inf, f"{least:g} or more is needed"


_POSITIVE: tuple[Callable[[Any], bool], str] = (lambda value: 0 < value < math.inf, "a positive number is needed")
_BETA: tuple[Callable[[Any], bool], str] = (lambda value: 0 <= value < 1, "a number from 0 to below 1 is needed")
_SEED: tuple[Callable[[Any], bool], str] = (lambda value: 0 <= value < 1 << 32, "0 to 4294967295 is needed")


def _is_object(value: Any) -> bool:
    try:
        return isinstance(json.loads(value), dict)
    except (TypeError, ValueError):
        return False


_OBJECT = (_is_object, "a JSON object such as '{\"key\": 1}' is needed")

#: Flag (of any command) -> (is this value right?, what is needed). None is always right where it is the default.
VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_length": _at_least(2),
    "max_samples": _at_least(1),
    "tokens": _at_least(1),
    "rank": _at_least(0),
    "patch_rank": (lambda value: isinstance(value, str) or value >= 0, "0 or more is needed"),
    "distilled_samples": _at_least(0),
    "distilled_passes": _at_least(1),
    "batch_size": _at_least(1),
    "max_train_samples": (lambda value: value >= 0, "1 or more is needed (0: all)"),
    "max_eval_samples": (lambda value: value >= 0, "1 or more is needed (0: all)"),
    "capacity_lambda": (math.isfinite, "a finite number is needed"),
    "per_device_train_batch_size": _at_least(1),
    "per_device_eval_batch_size": _at_least(1),
    "gradient_accumulation_steps": _at_least(1),
    "num_train_epochs": _POSITIVE,
    "max_steps": (lambda value: value == -1 or value > 0, "1 or more is needed (-1: by --num-train-epochs)"),
    "learning_rate": _POSITIVE,
    "warmup_steps": _at_least(0),
    "weight_decay": _at_least(0),
    "adam_beta1": _BETA,
    "adam_beta2": _BETA,
    "adam_epsilon": _POSITIVE,
    "max_grad_norm": _at_least(0),
    "logging_steps": _POSITIVE,
    "save_steps": _POSITIVE,
    "eval_steps": _POSITIVE,
    "eval_delay": _at_least(0),
    "gradient_checkpointing_kwargs": _OBJECT,
    "lr_scheduler_kwargs": _OBJECT,
    "dataloader_num_workers": _at_least(0),
    "dataloader_prefetch_factor": _at_least(1),
    "neftune_noise_alpha": _at_least(0),
    "seed": _SEED,
    "data_seed": _SEED,
}
