"""`mod_config`: what a checkpoint routes, and the knobs an engine may override.

Shared by training and serving, so it imports neither vLLM nor torch.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

Granularity = Literal[
    "attn_token",
    "attn_sequence",
    "mlp_token",
    "mlp_sequence",
    "block_token",
    "block_sequence",
    "expert_token",
    "attn_static",
    "mlp_static",
    "block_static",
]
GRANULARITIES: tuple[str, ...] = get_args(Granularity)

#: Base architecture (`config.json: architectures`) -> the one a routed checkpoint names.
ARCHITECTURES: dict[str, str] = {
    "LlamaForCausalLM": "LlamaMoDForCausalLM",
    "MistralForCausalLM": "MistralMoDForCausalLM",
    "Qwen2ForCausalLM": "Qwen2MoDForCausalLM",
    "Qwen3ForCausalLM": "Qwen3MoDForCausalLM",
    "OlmoeForCausalLM": "OlmoeMoDForCausalLM",
    "DeepseekForCausalLM": "DeepseekMoDForCausalLM",
}


class ConfigError(ValueError):
    """A setting or file the user can mend; the message is one line and says how."""


def _one_line(error: ValidationError, where: str) -> str:
    problems = []
    for e in error.errors():
        key = ".".join(str(k) for k in e["loc"])
        if not key:
            problems.append(e["msg"].removeprefix("Value error, "))
        elif e["type"] == "extra_forbidden":
            problems.append(f"unknown key '{key}'")
        elif e["type"] == "missing":
            problems.append(f"key '{key}' is required")
        else:
            problems.append(f"key '{key}': {e['msg'].removeprefix('Value error, ')} (got {e['input']!r})")
    return f"{where}: " + "; ".join(problems)


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @classmethod
    def parse(cls, data: Any, where: str) -> Any:
        """Validate `data`; raises ConfigError that names the key and what is allowed."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            allowed = ", ".join(cls.model_fields)
            raise ConfigError(f"{_one_line(error, where)}. Known keys: {allowed}.") from None


def _check_threshold(value: float) -> float:
    if not 0.0 <= value <= 1.0:  # also refuses NaN
        raise ValueError("a threshold is a number from 0 (keep everything) to 1 (skip everything)")
    return value


class ModConfig(Strict):
    """The `mod_config` object of a checkpoint's `config.json`."""

    version: Literal[1] = Field(description="schema version of this object")
    granularity: Granularity = Field(description="'<target>_<level>': what is skipped, and per what")
    layers: tuple[int, ...] = Field(strict=False, description="routed decoder layers, ascending")
    threshold: float | tuple[float, ...] = Field(
        0.5, description="keep where sigmoid(score) >= threshold; one number, or one per layer"
    )
    target_capacity: float | None = Field(None, ge=0, le=1, description="kept ratio asked for in training")
    base_model: str | None = Field(None, description="the model the routers were trained on")

    @field_validator("version", mode="before")
    @classmethod
    def _version(cls, version: Any) -> Any:
        if type(version) is not int:  # to Python, True and 1.0 equal 1
            raise ValueError("the number 1 is needed")
        return version

    @field_validator("layers", mode="before")
    @classmethod
    def _layers(cls, layers: Any) -> Any:
        if not isinstance(layers, (list, tuple)) or any(type(i) is not int for i in layers):
            raise ValueError("a list of layer numbers is needed")
        if not layers:
            raise ValueError("at least one layer must be listed")
        twice = sorted({i for i in layers if layers.count(i) > 1})
        if twice:
            raise ValueError(f"listed twice: {twice}")
        if min(layers) < 0:
            raise ValueError(f"layer {min(layers)} is out of range, layers count from 0")
        if list(layers) != sorted(layers):
            raise ValueError("layers must ascend")
        return tuple(layers)

    @field_validator("threshold", mode="before")
    @classmethod
    def _threshold(cls, value: Any) -> Any:
        values = value if isinstance(value, (list, tuple)) else [value]
        for v in values:
            if type(v) not in (int, float):
                raise ValueError("a number, or a list with one number per entry of 'layers', is needed")
            _check_threshold(v)
        return tuple(map(float, value)) if isinstance(value, (list, tuple)) else float(value)

    @model_validator(mode="after")
    def _lengths(self) -> ModConfig:
        if isinstance(self.threshold, tuple) and len(self.threshold) != len(self.layers):
            raise ValueError(
                f"'threshold' lists {len(self.threshold)} numbers for {len(self.layers)} routed layers; "
                "give one number, or one per layer"
            )
        return self

    @property
    def target(self) -> str:
        """`attn`, `mlp`, `block` or `expert`."""
        return self.granularity.split("_")[0]

    @property
    def level(self) -> str:
        """`token`, `sequence` or `static`."""
        return self.granularity.split("_")[1]

    @property
    def is_static(self) -> bool:
        return self.level == "static"

    @property
    def packs_kv(self) -> bool:
        """Kept tokens of a request lie densely in its blocks of a routed layer."""
        return self.level == "token" and self.target in ("attn", "block")

    @property
    def keeps_state(self) -> bool:
        """A worker remembers something of a running request: its decisions, or how much packed KV it has."""
        return self.level == "sequence" or self.packs_kv

    @property
    def thresholds(self) -> tuple[float, ...]:
        """One threshold per entry of `layers`."""
        return self.threshold if isinstance(self.threshold, tuple) else (self.threshold,) * len(self.layers)

    @property
    def cutoffs(self) -> tuple[float, ...]:
        """`logit(threshold)` per entry of `layers`: a sublayer is kept where `w . x >= cutoff`."""
        return tuple(logit(t) for t in self.thresholds)

    def check_fits(
        self, num_layers: int, num_experts: int | None = None, dense_layers: Collection[int] = ()
    ) -> None:  # fmt: skip
        """Raise ConfigError if the base model has not what this config routes.

        dense_layers: those without experts, of a model that has experts in others.
        """
        if self.layers[-1] >= num_layers:
            raise ConfigError(
                f"mod_config: key 'layers': layer {self.layers[-1]} is out of range, "
                f"the model has layers 0 to {num_layers - 1}"
            )
        if self.target == "expert" and not num_experts:
            raise ConfigError(
                f"mod_config: key 'granularity': {self.granularity!r} needs experts, and this model is dense"
            )
        if self.target == "expert" and (dense := sorted(set(self.layers) & set(dense_layers))):
            raise ConfigError(
                f"mod_config: key 'layers': {self.granularity!r} needs experts, and layers {dense} of this model have "
                f"one dense MLP ({num_experts} experts in the others)"
            )

    def to_dict(self) -> dict[str, Any]:
        """What is written to `config.json`; keys that say nothing are left out."""
        data = self.model_dump(mode="json", exclude_none=True)
        if self.is_static:
            data.pop("threshold")
        return data


class EngineKnobs(Strict):
    """`--additional-config '{"mod": {...}}'`."""

    threshold: Any = Field(None, description="overrides the checkpoint's; one number, or one per routed layer")
    force: Literal["keep", "skip"] | None = Field(None, description="every router answers that")
    kv_reclaim: bool = Field(True, description="give back the KV pages of skipped layers")

    @classmethod
    def from_additional_config(cls, additional_config: Any) -> EngineKnobs:
        data = additional_config.get("mod", {}) if isinstance(additional_config, dict) else {}
        return cls.parse(data, "--additional-config: mod")

    def apply(self, config: ModConfig) -> ModConfig:
        """The checkpoint's config with this engine's thresholds."""
        if config.is_static:
            if self.threshold is not None or self.force is not None:
                raise ConfigError(
                    "--additional-config: mod: 'threshold' and 'force' need routers, "
                    f"and a {config.granularity} checkpoint has none"
                )
            return config
        if self.force is not None:
            threshold: Any = 0.0 if self.force == "keep" else 1.0
        elif self.threshold is not None:
            threshold = self.threshold
        else:
            return config
        return ModConfig.parse(config.model_dump() | {"threshold": threshold}, "--additional-config: mod")


def logit(p: float) -> float:
    """Inverse of the sigmoid; exactly -inf at 0 and +inf at 1."""
    if p <= 0.0:
        return -math.inf
    if p >= 1.0:
        return math.inf
    return math.log(p / (1.0 - p))


def default_layers(num_layers: int) -> list[int]:
    """The deepest half of the layers except the last one (32 layers: 15..30)."""
    if num_layers < 2:
        raise ConfigError(f"a model of {num_layers} layer(s) has none to route")
    last = num_layers - 2
    return list(range(max(last - num_layers // 2 + 1, 0), last + 1))


def mod_architecture(base: str) -> str:
    """The routed counterpart of a base architecture; raises ConfigError listing what is supported."""
    if base in ARCHITECTURES.values():
        return base
    if base not in ARCHITECTURES:
        raise ConfigError(f"architecture {base!r} is not supported; supported: {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[base]
