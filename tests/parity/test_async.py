"""Asynchronous scheduling: a step is in flight before the scheduler has heard of the last one's decisions.

vLLM switches it off on the CPU; Model Runner V2, in which it is the default on CUDA, works with it there (see test_v2).
"""

import os
import random
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from tests.support.models import routed_checkpoint

from .harness import (
    TOKEN_BLOCK,
    assert_equals_reference,
    counter,
    engine,
    free_pages,
    generate,
    poison_free_pages,
    random_prompts,
    running_ahead,
    scheduler,
)
from .test_pages import LAYERS

pytestmark = pytest.mark.skipif(
    os.environ.get("VLLM_USE_V2_MODEL_RUNNER") != "1", reason="needs Model Runner V2, which test_v2 starts"
)


@pytest.mark.parametrize(("granularity", "ahead"), [("attn_sequence", True), ("block_sequence", False)])
def test_steps_in_flight(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, granularity: str, ahead: bool
) -> None:
    """Pages are given back one step late and poisoned then; whatever is in flight never touches them."""
    from vllm.platforms.cpu import CpuPlatform

    stock = CpuPlatform.check_and_update_config.__func__

    def asynchronous(cls: Any, vllm_config: Any) -> None:
        stock(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    monkeypatch.setattr(CpuPlatform, "check_and_update_config", classmethod(asynchronous))
    checkpoint = routed_checkpoint(base, tmp_path / "c", granularity, LAYERS)
    rng = random.Random(5)
    prompts = random_prompts([rng.randrange(5, 90) for _ in range(14)])
    lengths = [rng.randrange(1, 30) for _ in prompts]
    monkeypatch.setattr("vllm_mod.step.download", None)  # nobody waits to know whose rows they are
    with (
        engine(checkpoint, kv_cache_memory_bytes=9 * TOKEN_BLOCK) as llm,
        running_ahead(llm, 2) if ahead else nullcontext(),
    ):
        assert type(scheduler(llm)).__name__ == "AsyncScheduler"
        poison_free_pages(llm)
        free = free_pages(llm)
        answers = generate(llm, prompts, lengths)
        assert counter(llm, "vllm:num_preemptions") > 0
        assert counter(llm, "vllm:mod_kv_pages_freed") > 0
        assert free_pages(llm) == free
    assert_equals_reference(checkpoint, prompts, answers)
