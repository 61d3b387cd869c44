"""Routers in closed form: they predict what skipping a layer costs a request, and skip where that is least.

    log c_rl ~ a_l + w_l . x_rl        c: nats per answer token if layer l skips (`selection`), x: what a router sees
    keep where   w_l . x_rl >= cutoff_l = log(price) - a_l

Ridge regression per layer, its strength chosen by the error on samples left out. Where nothing is learned w_l is zero,
and what is left is the best static drop by measured costs: one price for all layers, so cheap ones are skipped first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .selection import Measured

#: In units of the inputs' mean variance, per sample.
RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
#: Costs below it count as it does: nats per token.
_FLOOR = 1e-5
#: A router that fewer requests follow is not worth its place in the engine.
_FEW = 0.02


@dataclass(frozen=True)
class CostRouter:
    """One layer's."""

    #: float32 `[1, hidden]`; zero where costs could not be told apart
    weight: Tensor
    #: a_l: what the log of the cost is where the score is 0
    offset: float
    #: float64 `[N]`: log of the cost of each sample, predicted by a fit that had not seen it, or the mean of all
    predicted: Tensor
    #: share of the variance of the log costs that is predicted so
    explained: float


def moderated(nats: Tensor, share: float) -> Tensor:
    """Costs `[N, layers]` in which requests differ less in all layers alike: by this share, in logs, of what they do.

    What is skipped together costs more than its parts do one by one. Requests all of whose layers are cheap would skip
    most of them, and pay more for that than the others gain.
    """
    logs = nats.double().clamp(min=_FLOOR).log()
    level = logs.median(1, keepdim=True).values
    return (logs - (1.0 - share) * (level - level.mean())).exp()


@dataclass(frozen=True)
class Inputs:
    """What a router sees of the samples, `[N, hidden]` float64 about its mean, and its principal directions."""

    mean: Tensor
    centred: Tensor
    #: of the samples' Gram matrix: eigenvalues `[k]`, above zero, and eigenvectors `[N, k]`
    values: Tensor
    vectors: Tensor

    @classmethod
    def of(cls, inputs: Tensor) -> Inputs:
        """inputs: `[N, hidden]`, of any float type. One eigendecomposition of the smaller of the two sides."""
        mean = inputs.double().mean(0)
        centred = inputs.double() - mean
        if len(centred) <= centred.shape[1]:
            values, vectors = torch.linalg.eigh(centred @ centred.T)
        else:
            values, directions = torch.linalg.eigh(centred.T @ centred)
            vectors = centred @ directions / values.clamp(min=1e-300).sqrt()
        there = values > values[-1].clamp(min=0) * 1e-12
        return cls(mean, centred, values[there], vectors[:, there])


def fit_router(inputs: Inputs, nats: Tensor, ridges: Sequence[float] = RIDGES) -> CostRouter:
    """nats: `[N]`. At least 3 samples."""
    y = nats.double().clamp(min=_FLOOR).log()
    mean_y, number = y.mean(), len(y)
    target, values, vectors = y - mean_y, inputs.values, inputs.vectors
    unit = values.sum() / number
    alone = target * number / (number - 1)  # the mean of the others is as good a guess as any
    # What the mean predicts is the same for all, so that such a layer is kept by all or by none.
    best, weight, left = float(alone.square().sum()), torch.zeros_like(inputs.mean), target
    for ridge in ridges if unit > 0 else ():
        shrunk = values / (values + ridge * unit)
        along = vectors.T @ target
        # Of the hat matrix, what is fitted and the diagonal; its 1 / number adds nothing to a target of mean zero.
        residual = target - vectors @ (shrunk * along)
        residual /= (1.0 - vectors.square() @ shrunk - 1.0 / number).clamp(min=1e-9)
        if float(residual.square().sum()) < best:
            weight = inputs.centred.T @ (vectors @ (along / (values + ridge * unit)))
            best, left = float(residual.square().sum()), residual
    predicted = y - left
    # The mean of a log is not the log of the mean: shifted so that predicted costs add up to the measured ones.
    shift = float(nats.double().mean().clamp(min=_FLOOR).log() - predicted.exp().mean().log())
    weight = weight.float()
    return CostRouter(
        weight[None],
        float(mean_y - weight.double() @ inputs.mean) + shift,
        predicted + shift,
        1.0 - best / max(float(alone.square().sum()), 1e-300),
    )


def price(routers: Sequence[CostRouter], kept: float) -> float:
    """Log of the price at which the predicted costs keep this ratio of sample-layer pairs, or as near as ties allow."""
    return cut(torch.cat([router.predicted for router in routers]), kept)


def cut(costs: Tensor, kept: float) -> float:
    """A value that this ratio of `costs` is not below, or as near as ties allow."""
    costs = costs.flatten().sort().values
    skipped = round((1.0 - kept) * len(costs))
    if skipped == 0:
        return float(costs[0]) - 1.0
    if skipped == len(costs):
        return float(costs[-1]) + 1.0
    # Pairs that are equal go together: cut before or behind them, whichever is nearer.
    value = costs[skipped]
    first, behind = (int((costs < value).sum()), int((costs <= value).sum()))
    place = first if skipped - first <= behind - skipped else behind
    if place == 0:
        return float(costs[0]) - 1.0
    return float(costs[-1]) + 1.0 if place == len(costs) else float(costs[place - 1] + costs[place]) / 2


def spared(layers: Sequence[int], routers: Mapping[int, CostRouter], skipped: float) -> list[int]:
    """The layers worth a router if a request skips so many on average: those that more than a few would skip."""
    log_price = price([routers[layer] for layer in layers], 1.0 - skipped / len(layers))
    return [layer for layer in layers if float((routers[layer].predicted < log_price).double().mean()) >= _FEW]


@dataclass(frozen=True)
class Saving:
    """Nats per answer token of all that is skipped, layers taken by themselves, at the same kept ratio."""

    routed: float
    #: the cheapest layers for everyone
    static: float
    #: each request's own cheapest, known with hindsight
    oracle: float


def saving(measured: Measured, routers: Sequence[CostRouter], places: Sequence[int], log_price: float) -> Saving:
    """By predictions of fits that had not seen the sample. places: the routed layers, as columns of `measured`."""
    nats = measured.nats[:, list(places)]
    predicted = torch.stack([router.predicted for router in routers], 1)
    skip = predicted < log_price
    number = int(skip.sum())
    cheap = nats.mean(0).argsort()
    static = nats[:, cheap].T.flatten()[:number]  # layer by layer, the last one for as many as are left
    oracle = nats.flatten().sort().values[:number]
    rows = len(nats)
    return Saving(*(float(part.sum()) / rows for part in (nats[skip], static, oracle)))
