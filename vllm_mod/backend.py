"""Attention backends of vLLM whose metadata carries the `Step` that it was built for."""

from __future__ import annotations

import copy
import functools
from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata, subclass_attention_backend

from .compat import layers_by_name
from .rows import Rows

if TYPE_CHECKING:
    from .routing import Routing


@functools.cache
def stepping_backend(backend: type) -> type:
    """`backend`, its metadata with the forward's `Step` as attribute `mod_step`."""
    stock = backend.get_builder_cls()  # type: ignore[attr-defined]

    class SteppingBuilder(stock):  # type: ignore[misc, valid-type]
        def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
            super().__init__(kv_cache_spec, layer_names, vllm_config, device)
            self._routing: Routing = layers_by_name(vllm_config)[layer_names[0]].mod_routing
            self._routing.start(vllm_config, kv_cache_spec.block_size, device)

        def build(
            self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, *args: Any, **options: Any
        ) -> Any:
            metadata = copy.copy(super().build(common_prefix_len, common_attn_metadata, *args, **options))
            rows = Rows(common_attn_metadata, functools.partial(_build_subset, self))
            metadata.mod_step = self._routing.prepare(rows)
            return metadata

    def _build_subset(builder: Any, cm: CommonAttentionMetadata) -> Any:
        # fast_build: schedules of kernels go into one buffer per builder, which is the whole batch's.
        return stock.build(builder, 0, cm, fast_build=True)

    return subclass_attention_backend("MoD", backend, SteppingBuilder)
