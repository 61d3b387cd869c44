"""What of a routed model is compiled, and which steps CUDA graphs hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm import envs
from vllm.logger import init_logger

from .compat import attention_ops
from .config import ConfigError

if TYPE_CHECKING:
    from vllm.config import CompilationConfig, VllmConfig
    from vllm.config.compilation import CUDAGraphMode

logger = init_logger("vllm." + __name__)

#: Operators that hold a routed sublayer, or attention that pages are looked up for (see `sublayers`, `kv.attention`).
OPS = ("routed_attention", "routed_mlp", "paged_attention")


def set_compilation(vllm_config: VllmConfig) -> None:
    """FULL CUDA graphs hold decode steps of one token per request (see `decode`).

    In all other steps routed sublayers run eagerly between compiled pieces: their row count varies. Raises ConfigError.
    """
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return
    compilation = vllm_config.compilation_config
    _split_at_routed_sublayers(compilation)
    mode = _graphs(compilation, vllm_config.speculative_config is not None)
    if mode is not None and mode is not compilation.cudagraph_mode:
        logger.info("routed models: CUDA graphs %s (the number of rows varies in other steps)", mode.name)
        compilation.cudagraph_mode = mode


def _graphs(compilation: CompilationConfig, speculates: bool) -> CUDAGraphMode | None:
    """None leaves the choice to vLLM."""
    from vllm.config.compilation import CompilationMode, CUDAGraphMode

    asked = compilation.cudagraph_mode
    # Graphs that break where the compiler would split (batch invariance asks for them, too) have the model's whole
    # forward inside, and with it what a step decides on the host.
    breakable = envs.VLLM_USE_BREAKABLE_CUDAGRAPH or envs.VLLM_BATCH_INVARIANT
    pieces = not breakable and compilation.mode in (None, CompilationMode.VLLM_COMPILE)
    if asked is CUDAGraphMode.NONE or (asked is None and pieces and not speculates):
        return asked
    if speculates:  # a decode step has several tokens per request
        return CUDAGraphMode.PIECEWISE if pieces else CUDAGraphMode.NONE
    if asked is CUDAGraphMode.FULL:
        return CUDAGraphMode.FULL_AND_PIECEWISE if pieces else CUDAGraphMode.FULL_DECODE_ONLY
    if breakable:
        return CUDAGraphMode.FULL_DECODE_ONLY if asked is None else asked.without_piecewise()
    return asked


def _split_at_routed_sublayers(compilation: CompilationConfig) -> None:
    needed = [*attention_ops(compilation), *(f"vllm_mod::{op}" for op in OPS)]
    if compilation.pass_config.fuse_attn_quant:
        raise ConfigError("routed models cannot be served with attention fused into quantisation; drop fuse_attn_quant")
    if compilation.splitting_ops is None:
        compilation.splitting_ops = needed
    elif lacking := [op for op in needed if op not in compilation.splitting_ops]:
        raise ConfigError(
            f"--compilation-config: splitting_ops: {', '.join(lacking)} must be among them for a routed model; "
            "drop splitting_ops"
        )
