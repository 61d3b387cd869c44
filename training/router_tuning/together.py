"""What a request skips costs more together than one by one: measured, for a few ways to choose it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .data import Collator
from .layerwise import answer_predictions, divergences, supervised
from .routing import ModelRouting, routing_of
from .selection import batches_of, tokens_of_a_forward


class _Decided(nn.Module):
    """In place of a router: it skips for the requests it is told to. Cutoffs must be 0."""

    #: bool `[B]`
    skip: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """x: `[B, T, hidden]` -> scores `[B, T]`"""
        return torch.where(self.skip, -1.0, 1.0)[:, None].expand(x.shape[:2]).to(x.device)


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
    with (
        _deciding(routing_of(model)) as routers,
        tqdm(total=total, desc="skipped together", unit="forward", disable=True if quiet else None) as progress,
    ):
        for places in batches:
            these = [order[place] for place in places]
            batch = Collator(0)([dict(samples[i]) for i in these])
            answers = supervised(batch)
            tokens[these] = answers.sum(1).double()

            def predictions(skip: Tensor, batch: Any = batch) -> Tensor:
                for place, router in enumerate(routers):
                    router.skip = skip[:, place]
                found = answer_predictions(model, batch)
                progress.update()
                return found

            dense = predictions(torch.zeros(len(these), len(routers), dtype=torch.bool))
            for choice, skip in enumerate(skips):
                lost = divergences(predictions(skip[these]), dense).double().cpu()
                nats[choice, these] = nats.new_zeros(len(these)).index_add_(0, answers.nonzero()[:, 0], lost)
    return nats, tokens


@contextlib.contextmanager
def _deciding(state: ModelRouting) -> Iterator[list[_Decided]]:
    """While it lasts, every routed layer does as it is told."""
    own = dict(state.routers)
    told = {layer: _Decided() for layer in state.config.layers}
    state.routers.update(told)  # type: ignore[arg-type]
    state.cutoffs = tuple(0.0 for _ in told)
    try:
        yield list(told.values())
    finally:
        state.routers.update(own)
        state.cutoffs = None
