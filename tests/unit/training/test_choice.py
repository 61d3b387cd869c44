"""How far routers follow what requests differ in: the candidates, and which of them is taken."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from router_tuning import choice
from router_tuning.choice import best, choices
from router_tuning.selection import Measured
from router_tuning.together import Lost
from vllm_mod.config import ConfigError

LAYERS = (0, 1, 2, 3)
EVERY = torch.arange(200)


def measured(number: int = 200) -> Measured:
    """Requests with a level of their own, and layers that each prefer some; layer 3 is dear for all."""
    inputs = torch.randn(number, 8, generator=torch.Generator().manual_seed(3))
    logs = inputs[:, :1] + inputs[:, 1:5] / 2 - 4 + torch.tensor([0.0, 0.1, 0.2, 9.0])
    order = torch.arange(number).flip(0)
    return Measured(LAYERS, logs.double().exp(), torch.ones(number).double(), inputs[:, None].expand(-1, 4, -1), order)


def test_every_candidate_skips_as_much() -> None:
    found = choices(measured(), False, None, 2.0, 0.5)
    assert [each.share for each in found] == [None, 0.0, 0.5, 1.0]
    skipped = [each.skips(measured(), EVERY) for each in found]
    assert [float(skip.sum(1).double().mean()) for skip in skipped] == pytest.approx([2, 2, 2, 2], abs=0.02)
    spread = [float(skip.sum(1).double().std()) for skip in skipped]
    assert spread[0] == 0 and spread[1] < spread[2] < spread[3]
    assert skipped[0][:, :2].all() and not any(skip[:, 3].any() for skip in skipped)


def test_scores_are_those_of_fits_that_had_not_seen_the_sample() -> None:
    """In the order of the samples, and none of those that were not measured."""
    (_, _, _, found) = choices(measured(), False, None, 2.0, 0.5)
    scores = found.scores(measured(), 203)
    assert scores.shape == (203, len(found.layers)) and scores[200:].isnan().all()
    cutoffs = torch.tensor([found.log_price - found.routers[layer].offset for layer in found.layers])
    for place, layer in enumerate(found.layers):
        router = found.routers[layer]
        assert torch.equal(scores[:200, place].flip(0) >= cutoffs[place], router.predicted >= found.log_price)
        own = measured().inputs[:, layer].double() @ router.weight[0].double()
        assert (scores[:200, place].flip(0) - own).abs().max() > 1e-5  # what it gives a sample it was fitted to


def test_layers_that_were_named_are_all_that_skip() -> None:
    for each in choices(measured(), False, [1, 3], None, 0.5):
        assert each.layers == [1, 3] and each.kept == 0.5
        skip = each.skips(measured(), EVERY)
        assert not skip[:, [0, 2]].any() and float(skip.sum(1).double().mean()) == pytest.approx(1, abs=0.02)
    assert all(each.layers == [0, 1] for each in choices(measured(), False, None, None, 0.5))


def test_the_static_drop_alone_is_not_compared() -> None:
    (only,) = choices(measured(), True, None, 2.0, 0.5)
    assert only.share is None and best(None, [], measured(), [only]) is only
    with pytest.raises(ConfigError, match=r"--skip 0\.4: hardly any request"):
        choices(measured(), True, None, 0.4, 0.5)


@pytest.mark.parametrize("cheapest", [0, 1, 2, 3])
def test_what_costs_least_together_is_taken(
    cheapest: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The static drop too; samples are those that were measured, each with its own decisions."""
    samples = [{"input_ids": [number]} for number in range(200)]
    found = choices(measured(), False, None, 2.0, 0.5)

    def together(model: Any, given: Sequence[Any], skips: Sequence[torch.Tensor]) -> Lost:
        rows = [199 - sample["input_ids"][0] for sample in given]  # `order` of `measured`, backwards
        assert len(rows) == 128 and all(
            torch.equal(skip, each.skips(measured(), torch.tensor(rows)))
            for skip, each in zip(skips[:-1], found, strict=True)
        )
        hindsight = measured().nats[torch.tensor(rows)].argsort(1)[:, :2]  # the last choice
        assert torch.equal(skips[4].nonzero()[:, 1].view(128, 2), hindsight.sort(1).values)
        assert [float(skip.sum(1).double().mean()) for skip in skips] == pytest.approx([2] * 5, abs=0.02)
        nats = torch.full((5, 128), 3.0, dtype=torch.float64)
        nats[cheapest], nats[4] = 2.0, 1.0
        return Lost(nats, nats / 2, torch.full((128,), 10.0, dtype=torch.float64))

    monkeypatch.setattr(choice, "lost", together)
    assert best(None, samples, measured(), found) is found[cheapest]
    said = capsys.readouterr().out
    assert f"chosen: {found[cheapest]}" in said and "0.2000 (" in said and "0.3000 (" in said


def test_a_drop_that_skips_less_than_was_asked_for_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a layer for everyone is none, which costs nothing."""
    found = choices(measured(), False, [0, 1], None, 0.8)
    assert not found[0].skips(measured(), EVERY).any()
    nats = torch.tensor([0.0, 3.0, 2.0, 4.0, 0.0]).double()[:, None].expand(5, 128)
    monkeypatch.setattr(choice, "lost", lambda *_: Lost(nats, nats, torch.ones(128).double()))
    samples = [{"input_ids": [number]} for number in range(200)]
    assert best(None, samples, measured(), found).share == 0.5


def test_answers_have_a_say_beside_the_predictions(monkeypatch: pytest.MonkeyPatch) -> None:
    found = choices(measured(), False, None, 2.0, 0.5)
    nats, loss = (torch.tensor(v).double()[:, None].expand(5, 128) for v in ([3, 2, 1, 4, 0], [3, 1, 2.5, 4, 0]))
    monkeypatch.setattr(choice, "lost", lambda *_: Lost(nats, loss, torch.ones(128).double()))
    samples = [{"input_ids": [number]} for number in range(200)]
    assert best(None, samples, measured(), found).share == 0.0


@pytest.mark.parametrize(("apart", "share"), [(1.0, 0.0), (0.05, 0.5)])
def test_of_routers_that_cost_alike_those_that_follow_least_are_taken(
    apart: float, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By less than a standard error, of the difference; the same layers for everyone are no such routers."""
    found = choices(measured(), False, None, 2.0, 0.5)
    nats = torch.tensor([2.0, 2.01, 2.0, 2.2, 0.0]).double()[:, None].repeat(1, 128)
    nats[0] += 0.001
    nats[1, ::2] += apart
    nats[1, 1::2] -= apart
    nats[3] += torch.linspace(-1e-3, 1e-3, 128)
    monkeypatch.setattr(choice, "lost", lambda *_: Lost(nats, nats * 0, torch.ones(128).double()))
    samples = [{"input_ids": [number]} for number in range(200)]
    assert best(None, samples, measured(), found).share == share
