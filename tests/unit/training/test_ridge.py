"""Patches in closed form, against other ways to the same numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from router_tuning.ridge import Moments, Regression, TooLowRank, fit
from vllm_mod.gate import apply_patch
from vllm_mod.tensors import Patch

HIDDEN, TOKENS = 12, 400


def data(tokens: int = TOKENS, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs of unlike size, with a mean; outputs that are linear in them but for noise and a square."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    x = torch.randn(tokens, HIDDEN, generator=generator, dtype=torch.float64) * torch.linspace(0.1, 3, HIDDEN) + 1.5
    noise = torch.randn(tokens, HIDDEN, generator=generator, dtype=torch.float64)
    return x, x @ weight.T + 0.5 * x.square() + noise - 4.0


def moments(x: Tensor, y: Tensor, batch: int = 50) -> Moments:
    found = Moments(x.shape[1])
    for first in range(0, len(x), batch):
        found.add(x[first : first + batch], y[first : first + batch])
    return found


def penalised(patch: Patch, x: Tensor, y: Tensor, ridge: float) -> float:
    """The objective, in the plain: mean squares and the penalty, in units of the mean variance of x."""
    assert patch.down is not None and patch.up is not None
    error = (y - apply_patch(x, patch.bias, patch.down, patch.up)).square().sum() / len(x)
    return float(error + ridge * x.var(0, correction=0).mean() * (patch.up @ patch.down).square().sum())


def test_at_full_rank_it_is_least_squares():
    x, y = data()
    patch = Regression(moments(x, y)).patch(HIDDEN, 0.0)
    expected, *_ = np.linalg.lstsq(np.c_[x.numpy(), np.ones(TOKENS)], y.numpy(), rcond=None)
    assert patch.up is not None and patch.down is not None
    np.testing.assert_allclose((patch.up @ patch.down).T.numpy(), expected[:-1], atol=1e-9)
    np.testing.assert_allclose(patch.bias.numpy(), expected[-1], atol=1e-9)


def test_a_ridge_is_as_many_more_rows():
    """The textbook's way: sqrt(ridge) times the unit vectors as inputs whose outputs are 0, means taken out before."""
    x, y = data()
    patch = Regression(moments(x, y)).patch(HIDDEN, 0.3)
    strength = 0.3 * x.var(0, correction=0).mean() * TOKENS
    rows = torch.cat([x - x.mean(0), strength.sqrt() * torch.eye(HIDDEN)])
    expected = torch.linalg.lstsq(rows, torch.cat([y - y.mean(0), torch.zeros(HIDDEN, HIDDEN)])).solution
    assert patch.up is not None and patch.down is not None
    torch.testing.assert_close((patch.up @ patch.down).T, expected)


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_a_lower_rank_is_the_svd_of_what_is_fitted(rank):
    x, y = data()
    patch = Regression(moments(x, y)).patch(rank, 0.0)
    centred = x - x.mean(0)
    fitted = centred @ torch.linalg.lstsq(centred, y - y.mean(0)).solution
    u, s, v = torch.linalg.svd(fitted, full_matrices=False)
    torch.testing.assert_close(
        apply_patch(x, patch.bias, patch.down, patch.up), u[:, :rank] * s[:rank] @ v[:rank] + y.mean(0)
    )
    assert patch.down is not None and patch.down.shape == (rank, HIDDEN)


@pytest.mark.parametrize("ridge", [0.0, 0.1])
@pytest.mark.parametrize("rank", [1, 4])
def test_no_other_map_of_its_rank_is_better(rank, ridge):
    x, y = data()
    patch = Regression(moments(x, y)).patch(rank, ridge)
    best = penalised(patch, x, y, ridge)
    generator = torch.Generator().manual_seed(3)
    assert patch.down is not None and patch.up is not None

    def noise(like: Tensor, scale: float) -> Tensor:
        return scale * torch.randn(like.shape, generator=generator, dtype=torch.float64)

    for scale in (1e-3, 1e-1, 1.0):
        for _ in range(20):
            down, up = patch.down + noise(patch.down, scale), patch.up + noise(patch.up, scale)
            other = Patch(y.mean(0) - up @ (down @ x.mean(0)), down, up)
            assert penalised(other, x, y, ridge) > best
    shifted = Patch(patch.bias + noise(patch.bias, 1e-2), patch.down, patch.up)
    assert penalised(shifted, x, y, ridge) > best


def test_rank_0_is_the_mean():
    x, y = data()
    found = fit(moments(x, y), moments(*data(seed=1)), 0)
    assert (found.patch.down, found.patch.up, found.ridge, found.tokens) == (None, None, None, 2 * TOKENS)
    torch.testing.assert_close(found.patch.bias, torch.cat([y, data(seed=1)[1]]).mean(0).float())


def test_errors_and_variance_are_those_of_the_tokens():
    x, y = data()
    sums = moments(x, y)
    for patch in (Regression(sums).patch(3, 0.01), Patch(y.mean(0)), Patch(torch.ones(HIDDEN))):
        left = y - apply_patch(x, patch.bias.double(), patch.down, patch.up)
        assert sums.error(patch) == pytest.approx(float(left.square().sum()), rel=1e-9)
    assert sums.variance() == pytest.approx(float((y - y.mean(0)).square().sum()))


def test_sums_do_not_depend_on_the_batches():
    x, y = data()
    for name, value in vars(moments(x, y, batch=7)).items():
        torch.testing.assert_close(torch.as_tensor(value), torch.as_tensor(getattr(moments(x, y, batch=400), name)))


def test_the_ridge_is_the_one_that_leaves_least_on_held_out_tokens():
    few, held_out = moments(*data(tokens=20)), moments(*data(seed=1))
    ridges = (0.0, 1e-3, 0.1, 30.0)
    left = {ridge: held_out.error(Regression(few).patch(HIDDEN, ridge)) for ridge in ridges}
    found = fit(few, held_out, HIDDEN, ridges)
    assert found.ridge == min(left, key=lambda r: left[r]) != 0.0  # 20 tokens for 12 directions are few
    assert found.explained == pytest.approx(1 - left[found.ridge] / held_out.variance())
    together = torch.cat([data(tokens=20)[0], data(seed=1)[0]]), torch.cat([data(tokens=20)[1], data(seed=1)[1]])
    final = Regression(moments(*together)).patch(HIDDEN, found.ridge)
    torch.testing.assert_close(found.patch.bias, final.bias.float())


def test_too_few_directions():
    x, y = data(tokens=6)
    assert Regression(moments(x, y)).rank == 5  # the mean is taken out
    assert Regression(moments(x.repeat(9, 1), y.repeat(9, 1))).rank == 5
    assert Regression(moments(*data())).rank == HIDDEN
    with pytest.raises(TooLowRank, match="12 tokens differ in 5 directions"):
        fit(moments(x, y), moments(x, y), 6)
    assert fit(moments(x, y), moments(x, y), 5).patch.up is not None


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("where", ["x", "y"])
def test_one_value_that_is_not_finite_is_seen(where, value):
    x, y = data()
    (x if where == "x" else y)[17, 3] = value
    assert moments(*data()).is_finite() and not moments(x, y).is_finite()
