"""Attention layers of models whose requests have state on the workers (see `kv.pages`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.library import Library
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention.attention import unified_attention_with_output, unified_kv_cache_update
from vllm.utils.torch_utils import LayerNameType, direct_register_custom_op
from vllm.v1.kv_cache_interface import get_kv_quant_mode

from ..compat import layer_name_encoder
from ..config import ConfigError
from ..tables import Layout
from .spec import PageSpec

logger = init_logger("vllm." + __name__)
_library = Library("vllm_mod", "FRAGMENT")
_encode = layer_name_encoder()


def paged_attention(query: Tensor, key: Tensor, value: Tensor, output: Tensor, layer_name: LayerNameType) -> None:
    """Write K/V, then attend; stock `Attention.forward` leaves the write out in layers that alias another's cache."""
    unified_kv_cache_update(key, value, layer_name)
    unified_attention_with_output(query, key, value, output, layer_name)


def _fake(*args: Any) -> None:
    return None


direct_register_custom_op(
    "paged_attention", paged_attention, mutates_args=["output"], fake_impl=_fake, target_lib=_library
)


class TrackedAttention(Attention):
    """`Attention` of a model whose requests have state on the workers.

    Its KV spec says nothing of a sliding window: vLLM would give blocks that fall out of it to other requests. The
    kernels go on to look no further back than the window.
    """

    page_columns: int
    routed_columns: tuple[int, ...]

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> PageSpec:
        return PageSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            head_size_v=self.head_size_v,
            dtype=self.kv_cache_torch_dtype,
            kv_quant_mode=get_kv_quant_mode(self.kv_cache_dtype),
            columns=self.page_columns,
            routed=self.routed_columns,
        )


class PagedAttention(TrackedAttention):
    """Its KV lives in pages of the pool that the first attention layer owns."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, output_shape: Any = None, output_dtype: Any = None
    ) -> Tensor:
        output = torch.empty(len(query), self.num_heads * self.head_size_v, dtype=query.dtype, device=query.device)
        torch.ops.vllm_mod.paged_attention(
            query.view(-1, self.num_heads, self.head_size),
            key.view(-1, self.num_kv_heads, self.head_size),
            value.view(-1, self.num_kv_heads, self.head_size_v),
            output.view(-1, self.num_heads, self.head_size_v),
            _encode(self.layer_name),
        )
        return output


def track_requests(
    model: nn.Module, vllm_config: VllmConfig, routed_layers: Sequence[str | None], per_layer: bool
) -> Layout:
    """Let workers know requests by their slots, and keep page tables; returns where the KV of each layer is.

    routed_layers: the attention layer that each routed layer skips, None where it skips none or is elsewhere.
    per_layer: give each layer pages of its own, so that skipped ones can be given back. Where that cannot work, one
    warning says why, and pages hold all layers.
    """
    layers: list[Any] = [m for m in model.modules() if isinstance(m, Attention)]
    shapes = {(a.num_kv_heads, a.head_size, a.head_size_v, a.kv_cache_torch_dtype) for a in layers}
    if len(shapes) != 1 or any(type(a) is not Attention for a in layers):
        kinds = ", ".join(sorted({type(a).__name__ for a in layers})) or "no attention layer"
        raise ConfigError(
            f"{type(model).__name__}: routing that remembers requests needs plain attention layers whose KV has one "
            f"shape; this model has {kinds} of {len(shapes)} shapes"
        )
    why = None
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        why = "pipeline parallel stages share page numbers"
    elif any(a.kv_sharing_target_layer_name or a.query_quant for a in layers):
        why = "an attention layer shares its KV, or quantises queries"
    if why and per_layer:
        logger.warning("kv_reclaim: off, skipped layers keep their KV pages (%s)", why)
    names = [layer.layer_name for layer in layers]
    paged = per_layer and not why
    for layer in layers:
        layer.__class__ = PagedAttention if paged else TrackedAttention
        layer.page_columns = len(layers) if paged else 1
        layer.routed_columns = tuple(names.index(name) if paged and name else -1 for name in routed_layers)
        if paged and layer is not layers[0]:
            layer.kv_sharing_target_layer_name = names[0]
    return Layout(names, list(range(len(names))) if paged else [0] * len(names))
