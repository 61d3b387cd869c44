"""What a checkpoint and the engine's knobs ask for, read once and handed on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .checkpoint import BaseShape
from .config import ConfigError, EngineKnobs, ModConfig


@dataclass(frozen=True)
class Plan:
    config: ModConfig  #: the checkpoint's, with the engine's knobs applied
    knobs: EngineKnobs
    shape: BaseShape


def plan_of(vllm_config: Any) -> Plan:
    """Raises ConfigError."""
    hf_config = vllm_config.model_config.hf_text_config
    where = f"{vllm_config.model_config.model}/config.json: mod_config"
    data = getattr(hf_config, "mod_config", None)
    if data is None:
        raise ConfigError(f"{where} is missing; architecture {hf_config.architectures} needs it")
    config: ModConfig = ModConfig.parse(data, where)
    shape = BaseShape.of(hf_config.to_dict(), where)
    config.check_fits(shape.num_layers, shape.num_experts, shape.dense_layers)
    knobs = EngineKnobs.from_additional_config(vllm_config.additional_config)
    return Plan(knobs.apply(config), knobs, shape)
