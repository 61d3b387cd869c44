"""Means over samples with their standard errors, and what pairs of them differ by."""

from __future__ import annotations

import math
from collections.abc import Sequence


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error; no error of a single value."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, None
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


def above(values: Sequence[float], others: Sequence[float]) -> tuple[float, float | None]:
    """`mean_and_error` of the differences between values of the same samples."""
    return mean_and_error([mine - theirs for mine, theirs in zip(values, others, strict=True)])
