"""The first tokens of a batch's rows, run once: in a window nothing is skipped, so their keys and values are the same
whatever is skipped behind them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from vllm_mod.gate import decision_lengths

from .layerwise import Batch, answer_logits, supervised
from .routing import routing_of


@dataclass(frozen=True)
class Past:
    """What attention needs of the first tokens of each row: per decoder layer `[B, heads, tokens, …]`."""

    #: both empty of no tokens
    keys: list[Tensor]
    values: list[Tensor]

    def cache(self) -> DynamicCache | None:
        """A cache of its own, for one forward of the tokens behind."""
        if not self.keys:
            return None
        cache = DynamicCache()  # of full layers: windows of attention are the mask's
        for layer, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            cache.update(keys, values, layer)
        return cache


@contextlib.contextmanager
def decisions_given(model: Any) -> Iterator[None]:
    """While it lasts, batches say which layers their rows skip, see `skipping`."""
    state = routing_of(model)
    state.cutoffs = tuple(0.0 for _ in state.config.layers)
    try:
        yield
    finally:
        state.cutoffs = None


def skipping(batch: Batch, skips: Tensor) -> Batch:
    """A batch whose rows skip these of the routed layers, bool `[B, layers]`, while `decisions_given` lasts."""
    return {**batch, "scores": torch.where(skips, -1.0, 1.0).double()}


def with_past(model: Any, batch: Batch) -> tuple[Tensor, Past]:
    """`answer_logits` of a batch that skips nothing (`skipping`), and what need not run again for others."""
    length = past_length(model, batch)
    if not length:
        return answer_logits(model, batch), Past([], [])
    cache = DynamicCache()
    logits = answer_logits(model, batch, cache=cache)
    layers: list[Any] = cache.layers
    # Copies, so that the other tokens' memory is free again.
    keys, values = ([getattr(layer, name)[:, :, :length].clone() for layer in layers] for name in ("keys", "values"))
    return logits, Past(keys, values)


def past_length(model: Any, batch: Batch) -> int:
    """With how many tokens each row begins that decide, and so run every layer, and that predict no answer.

    batch: as `Collator` makes it. 0 where the model has no window: its prompts skip as they decide.
    """
    window = routing_of(model).config.window
    if window is None:
        return 0
    deciding = int(decision_lengths(batch["prompt_mask"].sum(1), window).min())
    answers = supervised(batch).any(0).nonzero()
    return min(deciding, int(answers[0])) if len(answers) else 0
