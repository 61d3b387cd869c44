"""Parity with the reference at scale: hundreds of requests in a pool far too small for them.

The small version runs again at Model Runner V2 (see test_v2).
"""

import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.models import routed_checkpoint

from .harness import (
    TOKEN_BLOCK,
    assert_equals_reference,
    assert_nothing_left,
    counter,
    engine,
    free_pages,
    generate,
    manager,
    poison_free_pages,
    random_prompts,
    scheduler,
)
from .test_pages import LAYERS


def _run(
    base: Path,
    tmp_path: Path,
    prompts: Sequence[int],
    outputs: Sequence[int],
    blocks: int,
    longest: int,
    ahead: bool = False,
) -> None:
    """Prompts and answers of these lengths, in a pool of that many token blocks, free pages filled with NaN."""
    checkpoint = routed_checkpoint(base, tmp_path / "c", "attn_sequence", LAYERS)
    tokens = random_prompts(prompts, seed=11)
    with engine(checkpoint, kv_cache_memory_bytes=blocks * TOKEN_BLOCK, max_model_len=longest, max_num_seqs=48) as llm:
        assert scheduler(llm).scheduler_config.async_scheduling == ahead
        poison_free_pages(llm)
        free = free_pages(llm)
        unheard = _decoding_before_a_decision_is_heard(llm)
        answers = generate(llm, tokens, outputs)
        assert bool(unheard) == ahead
        assert counter(llm, "vllm:num_preemptions") > 0
        assert counter(llm, "vllm:mod_kv_pages_freed") > 0
        assert free_pages(llm) == free, "pages leaked"
        assert_nothing_left(llm)
    decisions = assert_equals_reference(checkpoint, tokens, answers)
    for layer in LAYERS:  # the test means something only where requests disagree
        kept = [bool(decision[layer]) for decision in decisions]
        assert len(set(kept)) == 2, f"layer {layer}"


def _decoding_before_a_decision_is_heard(llm: Any) -> list[str]:
    """Requests that got slots for another step while the scheduler did not know yet what they skip."""
    pages, found = manager(llm), []
    allocate = pages.allocate_new_blocks

    def watched(request: str, *args: Any) -> Any:
        if pages.req_to_blocks.get(request) and pages._live[request].keep is None:
            found.append(request)
        return allocate(request, *args)

    pages.allocate_new_blocks = watched
    return found


@pytest.mark.slow
def test_hundreds_of_requests(base: Path, tmp_path: Path) -> None:
    rng = random.Random(17)
    prompts = [rng.randint(20, 600) for _ in range(300)]
    _run(base, tmp_path, prompts, [rng.randint(1, 100) for _ in prompts], blocks=60, longest=768)


FEW = {"prompts": [20, 45, 28, 33, 60, 25, 31, 50], "outputs": [36, 20, 8, 34, 12, 36, 36, 16]}


def test_a_few_requests(base: Path, tmp_path: Path) -> None:
    _run(base, tmp_path, **FEW, blocks=9, longest=256)


@pytest.mark.skipif(os.environ.get("VLLM_USE_V2_MODEL_RUNNER") != "1", reason="on the CPU only Model Runner V2 can")
def test_a_few_requests_scheduled_ahead(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asynchronous scheduling: the next step is under way before the scheduler hears of a decision."""
    from vllm.platforms.cpu import CpuPlatform

    settle = CpuPlatform.check_and_update_config

    def check_and_update_config(vllm_config: Any) -> None:
        settle(vllm_config)
        vllm_config.scheduler_config.async_scheduling = True  # vLLM has it off on the CPU, where it gains nothing

    monkeypatch.setattr(CpuPlatform, "check_and_update_config", staticmethod(check_and_update_config))
    _run(base, tmp_path, **FEW, blocks=5, longest=128, ahead=True)
