"""vLLM's GPU worker, from its first call to its last, on a machine without a GPU.

`GPUWorker` runs the code of vLLM's own GPU worker and of its model runners, in their order: memory profiling with its
own KV cache, dummy runs, warm-up, capture of every graph, sampler, sleep and wake-up. Stand-ins replace what only a GPU
has: graphs (`graphs`), memory pools (`pools`), memory figures, and kernels that need no schedule.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm import _custom_ops as ops
from vllm.compilation import cuda_graph
from vllm.compilation.cuda_graph import CUDAGraphWrapper
from vllm.config.compilation import CompilationConfig, CUDAGraphMode
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.model_executor.warmup.attention_warmup import mixed_batch_attention_warmup
from vllm.platforms import current_platform
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadataBuilder, _get_attn_isa
from vllm.v1.worker import cpu_worker, gpu_model_runner, gpu_worker
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu import cudagraph_utils
from vllm.v1.worker.gpu import model_runner as gpu_v2
from vllm.v1.worker.gpu.structured_outputs import StructuredOutputsWorker
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.workspace import init_workspace_manager

from vllm_mod import decode

from .graphs import Graph, Recorder, kernel
from .pools import Pools

CAPTURE_SIZES = [1, 2, 4, 16]
KV_BYTES = 16 << 20
MEMORY = 1 << 34  #: bytes of the device, always free
#: Engine options; start the engine inside of `rehearsal`.
ENGINE: dict[str, Any] = {
    "worker_cls": "tests.support.rehearsal.GPUWorker",
    "enforce_eager": False,
    "compilation_config": {"mode": 0},
    "kv_cache_memory_bytes": None,
    "gpu_memory_utilization": 0.5,
}


class _Runner(CPUModelRunner):
    """Model Runner V1 that loads and captures as on a GPU; V2 is the same on all devices."""

    load_model = GPUModelRunner.load_model
    use_cuda_graph = True


class GPUWorker(CPUWorker):
    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        compilation = vllm_config.compilation_config
        compilation.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
        compilation.cudagraph_capture_sizes = list(CAPTURE_SIZES)
        compilation.max_cudagraph_capture_size = CAPTURE_SIZES[-1]
        super().__init__(vllm_config, *args, **kwargs)
        self._sleep_mode_backend = Pools()

    def init_device(self) -> None:
        super().init_device()
        self.init_snapshot = SimpleNamespace(free_memory=MEMORY, total_memory=MEMORY)
        self.requested_memory = KV_BYTES
        init_workspace_manager(self.device)

    def load_model(self, **kwargs: Any) -> None:
        gpu_worker.Worker.load_model(self, **kwargs)
        # As the compiler wraps what it compiles between `splitting_ops`.
        layers = self.model_runner.get_model().model
        layers.forward = CUDAGraphWrapper(layers.forward, self.vllm_config, CUDAGraphMode.PIECEWISE)

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        self.kv_cache_config = copy.deepcopy(kv_cache_config)
        super().initialize_from_config(kv_cache_config)

    determine_available_memory = gpu_worker.Worker.determine_available_memory
    compile_or_warm_up_model = gpu_worker.Worker.compile_or_warm_up_model
    sleep, wake_up, discard = gpu_worker.Worker.sleep, gpu_worker.Worker.wake_up, gpu_worker.Worker.discard

    def _maybe_get_memory_pool_context(self, tag: str) -> Any:
        return self.sleep_mode_backend.use(tag)

    def _scoped_allocator_max_split(self, max_split_size_mb: int) -> Any:
        return contextlib.nullcontext()


class _CUDA:
    """vLLM's platform, as its GPU worker sees it."""

    def is_cuda_alike(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        return getattr(current_platform, name)


def _self_scheduling(attend: Any) -> Any:
    """CPU kernels are given a schedule for the lengths of one step; those of a GPU make their own."""

    @functools.wraps(attend)
    def call(*, query: Tensor, key_cache: Tensor, **rest: Any) -> None:
        _, kv_heads, block_size, head_size = key_cache.shape
        rest["scheduler_metadata"] = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(rest["seq_lens"]), num_heads=query.shape[1], num_kv_heads=kv_heads, head_dim=head_size,
            seq_lens=rest["seq_lens"], dtype=query.dtype, query_start_loc=rest["query_start_loc"],
            causal=rest["causal"], sliding_window_size=rest["sliding_window"],
            isa=_get_attn_isa(query.dtype, block_size, head_size), enable_kv_split=False,
        )  # fmt: skip
        attend(query=query, key_cache=key_cache, **rest)

    return call


def _by_slots(store: Any) -> Any:
    """A GPU's kernels store as many rows as there are slots; batches that are padded for graphs have more."""

    @functools.wraps(store)
    def call(key: Tensor, value: Tensor, keys: Tensor, values: Tensor, slots: Tensor, *rest: Any, **more: Any) -> None:
        store(key[: len(slots)], value[: len(slots)], keys, values, slots, *rest, **more)

    return call


def _kernel_warmup(worker: Any) -> None:
    """Of vLLM's own the part that runs the model; the rest compiles single kernels."""
    runner = worker.model_runner
    runner._dummy_run(num_tokens=runner.max_num_tokens, skip_eplb=True, is_profile=True, randomize_inputs=True)
    mixed_batch_attention_warmup(worker)


@contextlib.contextmanager
def _memory_profiling(*args: Any, **kwargs: Any) -> Iterator[Any]:
    yield SimpleNamespace(
        after_profile=SimpleNamespace(free_memory=MEMORY),
        total_consumed=0,
        transient_peak_headroom=0,
        non_kv_cache_memory=0,
    )


@contextlib.contextmanager
def _graph(graph: Graph, *args: Any, **kwargs: Any) -> Iterator[None]:
    mode = get_forward_context().cudagraph_runtime_mode if is_forward_context_available() else CUDAGraphMode.FULL
    graph.kind = mode.name
    graph.capture_begin()
    try:
        yield
    finally:
        graph.capture_end()


@contextlib.contextmanager
def _graph_capture(device: torch.device) -> Iterator[None]:
    def is_break(operator: str) -> bool:
        return get_forward_context().cudagraph_runtime_mode == CUDAGraphMode.PIECEWISE

    with Recorder(is_break):
        yield


@contextlib.contextmanager
def rehearsal() -> Iterator[None]:
    """Put the stand-ins in place."""
    nothing, itself = lambda *args, **kwargs: None, lambda tensors: tensors
    stand_ins: list[tuple[Any, str, Any]] = [
        (torch.accelerator, "synchronize", nothing),
        (torch.accelerator, "empty_cache", nothing),
        (torch.accelerator, "get_memory_info", lambda *args: (MEMORY, MEMORY)),
        (torch.cuda, "CUDAGraph", Graph),
        (torch.cuda, "graph", _graph),
        (gpu_model_runner, "graph_capture", _graph_capture),
        (cudagraph_utils, "graph_capture", _graph_capture),
        (cuda_graph, "weak_ref_tensors", itself),
        (CpuPlatform, "graph_pool_handle", lambda self: object()),
        (CpuPlatform, "get_current_memory_usage", lambda self, device=None: 0),
        (CPUAttentionMetadataBuilder, "_cudagraph_support", AttentionCGSupport.UNIFORM_BATCH),
        (CompilationConfig, "is_attention_compiled_piecewise", lambda self: True),
        (cudagraph_utils, "has_compiled_submodule", lambda model: True),
        (gpu_v2, "has_compiled_submodule", lambda model: True),
        (ops, "cpu_attention_with_kv_cache", _self_scheduling(ops.cpu_attention_with_kv_cache)),
        (ops, "cpu_attn_reshape_and_cache", _by_slots(ops.cpu_attn_reshape_and_cache)),
        (ops, "_supports_onednn", False),  # it keeps copies of weights, which a graph would go on to use
        (decode, "decide", kernel(decode.decide)),  # Triton's on a GPU
        (cpu_worker, "CPUModelRunner", _Runner),
        (gpu_worker, "current_platform", _CUDA()),
        (gpu_worker, "memory_profiling", _memory_profiling),
        (gpu_worker, "kernel_warmup", _kernel_warmup),
        # Triton's interpreter cannot run these kernels of the sampler.
        (StructuredOutputsWorker, "apply_grammar_bitmask", nothing),
        (SamplingParams, "for_sampler_warmup", staticmethod(lambda: SamplingParams(temperature=0))),
    ]
    with contextlib.ExitStack() as stack:
        for target, name, value in stand_ins:
            stack.enter_context(patch.object(target, name, value, create=True))
        yield
