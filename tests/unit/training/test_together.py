"""What a choice of skips costs together, against samples that are run alone with the same layers skipped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from router_tuning.data import IGNORED, Collator
from router_tuning.layerwise import answer_logits, supervised
from router_tuning.model import attach_routers, given_prompts, load_base, reference_decisions
from router_tuning.patches import collate, fit_patches
from router_tuning.routing import routing_of
from router_tuning.together import lost
from tests.support.models import tiny_model
from tests.unit.training.test_selection import answered
from vllm_mod.config import ModConfig


@torch.no_grad()
@pytest.mark.parametrize("target", ["attn", "mlp", "block"])
def test_each_request_skips_its_own(tmp_path: Path, target: str) -> None:
    base = tiny_model(tmp_path / "base", "llama", num_hidden_layers=4)
    samples = answered(20)
    settings = {"version": 2, "granularity": f"{target}_sequence", "layers": [0, 2, 3], "window": 2, "threshold": 0.0}
    config = ModConfig.parse(settings, "test")
    model = load_base(base, torch.float32).eval()
    attach_routers(model, config)
    fit_patches(model, collate(samples, config, 2, 8, "test"), 2, tmp_path, True)
    state = routing_of(model)
    routers = dict(state.routers)
    skip = torch.rand(20, 3, generator=torch.Generator().manual_seed(0)) < 0.5
    nothing = torch.zeros_like(skip)
    found = lost(model, samples, [skip, nothing], quiet=True)
    nats, tokens = found.nats, found.tokens
    assert state.cutoffs is None and state.routers == routers
    assert nats[1].abs().max() < 1e-6 and found.loss[1].abs().max() < 1e-5 and (nats[0] > 1e-6).sum() > 10

    def alone(sample: dict[str, object], skipped: list[bool]) -> torch.Tensor:
        ids, labels = torch.tensor([sample["input_ids"]]), torch.tensor(sample["labels"])
        state.cutoffs = tuple(float("inf") if off else float("-inf") for off in skipped)
        with given_prompts(model, torch.arange(ids.shape[1])[None] < sample["prompt_len"]):
            logits = model(ids, use_cache=False).logits[0, :-1]
        return logits[labels[1:] != IGNORED].log_softmax(-1)

    for number, sample in enumerate(samples):
        dense, routed = alone(sample, [False] * 3), alone(sample, skip[number].tolist())
        assert len(dense) == tokens[number]
        assert float(nats[0, number]) == pytest.approx(float((dense.exp() * (dense - routed)).sum()), abs=1e-5)
        answer = torch.tensor([token for token in sample["labels"][1:] if token != IGNORED])[:, None]
        likelihoods = [logs.gather(1, answer).sum() for logs in (dense, routed)]
        assert float(found.loss[0, number]) == pytest.approx(float(likelihoods[0] - likelihoods[1]), abs=1e-4)
    nats_above, error = found.above_first("nats", 1)
    assert nats_above == pytest.approx(found.mean("nats", 1) - found.mean("nats", 0)) and 0 < error < -nats_above


@torch.no_grad()
def test_requests_without_a_score_are_decided_by_their_routers(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", "llama", num_hidden_layers=4)
    config = ModConfig.parse({"version": 2, "granularity": "attn_sequence", "layers": [0, 2], "window": 2}, "test")
    model = load_base(base, torch.float32).eval()
    attach_routers(model, config, {layer: torch.randn(1, model.config.hidden_size) for layer in (0, 2)})
    batch = Collator(0)(answered(12))
    own = answer_logits(model, batch)
    keep = torch.stack(list(reference_decisions(model).values()), 1)
    answer_logits(model, {**batch, "scores": torch.full(keep.shape, torch.nan).double()})
    assert torch.equal(torch.stack(list(reference_decisions(model).values()), 1), keep)
    scores = torch.where(torch.arange(12)[:, None] % 2 == 0, torch.nan, torch.where(keep, -1.0, 1.0)).double()
    other = answer_logits(model, {**batch, "scores": scores})
    found = torch.stack(list(reference_decisions(model).values()), 1)
    assert torch.equal(found[::2], keep[::2]) and torch.equal(found[1::2], ~keep[1::2])
    rows = supervised(batch).nonzero()[:, 0]
    same = (own - other).abs().amax(1) < 1e-6
    assert same[rows % 2 == 0].all() and not same[rows % 2 == 1].all()
    assert routing_of(model).scores is None
