"""KV pages of skipped layers go back to the pool, are reused by other requests, and no answer changes."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.models import routed_checkpoint, tiny_llama

from .harness import (
    TOKEN_BLOCK,
    assert_equals_reference,
    assert_nothing_left,
    assert_same,
    counter,
    engine,
    free_pages,
    generate,
    manager,
    poison_free_pages,
    random_prompts,
    scheduler,
)

LAYERS = [0, 2, 3, 5, 7]  # the first layer, too


@pytest.fixture(scope="module")
def long_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base") / "llama")


@pytest.mark.parametrize("granularity", ["attn_sequence", "block_sequence"])
def test_pages_are_reused_under_preemption(long_base: Path, tmp_path: Path, granularity: str) -> None:
    """Many requests, a small pool, every freed page filled with NaN: tokens and log-probabilities stay exact."""
    checkpoint = routed_checkpoint(long_base, tmp_path / "c", granularity, LAYERS)
    rng = random.Random(3)
    prompts = random_prompts([rng.randrange(20, 300) for _ in range(40)])
    lengths = [rng.randrange(1, 60) for _ in prompts]
    pool = 24 * TOKEN_BLOCK
    with engine(checkpoint, kv_cache_memory_bytes=pool, max_model_len=512, max_num_seqs=32) as llm:
        poison_free_pages(llm)
        free = free_pages(llm)
        answers = generate(llm, prompts, lengths)
        assert counter(llm, "vllm:num_preemptions") > 0
        assert manager(llm).pages_released > 100
        assert free_pages(llm) == free, "pages leaked"
        assert manager(llm).reports_ignored == sum(n == 1 for n in lengths)  # ended before it arrived
        assert_nothing_left(llm)
    decisions = assert_equals_reference(checkpoint, prompts, answers)
    kept = torch.tensor([[bool(d[i]) for i in LAYERS] for d in decisions]).float().mean()
    assert 0.2 < kept < 0.8


def test_reclaim_changes_no_answer(long_base: Path, tmp_path: Path) -> None:
    checkpoint = routed_checkpoint(long_base, tmp_path / "c", "attn_sequence", LAYERS)
    prompts = random_prompts((20, 90, 45, 200))
    answers = []
    for reclaim in (True, False):
        with engine(checkpoint, {"kv_reclaim": reclaim}) as llm:
            assert manager(llm).by_layer == reclaim
            answers.append(generate(llm, prompts))
    assert_same(*answers)


def test_more_requests_fit(long_base: Path, tmp_path: Path) -> None:
    """A quarter of all layers skipped by everybody: 4/3 of the requests run at once in the same memory."""
    thresholds = [1.0, 1.0]  # two of eight layers
    checkpoint = routed_checkpoint(long_base, tmp_path / "c", "attn_sequence", [3, 5], threshold=thresholds)
    peak = {}
    for name, path, mod in (
        ("stock", long_base, None),
        ("keep", checkpoint, {"force": "keep"}),
        ("mod", checkpoint, {}),
    ):
        with engine(path, mod, kv_cache_memory_bytes=48 * TOKEN_BLOCK, max_num_seqs=64) as llm:
            running, schedule = [], scheduler(llm).schedule

            def watched(*args: Any, schedule: Any = schedule, running: list[int] = running, **kwargs: Any) -> Any:
                output = schedule(*args, **kwargs)
                running.append(len(output.num_scheduled_tokens))
                return output

            scheduler(llm).schedule = watched
            generate(llm, random_prompts([33] * 48), 60)
            peak[name] = sum(sorted(running)[-40:]) / 40  # sustained, not one lucky step
    assert peak["keep"] == pytest.approx(peak["stock"], rel=0.05)
    assert peak["mod"] / peak["stock"] > 1.2
