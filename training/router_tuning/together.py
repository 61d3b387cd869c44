"""What a request skips costs more together than one by one: measured, for a few ways to choose it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .data import Collator
from .layerwise import Batch, answer_predictions, divergences, supervised
from .routing import routing_of
from .selection import batches_of, tokens_of_a_forward


@torch.no_grad()
def divergence(
    model: Any, samples: Sequence[Mapping[str, Any]], skips: Sequence[Tensor], quiet: bool = False
) -> tuple[Tensor, Tensor]:
    """KL of the dense model's predictions to those of each choice, summed over a sample's answer tokens.

    model: in evaluation mode, with routers, whose own decisions do not matter, and whatever stands in for what is
    skipped. skips: bool `[N, layers]` each, which of the model's routed layers a sample skips. Returns nats, float64
    `[skips, N]`, and answer tokens, float64 `[N]`. Costs one more forward than there are choices.
    """
    order = sorted(range(len(samples)), key=lambda i: len(samples[i]["input_ids"]))
    batches = batches_of([len(samples[i]["input_ids"]) for i in order], tokens_of_a_forward(model))
    nats = torch.zeros(len(skips), len(samples), dtype=torch.float64)
    tokens = torch.zeros(len(samples), dtype=torch.float64)
    total = len(batches) * (len(skips) + 1)
    state = routing_of(model)
    state.cutoffs = tuple(0.0 for _ in state.config.layers)
    progress = tqdm(total=total, desc="skipped together", unit="forward", disable=True if quiet else None)

    def predictions(batch: Batch, skip: Tensor) -> Tensor:
        scores = torch.where(skip, -1.0, 1.0).double()
        found = answer_predictions(model, {**batch, "scores": scores})
        progress.update()
        return found

    with progress:
        try:
            for places in batches:
                these = [order[place] for place in places]
                batch = Collator(0)([dict(samples[i]) for i in these])
                answers = supervised(batch)
                tokens[these] = answers.sum(1).double()
                dense = predictions(batch, torch.zeros_like(skips[0][these]))
                for choice, skip in enumerate(skips):
                    lost = divergences(predictions(batch, skip[these]), dense).double().cpu()
                    nats[choice, these] = nats.new_zeros(len(these)).index_add_(0, answers.nonzero()[:, 0], lost)
        finally:
            state.cutoffs = None
    return nats, tokens
