"""The average of a run's last routers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from router_tuning.average import TailAverage
from router_tuning.routing import Router


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=30), st.integers(1, 29))
def test_the_kth_of_the_last_half_counts_k_times(values, cut):
    average, router = TailAverage(), Router(3)
    for step, value in enumerate(values, start=1):
        if step == cut:  # a run may be interrupted anywhere
            resumed = TailAverage()
            resumed.load_state_dict(average.state_dict())
            average = resumed
        router.weight.data.fill_(value)
        average.update({7: router}, step / len(values))
    average.apply({7: router})
    tail = values[len(values) // 2 :]
    expected = sum(k * v for k, v in enumerate(tail, start=1)) / sum(range(1, len(tail) + 1))
    assert router.weight.flatten().tolist() == pytest.approx([expected] * 3, abs=1e-4)


def test_before_the_last_half_there_is_nothing_to_apply():
    average, router = TailAverage(), Router(2)
    router.weight.data.fill_(3.0)
    average.update({0: router}, 0.5)
    average.apply({0: router})
    assert torch.equal(router.weight.data, torch.full((1, 2), 3.0))
