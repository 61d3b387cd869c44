"""Cutoffs from the scores on calibration data, so that the kept ratio is what is asked.

A cutoff is put between two neighbouring scores. Decisions of one layer change the scores of the next, so scores are
collected again under the new cutoffs until the kept ratio, measured with the real decisions, is as near as the number
of samples allows. Per-layer cutoffs settle layer by layer; a global one is a fixed point, found by bisection where
later layers jump. With a decision window no decision changes a score: the tokens that decide run dense.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from vllm_mod.config import ConfigError, ModConfig, logit, sigmoid
from vllm_mod.gate import keeps

from .model import given_prompts, routing_of

#: Kept ratios this near to the target are not improved any further.
NEAR_ENOUGH = 0.0005


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

    def keeps(self, cutoffs: Sequence[float]) -> Tensor:
        """bool: what these cutoffs would keep of all these scores."""
        return torch.cat([keeps(s, c) for s, c in zip(self.scores.values(), cutoffs, strict=True)])


def ratio(pairs: Tensor) -> float:
    """`[samples, 2]` -> kept / routed."""
    kept, routed = pairs.sum(0).tolist()
    return kept / routed


@torch.no_grad()
def measure(
    model: Any, batches: Sequence[Mapping[str, Tensor]], cutoffs: Sequence[float] | None = None, title: str = ""
) -> Measured:
    """Scores and decisions of a routed model under other cutoffs than its own (None: those)."""
    state = routing_of(model)
    scores: dict[int, list[Tensor]] = {layer: [] for layer in state.config.layers}
    pairs: dict[int, list[Tensor]] = {layer: [] for layer in state.config.layers}
    before, state.cutoffs = state.cutoffs, None if cutoffs is None else tuple(cutoffs)
    try:
        for batch in tqdm(batches, desc=title, unit="batch", leave=False, disable=None if title else True):
            inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
            with given_prompts(model, inputs.pop("prompt_mask")):
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
        state.cutoffs = before
    return Measured({i: torch.cat(s) for i, s in scores.items()}, {i: torch.cat(p) for i, p in pairs.items()})


class Meter:
    """Measures a routed model on calibration data under any cutoffs; knows the range of all scores it has seen."""

    def __init__(self, model: Any, batches: Sequence[Mapping[str, Tensor]]) -> None:
        self.model, self.batches = model, batches
        self.config: ModConfig = routing_of(model).config
        self.lowest = [math.inf] * len(self.config.layers)
        self.highest = [-math.inf] * len(self.config.layers)
        self._scores: dict[int, Tensor] | None = None  #: of all passes, where decisions do not change them

    def __call__(self, cutoffs: Sequence[float], title: str = "") -> Measured:
        found = self._decide(cutoffs) if self._scores else measure(self.model, self.batches, cutoffs, title)
        if self.config.window is not None:
            self._scores = found.scores
        for place, (layer, scores) in enumerate(found.scores.items()):
            if not scores.isfinite().all():
                raise ConfigError(f"layer {layer}: scores are not finite; the base model overflows on these samples")
            self.lowest[place] = min(self.lowest[place], float(scores.min()))
            self.highest[place] = max(self.highest[place], float(scores.max()))
        return found

    def _decide(self, cutoffs: Sequence[float]) -> Measured:
        assert self._scores is not None
        pairs = {}
        for (layer, scores), cutoff in zip(self._scores.items(), cutoffs, strict=True):
            keep = keeps(scores, cutoff)
            pairs[layer] = torch.stack([keep, torch.ones_like(keep)], -1).double()
        return Measured(self._scores, pairs)


def cutoff_for(scores: Tensor, target: float) -> float:
    """The cutoff that keeps `target` of `scores`, in the middle of the gap it lies in; beyond the last one for none
    or all of them, by as much as they spread (1 if they do not). Finite.

    Equal scores are kept or skipped together: of the two ratios around the target the nearer one is taken.
    """
    ordered = scores.double().sort(descending=True).values
    total = len(ordered)
    wanted = target * total
    keep = round(wanted)
    if 0 < keep < total and ordered[keep - 1] == ordered[keep]:
        first, last = (int((ordered > ordered[keep]).sum()), int((ordered >= ordered[keep]).sum()))
        keep = first if wanted - first <= last - wanted else last
    highest, lowest = float(ordered[0]), float(ordered[-1])
    spread = highest - lowest or 1.0
    if keep == 0 or keep == total:
        return highest + spread if keep == 0 else lowest - spread
    upper, lower = float(ordered[keep - 1]), float(ordered[keep])
    middle = (upper + lower) / 2
    as_compared = torch.tensor(middle, dtype=scores.dtype)  # token scores are float32
    return middle if float(as_compared) > lower else upper


def fit(
    meter: Meter, start: Sequence[float], target: float, per_layer: bool, prior: Sequence[float]
) -> tuple[tuple[float, ...], Measured]:
    """Cutoffs per layer that keep `target`, and what they were measured to keep.

    start: cutoffs to begin with. prior: what a layer's cutoff is above the one that all share; not used per layer.
    """
    if target in (0, 1):
        cutoffs = tuple([-math.inf if target else math.inf] * len(start))
        return cutoffs, meter(cutoffs, f"kept ratio {target:g}")
    best: tuple[float, tuple[float, ...], Measured] | None = None
    low, high = -math.inf, math.inf  # the shared cutoff lies between them: the lower one keeps too much
    cutoffs, shared = tuple(start), _shared(start, prior)
    for attempt in range(len(cutoffs) + 8):
        found = meter(cutoffs, f"kept ratio {target:g}, pass {attempt + 1}")
        distance = found.distance(target, per_layer)
        if best is None or distance < best[0]:
            best = distance, cutoffs, found
        if per_layer:
            groups = list(found.scores.values())
        else:
            groups = [torch.cat([s.double() - p for s, p in zip(found.scores.values(), prior, strict=True)])]
        if distance <= max(0.5 / min(map(len, groups)), NEAR_ENOUGH):
            break
        values = [cutoff_for(group, target) for group in groups]
        if per_layer:
            following = tuple(values)
        else:
            if shared is not None:
                low, high = (shared, high) if found.kept > target else (low, shared)
            shared = values[0] if low < values[0] < high else _between(low, high, groups[0])
            following = tuple(shared + p for p in prior)
        if following == cutoffs:
            break
        cutoffs = following
    assert best is not None
    return best[1:]


def _shared(cutoffs: Sequence[float], prior: Sequence[float]) -> float | None:
    """The one number by which `cutoffs` are above `prior`."""
    above = {c - p for c, p in zip(cutoffs, prior, strict=True)}
    return above.pop() if len(above) == 1 and math.isfinite(min(above)) else None


def _between(low: float, high: float, scores: Tensor) -> float:
    """A number between two bounds, at most one of them infinite: later layers answered with a jump."""
    if math.isinf(low):
        low = min(float(scores.min()), high) - 1.0
    if math.isinf(high):
        high = max(float(scores.max()), low) + 1.0
    return (low + high) / 2


def thresholds_like(cutoffs: Sequence[float], found: Measured) -> tuple[float, ...] | None:
    """Thresholds that decide all these scores as `cutoffs` do; None where a sigmoid cannot tell them apart."""
    thresholds = tuple(sigmoid(c) for c in cutoffs)
    same = torch.equal(found.keeps(cutoffs), found.keeps([logit(t) for t in thresholds]))
    return thresholds if same else None
