"""Thousands of requests that come, stop, are aborted and preempted: no page, table entry or request is left over.

Every greedy answer must begin as the same prompt's answer alone does, while free pages are filled with NaN.
"""

import asyncio
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.support.models import routed_checkpoint
from vllm_mod.checkpoint import read_mod_config

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
)
from .test_pages import LAYERS

OUTPUT = 40


@dataclass
class Traffic:
    """Requests about a few known prompts, and what became of them."""

    llm: Any
    prompts: list[list[int]]
    expected: list[list[int]]  #: greedy answers, each asked alone
    rng: random.Random
    dials: list[dict[str, Any] | None] | None = None  #: of each prompt
    asked: dict[str, int | None] = field(default_factory=dict)  #: live request -> prompt it greedily answers
    ended: dict[str, int] = field(default_factory=lambda: dict.fromkeys(["length", "stop", "aborted", "several"], 0))

    def submit(self, name: str) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        number = self.rng.randrange(len(self.prompts))
        settings: dict[str, Any] = {"temperature": 0, "max_tokens": self.rng.randint(1, OUTPUT), "ignore_eos": True}
        settings["output_kind"] = RequestOutputKind.FINAL_ONLY
        kind = self.rng.random()
        if kind < 0.1:
            settings |= {"n": 2, "temperature": 1.0}  # no seed: on a CPU vLLM cannot take one back for a chunk
        elif kind < 0.3:
            settings["stop"] = self.llm.get_tokenizer().decode(self.expected[number][2:4])
        if self.dials is not None:
            settings["extra_args"] = self.dials[number]
        prompt = {"prompt_token_ids": self.prompts[number]}
        self.llm.llm_engine.add_request(name, prompt, SamplingParams(**settings))
        self.asked[name] = None if "n" in settings else number

    def abort_some(self) -> None:
        for name in list(self.asked):
            if self.rng.random() < 0.01:
                self.llm.llm_engine.abort_request([name])
                del self.asked[name]
                self.ended["aborted"] += 1

    def step(self) -> None:
        for output in self.llm.llm_engine.step():
            if not output.finished:
                continue
            number = self.asked.pop(output.request_id)
            if number is None:
                self.ended["several"] += 1
                assert len(output.outputs) == 2
                continue
            [answer] = output.outputs
            self.ended[answer.finish_reason] += 1
            tokens = list(answer.token_ids)
            assert tokens == self.expected[number][: len(tokens)], f"prompt {number}"

    def run(self, requests: int) -> None:
        submitted = 0
        for _ in range(50 * requests):  # far more steps than needed: a request that hangs ends this loop
            while submitted < requests and len(self.asked) < 40 and self.rng.random() < 0.8:
                self.submit(f"r{submitted}")
                submitted += 1
            self.abort_some()
            self.step()
            if submitted == requests and not self.asked:
                break
        assert not self.asked, "requests hang"
        assert sum(self.ended.values()) == requests
        assert all(self.ended.values()), f"some way to end never happened: {self.ended}"


@pytest.mark.parametrize("requests", [150, pytest.param(2000, marks=pytest.mark.slow)])
def test_nothing_is_left_over(base: Path, tmp_path: Path, requests: int) -> None:
    checkpoint = routed_checkpoint(base, tmp_path / "c", "attn_sequence", LAYERS)
    rng = random.Random(requests)
    prompts = random_prompts([rng.randrange(1, 120) for _ in range(24)], seed=5)
    with engine(checkpoint, kv_cache_memory_bytes=24 * TOKEN_BLOCK, max_num_seqs=24) as llm:
        poison_free_pages(llm)
        free = free_pages(llm)
        expected = [generate(llm, [prompt], OUTPUT)[0].tokens for prompt in prompts]
        traffic = Traffic(llm, prompts, expected, rng)
        traffic.run(requests)
        assert counter(llm, "vllm:num_preemptions") > 0
        assert manager(llm).reports_ignored > 0
        assert_nothing_left(llm)
        assert free_pages(llm) == free, "pages leaked"


@pytest.mark.parametrize("requests", [120, pytest.param(2000, marks=pytest.mark.slow)])
def test_shared_prefixes_and_dials(base: Path, tmp_path: Path, requests: int) -> None:
    """Decisions from a window, prompts in chunks, prefixes from the cache, each request at a depth of its own."""
    checkpoint = routed_checkpoint(base, tmp_path / "c", "attn_sequence", LAYERS, version=2, window=40)
    rng = random.Random(requests)
    prefixes = random_prompts([rng.randrange(33, 130) for _ in range(20)], seed=7)
    own = random_prompts([rng.randrange(1, 60) for _ in range(40)], seed=8)
    prompts = [rng.choice(prefixes) + tail for tail in own]
    depths = [None, {"mod_threshold": 0}, {"mod_threshold": 0.3}, {"mod_threshold": 0.8}, {"mod_threshold": 1}]
    dials: list[dict[str, Any] | None] = [rng.choice(depths) for _ in prompts]
    config = read_mod_config(checkpoint)
    with engine(
        checkpoint, kv_cache_memory_bytes=40 * TOKEN_BLOCK, max_num_seqs=24, max_num_batched_tokens=96
    ) as llm:  # fmt: skip
        poison_free_pages(llm)
        free = free_pages(llm)
        answers = [generate(llm, [prompt], OUTPUT, dial)[0] for prompt, dial in zip(prompts, dials, strict=True)]
        traffic = Traffic(llm, prompts, [answer.tokens for answer in answers], rng, dials)
        traffic.run(requests)
        assert counter(llm, "vllm:num_preemptions") > 0
        assert counter(llm, "vllm:prefix_cache_hits") > 0
        assert_nothing_left(llm)
        assert free_pages(llm) == free, "pages leaked"
    for depth in depths:
        mine = [i for i, dial in enumerate(dials) if dial == depth]
        wanted = config if depth is None else config.with_threshold(float(depth["mod_threshold"]))
        assert_equals_reference(checkpoint, [prompts[i] for i in mine], [answers[i] for i in mine], wanted)


@pytest.mark.slow
def test_clients_that_disconnect(base: Path, tmp_path: Path) -> None:
    """Through the asynchronous engine, its core in another process: a cancelled stream is an aborted request."""
    from prometheus_client import REGISTRY
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    checkpoint = routed_checkpoint(base, tmp_path / "c", "attn_sequence", LAYERS)
    rng = random.Random(9)
    prompts = random_prompts([rng.randrange(1, 120) for _ in range(300)], seed=6)
    settings: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256, "block_size": 32}
    settings |= {"kv_cache_memory_bytes": 24 * TOKEN_BLOCK, "max_num_seqs": 24}

    async def ask(llm: Any, number: int, gate: asyncio.Semaphore, patience: int) -> bool:
        """Whether the answer was awaited to its end."""
        params = SamplingParams(temperature=0, max_tokens=OUTPUT, ignore_eos=True)
        async with gate:
            stream = llm.generate({"prompt_token_ids": prompts[number]}, params, f"r{number}")
            async for output in stream:
                if output.finished:
                    assert len(output.outputs[0].token_ids) == OUTPUT
                    return True
                if len(output.outputs[0].token_ids) >= patience:
                    await stream.aclose()
                    return False
        raise AssertionError("a stream ended without an answer")

    async def run() -> tuple[int, dict[str, float]]:
        llm = AsyncLLM.from_engine_args(AsyncEngineArgs(model=str(checkpoint), **settings))
        try:
            gate = asyncio.Semaphore(40)
            patience = [rng.choice([1, 3, 10, OUTPUT]) for _ in prompts]
            asked = [ask(llm, n, gate, patience[n]) for n in range(len(prompts))]
            finished = sum(await asyncio.wait_for(asyncio.gather(*asked), 300))
            # One more by itself: its last report comes when every abort before it has been carried out.
            assert await ask(llm, 0, gate, OUTPUT + 1)
            return finished, {m: await value(f"vllm:{m}") for m in ("num_requests_running", "kv_cache_usage_perc")}
        finally:
            llm.shutdown()

    async def value(name: str) -> float:
        return sum(s.value for m in REGISTRY.collect() for s in m.samples if s.name == name)

    finished, left = asyncio.run(run())
    assert 0 < finished < len(prompts)
    assert left == {"num_requests_running": 0, "kv_cache_usage_perc": 0}
