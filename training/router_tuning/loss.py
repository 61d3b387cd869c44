"""What makes routers skip: a price on every kept sublayer, fixed (the paper's) or set by a controller.

`kept_l` is layer l's kept ratio in the batch, differentiable through the straight-through gates.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

CapacityLossKind = Literal["controller", "paper"]
STIFFNESS = 15.0
GAIN = 90.0


class CapacityLoss:
    """Added to the task loss.

    `paper` (arXiv 2410.13184, eq. 6): `lambda * sum_l relu(kept_l - target)`, lambda fixed. Where it ends up depends
    on lambda and learning rate, and nothing pulls a layer back that skips too much.

    `controller`: the Lagrangian of "least task loss with mean kept = target", solved by the method of multipliers:

        price  = lambda + stiffness * scale * e,    e = mean_l kept_l - target
        loss   = price * sum_l kept_l
        lambda <- lambda + gain * scale * share * e                  after each step

    All layers pay one price, so those whose sublayer helps most keep most. The price may become negative: then
    keeping is rewarded, so the target is approached from both sides. `scale` is the root mean square of what keeping
    one sample (or token) is worth to the task loss, measured in the backward pass: it makes the two constants mean
    the same for a toy, whose sublayers are worth 0.1 nats, and for models whose single sublayers matter far less.

    How the constants were chosen. Decisions do not depend on the scale of w, so neither does this loop on the learning
    rate (lr / 3 and 3 lr end at the same kept ratios). Without stiffness the price integrates the error, the routers
    integrate the price, and kept ratios swing (early runs: between nearly all and nothing). Stiffness answers at
    once; 15 is about where the answer to e = 0.1 outweighs a typical sublayer. Gain closes what is left: the error
    decays by exp(-gain / stiffness / 2) over a run with a cosine schedule, exp(-3) with these. More gain swings where
    a run is short, more stiffness answers to the noise of single batches. That noise is what is left, and `average`
    lowers it; it falls with the samples that the run sees.
    """

    def __init__(
        self,
        kind: CapacityLossKind,
        target: float,
        weight: float | None = None,
        stiffness: float = STIFFNESS,
        gain: float = GAIN,
    ) -> None:
        self.kind = kind
        self.target = target
        #: lambda, in nats per unit of one layer's kept ratio.
        self.weight = weight if weight is not None else (0.01 if kind == "paper" else 0.0)
        self.stiffness = stiffness
        self.gain = gain
        #: Unknown until the first backward; no price is asked before.
        self.scale = 0.0

    def price(self, error: float) -> float:
        """What one kept sublayer costs at the present `error` = mean kept - target."""
        return self.weight + (self.stiffness * self.scale * error if self.kind == "controller" else 0.0)

    def __call__(self, kept: Mapping[int, Tensor], measured: float | None = None) -> Tensor:
        """kept: float scalar per routed layer. measured: mean kept over all processes, where there are several."""
        ratios = torch.stack(list(kept.values()))
        if self.kind == "paper":
            return self.weight * torch.relu(ratios - self.target).sum()
        error = (float(ratios.detach().mean()) if measured is None else measured) - self.target
        return self.price(error) * ratios.sum()

    def step(self, measured: float, effect: float, share: float) -> None:
        """After an optimizer step, with its mean kept ratio and root mean square effect.

        share: the step's learning rate relative to the peak, over the number of steps: a short run must not leave
        lambda behind, and where routers hardly move any more, lambda must not run ahead.
        """
        self.scale = effect if self.scale == 0.0 else 0.9 * self.scale + 0.1 * effect
        if self.kind == "controller":
            self.weight += self.gain * self.scale * share * (measured - self.target)

    def state_dict(self) -> dict[str, Any]:
        return {"weight": self.weight, "scale": self.scale}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.weight, self.scale = float(state["weight"]), float(state["scale"])
