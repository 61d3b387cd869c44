"""The first tokens of a batch's rows, run once: in a window nothing is skipped, so their keys and values are the same
whatever is skipped behind them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import DynamicCache

from vllm_mod.gate import decision_lengths

from .data import IGNORED
from .routing import routing_of


@dataclass(frozen=True)
class Past:
    """What attention needs of the first tokens of each row."""

    #: that many, one or more
    length: int
    #: per decoder layer, `[B, heads, length, …]`
    keys: list[Tensor]
    values: list[Tensor]

    @classmethod
    def of(cls, cache: DynamicCache, length: int) -> Past | None:
        """Of a cache that all layers have filled, behind dense tokens; None of no tokens."""
        if not length:
            return None
        layers: list[Any] = cache.layers
        # Copies, so that the other tokens' memory is free again.
        keys, values = (
            [getattr(layer, name)[:, :, :length].clone() for layer in layers] for name in ("keys", "values")
        )
        return cls(length, keys, values)

    def cache(self) -> DynamicCache:
        """A cache of its own, for one forward of the tokens behind."""
        cache = DynamicCache()  # of full layers: windows of attention are the mask's
        for layer, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            cache.update(keys, values, layer)
        return cache


def past_length(model: Any, batch: Mapping[str, Tensor]) -> int:
    """With how many tokens each row begins that decide, and so run every layer, and that predict no answer.

    batch: as `Collator` makes it. 0 where the model has no window: its prompts skip as they decide.
    """
    window = routing_of(model).config.window
    if window is None:
        return 0
    deciding = int(decision_lengths(batch["prompt_mask"].sum(1), window).min())
    answers = (batch["labels"][:, 1:] != IGNORED).any(0).nonzero()
    return min(deciding, int(answers[0])) if len(answers) else 0
