"""Reduced-rank ridge regression from sums over tokens: a patch in closed form, from data of any length.

    min over maps B of rank r and biases b:   sum over tokens |y - B x - b|^2 + ridge * |B|^2

x is what the patch will see, y what the sublayer would add. With all tokens' means taken out this is one
eigendecomposition of the covariance of x, for every ridge; the best B of rank r is the full-rank one, projected onto
the principal directions of what it fits (Mukherjee and Zhu, 2011).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_mod.tensors import Patch

#: Tried on held-out tokens; in units of the mean variance of an entry of x.
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


class Moments:
    """The normal equations of y on x, summed up in float64. Memory: two matrices `[hidden, hidden]`."""

    def __init__(self, hidden_size: int, device: torch.device | None = None) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.tokens: float = 0  #: each counts its weight
        self.x, self.y, self.yy = zeros(hidden_size), zeros(hidden_size), zeros()
        self.xx, self.xy = zeros(hidden_size, hidden_size), zeros(hidden_size, hidden_size)

    def add(self, x: Tensor, y: Tensor, weight: float = 1.0) -> None:
        """x, y: `[tokens, hidden]`, of any float type. weight: of each of these tokens."""
        x, y = x.double(), y.double()
        self.tokens += weight * len(x)
        self.x += weight * x.sum(0)
        self.y += weight * y.sum(0)
        self.yy += weight * y.square().sum()
        self.xx += weight * (x.T @ x)
        self.xy += weight * (x.T @ y)

    def __add__(self, other: Moments) -> Moments:
        total = Moments(len(self.x), self.x.device)
        for name, value in vars(self).items():
            setattr(total, name, value + getattr(other, name))
        return total

    def is_finite(self) -> bool:
        """Whether every x and y was: what is not stays in the sums."""
        return bool(self.xx.diagonal().isfinite().all() and self.yy.isfinite())

    def variance(self) -> float:
        """Of y about its mean, summed over tokens and entries."""
        return float(self.yy - self.y.square().sum() / self.tokens)

    def error(self, patch: Patch) -> float:
        """What `patch` leaves of y: squares, summed over tokens and entries."""
        bias = patch.bias.to(self.y)
        error = self.yy - 2 * bias @ self.y + self.tokens * bias.square().sum()
        if patch.down is not None and patch.up is not None:
            down, up = patch.down.to(self.x), patch.up.to(self.x)
            error += -2 * ((down @ self.xy) * up.T).sum() + 2 * (bias @ up) @ (down @ self.x)
            error += ((down @ self.xx @ down.T) * (up.T @ up)).sum()
        return float(error)


class Regression:
    """Patches of any ridge and rank from one set of moments."""

    def __init__(self, moments: Moments) -> None:
        tokens = moments.tokens
        self.mean_x, self.mean_y = moments.x / tokens, moments.y / tokens
        second = moments.xx / tokens
        values, self.directions = torch.linalg.eigh(second - torch.outer(self.mean_x, self.mean_x))
        self.variances = values.clamp(min=0.0)
        #: Below it a variance is what rounding has left.
        self.nothing = float(second.trace()) * len(values) * torch.finfo(torch.float64).eps
        self.cross = self.directions.T @ (moments.xy / tokens - torch.outer(self.mean_x, self.mean_y))

    @property
    def rank(self) -> int:
        """In how many directions x differs from token to token."""
        return int((self.variances > self.nothing).sum())

    def patch(self, rank: int, ridge: float) -> Patch:
        """The best one of this rank, float64; of rank 0 the mean of y."""
        if rank == 0:
            return Patch(self.mean_y)
        penalised = self.variances + ridge * self.variances.mean()
        inverse = torch.where(penalised > self.nothing, 1.0 / penalised, 0.0)
        fitted = inverse.sqrt()[:, None] * self.cross
        up = torch.linalg.eigh(fitted.T @ fitted).eigenvectors[:, -rank:].flip(1)
        down = (self.directions @ (inverse[:, None] * (self.cross @ up))).T
        return Patch(self.mean_y - up @ (down @ self.mean_x), down, up)


@dataclass(frozen=True)
class Fitted:
    """A layer's patch and how it was found."""

    #: float32, on the CPU
    patch: Patch
    #: chosen on held-out tokens; None of rank 0, which has none
    ridge: float | None
    #: share of the variance of y on held-out tokens that a patch of the others explains
    explained: float
    #: with the held-out ones, all of which the patch is of in the end
    tokens: int


class TooLowRank(ValueError):
    """The data differ in fewer directions than the patch is to have."""


def fit(train: Moments, held_out: Moments, rank: int, ridges: Sequence[float] = RIDGES) -> Fitted:
    """The ridge that leaves least on `held_out` when fitted on `train`; the patch is then fitted on both.

    Raises TooLowRank.
    """
    together = Regression(train + held_out)
    if together.rank < rank:
        raise TooLowRank(f"{math.ceil(train.tokens + held_out.tokens)} tokens differ in {together.rank} directions")
    trained = Regression(train)
    errors = {ridge: held_out.error(trained.patch(rank, ridge)) for ridge in (ridges if rank else ridges[:1])}
    ridge = min(errors, key=lambda r: errors[r])
    variance = held_out.variance()
    return Fitted(
        _in_float32(together.patch(rank, ridge)),
        ridge if rank else None,
        1.0 - errors[ridge] / variance if variance > 0 else 0.0,
        math.ceil(train.tokens + held_out.tokens),
    )


def _in_float32(patch: Patch) -> Patch:
    parts = (None if part is None else part.float().cpu().contiguous() for part in (patch.bias, patch.down, patch.up))
    bias, *maps = parts
    assert bias is not None
    return Patch(bias, *maps)
