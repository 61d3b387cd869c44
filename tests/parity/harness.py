"""Run a checkpoint in vLLM and compare it, token by token, with the float32 reference."""

from __future__ import annotations

import contextlib
import gc
import random
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_mod.config import ModConfig

LOGPROB_TOLERANCE = 1e-3
TOKEN_BLOCK = 2 * 32 * 2 * 32 * 4 * 8  # bytes: K and V, tokens, heads, head size, float32, layers


@dataclass
class Answer:
    tokens: list[int]
    logprobs: list[float]

    @classmethod
    def of(cls, output: Any) -> Answer:
        """A `RequestOutput` of one completion, whose log-probabilities were asked for."""
        [found] = output.outputs
        logprobs = [step[token].logprob for step, token in zip(found.logprobs, found.token_ids, strict=True)]
        return cls(list(found.token_ids), logprobs)


def random_prompts(lengths: Sequence[int], seed: int = 0, vocabulary: tuple[int, int] = (6, 260)) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(*vocabulary) for _ in range(n)] for n in lengths]


@contextlib.contextmanager
def engine(checkpoint: Path, mod: dict[str, Any] | None = None, **options: Any) -> Iterator[Any]:
    """vLLM's `LLM` in this process; `mod` is `--additional-config`'s."""
    from vllm import LLM

    settings: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 256,
        "block_size": 32,
        "kv_cache_memory_bytes": 64 << 20,
        "max_num_seqs": 16,
        "disable_log_stats": False,
    }
    if mod is not None:
        settings["additional_config"] = {"mod": mod}
    llm = LLM(str(checkpoint), **(settings | options))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def generate(
    llm: Any, prompts: Sequence[list[int]], max_tokens: int | Sequence[int] = 24, dial: dict[str, Any] | None = None
) -> list[Answer]:
    """Greedy answers of exactly so many tokens; dial: `vllm_xargs` of all of them."""
    from vllm import SamplingParams

    lengths = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else max_tokens
    options: dict[str, Any] = {"temperature": 0, "logprobs": 0, "ignore_eos": True, "extra_args": dial}
    params = [SamplingParams(max_tokens=n, **options) for n in lengths]
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    return [Answer.of(output) for output in outputs]


def counter(llm: Any, name: str) -> float:
    """Sum of a Prometheus counter of the engine over all labels."""
    return sum(m.value for m in llm.get_metrics() if m.name == name)


def runner_model(llm: Any) -> Any:
    """The model as the (in-process) worker holds it."""
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner.model


@contextlib.contextmanager
def running_ahead(llm: Any, lag: int) -> Iterator[None]:
    """Meanwhile the host reads what is decided some steps later, as with a GPU that it does not wait for."""
    routing = runner_model(llm).routing
    routing._wait_from, routing._state._coming = 1 << 60, deque([[] for _ in range(lag)])
    yield
    for _ in range(lag):  # until all of it has been read
        generate(llm, [[1, 2]], 2)
    routing._wait_from, routing._state._coming = 0, deque()


def assert_no_kv_cache_of(llm: Any, dropped: Sequence[int], layers: int) -> None:
    """The other layers have one, and the pool holds as many blocks as fit with these alone."""
    specs = llm.llm_engine.model_executor.driver_worker.worker.get_kv_cache_spec()
    assert set(specs) == {f"model.layers.{i}.self_attn.attn" for i in set(range(layers)) - set(dropped)}
    block_bytes = sum(spec.page_size_bytes for spec in specs.values())
    cache = llm.llm_engine.vllm_config.cache_config
    assert cache.num_gpu_blocks == cache.kv_cache_memory_bytes // block_bytes


def scheduler(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler


def manager(llm: Any) -> Any:
    from vllm_mod.compat import manager_of

    return manager_of(scheduler(llm).kv_cache_manager)


def assert_nothing_left(llm: Any) -> None:
    """Of requests that have ended: neither at the scheduler nor, once another step has told them, at the workers."""
    generate(llm, [[1]], 1)
    pages = manager(llm)
    assert not pages._live and not pages._by_serial and not pages._stepping
    assert pages.token_slots == 0 and len(pages._free_slots) == pages._number_of_slots
    state = runner_model(llm).routing._state
    assert not getattr(state, "open", ())


def free_pages(llm: Any) -> int:
    return scheduler(llm).kv_cache_manager.block_pool.get_num_free_blocks()


def poison_free_pages(llm: Any) -> None:
    """A page is NaN while nobody owns or may find it; zero when handed out: kernels multiply an unused tail by 0."""
    layers = [layer.self_attn.attn for layer in runner_model(llm).model.layers]
    caches = list({layer.kv_cache.data_ptr(): layer.kv_cache for layer in layers}.values())  # one, if pages are shared
    for cache in caches:
        cache.fill_(torch.nan)
        cache[0] = 0  # the null page, which rows of skipped layers point to
    pages = manager(llm).pages
    give, take = pages.free.give, pages.free.take

    def fill(numbers: Any, value: float) -> None:
        for cache in caches:
            cache[torch.from_numpy(numbers)] = value

    def poison(numbers: Any, last: bool) -> None:
        fill(numbers[~pages.cached[numbers]], torch.nan)
        give(numbers, last)

    def clean(number: int) -> Any:
        numbers = take(number)
        fill(numbers, 0)
        return numbers

    pages.free.give, pages.free.take = poison, clean


def assert_equals_reference(
    checkpoint: Path, prompts: Sequence[list[int]], answers: Sequence[Answer], config: ModConfig | None = None
) -> list[dict[int, Any]]:
    """Greedy tokens equal and log-probabilities within 1e-3; returns the reference's decisions per prompt.

    Teacher-forced: the reference runs once over prompt + answer, and every answered token must be its argmax.
    """
    from router_tuning.model import load_reference, reference_decisions, reference_logits

    model, decisions = load_reference(checkpoint, config=config), []
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        logits = reference_logits(model, prompt + answer.tokens, len(prompt))[len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1)
        for step, (token, logprob) in enumerate(zip(answer.tokens, answer.logprobs, strict=True)):
            where = f"request {number} ({len(prompt)} prompt tokens), token {step}"
            difference = abs(float(expected[step, token]) - logprob)
            assert difference < LOGPROB_TOLERANCE, f"{where}: log-probability off by {difference}"
            assert token == int(expected[step].argmax()), f"{where}: {token} is not the reference's choice"
        decisions.append(reference_decisions(model))
    return decisions


def assert_same(left: Sequence[Answer], right: Sequence[Answer], tolerance: float = LOGPROB_TOLERANCE) -> None:
    for number, (a, b) in enumerate(zip(left, right, strict=True)):
        assert a.tokens == b.tokens, f"request {number}"
        worst = max(abs(x - y) for x, y in zip(a.logprobs, b.logprobs, strict=True))
        assert worst < tolerance, f"request {number}: log-probability off by {worst}"
