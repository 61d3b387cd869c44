"""Routers in closed form, against what they are meant to be."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from router_tuning.cost_routers import CostRouter, Inputs, fit_router, moderated, price, saving
from router_tuning.selection import Measured


def planted(number: int, hidden: int = 12, noise: float = 0.1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draws = torch.Generator().manual_seed(number)
    inputs, weight = torch.randn(number, hidden, generator=draws) + 3, torch.randn(hidden, generator=draws)
    log_cost = inputs @ weight / 4 - 4 + noise * torch.randn(number, generator=draws)
    return inputs, log_cost.double().exp(), weight


def test_a_planted_cost_is_found_and_its_level_too() -> None:
    inputs, nats, weight = planted(200)
    router = fit_router(Inputs.of(inputs, torch.ones(len(inputs))), nats)
    assert torch.cosine_similarity(router.weight[0], weight, dim=0) > 0.98 and router.explained > 0.95
    score = (inputs @ router.weight[0]).double() + router.offset
    assert float(score.exp().sum()) == pytest.approx(float(nats.sum()), rel=0.05)
    assert float(router.predicted.exp().mean()) == pytest.approx(float(nats.mean()), rel=1e-9)


@pytest.mark.parametrize("hidden", [12, 40])
@pytest.mark.parametrize("ridge", [0.1, 3.0])
@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("prompts", [range(20), [*range(12), 3, 3, 4, 11, 12, 12, 13, 14]])
def test_predictions_are_of_fits_that_had_not_seen_the_sample(
    ridge: float, hidden: int, equal: bool, prompts: Sequence[int]
) -> None:
    """Every sample is really left out, with all others of its prompt, and the ridge regression solved again in the
    primal; with more samples than numbers in an input, and with fewer; a sample counts as its answer has tokens."""
    inputs, nats, _ = planted(20, hidden)
    y, tokens = nats.log(), torch.ones(20) if equal else torch.arange(1, 21)
    found = fit_router(Inputs.of(inputs, tokens, torch.tensor(prompts)), nats, [ridge])
    weights = tokens.double() / tokens.double().mean()
    mean_of_all = (inputs.double() * weights[:, None]).mean(0)
    centred = (inputs.double() - mean_of_all) * weights.sqrt()[:, None]
    unit = torch.linalg.eigvalsh(centred @ centred.T).clamp(min=0).mean()
    shifts = []
    for left in range(20):
        rest = [i for i in range(20) if prompts[i] != prompts[left]]
        w = weights[rest][:, None]
        mean, level = (inputs[rest].double() * w).sum(0) / w.sum(), float((y[rest] * w[:, 0]).sum() / w.sum())
        x = inputs[rest].double() - mean
        weight = torch.linalg.solve(
            x.T @ (x * w) + ridge * unit * torch.eye(hidden), x.T @ ((y[rest] - level) * w[:, 0])
        )
        direct = level + (inputs[left].double() - mean) @ weight
        shifts.append(float(found.predicted[left] - direct))
    assert shifts == pytest.approx([shifts[0]] * 20, abs=1e-6)  # one shift of the level for all
    assert float((weights * (found.predicted.exp() - nats)).sum()) == pytest.approx(0, abs=1e-9)


def test_a_prompt_that_is_there_twice_tells_nothing_of_others() -> None:
    """Costs that are a prompt's and have nothing to do with its inputs: they look learned, from its other answer."""
    draws = torch.Generator().manual_seed(0)
    inputs = torch.randn(40, 80, generator=draws).repeat(2, 1)
    nats = (torch.randn(40, generator=draws) - 3).double().exp().repeat(2)
    tokens, prompts = torch.ones(80), torch.arange(40).repeat(2)
    assert fit_router(Inputs.of(inputs, tokens), nats).explained > 0.9
    router = fit_router(Inputs.of(inputs, tokens, prompts), nats)
    assert not router.weight.any() and router.explained == 0
    one = fit_router(Inputs.of(inputs, tokens, torch.zeros(80, dtype=torch.int64)), nats)
    assert bool(one.predicted.isfinite().all())


def test_what_cannot_be_learned_is_the_static_order() -> None:
    """Costs that have nothing to do with the inputs: the router is zero, and its offset the layer's mean cost."""
    draws = torch.Generator().manual_seed(0)
    inputs = torch.randn(40, 30, generator=draws)
    nats = (torch.randn(40, generator=draws) * 0.3 - 3).double().exp()
    router = fit_router(Inputs.of(inputs, torch.ones(len(inputs))), nats)
    assert not router.weight.any() and router.explained == 0
    assert router.offset == pytest.approx(float(nats.mean().log()), abs=0.02)
    many = torch.rand(4000, generator=draws).double().exp() ** 1.1
    unequal = fit_router(Inputs.of(torch.ones(4000, 3), torch.randint(1, 90, (4000,), generator=draws)), many)
    assert len(unequal.predicted.unique()) == 1  # to the last bit: a price keeps all of them, or none
    same = fit_router(Inputs.of(torch.ones(40, 30), torch.ones(40)), nats)  # inputs that do not differ at all
    assert not same.weight.any()


@settings(max_examples=200, deadline=None)
@example([[0, 0, 0, 0, 2, 1]], [1, 1, 1, 1, 1, 5], 0.35)  # two shares that are as near
@given(
    st.lists(st.lists(st.integers(-3, 3), min_size=6, max_size=6), min_size=1, max_size=4),
    st.lists(st.integers(1, 50), min_size=6, max_size=6),
    st.floats(0.01, 0.99),
)
def test_the_price_keeps_the_ratio_or_as_near_as_ties_allow(
    predicted: list[list[int]], tokens: list[int], kept: float
) -> None:
    """Of tokens, not of requests."""
    routers = [CostRouter(torch.zeros(1, 2), 0.0, torch.tensor(row).double(), 0.0) for row in predicted]
    costs, counts = torch.tensor(predicted).T, torch.tensor(tokens).double()
    share = lambda value: float(((costs < value).sum(1) * counts).sum() / (counts.sum() * len(predicted)))  # noqa: E731
    possible = [share(value) for value in [*costs.flatten().tolist(), float(costs.max()) + 1]]
    nearest = min(abs(value - (1 - kept)) for value in possible)
    assert abs(share(price(routers, kept, counts)) - (1 - kept)) == pytest.approx(nearest, abs=1e-9)


@pytest.mark.parametrize("equal", [True, False])
def test_savings_lie_between_the_oracle_and_the_static_drop(equal: bool) -> None:
    draws = torch.Generator().manual_seed(1)
    inputs = torch.randn(100, 2, 5, generator=draws)
    nats = torch.stack([inputs[:, 0, 0], -inputs[:, 1, 1]], 1).double().exp()
    tokens = (torch.ones(100) if equal else torch.randint(1, 90, (100,), generator=draws)).double()
    measured = Measured((3, 7), nats, tokens, inputs, torch.arange(100))
    routers = [fit_router(Inputs.of(inputs[:, place], tokens), nats[:, place]) for place in (0, 1)]
    worth = saving(measured, routers, (0, 1), price(routers, 0.5, tokens))
    assert worth.oracle <= worth.routed + 1e-9 and worth.routed < 0.7 * worth.static
    levels = [math.log(float((nats[:, place] * tokens).sum() / tokens.sum())) for place in (0, 1)]
    zero = [CostRouter(torch.zeros(1, 5), 0.0, torch.full((100,), level).double(), 0.0) for level in levels]
    nothing = saving(measured, zero, (0, 1), price(zero, 0.5, tokens))
    assert nothing.routed == pytest.approx(nothing.static)  # routers that know nothing are the static drop
    assert nothing.static == pytest.approx(math.exp(min(levels)))


def test_skips_are_counted_by_token() -> None:
    """Short answers are the cheap ones: as many requests that skip would spare fewer tokens."""
    tokens = torch.tensor([10.0] * 10 + [90.0] * 10)
    predicted = torch.cat([torch.linspace(-4, -3, 10), torch.linspace(-2, -1, 10)]).double()
    (router,) = [CostRouter(torch.zeros(1, 2), 0.0, predicted, 0.0)]
    skip = predicted < price([router], 0.5, tokens)
    assert skip[:10].all() and int(skip[10:].sum()) == 4  # 100 + 4 * 90 of 1,000; with the fifth 550
    assert int((predicted < price([router], 0.5, torch.ones(20))).sum()) == 10


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_requests_differ_less_in_all_layers_alike(share: float) -> None:
    """Costs that are request x layer: the requests' part shrinks to its share, the layers' part stays."""
    request, layer = torch.rand(40, 1).double() * 3 - 5, torch.rand(1, 7).double() - 3
    found = moderated((request + layer).exp(), share).log()
    assert torch.allclose(found.std(0), share * request.std(), atol=1e-9)
    assert torch.allclose(found - found[:, :1], (layer - layer[:, :1]).expand(40, 7))
    assert float(found.mean()) == pytest.approx(float((request + layer).mean()))


def test_what_is_worth_skipping_does_not_hang_on_the_request_alone() -> None:
    """Requests with a level of their own, and layers that each prefer some: how many a request skips spreads less."""
    draws = torch.Generator().manual_seed(3)
    inputs = torch.randn(200, 8, generator=draws)
    logs = inputs[:, :1] + inputs[:, 1:7] / 2 - 4
    spreads = []
    for nats in (logs.exp(), moderated(logs.exp(), 0.5)):
        routers = [fit_router(Inputs.of(inputs, torch.ones(200)), nats[:, layer]) for layer in range(6)]
        limit = price(routers, 0.5, torch.ones(200))
        spreads.append(float(torch.stack([r.predicted < limit for r in routers], 1).sum(1).double().std()))
    assert spreads[1] < 0.9 * spreads[0]
