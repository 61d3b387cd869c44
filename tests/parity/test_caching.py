"""What vLLM does with cached prefixes (salts, adapters, events, a reset) holds where pages are cached per layer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.models import routed_checkpoint, tiny_llama

from .harness import (
    TOKEN_BLOCK,
    Answer,
    assert_equals_reference,
    assert_same,
    counter,
    engine,
    free_pages,
    manager,
    poison_free_pages,
    random_prompts,
)
from .test_lora import OPTIONS, _make_adapter

LAYERS = [0, 2, 3, 5, 7]
BLOCK = 32
CONFIG: dict[str, Any] = {"version": 2, "window": 40, "patch": {"rank": 4}}


def ask(llm: Any, prompts: Sequence[list[int]], salt: str | None = None, adapter: Any = None) -> list[Answer]:
    from vllm import SamplingParams

    inputs = [{"prompt_token_ids": p} | ({"cache_salt": salt} if salt else {}) for p in prompts]
    params = SamplingParams(temperature=0, max_tokens=8, logprobs=0, ignore_eos=True)
    return [Answer.of(output) for output in llm.generate(inputs, params, lora_request=adapter, use_tqdm=False)]


class Hits:
    """Tokens found in the cache since it was last asked."""

    def __init__(self, llm: Any) -> None:
        self.llm, self.before = llm, 0.0

    def __call__(self) -> float:
        before, self.before = self.before, counter(self.llm, "vllm:prefix_cache_hits")
        return self.before - before


def test_salts_a_reset_and_events(base: Path, tmp_path: Path) -> None:
    from vllm.config import KVEventsConfig
    from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored

    checkpoint = routed_checkpoint(base, tmp_path / "c", "attn_sequence", LAYERS, **CONFIG)
    prompts = random_prompts((70, 130, 200))
    whole = sum((len(p) - 1) // BLOCK * BLOCK for p in prompts)
    events = KVEventsConfig(enable_kv_cache_events=True, publisher="null")
    with engine(checkpoint, kv_cache_memory_bytes=40 * TOKEN_BLOCK, kv_events_config=events) as llm:
        poison_free_pages(llm)
        published: list[Any] = []
        pool = manager(llm).block_pool
        take = pool.take_events
        pool.take_events = lambda: [published.append(event) or event for event in take()]
        free, hits = free_pages(llm), Hits(llm)
        first = ask(llm, prompts)
        assert hits() == 0
        assert_same(first, ask(llm, prompts))
        assert hits() == whole
        assert_same(first, ask(llm, prompts, salt="tenant"))
        assert hits() == 0  # another tenant's
        assert_same(first, ask(llm, prompts, salt="tenant"))
        assert hits() == whole
        stored = [event for event in published if isinstance(event, BlockStored)]
        # The answer's tokens may complete another block: at least the prompts', once per tenant, each by its own hash.
        hashes = [block for event in stored for block in event.block_hashes]
        assert len(hashes) == len(set(hashes)) >= 2 * whole // BLOCK
        assert all(event.block_size == BLOCK for event in stored)
        assert llm.reset_prefix_cache()
        assert_same(first, ask(llm, prompts))
        assert hits() == 0 and free_pages(llm) == free
        assert any(isinstance(event, AllBlocksCleared) for event in published)
        others = random_prompts((200,) * 12, seed=5)  # five times what the pool holds
        ask(llm, others)
        removed = {block for event in published if isinstance(event, BlockRemoved) for block in event.block_hashes}
        assert removed and removed <= {b for e in published if isinstance(e, BlockStored) for b in e.block_hashes}
        assert_same(first, ask(llm, prompts))
    assert_equals_reference(checkpoint, prompts, first)


def test_an_adapters_prefixes_are_its_own(tmp_path: Path) -> None:
    from vllm.lora.request import LoRARequest

    base, adapter, merged_base = _make_adapter(tmp_path, "llama")
    checkpoint = routed_checkpoint(base, tmp_path / "plain", "block_sequence", LAYERS, **CONFIG)
    merged = routed_checkpoint(merged_base, tmp_path / "with", "block_sequence", LAYERS, **CONFIG)
    prompts = random_prompts((70, 130))
    whole = sum((len(p) - 1) // BLOCK * BLOCK for p in prompts)
    request = LoRARequest("a", 1, str(adapter))
    with engine(checkpoint, max_num_batched_tokens=64, **OPTIONS) as llm:
        hits = Hits(llm)
        plain, adapted = ask(llm, prompts), ask(llm, prompts, adapter=request)
        assert hits() == 0
        assert_same(plain, ask(llm, prompts))
        assert_same(adapted, ask(llm, prompts, adapter=request))
        assert hits() == 2 * whole
    assert_equals_reference(checkpoint, prompts, plain)
    assert_equals_reference(merged, prompts, adapted)


def test_a_chat_is_found_again_turn_by_turn(base: Path, tmp_path: Path) -> None:
    """Each turn finds the ones before it, their answers included."""
    checkpoint = routed_checkpoint(base, tmp_path / "c", "attn_sequence", LAYERS, **CONFIG)
    chat, asked = random_prompts((50,))[0], []
    with engine(checkpoint, max_num_batched_tokens=48) as llm:
        hits, answers = Hits(llm), []
        for turn in random_prompts((20, 30, 25), seed=3):
            chat = chat + turn
            asked.append(chat)
            answers += ask(llm, [chat])
            found = hits()
            # What was fed of the turn before: its prompt, and its answer but for the last token.
            if len(asked) > 1:
                assert found == (len(asked[-2]) + len(answers[-2].tokens) - 1) // BLOCK * BLOCK
            chat = chat + answers[-1].tokens
    assert_equals_reference(checkpoint, asked, answers)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_prompt_of_100_000_tokens(tmp_path: Path) -> None:
    """Prefilled 2,048 tokens at a time; the pages of the skipped layer come back while it still is."""
    shape = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 1}
    shape |= {"num_key_value_heads": 1, "max_position_embeddings": 131072}
    base = tiny_llama(tmp_path / "base", **shape)
    checkpoint = routed_checkpoint(base, tmp_path / "c", "attn_sequence", [1], version=2, window=64, threshold=1.0)
    [prompt] = random_prompts((100_000,))
    page = 2 * BLOCK * 32 * 4  # K and V, tokens, head size, float32
    blocks = -(-100_008 // BLOCK)
    # vLLM wants room for the longest request's pages in all layers; half of it will do.
    options = {"kv_cache_memory_bytes": (2 * blocks + 64) * page, "max_model_len": 100_032}
    with engine(checkpoint, max_num_batched_tokens=2048, **options) as llm:
        assert llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens == 2048
        held, take = [], manager(llm).take_message

        def watched() -> Any:
            held.append(manager(llm).bytes_held // page)
            return take()

        manager(llm).take_message = watched
        [answer] = ask(llm, [prompt])
        assert len(answer.tokens) == 8
        assert counter(llm, "vllm:num_preemptions") == 0
        assert counter(llm, "vllm:mod_kv_pages_freed") > 0
    assert len(held) >= 100_000 // 2048 and max(held) <= blocks + 200
