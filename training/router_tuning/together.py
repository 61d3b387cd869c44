"""What a request skips costs more together than one by one: measured, for a few ways to choose it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .data import Collator
from .layerwise import answer_logits, supervised
from .past import decisions_given, skipping, with_past
from .per_token import mean_per_token
from .predictions import divergences, log_probabilities, losses
from .selection import batches_of, tokens_of_a_forward


@dataclass(frozen=True)
class Lost:
    """Against the dense model, in nats, summed over a sample's answer tokens: float64 `[choices, N]`."""

    #: KL of its predictions to those of each choice
    nats: Tensor
    #: what the answer's negative log-likelihood is higher by
    loss: Tensor
    #: float64 `[N]`, answer tokens
    tokens: Tensor

    def mean(self, name: str, choice: int) -> float:
        """Per token. name: `nats` or `loss`."""
        return float(getattr(self, name)[choice].sum() / self.tokens.sum())

    def above_first(self, name: str, choice: int) -> tuple[float, float]:
        """Per token, above the first choice, and its standard error over samples."""
        values = getattr(self, name)
        return mean_per_token(values[choice] - values[0], self.tokens)


@torch.no_grad()
def lost(model: Any, samples: Sequence[Mapping[str, Any]], skips: Sequence[Tensor], quiet: bool = False) -> Lost:
    """model: in evaluation mode, with routers, whose own decisions do not matter, and whatever stands in for what is
    skipped. skips: of each choice bool `[N, layers]`, which of the model's routed layers a sample skips. Costs one more
    forward than there are choices.
    """
    order = sorted(range(len(samples)), key=lambda i: len(samples[i]["input_ids"]))
    batches = batches_of([len(samples[i]["input_ids"]) for i in order], tokens_of_a_forward(model))
    nats = torch.zeros(len(skips), len(samples), dtype=torch.float64)
    loss = nats.clone()
    tokens = torch.zeros(len(samples), dtype=torch.float64)
    total = len(batches) * (len(skips) + 1)
    progress = tqdm(total=total, desc="skipped together", unit="forward", disable=True if quiet else None)

    with progress, decisions_given(model):
        for places in batches:
            these = [order[place] for place in places]
            batch = Collator(0)([dict(samples[i]) for i in these])
            answers = supervised(batch)
            tokens[these] = answers.sum(1).double()
            owners, labels = answers.nonzero()[:, 0], batch["labels"][:, 1:][answers].to(model.device)
            kept, past = with_past(model, skipping(batch, torch.zeros_like(skips[0][these])))
            progress.update()
            dense, likely = log_probabilities(kept), losses(kept, labels)
            for choice, skip in enumerate(skips):
                found = answer_logits(model, skipping(batch, skip[these]), cache=past.cache())
                progress.update()
                less_likely = losses(found, labels) - likely
                for sums, values in ((nats, divergences(found, dense)), (loss, less_likely)):
                    sums[choice, these] = nats.new_zeros(len(these)).index_add_(0, owners, values.double().cpu())
    return Lost(nats, loss, tokens)
