"""How a kept ratio is asked for; a single request's dial is `vllm_xargs: {"mod_threshold": …}` or `{"mod_kept": …}`.

No vLLM import.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from typing import Any

from .calibration import Calibration, OperatingPoint
from .config import ConfigError, ModConfig, logit

THRESHOLD, KEPT = "mod_threshold", "mod_kept"


def requested_cutoffs(
    extra_args: Mapping[str, Any] | None, config: ModConfig, table: Calibration | None
) -> tuple[float, ...] | None:
    """Cutoff per entry of `config.layers` that a request asks for; None if it leaves that to the engine.

    extra_args: of the request's SamplingParams; keys that do not begin with `mod_` are somebody else's.
    `mod_threshold`: one threshold for all layers, 0 is dense. `mod_kept`: a kept ratio, see `Calibration.cutoffs_at`.
    Raises ConfigError, one line that names the key.
    """
    asked = {key: value for key, value in (extra_args or {}).items() if key.startswith("mod_")}
    if not asked:
        return None
    if unknown := sorted(set(asked) - {THRESHOLD, KEPT}):
        raise ConfigError(f"key {reprlib.repr(unknown[0])} is unknown; known: '{THRESHOLD}', '{KEPT}'")
    if len(asked) > 1:
        raise ConfigError(f"keys '{THRESHOLD}' and '{KEPT}' say the same thing twice; give one of them")
    ((key, value),) = asked.items()
    if type(value) not in (int, float) or not 0 <= value <= 1:  # also refuses NaN; to Python, True is a number
        raise ConfigError(f"key '{key}': a number from 0 to 1 is needed (got {reprlib.repr(value)})")
    if config.window is None:
        raise ConfigError(
            f"key '{key}': this model has no decision window, so single requests have no dial "
            f"({config.granularity}, see key 'window' of mod_config)"
        )
    layers = len(config.layers)
    if key == THRESHOLD or value in (0, 1):
        return (logit(value if key == THRESHOLD else 1 - value),) * layers
    if table is None:
        raise ConfigError(
            f"key '{KEPT}': this model has no calibrated table (calibration.json), so only 0 and 1 are known; "
            f"make one with `router-tuning calibrate`, or give '{THRESHOLD}'"
        )
    try:
        return table.cutoffs_at(value, layers)
    except ConfigError as error:
        raise ConfigError(f"key '{KEPT}': {error}") from None


def ways_to_ask(point: OperatingPoint, config: ModConfig) -> list[str]:
    """How an operating point is had: of an engine, of a single request, or by setting it in the checkpoint."""
    ways = []
    if point.threshold is not None:
        threshold = list(point.threshold) if isinstance(point.threshold, tuple) else point.threshold
        ways.append("--additional-config '" + json.dumps({"mod": {"threshold": threshold}}) + "'")
    if config.window is not None:
        ways.append('"vllm_xargs": ' + json.dumps({KEPT: point.target}))
    return ways or [f"router-tuning calibrate CKPT --data D --target-capacity {point.target:g}"]
