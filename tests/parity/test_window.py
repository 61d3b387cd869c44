"""Decisions from a window (version 2): exact with prompts in chunks and with prefixes from the cache."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.models import routed_checkpoint

from .harness import (
    TOKEN_BLOCK,
    assert_equals_reference,
    assert_nothing_left,
    assert_same,
    counter,
    engine,
    free_pages,
    generate,
    poison_free_pages,
    random_prompts,
    running_ahead,
)
from .test_decode import static_decode

LAYERS = [0, 2, 3, 5, 7]
GRANULARITIES = ["attn_sequence", "mlp_sequence", "block_sequence"]


def _checkpoint(base: Path, tmp_path: Path, granularity: str, window: int, **config: Any) -> Path:
    return routed_checkpoint(base, tmp_path / "c", granularity, LAYERS, version=2, window=window, **config)


def _disagree(decisions: list[dict[int, torch.Tensor]]) -> None:
    """A test means something only where requests decide differently."""
    kept = torch.stack([torch.cat([d[layer].flatten() for layer in LAYERS]) for d in decisions]).float()
    assert 0.1 < kept.mean() < 0.9
    assert len(kept.unique(dim=0)) > 2


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("window", [1, 24, 32, 64, 4096])
def test_chunks_and_cached_prefixes(base: Path, tmp_path: Path, granularity: str, window: int) -> None:
    """Prompts of every length around the window, in chunks that cut it; then again, found in the cache."""
    checkpoint = _checkpoint(base, tmp_path, granularity, window)
    prompts = random_prompts((1, 23, 24, 25, 31, 32, 33, 63, 64, 65, 100, 200, 128))
    prompts += [prompts[-1][:96] + p for p in prompts[:3]]  # they share their first blocks
    limits = {"max_num_batched_tokens": 48, "max_num_scheduled_tokens": 40}
    with engine(checkpoint, **limits, max_num_seqs=8, enable_prefix_caching=True) as llm:
        settings = llm.llm_engine.vllm_config
        assert settings.scheduler_config.enable_chunked_prefill and settings.cache_config.enable_prefix_caching
        assert settings.scheduler_config.max_num_batched_tokens == 48
        poison_free_pages(llm)
        free = free_pages(llm)
        first = generate(llm, prompts)
        before = counter(llm, "vllm:prefix_cache_hits")
        again = generate(llm, prompts)
        assert counter(llm, "vllm:prefix_cache_hits") - before > sum(map(len, prompts)) / 2
        assert free_pages(llm) == free
    decisions = assert_equals_reference(checkpoint, prompts, first)
    assert_same(first, again)
    _disagree(decisions)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("static", [False, True], ids=["compact", "static"])
def test_one_token_per_step(base: Path, tmp_path: Path, granularity: str, static: bool) -> None:
    """Every token of a prompt is a decode step to vLLM; `static`: at static shapes, as in a FULL CUDA graph."""
    checkpoint = _checkpoint(base, tmp_path, granularity, 40)
    prompts, checked = random_prompts((1, 39, 40, 41, 65, 80)), []  # type: ignore[var-annotated]
    options = {"max_num_batched_tokens": 16, "long_prefill_token_threshold": 1}
    with engine(checkpoint, **options) as llm, static_decode(llm, checked) if static else nullcontext():
        first = generate(llm, prompts, 12)
        before = counter(llm, "vllm:prefix_cache_hits")
        again = generate(llm, prompts, 12)
        assert counter(llm, "vllm:prefix_cache_hits") > before
        routed, kept = (counter(llm, f"vllm:mod_{name}") for name in ("routed", "kept"))
    decisions = assert_equals_reference(checkpoint, prompts, first)
    assert_same(first, again)
    assert bool(checked) == static
    assert routed == 2 * len(prompts) * len(LAYERS)
    assert kept == 2 * sum(int(d[i]) for d in decisions for i in LAYERS)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("window", [24, 4096])
def test_preemption(base: Path, tmp_path: Path, granularity: str, window: int) -> None:
    """A pool so small that requests are preempted and pages change hands, cached ones, too."""
    checkpoint = _checkpoint(base, tmp_path, granularity, window)
    prompts = random_prompts((30, 60, 25, 90, 31, 64, 10, 50, 40, 20), seed=1)
    with engine(checkpoint, kv_cache_memory_bytes=14 * TOKEN_BLOCK, max_num_seqs=8, max_num_batched_tokens=64) as llm:
        poison_free_pages(llm)
        free = free_pages(llm)
        answers = generate(llm, prompts, 80)
        assert counter(llm, "vllm:num_preemptions") > 0
        assert free_pages(llm) == free
        assert_nothing_left(llm)
    _disagree(assert_equals_reference(checkpoint, prompts, answers))


@pytest.mark.parametrize(("granularity", "lag"), [("attn_sequence", 2), ("mlp_sequence", 1), ("block_sequence", 2)])
def test_a_host_that_runs_ahead(base: Path, tmp_path: Path, granularity: str, lag: int) -> None:
    """It hears later what was decided: rows behind a decision are computed and replaced, what skips is not stored."""
    checkpoint = _checkpoint(base, tmp_path, granularity, 24, **({"patch": {"rank": 4}} if lag == 2 else {}))
    prompts = random_prompts((1, 23, 24, 25, 48, 64, 65, 100, 200, 128))
    prompts += [prompts[-1][:96] + p for p in prompts[:3]]
    limits = {"max_num_batched_tokens": 48, "max_num_scheduled_tokens": 40}
    with engine(checkpoint, **limits, max_num_seqs=8, enable_prefix_caching=True) as llm:
        poison_free_pages(llm)
        free = free_pages(llm)
        with running_ahead(llm, lag):
            first = generate(llm, prompts)
            again = generate(llm, prompts)
        assert free_pages(llm) == free
        routed, kept = (counter(llm, f"vllm:mod_{name}") for name in ("routed", "kept"))
    decisions = assert_equals_reference(checkpoint, prompts, first)
    assert_same(first, again)
    _disagree(decisions)
    # Each decision is counted once; so are those of the requests that came last, as far as they were read.
    assert 0 <= routed - 2 * len(prompts) * len(LAYERS) <= lag * len(LAYERS)
    assert 0 <= kept - 2 * sum(int(d[i]) for d in decisions for i in LAYERS) <= lag * len(LAYERS)


@pytest.mark.parametrize(("granularity", "window"), [("attn_sequence", 24), ("block_sequence", None)])
def test_preemption_while_decisions_are_on_their_way(
    base: Path, tmp_path: Path, granularity: str, window: int | None
) -> None:
    """Slots and pages change hands before the host has heard of their last owner."""
    version: dict[str, Any] = {"window": window} if window else {}
    checkpoint = routed_checkpoint(base, tmp_path / "c", granularity, LAYERS, **version)
    prompts = random_prompts((30, 60, 25, 90, 31, 64, 10, 50, 40, 20), seed=1)
    limits = {"max_num_batched_tokens": 64} if window else {}
    with engine(checkpoint, kv_cache_memory_bytes=14 * TOKEN_BLOCK, max_num_seqs=8, **limits) as llm:
        poison_free_pages(llm)
        free = free_pages(llm)
        with running_ahead(llm, 2):
            answers = generate(llm, prompts, [80, 80, 2, 80, 80, 80, 1, 80, 80, 80])
        assert counter(llm, "vllm:num_preemptions") > 0
        assert free_pages(llm) == free
        assert_nothing_left(llm)
    _disagree(assert_equals_reference(checkpoint, prompts, answers))
