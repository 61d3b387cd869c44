"""Decode steps at static shapes (what FULL CUDA graphs hold): the same answers, and the device is never waited for."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from vllm.model_executor.layers.attention import Attention

from tests.support.models import routed_checkpoint, tiny_model
from vllm_mod.decode import DecodeStep
from vllm_mod.sublayers import _Routed, _RoutedAttention, _RoutedMLP

from .harness import assert_equals_reference, counter, engine, generate, random_prompts, runner_model
from .test_moe import SHAPES

LAYERS = [1, 2, 4, 5, 6]
GRANULARITIES = ["attn_token", "attn_sequence", "mlp_token", "mlp_sequence", "block_token", "block_sequence"]
#: One-token prompts are decode steps to vLLM: their decisions are taken there.
LENGTHS = (3, 1, 40, 1, 70, 33, 1, 64, 128, 1)
#: Operators whose result, or whose size, the host must wait for.
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "is_nonzero")


class NoWaiting(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.__name__.split(".")[0]
        assert name not in WAITING, f"{function} waits for the device"
        if name == "index":
            assert all(i is None or i.dtype != torch.bool for i in args[1]), "a mask as index has an unknown size"
        return function(*args, **(kwargs or {}))


@contextmanager
def static_decode(llm: Any, checked: list[int]) -> Iterator[None]:
    """Let the engine decode as on a GPU, and look at the operators of our own part of each step."""
    runner_model(llm).routing.static_decode = True
    decode, stock, rebuilt = _Routed._decode, _RoutedAttention.masked_stock_forward, DecodeStep.rebuilt

    def watched(self: Any, step: DecodeStep, output: Any, *inputs: Any) -> None:
        checked.append(len(step.seq_lens))
        # The plain versions of the kernels may look: Triton's have no such thing, see tests/unit/test_kernels.py.
        decide, step.decide = step.decide, lambda *args: _outside(decide, *args)  # type: ignore[method-assign]
        try:
            with NoWaiting():
                decode(self, step, output, *inputs)
        finally:
            del step.decide  # type: ignore[method-assign]

    def _outside(function: Any, *args: Any) -> Any:
        from torch.utils._python_dispatch import _disable_current_modes

        with _disable_current_modes():
            return function(*args)

    patch = pytest.MonkeyPatch()
    patch.setattr(_Routed, "_decode", watched)
    patch.setattr(_RoutedAttention, "masked_stock_forward", lambda *args: _outside(stock, *args))
    patch.setattr(DecodeStep, "rebuilt", lambda *args: _outside(rebuilt, *args))
    try:
        yield
    finally:
        patch.undo()


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("reclaim", [True, False])
def test_dense(base: Path, tmp_path: Path, granularity: str, reclaim: bool) -> None:
    """In a pool so small that requests are preempted and pages change hands."""
    if not reclaim and granularity not in ("attn_sequence", "block_sequence"):
        pytest.skip("nothing to reclaim")
    checkpoint = routed_checkpoint(base, tmp_path / "c", granularity, LAYERS)
    prompts, checked = random_prompts(LENGTHS, seed=3), []  # type: ignore[var-annotated]
    page = 2 * 32 * 2 * 32 * 4 * 8  # K and V, tokens, heads, head size, float32, layers
    with engine(
        checkpoint, {"kv_reclaim": reclaim}, kv_cache_memory_bytes=14 * page, max_num_seqs=8
    ) as llm, static_decode(llm, checked):  # fmt: skip
        answers = generate(llm, prompts, 60)
        assert counter(llm, "vllm:num_preemptions") > 0
        kept, routed = (counter(llm, f"vllm:mod_{name}") for name in ("kept", "routed"))
    assert max(checked) > 1
    decisions = assert_equals_reference(checkpoint, prompts, answers)
    assert 0 < kept < routed
    if granularity.endswith("sequence"):
        assert routed == len(prompts) * len(LAYERS)
        assert kept == sum(int(d[i]) for d in decisions for i in LAYERS)


@pytest.mark.parametrize("granularity", ["expert_token", "mlp_token", "block_sequence"])
def test_experts(tmp_path: Path, granularity: str) -> None:
    base = tiny_model(tmp_path / "base", "deepseek", num_hidden_layers=5, **SHAPES["deepseek"])
    checkpoint = routed_checkpoint(base, tmp_path / "c", granularity, [1, 2, 3])
    prompts, checked = random_prompts((3, 1, 40, 70)), []  # type: ignore[var-annotated]
    with engine(checkpoint) as llm, static_decode(llm, checked):
        answers = generate(llm, prompts, 12)
        kept, routed = (counter(llm, f"vllm:mod_{name}") for name in ("kept", "routed"))
    decisions = assert_equals_reference(checkpoint, prompts, answers)
    if granularity.endswith("token"):  # the last token of an answer is never fed back
        fed = [len(p) + 11 for p in prompts]
        assert kept == sum(int(d[i][0, :n].sum()) for d, n in zip(decisions, fed, strict=True) for i in (1, 2, 3))
        assert routed == sum(fed) * 3 * (3 if granularity == "expert_token" else 1)


class Tape(TorchDispatchMode):
    """Records operators, as the capture of a CUDA graph records kernels.

    `replay` runs them again without any Python of the model's: on the same outer tensors, by identity, with all
    numbers as they were. What is not in a buffer at one address is stale then.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[torch.Tensor]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        produced = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        self.calls.append((function, args, kwargs or {}, produced))
        return result

    def replay(self, result: torch.Tensor) -> torch.Tensor:
        made: dict[int, torch.Tensor] = {}

        def now(value: Any) -> Any:
            return made.get(id(value), value) if isinstance(value, torch.Tensor) else value

        for function, args, kwargs, produced in self.calls:
            again = function(*tree_map(now, args), **tree_map(now, kwargs))
            made.update(zip(map(id, produced), tree_leaves(again), strict=False))
        return made[id(result)]


@contextmanager
def replayed_decode(llm: Any, rows: int, replays: list[int]) -> Iterator[None]:
    """Record the first decode step of `rows` requests; replay it in place of every later one."""
    from vllm_mod.kv import attention

    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    routing, forward, recorded = runner_model(llm).routing, runner._model_forward, {}
    routing.static_decode = True

    def run(*args: Any, **kwargs: Any) -> Any:
        step = routing._latest.decode
        if step is None or step.rows != rows:
            return forward(*args, **kwargs)
        if not recorded:
            with Tape() as tape:
                recorded["result"] = forward(*args, **kwargs)
            recorded["tape"] = tape
            return recorded["result"]
        replays.append(step.rows)
        return recorded["tape"].replay(recorded["result"])

    def contexts(self: DecodeStep, *args: Any) -> Any:
        """CPU kernels need a schedule for the lengths of each step; it is made inside of what is recorded."""
        metadata, slots = original(self, *args)
        for name in metadata:
            metadata[name] = self.rebuilt(name) if name in self.buffers.layers else self._build(self._cm)
        return metadata, slots

    def transparent(kind: Any) -> Any:
        def call(self: Any, *inputs: Any, **named: Any) -> Any:
            inputs = inputs or tuple(named[n] for n in ("positions", "hidden_states"))
            output = torch.empty_like(inputs[-1])
            self.run(output, *inputs)
            return output

        return call

    original, patch = DecodeStep.contexts, pytest.MonkeyPatch()
    patch.setattr(DecodeStep, "contexts", contexts)
    patch.setattr(runner, "_model_forward", run)
    # Opaque operators would be recorded as such, and run their Python when they are replayed.
    patch.setattr(_RoutedAttention, "forward", transparent(_RoutedAttention))
    patch.setattr(_RoutedMLP, "forward", transparent(_RoutedMLP))
    patch.setattr(attention.torch.ops.vllm_mod, "paged_attention", attention.paged_attention)
    for module in runner_model(llm).modules():
        if isinstance(module, Attention):
            patch.setattr(module, "use_direct_call", True)
    try:
        yield
    finally:
        patch.undo()


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_replayed(base: Path, tmp_path: Path, granularity: str) -> None:
    """What a graph recorded in one step serves later steps and other requests, whatever they decided."""
    checkpoint = routed_checkpoint(base, tmp_path / "c", granularity, LAYERS)
    prompts, replays = random_prompts((3, 40, 17, 31, 64), seed=5), []  # type: ignore[var-annotated]
    others = random_prompts((20, 33, 5, 70, 28), seed=6)
    with engine(checkpoint) as llm, replayed_decode(llm, len(prompts), replays):
        answers = [generate(llm, group, 40) for group in (prompts, others)]
    assert len(replays) > 70
    for group, found in zip((prompts, others), answers, strict=True):
        assert_equals_reference(checkpoint, group, found)
