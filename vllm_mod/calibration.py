"""`calibration.json`: what `router-tuning calibrate` measured, and the table from kept ratios to cutoffs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from .checkpoint import read_json, replace_json
from .config import ConfigError, Cutoffs, ModConfig, Thresholds, logit
from .schema import Strict

CALIBRATION_FILE = "calibration.json"


class OperatingPoint(Strict):
    """What keeps a certain ratio. Where both are given they decide alike; a sigmoid cannot tell large cutoffs apart."""

    target: float = Field(ge=0, le=1, description="kept ratio asked for")
    kept: float = Field(ge=0, le=1, description="kept ratio measured")
    threshold: Thresholds | None = Field(None, description="0 or 1 at the ends; None where only a cutoff can say it")
    cutoff: Cutoffs | None = Field(None, description="None at the ends, where everything is kept or skipped")

    @model_validator(mode="after")
    def _says_something(self) -> OperatingPoint:
        if self.threshold is None and self.cutoff is None:
            raise ValueError("an operating point needs 'threshold' or 'cutoff'")
        return self

    def cutoffs(self, layers: int) -> tuple[float, ...]:
        """One per routed layer."""
        value = self.threshold if self.cutoff is None else self.cutoff
        assert value is not None
        values = value if isinstance(value, tuple) else (value,) * layers
        return tuple(map(logit, values)) if self.cutoff is None else values


class Calibration(Strict):
    """Kept ratios are executed / routed decisions; with a window those of (request, layer) pairs, as without one."""

    command: str | None = Field(None, description="what was typed")
    data: list[str] = Field(default_factory=list, description="what was measured on")
    samples: int | None = Field(None, ge=1)
    rows: dict[str, Any] = Field(default_factory=dict, description="what became of the rows of the data")
    per_layer: bool = Field(False, description="every layer keeps the ratio by itself")
    target_capacity: float | None = Field(None, ge=0, le=1, description="kept ratio that was set")
    kept: float | None = Field(None, ge=0, le=1, description="and what was measured of it")
    standard_error: float | None = Field(None, description="of `kept`, from one draw of samples to another")
    kept_per_layer: dict[str, float] = Field(default_factory=dict)
    threshold: Thresholds | None = Field(None, description="what was set")
    cutoff: Cutoffs | None = Field(None, description="or this")
    lowest_scores: list[float] | None = Field(None, description="per routed layer; a lower cutoff kept everything")
    highest_scores: list[float] | None = Field(None, description="per routed layer; a higher cutoff skipped everything")
    operating_points: list[OperatingPoint] = Field(default_factory=list)

    @field_validator("operating_points")
    @classmethod
    def _each_once(cls, points: list[OperatingPoint]) -> list[OperatingPoint]:
        targets = [point.target for point in points]
        if twice := sorted({t for t in targets if targets.count(t) > 1}):
            raise ValueError(f"listed twice: {twice}")
        return points

    def cutoffs_at(self, kept: float, layers: int) -> tuple[float, ...]:
        """Cutoffs per routed layer for a kept ratio from 0 to 1; raises ConfigError outside of the table.

        0 and 1 skip and keep everything. A ratio that was calibrated has the cutoffs found for it; between two of
        them every layer's cutoff is interpolated linearly, and beyond the last ones towards the lowest and highest
        scores seen. Where one of two neighbours is infinite in a layer, the nearer one's counts.
        """
        if kept in (0, 1):
            return (-math.inf if kept else math.inf,) * layers
        points = self._points(layers)
        above, below = [t for t in points if t >= kept], [t for t in points if t <= kept]
        if not above or not below:
            known = f"from {min(points):g} to {max(points):g}, 0 and 1" if points else "0 and 1"
            raise ConfigError(f"kept ratio {kept:g} is not in the calibrated table, which has {known}")
        upper, lower = min(above), max(below)
        share = 0.0 if upper == lower else (kept - lower) / (upper - lower)
        return tuple(_between(a, b, share) for a, b in zip(points[lower], points[upper], strict=True))

    def _points(self, layers: int) -> dict[float, tuple[float, ...]]:
        """Kept ratio -> cutoffs that are interpolated between."""
        calibrated = list(self.operating_points)
        if self.target_capacity is not None and (self.threshold is not None or self.cutoff is not None):
            set_now = {"target": self.target_capacity, "kept": self.kept or 0.0}
            calibrated.append(OperatingPoint(**set_now, threshold=self.threshold, cutoff=self.cutoff))
        points = {p.target: p.cutoffs(layers) for p in calibrated if 0 < p.target < 1}
        if points and self.lowest_scores and self.highest_scores:  # never back from a point that lies beyond them
            most, least = points[max(points)], points[min(points)]
            points[1.0] = tuple(map(min, self.lowest_scores, most))
            points[0.0] = tuple(map(max, self.highest_scores, least))
        return points

    def check_fits(self, config: ModConfig, where: str) -> None:
        """Raise ConfigError unless this was measured with the layers of `config`."""
        lists = [self.threshold, self.cutoff, self.lowest_scores, self.highest_scores]
        lists += [value for point in self.operating_points for value in (point.threshold, point.cutoff)]
        sizes = {len(values) for values in lists if isinstance(values, (list, tuple))} - {len(config.layers)}
        others = sorted(set(self.kept_per_layer) - set(map(str, config.layers)))
        if sizes or others:
            found = f"has {min(sizes)} values per point" if sizes else f"names layer {others[0]}"
            raise ConfigError(
                f"{where}: {found}, and mod_config routes layers {list(config.layers)}; calibrate again, or remove it"
            )

    def to_dict(self) -> dict[str, Any]:
        """What is written; keys that say nothing are left out."""
        return self.model_dump(mode="json", exclude_none=True)


def _between(lower: float, upper: float, share: float) -> float:
    """share: 0 gives `lower`, 1 gives `upper`."""
    if share in (0.0, 1.0) or math.isinf(lower) or math.isinf(upper):
        return upper if share > 0.5 else lower
    return lower + share * (upper - lower)


def read_calibration(directory: str | Path, config: ModConfig) -> Calibration | None:
    """The table of a checkpoint that `config` is the `mod_config` of; None where it was never calibrated.

    Raises ConfigError on unknown keys, wrong types, and a table of other layers.
    """
    path = Path(directory) / CALIBRATION_FILE
    if not path.is_file():
        return None
    calibration: Calibration = Calibration.parse(read_json(path), str(path))
    calibration.check_fits(config, str(path))
    return calibration


def write_calibration(directory: str | Path, calibration: Calibration) -> None:
    """Write the table in one step; ConfigError, with the old one as it was, on a full disk."""
    replace_json(Path(directory) / CALIBRATION_FILE, calibration.to_dict())
