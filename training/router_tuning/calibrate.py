"""`router-tuning calibrate`: thresholds from the scores on calibration data, so that the kept ratio is what is asked.

A threshold is put between two neighbouring scores. Decisions of one layer change the scores of the next, so scores are
collected again under the new thresholds until the kept ratio, measured with the real decisions, is as near as the
number of samples allows. Per-layer thresholds settle layer by layer; a global one is a fixed point, found by bisection
where later layers jump.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from vllm_mod.checkpoint import BaseShape, read_json, read_mod_config, read_routers, replace_json, write_thresholds
from vllm_mod.config import ConfigError, ModConfig

from . import card
from .arguments import CalibrateArguments
from .counts import Counts
from .data import Collator, check_sources, read_sources, split_tail, tokenize
from .export import local_model
from .model import attach_routers, load_base, load_reference, routing, routing_of
from .tokenizer import load_tokenizer

log = logging.getLogger(__name__)

FEWEST_PROMPTS = 8
#: Kept ratios this near to the target are not improved any further.
NEAR_ENOUGH = 0.0005
CALIBRATION_FILE = "calibration.json"
Thresholds = float | list[float]


@dataclass(frozen=True)
class Measured:
    """One pass over the calibration data."""

    #: All scores per routed layer, flat.
    scores: dict[int, Tensor]
    #: (kept, routed) pairs of every sample, float64 `[samples, 2]`, per routed layer.
    pairs: dict[int, Tensor]

    @property
    def kept_per_layer(self) -> dict[int, float]:
        return {layer: ratio(pairs) for layer, pairs in self.pairs.items()}

    @property
    def kept(self) -> float:
        """Executed / routed over all layers."""
        return ratio(self._samples)

    @property
    def standard_error(self) -> float:
        """Of `kept`, from sample to sample: how far another draw of as many samples is expected to be."""
        kept, routed = self._samples.unbind(-1)
        number = len(kept)
        return float((kept - self.kept * routed).std() * math.sqrt(number) / routed.sum()) if number > 1 else math.nan

    @property
    def _samples(self) -> Tensor:
        return torch.stack(list(self.pairs.values())).sum(0)

    def distance(self, target: float, per_layer: bool) -> float:
        """How far from what was asked: the ratio, or that of the worst layer."""
        found = self.kept_per_layer.values() if per_layer else [self.kept]
        return max(abs(kept - target) for kept in found)


def ratio(pairs: Tensor) -> float:
    """`[samples, 2]` -> kept / routed."""
    kept, routed = pairs.sum(0).tolist()
    return kept / routed


@torch.no_grad()
def measure(model: Any, batches: Sequence[Mapping[str, Tensor]], config: ModConfig, title: str = "") -> Measured:
    """Scores and decisions of a routed model under the thresholds of `config`."""
    state = routing_of(model)
    before, state.config = state.config, config
    scores: dict[int, list[Tensor]] = {layer: [] for layer in config.layers}
    pairs: dict[int, list[Tensor]] = {layer: [] for layer in config.layers}
    try:
        for batch in tqdm(batches, desc=title, unit="batch", leave=False, disable=None if title else True):
            inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
            with routing(model, inputs.pop("prompt_mask")):
                model(**inputs, logits_to_keep=1)  # logits are not needed
            for layer, decision in state.decisions.items():
                keep, valid = decision.keep, state.valid
                counted = torch.ones_like(keep)
                if valid is not None and keep.dim() > 1:
                    counted = valid.view(*valid.shape, *[1] * (keep.dim() - 2)).expand_as(keep)
                scores[layer].append(decision.score[counted].cpu())
                both = torch.stack([keep & counted, counted], -1).view(len(keep), -1, 2)
                pairs[layer].append(both.sum(1).double().cpu())
    finally:
        state.config = before
    return Measured({i: torch.cat(s) for i, s in scores.items()}, {i: torch.cat(p) for i, p in pairs.items()})


def threshold_for(scores: Tensor, target: float) -> float:
    """The threshold that keeps `target` of `scores`, in the middle of the gap it lies in.

    Equal scores are kept or skipped together: of the two ratios around the target the nearer one is taken.
    """
    ordered = scores.double().sort(descending=True).values
    total = len(ordered)
    wanted = target * total
    keep = round(wanted)
    if 0 < keep < total and ordered[keep - 1] == ordered[keep]:
        first, last = (int((ordered > ordered[keep]).sum()), int((ordered >= ordered[keep]).sum()))
        keep = first if wanted - first <= last - wanted else last
    if keep == 0 or keep == total:
        return float(keep == 0)
    return float(torch.sigmoid((ordered[keep - 1] + ordered[keep]) / 2))


def fit(
    model: Any, batches: Sequence[Mapping[str, Tensor]], config: ModConfig, target: float, per_layer: bool
) -> tuple[ModConfig, Measured]:
    """`config` with thresholds that keep `target`, and what they were measured to keep. Starts from config's own."""
    best: tuple[float, ModConfig, Measured] | None = None
    low, high = 0.0, 1.0  # a global threshold lies between them: the lower one keeps too much
    for attempt in range(len(config.layers) + 8):
        found = measure(model, batches, config, f"kept ratio {target:g}, pass {attempt + 1}")
        distance = found.distance(target, per_layer)
        if best is None or distance < best[0]:
            best = distance, config, found
        groups = list(found.scores.values()) if per_layer else [torch.cat(list(found.scores.values()))]
        if distance <= max(0.5 / min(map(len, groups)), NEAR_ENOUGH):
            break
        values = [threshold_for(group, target) for group in groups]
        if not per_layer and isinstance(config.threshold, float):
            low, high = (config.threshold, high) if found.kept > target else (low, config.threshold)
            if not low < values[0] < high and 0 < target < 1:
                values = [(low + high) / 2]  # later layers answered with a jump
        following = config_with(config, values if per_layer else values[0])
        if following == config:
            break
        config = following
    assert best is not None
    return best[1:]


def config_with(config: ModConfig, thresholds: Thresholds) -> ModConfig:
    return ModConfig.parse(config.model_dump() | {"threshold": thresholds}, "threshold")


# ---------------------------------------------------------------- the command


def calibrate(args: CalibrateArguments, command: str) -> dict[str, Any]:
    """Measure, rewrite the checkpoint's config, record; returns what calibration.json holds.

    Raises ConfigError, with the checkpoint as it was, on anything that cannot be calibrated.
    """
    directory, config = _checked(args)
    check_sources(args.data)
    base = directory if _is_full(directory) else local_model(args.model or config.base_model or "")
    batches, counts = _batches(args, config, base)
    model = _load(directory, config, base)
    points = {}
    for point in sorted({args.target_capacity, *args.operating_points}, reverse=True):
        fitted, found = fit(model, batches, config, point, args.per_layer)
        points[point] = fitted, found
        config = fitted if 0 < point < 1 else config  # the next one is near
    fitted, found = points[args.target_capacity]
    record = {
        "command": command,
        "data": list(args.data),
        "samples": counts.used,
        "rows": counts.to_dict(),
        "per_layer": args.per_layer,
        "target_capacity": args.target_capacity,
        "kept": found.kept,
        "standard_error": found.standard_error,
        "kept_per_layer": {str(layer): kept for layer, kept in found.kept_per_layer.items()},
        "threshold": _plain(fitted),
        "operating_points": [
            {"target": point, "kept": points[point][1].kept, "threshold": _plain(points[point][0])}
            for point in sorted(set(args.operating_points), reverse=True)
        ],
    }
    replace_json(directory / CALIBRATION_FILE, record)
    write_thresholds(directory, _plain(fitted))
    card.write(directory)
    return record


def report(record: Mapping[str, Any], directory: str) -> None:
    """What was set, and the line that sets each operating point in vLLM."""
    print(f"kept on calibration data: {record['kept']:.4f} (target {record['target_capacity']:g})", end="")
    print(f" ± {record['standard_error']:.4f} from one draw of {record['samples']} samples to another")
    for point in record["operating_points"]:
        knob = json.dumps({"mod": {"threshold": point["threshold"]}})
        print(f"kept {point['kept']:.4f}: --additional-config '{knob}'")
    print(f"written: {directory}")


def _plain(config: ModConfig) -> Thresholds:
    return list(config.threshold) if isinstance(config.threshold, tuple) else config.threshold


def _is_full(directory: Path) -> bool:
    return (directory / "config.json").is_file()


def _checked(args: CalibrateArguments) -> tuple[Path, ModConfig]:
    directory = Path(args.checkpoint)
    if not directory.is_dir():
        raise ConfigError(f"{directory}: no such checkpoint directory")
    config = read_mod_config(directory)
    if config.is_static:
        raise ConfigError(f"{directory}: {config.granularity} has no routers, so there is no threshold to calibrate")
    for flag, values in (("--target-capacity", [args.target_capacity]), ("--operating-points", args.operating_points)):
        for value in values:
            if not 0 <= value <= 1:
                raise ConfigError(f"{flag} {value:g}: a kept ratio from 0 to 1 is needed")
    if not 0 <= args.eval_fraction < 1:
        raise ConfigError(f"--eval-fraction {args.eval_fraction:g}: a number from 0 to below 1 is needed")
    for flag, number in (("--max-samples", args.max_samples), ("--batch-size", args.batch_size)):
        if number < 1:
            raise ConfigError(f"{flag} {number}: at least 1 is needed")
    if not _is_full(directory) and not (args.model or config.base_model):
        raise ConfigError(f"{directory}: names no base model; pass it with --model")
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
    return collate(list(samples), config, args.batch_size), counts


def collate(samples: list[dict[str, Any]], config: ModConfig, batch_size: int) -> list[dict[str, Tensor]]:
    """Batches of similar length, without labels. A sequence-level decision needs the prompt alone."""
    if config.level == "sequence":
        samples = [s | {k: s[k][: s["prompt_len"]] for k in ("input_ids", "labels")} for s in samples]
    samples = sorted(samples, key=lambda s: len(s["input_ids"]))
    collator = Collator(0)  # what fills the masked places does not matter
    batches = [collator(samples[i : i + batch_size]) for i in range(0, len(samples), batch_size)]
    return [{name: tensor for name, tensor in batch.items() if name != "labels"} for batch in batches]


def _load(directory: Path, config: ModConfig, base: Path) -> Any:
    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    if base == directory:
        model = load_reference(directory, dtype, config)
    else:
        shape = BaseShape.of(read_json(base / "config.json"), str(base / "config.json"))
        routers = read_routers(directory, config, shape)
        model = load_base(base, dtype).eval()
        attach_routers(model, config, routers)
    return model.to("cuda") if on_gpu else model
