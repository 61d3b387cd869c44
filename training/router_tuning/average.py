"""The routers of the last part of a run, averaged (Polyak and Juditsky, 1992; weights that rise linearly)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

#: The averaged part of a run.
TAIL = 0.5


class TailAverage:
    """Running mean of router weights over the last `TAIL` of the steps; the k-th of them counts k times.

    A batch of 16 samples knows its kept ratio to within 0.06 or so, every step answers to that noise, and the last
    routers inherit what is left of it. The controller holds the *mean* kept ratio of many steps at the target, so it
    is a mean of their routers that keeps the target.

    The mean is taken of each process's own part of a weight, so sharded parameters are never gathered.
    """

    def __init__(self) -> None:
        self.count = 0
        self.means: dict[int, Tensor] = {}

    def update(self, routers: Mapping[int, Any], progress: float) -> None:
        """After a step. progress: the share of the run's steps taken, this one included."""
        if progress <= 1.0 - TAIL:
            return
        self.count += 1
        for layer, weight in _local(routers).items():
            mean = self.means.get(layer, torch.zeros_like(weight)).to(weight)
            self.means[layer] = mean + (weight - mean) * (2.0 / (self.count + 1))

    def apply(self, routers: Mapping[int, Any]) -> None:
        """Give the routers the mean; nothing happens before there is one."""
        for layer, weight in _local(routers).items():
            if layer in self.means:
                weight.copy_(self.means[layer])

    def state_dict(self) -> dict[str, Tensor]:
        return {str(layer): mean for layer, mean in self.means.items()} | {"count": torch.tensor(self.count)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.count = int(state["count"])
        self.means = {int(layer): mean for layer, mean in state.items() if layer != "count"}


def _local(routers: Mapping[int, Any]) -> dict[int, Tensor]:
    return {layer: local(router.weight.detach()) for layer, router in routers.items()}


def local(tensor: Any) -> Tensor:
    """This process's part of a sharded tensor; all of it where it is not sharded."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
