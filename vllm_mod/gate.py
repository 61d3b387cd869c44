"""Scores and decisions of a router (Router-Tuning, arXiv 2410.13184, eq. 2-4), plain torch.

The one place where both the reference and the engine compute them: `keep = w . x >= logit(threshold)`.
Scores are reduced row by row in float32, never with a GEMM, so that a row's score does not depend on
how many other rows are in the batch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def token_scores(x: Tensor, weight: Tensor) -> Tensor:
    """`w . x` in float32.

    x: `[..., hidden]`, the sublayer's input after its norm. weight: `[1, hidden]`. Returns `[...]`.
    """
    return (x.float() * weight.float().view(-1)).sum(-1)


def pair_scores(x: Tensor, weight: Tensor, experts: Tensor) -> Tensor:
    """`w_e . x` in float32 of every (token, expert) pair that the model's own top-k selected.

    x: `[N, hidden]`, the MoE layer's input after its norm. weight: `[num_experts, hidden]`. experts: int `[N, K]`.
    Returns `[N, K]`.
    """
    weight = weight.float()
    # One of the K places at a time: K times the hidden states would not fit.
    return torch.stack([(x.float() * weight[place.long()]).sum(-1) for place in experts.unbind(-1)], dim=-1)


def segment_means(scores: Tensor, lengths: Tensor) -> Tensor:
    """Mean of each consecutive segment of `scores` `[N]`, in float64: the score of a sequence.

    `w . mean(x)` equals the mean of `w . x`. lengths: int64 `[S]`, all positive, summing to N.
    """
    return torch.segment_reduce(scores.double(), "mean", lengths=lengths)


def keeps(scores: Tensor, cutoff: float) -> Tensor:
    """Decision per score; `cutoff` is `logit(threshold)`, -inf keeps and +inf skips everything, whatever the score.

    Between those a NaN score keeps: a broken input must not silently change the model's depth.
    """
    if math.isinf(cutoff):
        return torch.full_like(scores, cutoff < 0, dtype=torch.bool)
    return ~(scores < cutoff)
