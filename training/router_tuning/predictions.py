"""Predictions of the whole vocabulary compared, a few tokens at a time on a CPU.

What is made of a token's logits (as float32, as log probabilities, as terms of a sum) is each time as large as all of
them, and the largest thing that `fit` holds. Every token's numbers are its own, so they are the same to the bit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

#: Tokens at a time on a CPU, where more are no faster; on a GPU all of them, see `selection.tokens_of_a_forward`.
_TOKENS = 16


def log_probabilities(logits: Tensor) -> Tensor:
    """`[tokens, vocabulary]` of any float type -> float32."""
    return _in_blocks(lambda block: block.float().log_softmax(-1), logits)


def divergences(logits: Tensor, dense: Tensor) -> Tensor:
    """KL of each token in nats, `[tokens]`: of the dense model's log probabilities, float32, to what logits say."""
    return _in_blocks(_divergences, logits, dense)


def losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log probability of each token's label in nats, float32 `[tokens]`. labels: int64 `[tokens]`."""
    return _in_blocks(_losses, logits, labels)


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.float(), labels, reduction="none")


def _divergences(logits: Tensor, dense: Tensor) -> Tensor:
    predicted = logits.float().log_softmax(-1)
    return nn.functional.kl_div(predicted, dense, reduction="none", log_target=True).sum(-1)


def _in_blocks(function: Callable[..., Tensor], logits: Tensor, *others: Tensor) -> Tensor:
    if logits.is_cuda or len(logits) <= _TOKENS:
        return function(logits, *others)
    return torch.cat(
        [function(*block) for block in zip(*(each.split(_TOKENS) for each in (logits, *others)), strict=True)]
    )
