"""Cutoffs from scores, by a model that is a formula: what is found, and how it converges."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from router_tuning.calibrate import collate
from router_tuning.fitting import Measured, cutoff_for, fit, thresholds_like
from vllm_mod.config import ModConfig, logit
from vllm_mod.gate import keeps

numbers = st.floats(-1e4, 1e4, width=32)


@given(
    scores=st.lists(numbers | st.sampled_from([1.0, math.nextafter(1, 2)]), min_size=1, max_size=40),
    target=st.floats(0, 1),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_no_other_cutoff_comes_nearer(scores, target, dtype):
    values = torch.tensor(scores, dtype=dtype)
    cutoff = cutoff_for(values, target)
    assert math.isfinite(cutoff)
    kept = keeps(values, json.loads(json.dumps(cutoff))).double().mean()
    possible = [0.0, *((values >= v).double().mean() for v in values)]
    assert abs(float(kept) - target) <= min(abs(float(p) - target) for p in possible) + 1e-12


def test_neighbours_in_float32_are_told_apart():
    lower = 3000.0
    upper = float(torch.nextafter(torch.tensor(lower), torch.tensor(math.inf)))
    values = torch.tensor([lower, upper])
    assert keeps(values, cutoff_for(values, 0.5)).tolist() == [False, True]


class Formula:
    """Scores per layer, which fall by `answer` for what the layer before skips."""

    def __init__(self, scores: dict[int, torch.Tensor], answer: float = 0.0) -> None:
        self.scores, self.answer, self.passes = scores, answer, 0

    def __call__(self, cutoffs, title: str = "") -> Measured:
        self.passes += 1
        scores, pairs, skipped = {}, {}, torch.zeros(())
        for (layer, own), cutoff in zip(self.scores.items(), cutoffs, strict=True):
            scores[layer] = own - self.answer * skipped
            keep = keeps(scores[layer], cutoff)
            skipped = (~keep).double()
            pairs[layer] = torch.stack([keep, torch.ones_like(keep)], -1).double()
        return Measured(scores, pairs)


def formula(layers: int = 4, samples: int = 200, answer: float = 0.0, scale: float = 1.0) -> Formula:
    generator = torch.Generator().manual_seed(1)
    return Formula({i: scale * (torch.randn(samples, generator=generator).double() + i) for i in range(layers)}, answer)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("answer", [0.0, 0.5, 5.0])
@pytest.mark.parametrize("start", [0.0, -math.inf, math.inf])
@pytest.mark.parametrize("target", [0.02, 0.5, 0.97])
def test_a_shared_cutoff_is_found(scale, answer, start, target):
    meter = formula(answer=answer * scale, scale=scale)
    cutoffs, found = fit(meter, [start] * 4, target, False, [0.0] * 4)
    assert len(set(cutoffs)) == 1
    assert found.kept == meter(cutoffs).kept == pytest.approx(target, abs=0.02)


@pytest.mark.parametrize("answer", [0.0, 5.0])
def test_every_layer_by_itself(answer):
    meter = formula(answer=answer)
    _, found = fit(meter, [0.0] * 4, 0.3, True, [0.0] * 4)
    assert found.kept_per_layer == pytest.approx(dict.fromkeys(range(4), 0.3), abs=0.01)


def test_a_prior_moves_as_one():
    prior = [3.0, -2.0, 0.0, 1e3]
    cutoffs, found = fit(formula(), prior, 0.4, False, prior)
    assert [c - p for c, p in zip(cutoffs, prior, strict=True)] == pytest.approx([cutoffs[0] - 3.0] * 4)
    assert found.kept == pytest.approx(0.4, abs=0.01) and found.kept_per_layer[3] == 0


@pytest.mark.parametrize(("target", "cutoff"), [(0, math.inf), (1, -math.inf), (1.0, -math.inf)])
@pytest.mark.parametrize("per_layer", [False, True])
def test_the_ends_are_one_pass(target, cutoff, per_layer):
    meter = formula()
    cutoffs, found = fit(meter, [0.0] * 4, target, per_layer, [0.0] * 4)
    assert cutoffs == (cutoff,) * 4 and found.kept == target and meter.passes == 1


@given(st.lists(numbers, min_size=2, max_size=20), st.floats(0, 1))
def test_thresholds_decide_alike_or_are_none(scores, target):
    values = torch.tensor(scores, dtype=torch.float64)
    found, cutoff = Measured({0: values}, {}), cutoff_for(values, target)
    thresholds = thresholds_like([cutoff], found)
    if thresholds is not None:
        assert torch.equal(keeps(values, logit(thresholds[0])), keeps(values, cutoff))
    elif values.abs().max() < 15 and min_gap(values) > 1e-6:
        raise AssertionError(f"a threshold could say {cutoff}")


def min_gap(values: torch.Tensor) -> float:
    distinct = values.unique()
    return float((distinct[1:] - distinct[:-1]).min()) if len(distinct) > 1 else 1.0


@pytest.mark.parametrize(
    ("window", "lengths"), [(None, [5, 3, 8]), (1, [1, 1, 1]), (4, [4, 3, 4]), (6, [5, 3, 6]), (10**9, [5, 3, 8])]
)
def test_batches_hold_the_tokens_that_decide(window, lengths):
    version = {"version": 1} if window is None else {"version": 2, "window": window}
    config = ModConfig.parse({"granularity": "mlp_sequence", "layers": [1], **version}, "test")
    samples = [{"input_ids": list(range(10, 18)), "labels": [0] * 8, "prompt_len": n} for n in (5, 3, 0)]
    (batch,) = collate(samples, config, 8)
    assert sorted(batch["attention_mask"].sum(1).tolist()) == sorted(lengths)
    assert torch.equal(batch["prompt_mask"], batch["attention_mask"].bool())
