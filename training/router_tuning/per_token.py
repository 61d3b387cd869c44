"""Means over tokens of what is known sample by sample, and what they are worth."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def mean_per_token(sums: Tensor, counts: Tensor) -> tuple[float, float]:
    """With its standard error over samples: that of a ratio of two sums (delta method).

    sums: float64 `[N]`, over the tokens of each sample; counts: `[N]`, how many these are.
    """
    mean = sums.sum() / counts.sum()
    error = (sums - mean * counts).std() * math.sqrt(len(sums)) / counts.sum()
    return float(mean), float(error)
