"""What a checkpoint and the engine's knobs ask for, read once and handed on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .architectures import BaseShape
from .calibration import CALIBRATION_FILE, Calibration, read_calibration
from .config import ConfigError, ModConfig
from .knobs import EngineKnobs, UnderLoad


@dataclass(frozen=True)
class Plan:
    config: ModConfig  #: the checkpoint's, with the engine's knobs applied
    knobs: EngineKnobs
    shape: BaseShape
    table: Calibration | None  #: from kept ratios to cutoffs; None where the checkpoint was never calibrated


def plan_of(vllm_config: Any) -> Plan:
    """Raises ConfigError."""
    model = vllm_config.model_config
    where = f"{model.model}/config.json: mod_config"
    data = getattr(model.hf_text_config, "mod_config", None)
    if data is None:
        raise ConfigError(f"{where} is missing; architecture {model.hf_text_config.architectures} needs it")
    stored: ModConfig = ModConfig.parse(data, where)
    shape = shape_of(vllm_config)
    stored.check_fits(shape.num_layers, shape.num_experts, shape.dense_layers)
    knobs = EngineKnobs.from_additional_config(vllm_config.additional_config)
    config = knobs.apply(stored)
    table = _table(model, stored)
    if knobs.under_load is not None:
        _check_table(table, knobs.under_load, len(config.layers))
    return Plan(config, knobs, shape, table)


def shape_of(vllm_config: Any) -> BaseShape:
    """Of the config as vLLM has loaded it. Raises ConfigError."""
    model = vllm_config.model_config
    return BaseShape.of(model.hf_text_config.to_dict(), f"{model.model}/config.json")


def _table(model: Any, config: ModConfig) -> Calibration | None:
    """Of a local checkpoint, or of one from the hub."""
    if Path(model.model).is_dir():
        return read_calibration(model.model, config)
    if config.window is None:  # nobody will ask
        return None
    from huggingface_hub import hf_hub_download

    try:
        path = hf_hub_download(model.model, CALIBRATION_FILE, revision=model.revision)
    except Exception:  # there is none, or no network: the same to whoever asks for a kept ratio
        return None
    return read_calibration(Path(path).parent, config)


def _check_table(table: Calibration | None, policy: UnderLoad, layers: int) -> None:
    if table is None:
        raise ConfigError(
            f"--additional-config: mod: 'under_load' needs the checkpoint's calibrated table ({CALIBRATION_FILE}); "
            "make one with `router-tuning calibrate`"
        )
    try:
        for kept in policy.ratios:
            table.cutoffs_at(kept, layers)
    except ConfigError as error:
        raise ConfigError(f"--additional-config: mod: under_load: {error}") from None
