"""Routers in closed form: they predict what skipping a layer costs a request, and skip where that is least.

    log c_rl ~ a_l + w_l . x_rl        c: nats per answer token if layer l skips (`selection`), x: what a router sees
    keep where   w_l . x_rl >= cutoff_l = log(price) - a_l

Ridge regression per layer, its strength chosen by the error on samples left out. Where nothing is learned w_l is zero,
and what is left is the best static drop by measured costs: one price for all layers, so cheap ones are skipped first.

A sample counts as many times as its answer has tokens: in the regression, and in what is kept. Work is done, and
spared, token by token; short answers are often the cheap ones, so that as many skips by request would spare less.
"""

from __future__ import annotations

import math
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
    #: float64 `[N]`: log of the cost of each sample, by a fit that had not seen its prompt, or the mean of all
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

    #: `[N]`: what a sample counts, 1 on average
    weights: Tensor
    mean: Tensor
    #: times the root of the weights, as are the vectors
    centred: Tensor
    #: of the samples' Gram matrix: eigenvalues `[k]`, above zero, and eigenvectors `[N, k]`
    values: Tensor
    vectors: Tensor
    #: the samples of each prompt that has more than one
    together: tuple[Tensor, ...]

    @classmethod
    def of(cls, inputs: Tensor, tokens: Tensor, prompts: Tensor | None = None) -> Inputs:
        """inputs: `[N, hidden]`, of any float type; tokens: `[N]`, of the samples' answers; prompts: int64 `[N]`, which
        prompt each sample has (None: each its own).

        One eigendecomposition of the smaller of the two sides.
        """
        weights = tokens.double().clamp(min=1.0)
        weights /= weights.mean()
        mean = (inputs.double() * weights[:, None]).mean(0)
        centred = (inputs.double() - mean) * weights.sqrt()[:, None]
        if len(centred) <= centred.shape[1]:
            values, vectors = torch.linalg.eigh(centred @ centred.T)
        else:
            values, directions = torch.linalg.eigh(centred.T @ centred)
            vectors = centred @ directions / values.clamp(min=1e-300).sqrt()
        there = values > values[-1].clamp(min=0) * 1e-12
        numbers, counts = (torch.arange(len(inputs)) if prompts is None else prompts).unique(return_counts=True)
        together = tuple((prompts == number).nonzero()[:, 0] for number in numbers[counts > 1])
        return cls(weights, mean, centred, values[there], vectors[:, there], together)

    def left_out(self, residual: Tensor, shrunk: Tensor) -> Tensor:
        """Of a regression's residuals `[N]`, those of fits that had not seen the sample, nor another of its prompt.

        shrunk: `[k]`, which part of each direction is fitted: (I - H)^-1 of each prompt's block, of the hat matrix H.
        The mean's part of it adds nothing to a target without one.
        """
        number, root = len(residual), self.weights.sqrt()
        found = residual / (1.0 - self.vectors.square() @ shrunk - self.weights / number).clamp(min=1e-9)
        for these in self.together:
            own, weight = self.vectors[these], root[these]
            rest = torch.eye(len(these), dtype=own.dtype) * (1 + 1e-9) - (own * shrunk) @ own.T
            found[these] = torch.linalg.solve(rest - weight[:, None] * weight / number, residual[these])
        return found


def fit_router(inputs: Inputs, nats: Tensor, ridges: Sequence[float] = RIDGES) -> CostRouter:
    """nats: `[N]`. At least 3 samples."""
    y, number, weights = nats.double().clamp(min=_FLOOR).log(), len(nats), inputs.weights
    mean_y, root = (weights * y).mean(), weights.sqrt()
    target, values, vectors = root * (y - mean_y), inputs.values, inputs.vectors
    unit = values.sum() / number
    alone = inputs.left_out(target, torch.zeros_like(values))  # the mean of the others is as good a guess as any
    # What the mean predicts is the same for all, so that such a layer is kept by all or by none.
    best, weight, left = float(alone.square().sum()), torch.zeros_like(inputs.mean), target
    for ridge in ridges if unit > 0 else ():
        shrunk = values / (values + ridge * unit)
        along = vectors.T @ target
        residual = inputs.left_out(target - vectors @ (shrunk * along), shrunk)
        if float(residual.square().sum()) < best:
            weight = inputs.centred.T @ (vectors @ (along / (values + ridge * unit)))
            best, left = float(residual.square().sum()), residual
    predicted = mean_y + (target - left) / root  # exactly the same for all where nothing was learned
    # The mean of a log is not the log of the mean: shifted so that predicted costs add up to the measured ones.
    measured, fitted = (float((weights * costs).mean()) for costs in (nats.double(), predicted.exp()))
    shift = math.log(max(measured, _FLOOR)) - math.log(fitted)
    weight = weight.float()
    return CostRouter(
        weight[None],
        float(mean_y - weight.double() @ inputs.mean) + shift,
        predicted + shift,
        1.0 - best / max(float(alone.square().sum()), 1e-300),
    )


def price(routers: Sequence[CostRouter], kept: float, tokens: Tensor) -> float:
    """Log of the price at which the predicted costs keep this ratio of token-layer pairs, or as near as ties allow.

    tokens: `[N]`, see `Inputs.of`.
    """
    return cut(torch.stack([router.predicted for router in routers], 1), kept, tokens)


def cut(costs: Tensor, kept: float, tokens: Tensor) -> float:
    """A value that this ratio of token-layer pairs is not below, or as near as ties allow. costs: `[N, layers]`."""
    values, order = costs.double().flatten().sort()
    skipped = tokens.double()[:, None].expand_as(costs).flatten()[order].cumsum(0)
    # Pairs that are equal go together: cut before or behind them, whichever is nearer.
    places = torch.cat([torch.tensor([True]), values[1:] > values[:-1], torch.tensor([True])]).nonzero().flatten()
    shares = torch.cat([torch.zeros(1, dtype=torch.float64), skipped / skipped[-1]])[places]
    place = int(places[(shares - (1.0 - kept)).abs().argmin()])
    if place == 0:
        return float(values[0]) - 1.0
    return float(values[-1]) + 1.0 if place == len(values) else float(values[place - 1] + values[place]) / 2


def spared(layers: Sequence[int], routers: Mapping[int, CostRouter], skipped: float, tokens: Tensor) -> list[int]:
    """The layers worth a router if a token skips so many on average: those that more than a few requests would skip."""
    log_price = price([routers[layer] for layer in layers], 1.0 - skipped / len(layers), tokens)
    return [layer for layer in layers if float((routers[layer].predicted < log_price).double().mean()) >= _FEW]


@dataclass(frozen=True)
class Saving:
    """Nats per answer token of all that is skipped, layers taken by themselves, as many by token."""

    routed: float
    #: the cheapest layers for everyone
    static: float
    #: each request's own cheapest, known with hindsight
    oracle: float


def saving(measured: Measured, routers: Sequence[CostRouter], places: Sequence[int], log_price: float) -> Saving:
    """By predictions of fits that had not seen the sample. places: the routed layers, as columns of `measured`."""
    nats = measured.nats[:, list(places)]
    share = (measured.tokens / measured.tokens.sum())[:, None].expand_as(nats)
    skip = torch.stack([router.predicted for router in routers], 1) < log_price
    number = float(share[skip].sum())
    cheap = nats[:, (nats * share).sum(0).argsort()]  # layer by layer, the last one for as many as are left
    static = (cheap * share).sum(0) * (number - torch.arange(nats.shape[1])).clamp(0, 1)
    least = nats.flatten().argsort()
    spent = share.flatten()[least]
    oracle = nats.flatten()[least] * (number - (spent.cumsum(0) - spent)).clamp(min=0).minimum(spent)
    return Saving(*(float(part.sum()) for part in ((nats * share)[skip], static, oracle)))
