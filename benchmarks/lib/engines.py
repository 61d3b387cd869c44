"""vLLM engines in processes of their own, stepped in turn.

On a shared machine the speed of everything drifts by more than what is to be measured. So engines take turns *step by
step*: each sees the same weather. Only the steps themselves are timed, inside vLLM's own engine loop
(`LLMEngine.step`), with all of scheduling, model and sampling in them.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .common import IN_PROCESS, cpu_flags, metric_totals, progress, routed_pairs

_state: dict[str, Any] = {}  # of an engine's own process


@dataclass(frozen=True)
class Load:
    """Requests that are submitted at once."""

    requests: int
    prompt: int  #: tokens
    output: int  #: tokens, exactly
    shared: int = 0  #: tokens of the prompt that are the same in all requests, at its beginning
    variant: int = 0  #: other prompts, which no cache has seen, but for what is shared

    def prompts(self) -> list[list[int]]:
        # One token repeated: random routers then decide otherwise for another request.
        first, own = self.variant * self.requests, self.prompt - self.shared
        return [[3] * self.shared + [7 + (first + number) % 400] * own for number in range(self.requests)]


@dataclass
class Times:
    """What the steps of one run took. A step is `prefill` if any request of it had more than one token."""

    seconds: dict[str, float] = field(default_factory=lambda: {"prefill": 0.0, "decode": 0.0})
    tokens: dict[str, int] = field(default_factory=lambda: {"prefill": 0, "decode": 0})
    steps: dict[str, list[float]] = field(default_factory=lambda: {"prefill": [], "decode": []})
    requests: int = 0
    #: seconds that the engine had worked when each request had its first token
    first_tokens: list[float] = field(default_factory=list)

    def add(self, kind: str, tokens: int, seconds: float, first_tokens: int = 0) -> None:
        self.seconds[kind] += seconds
        self.tokens[kind] += tokens
        self.steps[kind].append(seconds)
        self.first_tokens += [sum(self.seconds.values())] * first_tokens

    def rate(self, workload: str) -> float:
        """Tokens per second: of `prefill` or `decode` steps, or of `pool`: generated tokens over the whole run."""
        if workload == "pool":
            return (self.tokens["decode"] + self.requests) / sum(self.seconds.values())
        return self.tokens[workload] / max(self.seconds[workload], 1e-9)


class Engine:
    """One `LLM` in a process of its own; it works only while it is asked to."""

    def __init__(self, model: Path, mod: dict[str, Any] | None, flags: dict[str, Any]) -> None:
        self._pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        self._call(_start, str(model), mod, flags)

    def _call(self, function: Any, *args: Any) -> Any:
        return self._pool.submit(function, *args).result()

    def thresholds(self, load: Load, kept: float) -> list[float]:
        """Per routed layer: those with which `kept` of these requests keep it."""
        return self._call(_thresholds, load, kept)

    def submit(self, load: Load) -> None:
        self._call(_submit, load)

    def step(self) -> tuple[str, int, float, int] | None:
        """(kind, tokens, seconds, requests that got their first token) of a step; None when nothing is left to do."""
        return self._call(_step)

    def run(self, load: Load) -> list[tuple[str, int, float, int]]:
        """All steps of a load, one right after the other."""
        return self._call(_run, load)

    def counts(self) -> tuple[float, float]:
        """(kept, routed) pairs since the start."""
        return self._call(_counts)

    def metric(self, name: str) -> float:
        """A counter of vLLM's, since the start."""
        return self._call(_metric, name)

    def running(self) -> int:
        """Most requests that one step of the last load had."""
        return self._call(_running)

    def stop(self) -> None:
        self._pool.shutdown()


def start_engines(
    systems: Mapping[str, tuple[Path, dict[str, Any] | None]], flags: dict[str, Any]
) -> dict[str, Engine]:
    """One of each system, at the same time. systems: see `shapes.four_systems`."""
    progress(f"starting {', '.join(systems)}")
    with ThreadPoolExecutor() as pool:  # each waits for a process
        return dict(zip(systems, pool.map(lambda system: Engine(*system, flags), systems.values()), strict=True))


def engine_flags(args: Any, longest: int, batched_tokens: int, requests: int) -> dict[str, Any]:
    """vLLM's for dummy weights; args: `eager`, `block_size`, `kv_cache_memory_bytes`.

    Prompts are whole and nothing is cached, unless `args.caching`: vLLM's own settings then.
    """
    caching, share = getattr(args, "caching", False), getattr(args, "gpu_memory_utilization", None)
    return {
        "load_format": "dummy", "skip_tokenizer_init": True, "enforce_eager": args.eager, "max_model_len": longest,
        "enable_prefix_caching": caching, "enable_chunked_prefill": caching,
        "max_num_batched_tokens": getattr(args, "batched_tokens", 2048) if caching else batched_tokens,
        "block_size": args.block_size, "max_num_seqs": requests, "disable_log_stats": False,
        "kv_cache_memory_bytes": args.kv_cache_memory_bytes, **cpu_flags(),
        **({} if share is None else {"gpu_memory_utilization": share}),
    }  # fmt: skip


def run_in_turn(engines: dict[str, Engine], load: Load, first: int = 0, whole: bool = False) -> dict[str, Times]:
    """The same load on each engine, a step of one after a step of the other; `first` rotates who begins.

    whole: all of the load on one engine, then on the next. A GPU still works on a step when the host goes on, so that
    steps of several engines would run into each other.
    """
    names = list(engines)
    order = names[first % len(names) :] + names[: first % len(names)]
    times = {name: Times(requests=load.requests) for name in names}
    if whole:
        for name in order:
            for step in engines[name].run(load):
                times[name].add(*step)
        return times
    for engine in engines.values():
        engine.submit(load)
    busy = set(names)
    while busy:
        for name in [n for n in order if n in busy]:
            step = engines[name].step()
            if step is None:
                busy.remove(name)
            else:
                times[name].add(*step)
    return times


# ---------------------------------------------------------------- in the engine's process


def _start(model: str, mod: dict[str, Any] | None, flags: dict[str, Any]) -> None:
    os.dup2(2, 1)  # vLLM logs to stdout, whose last line is the benchmark's
    os.environ |= IN_PROCESS
    from vllm import LLM

    try:
        llm = LLM(model, **flags, **({} if mod is None else {"additional_config": {"mod": mod}}))
    except Exception as error:  # not all of vLLM's exceptions can be pickled
        raise RuntimeError(f"vLLM does not start on {model}: {error}") from None
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    schedule, scheduled = scheduler.schedule, []

    def watched(*args: Any, **kwargs: Any) -> Any:
        step = schedule(*args, **kwargs)
        scheduled.append(tuple(step.num_scheduled_tokens.values()))
        return step

    scheduler.schedule = watched
    _state.update(llm=llm, scheduled=scheduled, number=itertools.count())


def _submit(load: Load) -> None:
    from vllm import SamplingParams

    _state["most"] = 0
    params = SamplingParams(temperature=0, max_tokens=load.output, ignore_eos=True, detokenize=False)
    for prompt in load.prompts():
        _state["llm"].llm_engine.add_request(str(next(_state["number"])), {"prompt_token_ids": prompt}, params)


def _step() -> tuple[str, int, float, int] | None:
    engine, scheduled = _state["llm"].llm_engine, _state["scheduled"]
    if not engine.has_unfinished_requests():
        return None
    scheduled.clear()
    begin = time.perf_counter()
    outputs = engine.step()
    seconds = time.perf_counter() - begin
    first_tokens = sum(len(output.outputs[0].token_ids) == 1 for output in outputs)
    counts = [n for step in scheduled for n in step]
    _state["most"] = max(_state["most"], *(len(step) for step in scheduled), 0)
    return "prefill" if counts and max(counts) > 1 else "decode", sum(counts), seconds, first_tokens


def _run(load: Load) -> list[tuple[str, int, float, int]]:
    _submit(load)
    return list(iter(_step, None))  # type: ignore[arg-type]


def _counts() -> tuple[float, float]:
    kept, routed = (sum(pairs.values()) for pairs in routed_pairs(_state["llm"]).values())
    return kept, routed


def _metric(name: str) -> float:
    return metric_totals(_state["llm"]).get(name, 0.0)


def _running() -> int:
    return _state["most"]


def _thresholds(load: Load, kept: float) -> list[float]:
    """Layer by layer, because what a layer decides changes what the next ones see."""
    import torch

    from vllm_mod.windows import WindowScores

    routing = _state["llm"].llm_engine.model_executor.driver_worker.worker.model_runner.model.routing
    cutoffs = routing._state.default_cutoffs  # written into the state of each request that starts
    deciding = Load(load.requests, min(load.prompt, routing.config.window or load.prompt), 1)
    add, scores = WindowScores.add, []

    def recording(self: Any, route: Any, x: Any) -> Any:
        decided = add(self, route, x)
        if route.column == column:
            scores.extend(self.means(column).tolist())
        return decided

    cutoffs.fill_(float("-inf"))
    WindowScores.add = recording  # type: ignore[method-assign]
    try:
        for column in routing.columns:
            scores.clear()
            _state["llm"].reset_prefix_cache()  # it knows the scores of prompts that it has seen
            _submit(deciding)
            while _step():
                pass
            cutoffs[column] = _between(sorted(scores), round((1 - kept) * len(scores)))
    finally:
        WindowScores.add = add  # type: ignore[method-assign]
    return torch.sigmoid(cutoffs).tolist()


def _between(scores: Sequence[float], skipped: int) -> float:
    """A cutoff that the `skipped` lowest of the ascending `scores` miss."""
    if skipped <= 0:
        return float("-inf")
    if skipped >= len(scores):
        return float("inf")
    return (scores[skipped - 1] + scores[skipped]) / 2
