"""Patches after their fit: a few steps that bring the routed model's predictions nearer to the dense model's.

    minimise   mean over answer tokens of KL(p || q)      p: nothing is skipped, q: as the routers decide

in the patches alone; routers, thresholds and base stay. The closed form makes each sublayer's output right on average,
whatever becomes of it; this weighs its errors by what they do to the predictions.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from vllm_mod.config import ConfigError

from .data import Collator
from .layerwise import Batch, answer_predictions, divergences
from .patches import HELD_OUT
from .routing import routing_of

#: Samples of a step.
_BATCH = 8
#: Adam's, falling to zero: entries of a fitted patch are about 0.01 to 0.1.
RATE = 1e-3


@dataclass(frozen=True)
class Distilled:
    """Nats per answer token of the samples held out."""

    before: float
    after: float
    #: 0 where nothing was gained: the patches are then what they were
    steps: int


def distill(
    model: Any, samples: Sequence[Mapping[str, Any]], passes: int = 1, rate: float = RATE, quiet: bool = False
) -> Distilled:
    """Passes over `samples`, but for every tenth: these say whether it helped; if not, patches stay as they were.

    model: routed, not static, in evaluation mode, with patches; its parameters are frozen. A pass costs about three
    forwards. Raises ConfigError where a loss is not finite.
    """
    state = routing_of(model)
    model.requires_grad_(False)
    parameters = [parameter for patch in state.patches.values() for parameter in patch.parameters()]
    held_out, rest = _batches(samples[::HELD_OUT]), _batches([s for i, s in enumerate(samples) if i % HELD_OUT])
    steps = [batch for number in range(passes) for batch in random.Random(number).sample(rest, len(rest))]
    fitted = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.Adam(parameters, lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(steps))
    progress = tqdm(total=len(steps) + 2 * len(held_out), desc="distilling patches", disable=True if quiet else None)
    with progress:
        before = _mean(model, held_out, progress)
        for parameter in parameters:
            parameter.requires_grad_(True)
        try:
            for batch in steps:
                loss = _divergences(model, batch).mean()
                if not loss.isfinite():
                    raise ConfigError("distilling: the loss is not finite; the base model overflows on these samples")
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                schedule.step()
                progress.update()
                progress.set_postfix_str(f"{loss.item():.3f} nats per token")
        finally:
            for parameter in parameters:
                parameter.requires_grad_(False)
        after = _mean(model, held_out, progress)
    if after < before:
        return Distilled(before, after, len(steps))
    for parameter, value in zip(parameters, fitted, strict=True):
        parameter.data.copy_(value)
    return Distilled(before, before, 0)


def _batches(samples: Sequence[Mapping[str, Any]]) -> list[Batch]:
    """Of similar length."""
    order = sorted(samples, key=lambda sample: len(sample["input_ids"]))
    return [Collator(0)([dict(s) for s in order[first : first + _BATCH]]) for first in range(0, len(order), _BATCH)]


@torch.no_grad()
def _mean(model: Any, batches: Sequence[Batch], progress: Any) -> float:
    found = []
    for batch in batches:
        found.append(_divergences(model, batch))
        progress.update()
    return float(torch.cat(found).double().mean())


def _divergences(model: Any, batch: Batch) -> Tensor:
    """KL of each answer token, float32 `[tokens]`."""
    state = routing_of(model)
    state.cutoffs = tuple(float("-inf") for _ in state.config.layers)
    try:
        with torch.no_grad():
            dense = answer_predictions(model, batch)
    finally:
        state.cutoffs = None
    return divergences(answer_predictions(model, batch), dense)
