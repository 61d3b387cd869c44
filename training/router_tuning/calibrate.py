"""`router-tuning calibrate`: the thresholds, or cutoffs, that keep what is asked, and a table of further kept ratios.

See `fitting` for how they are found. What a sigmoid can express is written as `threshold`, in a version 1 checkpoint;
otherwise it becomes version 2, which has `cutoff`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from vllm_mod.calibration import Calibration, OperatingPoint, write_calibration
from vllm_mod.checkpoint import read_mod_config, write_mod_config
from vllm_mod.config import ConfigError, ModConfig
from vllm_mod.dial import ways_to_ask

from . import card
from .arguments import CalibrateArguments
from .counts import Counts
from .data import Collator, check_fraction, check_sources, read_sources, split_tail, tokenize
from .fitting import Measured, Meter, fit, thresholds_like
from .loading import base_of, checkpoint_config, load_routed
from .preflight import check_vocabulary
from .tokenizer import load_tokenizer

log = logging.getLogger(__name__)

FEWEST_PROMPTS = 8
Fitted = tuple[tuple[float, ...], Measured]


def calibrate(args: CalibrateArguments, command: str) -> Calibration:
    """Measure, rewrite the checkpoint's config, record; returns what calibration.json holds.

    Raises ConfigError, with the checkpoint as it was, on anything that cannot be calibrated.
    """
    directory, config = _checked(args)
    check_sources(args.data)
    base = base_of(directory, config, args.model)
    batches, counts = _batches(args, config, base)
    meter = Meter(load_routed(directory, base), batches)
    # Cutoffs per layer carry what is known of the layers: for a ratio of all layers together they move together.
    prior = config.cutoffs if isinstance(config.cutoff, tuple) else (0.0,) * len(config.layers)
    fitted: dict[float, Fitted] = {}
    start = config.cutoffs
    for target in sorted({args.target_capacity, *args.operating_points}, reverse=True):
        fitted[target] = fit(meter, start, target, args.per_layer, prior)
        start = fitted[target][0] if 0 < target < 1 else start  # the next one is near
    following = _set(config, fitted[args.target_capacity], args.per_layer)
    found = fitted[args.target_capacity][1]
    record = Calibration(
        command=command,
        data=list(args.data),
        samples=counts.used,
        rows=counts.to_dict(),
        per_layer=args.per_layer,
        target_capacity=args.target_capacity,
        kept=found.kept,
        standard_error=found.standard_error,
        kept_per_layer={str(layer): kept for layer, kept in found.kept_per_layer.items()},
        threshold=following.threshold,
        cutoff=following.cutoff,
        lowest_scores=meter.lowest,
        highest_scores=meter.highest,
        operating_points=[
            _point(target, fitted[target], args.per_layer)
            for target in sorted(set(args.operating_points), reverse=True)
        ],
    )
    if following.version != config.version:
        log.warning("%s: no threshold tells these scores apart; written as version 2, with 'cutoff'", directory)
    write_calibration(directory, record)
    write_mod_config(directory, following)
    card.write(directory)
    return record


def _set(config: ModConfig, fitted: Fitted, per_layer: bool) -> ModConfig:
    """The checkpoint's config with what was found: cutoffs in version 2, thresholds in version 1 if they can say it."""
    cutoffs, found = fitted
    thresholds = thresholds_like(cutoffs, found)
    if thresholds is not None and (config.version == 1 or any(map(math.isinf, cutoffs))):
        return config.with_threshold(_plain(thresholds, per_layer))
    return config.with_cutoff(_plain(cutoffs, per_layer))


def _point(target: float, fitted: Fitted, per_layer: bool) -> OperatingPoint:
    cutoffs, found = fitted
    thresholds = thresholds_like(cutoffs, found)
    return OperatingPoint(
        target=target,
        kept=found.kept,
        threshold=None if thresholds is None else _plain(thresholds, per_layer),
        cutoff=None if any(map(math.isinf, cutoffs)) else _plain(cutoffs, per_layer),
    )


def _plain(values: Sequence[float], per_layer: bool) -> float | tuple[float, ...]:
    """One number where all layers share it and were not asked for one by one."""
    return values[0] if len(set(values)) == 1 and not per_layer else tuple(values)


def report(record: Calibration, directory: str) -> None:
    """What was set, and how each operating point is asked of vLLM."""
    print(f"kept on calibration data: {record.kept:.4f} (target {record.target_capacity:g})", end="")
    print(f" ± {record.standard_error:.4f} from one draw of {record.samples} samples to another")
    config = read_mod_config(directory)
    for point in record.operating_points:
        print(f"kept {point.kept:.4f}: {' or '.join(ways_to_ask(point, config))}")
    print(f"written: {directory}")


def _checked(args: CalibrateArguments) -> tuple[Path, ModConfig]:
    directory, config = checkpoint_config(args.checkpoint, args.model)
    if config.is_static:
        raise ConfigError(f"{directory}: {config.granularity} has no routers, so there is no threshold to calibrate")
    for flag, values in (("--target-capacity", [args.target_capacity]), ("--operating-points", args.operating_points)):
        for value in values:
            if not 0 <= value <= 1:
                raise ConfigError(f"{flag} {value:g}: a kept ratio from 0 to 1 is needed")
    check_fraction(args.eval_fraction)
    for flag, number in (("--max-samples", args.max_samples), ("--batch-size", args.batch_size)):
        if number < 1:
            raise ConfigError(f"{flag} {number}: at least 1 is needed")
    return directory, config


def _batches(args: CalibrateArguments, config: ModConfig, base: Path) -> tuple[list[dict[str, Tensor]], Counts]:
    """The calibration data in batches of similar length, and what became of its rows."""
    tables = read_sources(args.data)
    rows = split_tail(tables, args.eval_fraction)[1 if args.eval_fraction else 0]
    tokenizer = load_tokenizer(base)
    samples, counts = tokenize(rows, tokenizer, args.max_length, args.max_samples)
    log.info("calibration data: %s", counts)
    if counts.used < FEWEST_PROMPTS:
        names = ", ".join(args.data)
        raise ConfigError(f"{names}: {counts.used} usable prompts ({counts}); at least {FEWEST_PROMPTS} are needed")
    check_vocabulary(base, samples)
    return collate(list(samples), config, args.batch_size), counts


def collate(samples: list[dict[str, Any]], config: ModConfig, batch_size: int) -> list[dict[str, Tensor]]:
    """Batches of similar length, without labels. A sequence-level decision needs the prompt alone, or its window."""
    if config.policy.by_request:
        samples = [_deciding(sample, config.window) for sample in samples]
    samples = sorted(samples, key=lambda s: len(s["input_ids"]))
    collator = Collator(0)  # what fills the masked places does not matter
    batches = [collator(samples[i : i + batch_size]) for i in range(0, len(samples), batch_size)]
    return [{name: tensor for name, tensor in batch.items() if name != "labels"} for batch in batches]


def _deciding(sample: dict[str, Any], window: int | None) -> dict[str, Any]:
    """A sample cut to the tokens that decide. Without a prompt all of it is one, as in the reference."""
    prompt = sample["prompt_len"] or len(sample["input_ids"])
    length = min(prompt, window or prompt)
    return sample | {"prompt_len": length} | {key: sample[key][:length] for key in ("input_ids", "labels")}
