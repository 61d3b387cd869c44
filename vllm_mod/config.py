"""`mod_config`: what a checkpoint routes, and the knobs an engine may override.

Shared by training and serving, so it imports neither vLLM nor torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from .granularity import POLICIES, Granularity, Policy
from .schema import ConfigError as ConfigError
from .schema import Strict


def _numbers(value: Any, check: Callable[[float], None]) -> float | tuple[float, ...]:
    """One number, or one per layer, each of them checked."""
    values = value if isinstance(value, (list, tuple)) else [value]
    for v in values:
        if type(v) not in (int, float):  # to Python, True is a number
            raise ValueError("a number, or a list with one number per entry of 'layers', is needed")
        check(v)
    return tuple(map(float, value)) if isinstance(value, (list, tuple)) else float(value)


def _check_threshold(value: float) -> None:
    if not 0.0 <= value <= 1.0:  # also refuses NaN
        raise ValueError("a threshold is a number from 0 (keep everything) to 1 (skip everything)")


def _check_cutoff(value: float) -> None:
    try:
        finite = math.isfinite(value)
    except OverflowError:  # an integer that no float can hold
        finite = False
    if not finite:
        raise ValueError("a cutoff is a finite number; to keep or skip everything give 'threshold' 0 or 1")


#: One number for all routed layers, or one for each.
Thresholds = Annotated[float | tuple[float, ...], BeforeValidator(partial(_numbers, check=_check_threshold))]
Cutoffs = Annotated[float | tuple[float, ...], BeforeValidator(partial(_numbers, check=_check_cutoff))]


class PatchConfig(Strict):
    """What a skipped sublayer adds: `U (D x) + b`, see `gate.apply_patch`."""

    rank: int = Field(ge=0, description="rows of D and columns of U; 0: the bias b alone")


class ModConfig(Strict):
    """The `mod_config` object of a checkpoint's `config.json`."""

    version: Literal[1, 2] = Field(description="schema version of this object; 2 for cutoff, window and patch")
    granularity: Granularity = Field(description="'<target>_<level>': what is skipped, and per what")
    layers: tuple[int, ...] = Field(strict=False, description="routed decoder layers, ascending")
    threshold: Thresholds | None = Field(
        0.5, description="keep where sigmoid(score) >= threshold; one number, or one per layer; None beside a cutoff"
    )
    cutoff: Cutoffs | None = Field(
        None, description="in place of threshold: keep where score >= cutoff; one number, or one per layer"
    )
    window: int | None = Field(
        None, description="decide by the first tokens, so many at most, and run them dense; None: by the whole prompt"
    )
    patch: PatchConfig | None = Field(None, description="what a skipped sublayer adds; None: nothing")
    target_capacity: float | None = Field(None, ge=0, le=1, description="kept ratio asked for in training")
    base_model: str | None = Field(None, description="the model the routers were trained on")

    @field_validator("version", mode="before")
    @classmethod
    def _version(cls, version: Any) -> Any:
        if type(version) is not int:  # to Python, True and 1.0 equal 1
            raise ValueError("the number 1 or 2 is needed")
        return version

    @model_validator(mode="before")
    @classmethod
    def _one_criterion(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        threshold = data.get("threshold")
        if data.get("cutoff") is not None:
            if threshold is not None:
                raise ValueError("keys 'threshold' and 'cutoff' say the same thing twice; give one of them")
            return data | {"threshold": None}
        if "threshold" in data and threshold is None:
            raise ValueError("key 'threshold': a number, or a list with one number per entry of 'layers', is needed")
        return data

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

    @field_validator("window", mode="before")
    @classmethod
    def _window(cls, value: Any) -> Any:
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError("a number of tokens, 1 or more, is needed")
        return value

    @model_validator(mode="after")
    def _belongs_together(self) -> ModConfig:
        for key in ("threshold", "cutoff"):
            value = getattr(self, key)
            if isinstance(value, tuple) and len(value) != len(self.layers):
                raise ValueError(
                    f"'{key}' lists {len(value)} numbers for {len(self.layers)} routed layers; "
                    "give one number, or one per layer"
                )
        if self.version == 1:
            for key in ("cutoff", "window", "patch"):
                if getattr(self, key) is not None:
                    raise ValueError(f"key '{key}' needs 'version' 2")
        if self.cutoff is not None and self.is_static:
            raise ValueError(f"key 'cutoff' needs routers, and {self.granularity} has none")
        if self.window is not None and not self.policy.by_request:
            raise ValueError(f"key 'window' needs a granularity *_sequence (got {self.granularity!r})")
        if self.patch is not None and self.policy.by_experts:
            raise ValueError(f"key 'patch': {self.granularity} has none; attn_*, mlp_* and block_* may have one")
        return self

    @property
    def policy(self) -> Policy:
        """What the granularity means."""
        return POLICIES[self.granularity]

    @property
    def is_static(self) -> bool:
        return self.policy.is_static

    @property
    def criterion(self) -> Literal["threshold", "cutoff"]:
        """The key that says what is kept."""
        return "threshold" if self.cutoff is None else "cutoff"

    @property
    def limits(self) -> tuple[float, ...]:
        """The criterion's value per entry of `layers`: thresholds, or cutoffs."""
        value = self.threshold if self.cutoff is None else self.cutoff
        assert value is not None
        return value if isinstance(value, tuple) else (value,) * len(self.layers)

    @property
    def cutoffs(self) -> tuple[float, ...]:
        """Per entry of `layers`: a sublayer is kept where `w . x >= cutoff`; infinite for the thresholds 0 and 1."""
        return self.limits if self.cutoff is not None else tuple(logit(t) for t in self.limits)

    def with_threshold(self, threshold: Any, where: str = "threshold") -> ModConfig:
        """The same routing by other thresholds, which replace a cutoff, too. Raises ConfigError on a bad value."""
        return self._by("threshold", threshold, where)

    def with_cutoff(self, cutoff: Any, where: str = "cutoff") -> ModConfig:
        """The same routing by other cutoffs, as version 2. Raises ConfigError on a bad value."""
        return self._by("cutoff", cutoff, where, version=2)

    def _by(self, criterion: str, value: Any, where: str, **more: Any) -> ModConfig:
        others = {k: v for k, v in self.to_dict().items() if k not in ("threshold", "cutoff")}
        return ModConfig.parse(others | more | {criterion: value}, where)

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
        if self.policy.by_experts and not num_experts:
            raise ConfigError(
                f"mod_config: key 'granularity': {self.granularity!r} needs experts, and this model is dense"
            )
        if self.policy.by_experts and (dense := sorted(set(self.layers) & set(dense_layers))):
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


def logit(p: float) -> float:
    """Inverse of the sigmoid; exactly -inf at 0 and +inf at 1."""
    if p <= 0.0:
        return -math.inf
    if p >= 1.0:
        return math.inf
    return math.log(p / (1.0 - p))


def sigmoid(x: float) -> float:
    """Inverse of `logit`, as well as a float can tell: 1.0 from 37 on."""
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


def default_layers(num_layers: int) -> list[int]:
    """The deepest half of the layers except the last one (32 layers: 15..30)."""
    if num_layers < 2:
        raise ConfigError(f"a model of {num_layers} layer(s) has none to route")
    last = num_layers - 2
    return list(range(max(last - num_layers // 2 + 1, 0), last + 1))
