"""Attention layers that share one pool of pages (see `kv.pages`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.library import Library
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention.attention import unified_attention_with_output, unified_kv_cache_update
from vllm.utils.torch_utils import LayerNameType, _encode_layer_name, direct_register_custom_op
from vllm.v1.kv_cache_interface import FullAttentionSpec, get_kv_quant_mode

from .pages import PageSpec

logger = init_logger("vllm." + __name__)
_library = Library("vllm_mod", "FRAGMENT")


def paged_attention(query: Tensor, key: Tensor, value: Tensor, output: Tensor, layer_name: LayerNameType) -> None:
    """Write K/V, then attend; stock `Attention.forward` leaves the write out in layers that alias another's cache."""
    unified_kv_cache_update(key, value, layer_name)
    unified_attention_with_output(query, key, value, output, layer_name)


def _fake(*args: Any) -> None:
    return None


direct_register_custom_op(
    "paged_attention", paged_attention, mutates_args=["output"], fake_impl=_fake, target_lib=_library
)


def _shape(layer: Attention, vllm_config: VllmConfig) -> dict[str, Any]:
    """Fields of a spec that says nothing of a window."""
    return {
        "block_size": vllm_config.cache_config.block_size,
        "num_kv_heads": layer.num_kv_heads,
        "head_size": layer.head_size,
        "head_size_v": layer.head_size_v,
        "dtype": layer.kv_cache_torch_dtype,
        "kv_quant_mode": get_kv_quant_mode(layer.kv_cache_dtype),
    }


class PagedAttention(Attention):
    """`Attention` whose KV lives in pages of the pool that the first attention layer owns."""

    num_layers: int

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> PageSpec:
        return PageSpec(**_shape(self, vllm_config), num_layers=self.num_layers)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, output_shape: Any = None, output_dtype: Any = None
    ) -> Tensor:
        output = torch.empty(len(query), self.num_heads * self.head_size_v, dtype=query.dtype, device=query.device)
        torch.ops.vllm_mod.paged_attention(
            query.view(-1, self.num_heads, self.head_size),
            key.view(-1, self.num_kv_heads, self.head_size),
            value.view(-1, self.num_kv_heads, self.head_size_v),
            output.view(-1, self.num_heads, self.head_size_v),
            _encode_layer_name(self.layer_name),
        )
        return output


def share_pages(model: nn.Module, vllm_config: VllmConfig) -> list[str] | None:
    """Let all attention layers of `model` draw pages from one pool.

    Returns the layers' names in table order, or None, with one warning that says why, where pages per layer cannot
    work; allocation is vLLM's own then.
    """
    layers = [m for m in model.modules() if isinstance(m, Attention)]
    shapes = {(a.num_kv_heads, a.head_size, a.head_size_v, a.kv_cache_torch_dtype) for a in layers}
    why = None
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        why = "pipeline parallel stages share page numbers"
    elif not layers:
        why = "there is no plain attention layer"
    elif len(shapes) != 1:
        why = "the layers' KV shapes differ"
    elif any(type(a) is not Attention or a.kv_sharing_target_layer_name or a.query_quant for a in layers):
        why = "an attention layer is of a kind of its own"
    if why:
        logger.warning("kv_reclaim: off, skipped layers keep their KV pages (%s)", why)
        return None
    for layer in layers:
        layer.__class__ = PagedAttention
        layer.num_layers = len(layers)
        if layer is not layers[0]:
            layer.kv_sharing_target_layer_name = layers[0].layer_name
    return [layer.layer_name for layer in layers]


class WholeRowAttention(Attention):
    """Sliding-window `Attention` that keeps the pages which fall out of its window.

    vLLM would give them to other requests, the first one of a row included, by which workers know a request.
    """

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> FullAttentionSpec:
        return FullAttentionSpec(**_shape(self, vllm_config))


def allocate_whole_rows(model: nn.Module) -> None:
    """For models whose requests have routing state; the kernels go on to look no further back than the window."""
    for module in model.modules():
        if type(module) is Attention and module.sliding_window is not None:
            module.__class__ = WholeRowAttention
