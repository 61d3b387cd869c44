"""Systems compared answer by answer, on the reference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.heldout import summary
from benchmarks.lib import perplexity
from benchmarks.lib.curve import Perplexities
from router_tuning.model import reference_logits, routing_of
from vllm_mod.config import ModConfig

SAMPLES = [
    {"input_ids": [3, 4, 5, 6, 7], "prompt_len": 2, "labels": [-100, -100, 5, 6, 7]},
    {"input_ids": [9, 8, 7], "prompt_len": 2, "labels": [-100, -100, 7]},
]


@pytest.fixture(scope="module")
def systems(tiny_llama_path: Path):
    def static(target: str, *layers: int):
        settings = {"version": 1, "granularity": f"{target}_static", "layers": list(layers)}
        return perplexity.load_system(tiny_llama_path, ModConfig.parse(settings, "test"))

    dense = perplexity.load_system(tiny_llama_path, perplexity.dense_config(tiny_llama_path))
    return {"dense": dense, "routed": static("attn", 2, 5), "blocks": static("block", 1)}


def test_each_is_compared_with_the_first(systems):
    found, counts = perplexity.compare(systems, SAMPLES)
    assert counts.tolist() == [3, 1]
    for name, model in systems.items():
        losses, _ = perplexity.answer_losses(model, SAMPLES)
        assert torch.allclose(found[name].losses, losses, atol=1e-5)
    assert found["dense"].divergence.abs().max() < 1e-6 and torch.equal(found["dense"].same, counts)
    dense, routed = (reference_logits(systems[n], [9, 8, 7], 2)[1].log_softmax(-1) for n in ("dense", "routed"))
    assert found["routed"].divergence[1].item() == pytest.approx(
        (dense.exp() * (dense - routed)).sum().item(), abs=1e-6
    )
    assert found["routed"].same[1] == (dense.argmax() == routed.argmax())
    assert [found[n].skipped.tolist() for n in systems] == [[0, 0], [2, 2], [1, 1]]


def test_samples_of_a_forward_do_not_see_each_other(systems):
    alone, _ = perplexity.compare(systems, SAMPLES, together=1)
    both, _ = perplexity.compare(systems, SAMPLES, together=2)
    for name in systems:
        for column in ("losses", "divergence", "same", "skipped"):
            assert torch.allclose(getattr(alone[name], column), getattr(both[name], column), atol=1e-5)


def test_padding_is_nobody_s_token(tiny_llama_path):
    settings = {"version": 1, "granularity": "attn_token", "layers": [0, 2], "threshold": 0.5}
    model = perplexity.load_system(tiny_llama_path, ModConfig.parse(settings, "test"))
    draws = torch.Generator().manual_seed(0)
    for router in routing_of(model).routers.values():
        router.weight.data = torch.randn(router.weight.shape, generator=draws)
    alone, _ = perplexity.compare({"dense": model}, SAMPLES, together=1)
    both, _ = perplexity.compare({"dense": model}, SAMPLES, together=2)
    assert torch.allclose(alone["dense"].skipped, both["dense"].skipped)
    assert alone["dense"].skipped.min() > 0 and alone["dense"].skipped.max() < 2
    assert torch.allclose(alone["dense"].losses, both["dense"].losses, atol=1e-5)


def test_a_row_per_system(systems):
    answers, counts = perplexity.compare(systems, SAMPLES)
    rows = {name: summary(found, answers, counts) for name, found in answers.items()}
    assert rows["dense"]["ratio_to_dense"] == 1 and rows["routed"]["ratio_to_routed"] == 1
    assert rows["blocks"]["ratio_to_routed"] == pytest.approx(
        rows["blocks"]["perplexity"] / rows["routed"]["perplexity"], rel=1e-3
    )
    assert rows["routed"]["kl_above_routed"] == 0
    assert rows["blocks"]["kl_above_routed"] == pytest.approx(
        rows["blocks"]["kl_to_dense"] - rows["routed"]["kl_to_dense"], abs=2e-4
    )
    assert rows["routed"]["kl_to_dense"] > 0 and 0 <= rows["routed"]["same_token"] <= 1


def test_what_is_skipped_by_request_and_by_token() -> None:
    counts = torch.tensor([3.0, 1.0])
    found = perplexity.Answers(counts, counts, counts, torch.tensor([0.0, 4.0]))
    row = summary(found, {"dense": found, "routed": found}, counts)
    assert (row["sublayers_skipped"], row["sublayers_skipped_by_token"]) == (2, 1)


def test_a_request_s_decision_counts_as_its_answer_has_tokens() -> None:
    """As what a static drop skips does; a token's counts as one."""
    counts = torch.tensor([3.0, 1.0], dtype=torch.float64)
    requests = [{2: torch.tensor([True]), 5: torch.tensor([True])}, {2: torch.tensor([False]), 5: torch.tensor([True])}]
    assert perplexity.kept_ratios(requests, counts, by_request=True) == {2: 0.75, 5: 1.0}
    tokens = [{2: torch.tensor([True, False, False])}, {2: torch.tensor([True])}]
    assert perplexity.kept_ratios(tokens, counts, by_request=False) == {2: 0.5}
    assert perplexity.kept_ratios([{}, {}], counts, by_request=True) == {}  # a static drop decides nothing


def test_a_point_of_the_curve(tiny_llama_path):
    curve = object.__new__(Perplexities)
    curve.config, curve.samples = perplexity.dense_config(tiny_llama_path), SAMPLES
    dense = curve._losses("base", tiny_llama_path, curve.config)
    assert dense["kept"] == 1 and dense["counts"] == [3, 1]
    assert curve._losses("static", tiny_llama_path, curve._static([2]))["kept"] is None


def test_what_was_measured_before_an_interrupt_counts(systems):
    def interrupted():
        yield from SAMPLES
        raise KeyboardInterrupt

    found, counts = perplexity.compare(systems, interrupted(), together=1)
    whole, _ = perplexity.compare(systems, SAMPLES, together=1)
    assert len(counts) == len(SAMPLES)
    assert all(torch.equal(found[name].losses, whole[name].losses) for name in systems)
    with pytest.raises(KeyboardInterrupt):
        perplexity.compare(systems, _at_once())


def _at_once():
    raise KeyboardInterrupt
    yield
