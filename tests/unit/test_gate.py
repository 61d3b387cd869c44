"""Scores and decisions: float32, exact at the ends, and independent of the rest of the batch."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_mod.config import logit
from vllm_mod.gate import apply_patch, decision_lengths, keeps, segment_means, segment_sums, token_scores

lengths_ = st.lists(st.integers(1, 40), min_size=1, max_size=8)
seeds = st.integers(0, 2**31)


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scores_are_float32_dot_products(dtype):
    x, weight = random(3, 5, 64, dtype=dtype), random(1, 64, seed=1, dtype=dtype)
    scores = token_scores(x, weight)
    assert scores.dtype == torch.float32
    assert scores.shape == (3, 5)
    torch.testing.assert_close(scores.double(), x.double() @ weight.double()[0], rtol=1e-5, atol=1e-5)


def test_low_precision_inputs_are_not_summed_in_low_precision():
    # 256 + 1 + 1 + ... stays 256 in bfloat16
    x = torch.ones(1, 257, dtype=torch.bfloat16)
    x[0, 0] = 256
    assert token_scores(x, torch.ones(1, 257, dtype=torch.bfloat16)).item() == 512


@given(rows=st.integers(1, 70), hidden=st.sampled_from([8, 64, 100, 2048]), seed=seeds)
def test_a_row_scores_the_same_in_any_batch(rows, hidden, seed):
    x, weight = random(rows, hidden, seed=seed), random(1, hidden, seed=seed + 1)
    scores = token_scores(x, weight)
    for i in (0, rows // 2, rows - 1):
        assert torch.equal(token_scores(x[i : i + 1], weight), scores[i : i + 1])


@given(lengths=lengths_, seed=seeds)
def test_segment_means_equal_the_mean_of_each_request(lengths, seed):
    scores = random(sum(lengths), seed=seed)
    means = segment_means(scores, torch.tensor(lengths))
    assert means.dtype == torch.float64
    expected = torch.stack([part.double().mean() for part in scores.split(lengths)])
    torch.testing.assert_close(means, expected, rtol=1e-12, atol=1e-12)


@given(lengths=lengths_, before=lengths_, seed=seeds)
def test_segment_means_do_not_depend_on_neighbours(lengths, before, seed):
    own, others = random(sum(lengths), seed=seed), random(sum(before), seed=seed + 1) * 1e6
    alone = segment_means(own, torch.tensor(lengths))
    together = segment_means(torch.cat([others, own]), torch.tensor(before + lengths))
    assert torch.equal(together[len(before) :], alone)


@given(length=st.integers(1, 200), seed=seeds)
def test_mean_of_scores_is_the_score_of_the_mean(length, seed):
    x, weight = random(length, 32, seed=seed), random(1, 32, seed=seed + 1)
    mean = segment_means(token_scores(x, weight), torch.tensor([length]))
    of_mean = (x.double().mean(0) * weight.double()[0]).sum()
    assert mean.item() == pytest.approx(of_mean.item(), abs=1e-5)


@given(lengths=lengths_, seed=seeds, chunk=st.integers(1, 50))
def test_a_window_may_come_in_chunks(lengths, seed, chunk):
    """Partial sums, empty ones among them, add up to the same mean, to the last bit."""
    scores, total = random(sum(lengths), seed=seed), torch.zeros(len(lengths), dtype=torch.float64)
    for start in range(0, max(lengths), chunk):
        parts = [part[start : start + chunk] for part in scores.split(lengths)]
        total += segment_sums(torch.cat(parts), torch.tensor([len(part) for part in parts]))
    assert torch.equal(total / torch.tensor(lengths), segment_means(scores, torch.tensor(lengths)))


def test_sums_of_nothing():
    assert segment_sums(torch.empty(0), torch.tensor([0, 0])).tolist() == [0.0, 0.0]
    assert segment_sums(torch.empty(0), torch.empty(0, dtype=torch.int64)).tolist() == []


@pytest.mark.parametrize(
    ("window", "expected"), [(None, [1, 4, 9]), (1, [1, 1, 1]), (4, [1, 4, 4]), (5, [1, 4, 5]), (10**30, [1, 4, 9])]
)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_decision_is_taken_from_at_most_the_prompt(window, expected, dtype):
    assert decision_lengths(torch.tensor([1, 4, 9], dtype=dtype), window).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_patch_is_a_linear_map_in_the_dtype_of_its_input(dtype, stored):
    x = random(2, 5, 16, dtype=dtype)
    bias, down, up = (random(*shape, seed=i).to(stored) for i, shape in enumerate([(16,), (3, 16), (16, 3)], 1))
    found = apply_patch(x, bias, down, up)
    assert (found.dtype, found.shape) == (dtype, x.shape)
    exact = x.double() @ (up.double() @ down.double()).T + bias.double()
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(found.double(), exact, atol=tolerance, rtol=tolerance)


def test_a_patch_of_rank_0_is_its_bias():
    x, bias = random(2, 5, 16, dtype=torch.bfloat16), random(16, seed=1)
    assert torch.equal(apply_patch(x, bias), bias.bfloat16().expand(2, 5, 16))


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), min_size=1))
def test_threshold_0_keeps_and_1_skips_everything(values):
    scores = torch.tensor(values)
    assert keeps(scores, logit(0)).all()
    assert not keeps(scores, logit(1)).any()
    assert keeps(scores, logit(0)).dtype == torch.bool


@given(score=st.floats(-30, 30, width=32), threshold=st.floats(0.001, 0.999))
def test_decisions_follow_the_sigmoid(score, threshold):
    probability = 1 / (1 + math.exp(-score))
    if abs(probability - threshold) > 1e-6:
        assert keeps(torch.tensor([score]), logit(threshold)).item() == (probability >= threshold)


def test_a_zero_router_keeps_everything_at_one_half():
    scores = token_scores(random(9, 16), torch.zeros(1, 16))
    assert keeps(scores, logit(0.5)).all()


def test_a_broken_score_keeps():
    assert keeps(torch.tensor([math.nan]), logit(0.5)).all()
