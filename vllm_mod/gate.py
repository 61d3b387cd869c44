"""Scores and decisions of a router (Router-Tuning, arXiv 2410.13184, eq. 2-4), and patches; plain torch.

The one place where both the reference and the engine compute them: `keep = w . x >= cutoff`.
Scores are reduced row by row in float32, never with a GEMM, so that a row's score does not depend on
how many other rows are in the batch. A patch decides nothing: its two products are GEMMs in the model's dtype.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import linear


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


def decision_lengths(prompt_lengths: Tensor, window: int | None) -> Tensor:
    """How many of its first tokens a sequence is decided by: `min(window, prompt)`; all of the prompt without a window.

    With a window these tokens always run the sublayer, and later ones follow the decision. prompt_lengths: int `[S]`.
    """
    return prompt_lengths if window is None else prompt_lengths.clamp(max=min(window, torch.iinfo(torch.int32).max))


def segment_sums(scores: Tensor, lengths: Tensor) -> Tensor:
    """Sum of each consecutive segment of `scores` `[N]`, in float64; 0 of an empty one.

    lengths: int64 `[S]`, summing to N. Float32 scores of a like size add up exactly in float64, so a sum of partial
    sums (a window that came in several chunks) is the same number.
    """
    if not lengths.numel():  # which segment_reduce refuses
        return scores.new_zeros(0, dtype=torch.float64)
    return torch.segment_reduce(scores.double(), "sum", lengths=lengths, initial=0.0)


def segment_means(scores: Tensor, lengths: Tensor) -> Tensor:
    """Mean of each consecutive segment of `scores` `[N]`, in float64: the score of a sequence.

    `w . mean(x)` equals the mean of `w . x`. lengths: int64 `[S]`, all positive, summing to N.
    """
    return segment_sums(scores, lengths) / lengths


def keeps(scores: Tensor, cutoff: float) -> Tensor:
    """Decision per score; a cutoff of -inf keeps and +inf skips everything, whatever the score.

    Between those a NaN score keeps: a broken input must not silently change the model's depth.
    """
    if math.isinf(cutoff):
        return torch.full_like(scores, cutoff < 0, dtype=torch.bool)
    return ~(scores < cutoff)


def apply_patch(x: Tensor, bias: Tensor, down: Tensor | None = None, up: Tensor | None = None) -> Tensor:
    """What a skipped sublayer adds to the residual: `up (down x) + bias`; the bias alone where the rank is 0.

    x: `[..., hidden]`, the sublayer's input after its norm. bias: `[hidden]`. down: `[rank, hidden]`, up:
    `[hidden, rank]`. Returns `[..., hidden]`, computed in x's dtype as the sublayer is (float32 in the reference).
    """
    bias = bias.to(x.dtype)
    if down is None or up is None:
        return bias.expand(x.shape)
    return linear(linear(x, down.to(x.dtype)), up.to(x.dtype), bias)
