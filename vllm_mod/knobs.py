"""What an engine is told of routing: `--additional-config '{"mod": {...}}'`."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, model_validator

from .config import ConfigError, ModConfig
from .schema import Strict


class UnderLoad(Strict):
    """Depth under load: the busier the engine is when a request is admitted, the less it keeps.

    The load is 0 below and 1 above each pair of bounds, linear between them; the larger of the two counts.
    """

    kept: float = Field(ge=0, le=1, description="kept ratio at full load, by the calibrated table")
    kv_usage: tuple[float, float] = Field((0.5, 0.9), strict=False, description="share of KV pages in use: from, to")
    waiting: tuple[int, int] = Field((0, 16), strict=False, description="requests that wait before it: from, to")
    levels: int = Field(4, ge=1, le=100, description="steps from full depth to `kept`; few: prefixes are shared")

    @model_validator(mode="after")
    def _ascending(self) -> UnderLoad:
        for key in ("kv_usage", "waiting"):
            low, high = getattr(self, key)
            if not 0 <= low < high:
                raise ValueError(f"key '{key}': two ascending numbers are needed (got {low}, {high})")
        if self.kv_usage[1] > 1:
            raise ValueError(f"key 'kv_usage': a share of the pages is at most 1 (got {self.kv_usage[1]})")
        return self

    @property
    def ratios(self) -> list[float]:
        """Kept ratio of each level, from full depth down."""
        return [1.0 - level / self.levels * (1.0 - self.kept) for level in range(self.levels + 1)]

    def kept_at(self, kv_usage: float, waiting: int) -> float:
        """The kept ratio of a request that is admitted now."""
        load = max(_share(kv_usage, *self.kv_usage), _share(waiting, *self.waiting))
        return self.ratios[math.ceil(load * self.levels)]


def _share(value: float, low: float, high: float) -> float:
    return min(max((value - low) / (high - low), 0.0), 1.0)


class EngineKnobs(Strict):
    """`--additional-config '{"mod": {...}}'`."""

    threshold: Any = Field(
        None, description="overrides the checkpoint's threshold or cutoff; one number, or one per routed layer"
    )
    force: Literal["keep", "skip"] | None = Field(None, description="every router answers that")
    kv_reclaim: bool = Field(True, description="give back the KV pages of skipped layers")
    under_load: UnderLoad | None = Field(None, description="admit requests with fewer layers while the engine is busy")

    @classmethod
    def from_additional_config(cls, additional_config: Any) -> EngineKnobs:
        data = additional_config.get("mod", {}) if isinstance(additional_config, dict) else {}
        return cls.parse(data, "--additional-config: mod")

    def apply(self, config: ModConfig) -> ModConfig:
        """The checkpoint's config with this engine's thresholds; raises ConfigError."""
        where = "--additional-config: mod"
        if config.is_static and (self.threshold is not None or self.force is not None):
            raise ConfigError(
                f"{where}: 'threshold' and 'force' need routers, and a {config.granularity} checkpoint has none"
            )
        if self.under_load is not None:
            if config.window is None:
                raise ConfigError(
                    f"{where}: 'under_load' needs a decision window (key 'window' of mod_config): without one a single "
                    "request has no dial"
                )
            if self.force is not None:
                raise ConfigError(f"{where}: 'force' answers for every request: 'under_load' has no effect; drop one")
            if self.threshold is not None:
                raise ConfigError(
                    f"{where}: 'under_load' gives every request without a dial a kept ratio of the calibrated table: "
                    "'threshold' has no effect; drop one"
                )
        if config.is_static:
            return config
        if self.force is not None:
            threshold: Any = 0.0 if self.force == "keep" else 1.0
        elif self.threshold is not None:
            threshold = self.threshold
        else:
            return config
        return config.with_threshold(threshold, where)
