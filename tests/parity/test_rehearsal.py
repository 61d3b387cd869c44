"""The start-up of vLLM's GPU worker, and what happens to it later, rehearsed on the CPU (run again at V2 by test_v2).

Decode steps are served by replaying what was captured at start-up, padding included, as on a GPU. Each test looks at
outcomes only: answers, what was counted of all requests so far, pages, what was captured.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams

pytest.importorskip("vllm.model_executor.warmup.attention_warmup", reason="the GPU worker of vLLM 0.32 is rehearsed")

from vllm.model_executor.warmup.attention_warmup import mixed_batch_attention_warmup

from tests.support.graphs import Graph
from tests.support.models import routed_checkpoint, tiny_llama, tiny_model
from tests.support.rehearsal import CAPTURE_SIZES, ENGINE, rehearsal

from .harness import Answer, assert_equals_reference, counter, engine, free_pages, generate, random_prompts, scheduler
from .test_moe import SHAPES

V2 = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"
LAYERS = [1, 2, 3]
#: What of version 2 is rehearsed: granularity, and further keys of `mod_config`.
VERSION_2: dict[str, tuple[str, dict[str, Any]]] = {
    "windowed": ("attn_sequence", {"window": 8}),
    "patched": ("block_sequence", {"window": 24, "patch": {"rank": 4}}),
    "patched_token": ("attn_token", {"patch": {"rank": 0}}),
}
QUICK = ["attn_sequence", "block_token", "patched"]
SLOW = ["expert_token", "attn_token", "mlp_sequence", "mlp_token", "block_sequence", "windowed", "patched_token"]
REQUESTS = 4  #: at once: what waits joins others that decode, in steps that are small enough for a graph
LENGTHS, NEW = (3, 40, 1, 12, 7, 5), (4, 6, 3, 2, 3, 2)


@dataclass
class Rehearsed:
    llm: Any
    granularity: str
    config: dict[str, Any]
    checkpoint: Path
    free: int  #: pages at the start
    kept: int = 0  #: of all requests that were served, by the reference
    routed: int = 0

    @property
    def worker(self) -> Any:
        return self.llm.llm_engine.model_executor.driver_worker.worker

    def serve(self, seed: int, checkpoint: Path | None = None) -> None:
        """Answers equal the reference's; what is counted is what was served since start-up, and no more."""
        prompts = random_prompts(LENGTHS, seed=seed)
        self.check(prompts, generate(self.llm, prompts, NEW), checkpoint)

    def check(
        self, prompts: Sequence[list[int]], answers: Sequence[Answer], checkpoint: Path | None = None,
        prefilled_again: bool = False,
    ) -> None:  # fmt: skip
        decisions = assert_equals_reference(checkpoint or self.checkpoint, prompts, answers)
        # The last token of an answer is never fed back.
        fed = [len(p) + len(a.tokens) - 1 for p, a in zip(prompts, answers, strict=True)]
        by_request = self.granularity.endswith("sequence")
        for decision, number in zip(decisions, fed, strict=True):
            for layer in LAYERS:
                taken = decision[layer].flatten() if by_request else decision[layer][0, :number]
                self.kept, self.routed = self.kept + int(taken.sum()), self.routed + taken.numel()
        kept, routed = int(counter(self.llm, "vllm:mod_kept")), int(counter(self.llm, "vllm:mod_routed"))
        if prefilled_again and not by_request:  # tokens are counted as often as they are computed
            assert kept > self.kept and routed > self.routed
            self.kept, self.routed = kept, routed
        assert (kept, routed) == (self.kept, self.routed)
        assert scheduler(self.llm).get_num_unfinished_requests() == 0
        assert free_pages(self.llm) == self.free

    def start(self, seed: int, steps: int) -> tuple[list[list[int]], list[Any]]:
        """Requests that have run for some steps; returns prompts and a list that outputs go to."""
        prompts, finished = random_prompts(LENGTHS, seed=seed), []  # type: ignore[var-annotated]
        for number, (prompt, length) in enumerate(zip(prompts, NEW, strict=True)):
            parameters = SamplingParams(temperature=0, max_tokens=length, logprobs=0, ignore_eos=True)
            self.llm.llm_engine.add_request(f"{seed}-{number}", {"prompt_token_ids": prompt}, parameters)
        for _ in range(steps):
            finished += self.step()
        return prompts, finished

    def step(self) -> list[Any]:
        return [output for output in self.llm.llm_engine.step() if output.finished]

    def finish(
        self, prompts: list[list[int]], finished: list[Any], each_step: Any = None, prefilled_again: bool = False
    ) -> None:  # fmt: skip
        while self.llm.llm_engine.has_unfinished_requests():
            finished += self.step()
            if each_step is not None:
                each_step()
        finished.sort(key=lambda output: int(output.request_id.split("-")[1]))
        self.check(prompts, [Answer.of(output) for output in finished], prefilled_again=prefilled_again)

    def dummies(self) -> None:
        """A decode step, and one with prompts."""
        self.worker.execute_dummy_batch()
        if V2:
            self.worker.model_runner._dummy_run(2 * REQUESTS)
        else:
            mixed_batch_attention_warmup(self.worker)

    def captured(self) -> dict[str, list[int]]:
        """Tokens of every graph there is, by runtime mode."""
        from vllm.compilation.cuda_graph import CUDAGraphWrapper

        sizes: dict[str, set[int]] = {"FULL": set(), "PIECEWISE": set()}
        manager = getattr(self.worker.model_runner, "cudagraph_manager", None)
        sizes["FULL"] |= {description.num_tokens for description in manager.graphs} if manager else set()
        for wrapper in CUDAGraphWrapper._all_instances:
            sizes[wrapper.runtime_mode.name] |= {key.num_tokens for key in wrapper.concrete_cudagraph_entries}
        return {mode: sorted(tokens) for mode, tokens in sizes.items()}


def _base(directory: Path, granularity: str, seed: int) -> Path:
    if granularity == "expert_token":
        return tiny_model(directory, "deepseek", seed=seed, num_hidden_layers=5, **SHAPES["deepseek"])
    return tiny_llama(directory, seed=seed, num_hidden_layers=5)


@pytest.fixture(scope="module", params=[*QUICK, *(pytest.param(kind, marks=pytest.mark.slow) for kind in SLOW)])
def rehearsed(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rehearsed]:
    granularity, config = VERSION_2.get(request.param, (request.param, {}))
    directory = tmp_path_factory.mktemp("rehearsal")
    base = _base(directory / "base", granularity, seed=0)
    checkpoint = routed_checkpoint(base, directory / "routed", granularity, LAYERS, **config)
    with rehearsal(), engine(checkpoint, max_num_seqs=REQUESTS, **ENGINE) as llm:
        yield Rehearsed(llm, granularity, config, checkpoint, free_pages(llm))


def test_graphs_are_captured_and_serve(rehearsed: Rehearsed) -> None:
    assert rehearsed.captured() == {
        "FULL": [size for size in CAPTURE_SIZES if size <= REQUESTS], "PIECEWISE": CAPTURE_SIZES,
    }  # fmt: skip
    Graph.replays.clear()
    rehearsed.serve(seed=0)
    assert Graph.replays["FULL"] > 1 and Graph.replays["PIECEWISE"] > 0


def test_dummy_steps_between(rehearsed: Rehearsed) -> None:
    """An idle data-parallel rank runs dummy batches, between its requests' steps and before steps without any."""
    prompts, finished = rehearsed.start(seed=1, steps=2)
    rehearsed.finish(prompts, finished, each_step=rehearsed.worker.execute_dummy_batch)
    rehearsed.step()  # tells the worker of the last ends
    rehearsed.worker.execute_dummy_batch()
    rehearsed.serve(seed=2)


def test_capture_again(rehearsed: Rehearsed) -> None:
    """Elastic expert parallelism warms up and captures a second time; V1 with requests under way."""
    from vllm.v1.worker.gpu.eplb_utils import preserve_serving_state
    from vllm.v1.worker.workspace import unlock_workspace

    worker, runner = rehearsed.worker, rehearsed.worker.model_runner
    prompts, finished = ([], []) if V2 else rehearsed.start(seed=3, steps=3)
    worker.elastic_ep_executor._release_cuda_graphs()
    unlock_workspace()
    with preserve_serving_state(runner) if V2 else runner.preserve_serving_state():
        runner._dummy_run(runner.max_num_tokens, is_profile=True, skip_eplb=True)
        worker.compile_or_warm_up_model()
    if prompts:
        rehearsed.finish(prompts, finished)
    rehearsed.serve(seed=4)


def test_start_again_with_a_new_kv_cache(rehearsed: Rehearsed) -> None:
    from vllm.v1.worker.gpu.cudagraph_utils import _teardown_profiling_state

    rehearsed.step()  # tells the worker of the last ends
    worker = rehearsed.worker
    config, runner = worker.kv_cache_config, worker.model_runner
    _teardown_profiling_state(runner) if V2 else runner._cleanup_profiling_kv_cache()
    assert worker.determine_available_memory() > 0
    worker.initialize_from_config(config)
    worker.compile_or_warm_up_model()
    rehearsed.serve(seed=5)


def test_a_reset_while_a_step_is_in_flight(rehearsed: Rehearsed) -> None:
    """What it answers is thrown away, and its requests are prefilled again: prompts of one token by a decode step.

    Decisions are frozen: the routers are other ones by then.
    """
    if not rehearsed.granularity.endswith("sequence"):
        pytest.skip("nothing is frozen")
    stock, model = scheduler(rehearsed.llm).update_from_output, rehearsed.worker.get_model()
    routers = {n: p.clone() for n, p in model.named_parameters() if n.endswith(".router.weight")}

    def reset(*args: Any) -> Any:
        scheduler(rehearsed.llm).update_from_output = stock
        assert scheduler(rehearsed.llm).reset_prefix_cache(reset_running_requests=True)
        model.load_weights([(name, -router) for name, router in routers.items()])
        return stock(*args)

    prompts, new = random_prompts((1, 1, 9, 1), seed=9), (5, 5, 5, 5)
    scheduler(rehearsed.llm).update_from_output = reset
    answers = generate(rehearsed.llm, prompts, new)
    model.load_weights(list(routers.items()))
    rehearsed.check(prompts, answers)


@pytest.mark.parametrize("mode", ["abort", "keep"])
def test_sleep_and_wake_up(rehearsed: Rehearsed, mode: str) -> None:
    """Level 1 keeps the weights and loses the KV cache; requests that are kept are prefilled again."""
    prompts, finished = rehearsed.start(seed=6, steps=4) if mode == "keep" else ([], [])
    rehearsed.llm.llm_engine.sleep(1, mode)
    rehearsed.llm.wake_up()
    rehearsed.dummies()  # before any request says anew what is where
    if prompts:
        rehearsed.finish(prompts, finished, prefilled_again=True)
    rehearsed.serve(seed=7)


def test_sleep_loses_the_weights_and_other_weights_come(rehearsed: Rehearsed, tmp_path: Path) -> None:
    """Level 2; on the CPU vLLM cannot reload the experts of any model."""
    if rehearsed.granularity == "expert_token":
        pytest.skip("vLLM's CPU kernels keep a copy of the experts' weights that reloading does not reach")
    base = _base(tmp_path / "base", rehearsed.granularity, seed=1)
    other = routed_checkpoint(base, tmp_path / "other", rehearsed.granularity, LAYERS, seed=1, **rehearsed.config)
    for path in (other, rehearsed.checkpoint):
        rehearsed.llm.sleep(2)
        assert all(p.isnan().all() for p in rehearsed.worker.get_model().parameters() if p.numel())
        rehearsed.llm.wake_up(["weights"])
        rehearsed.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(path)})
        rehearsed.llm.wake_up(["kv_cache"])
        rehearsed.dummies()
        rehearsed.serve(seed=8, checkpoint=path)
