"""What vLLM is told about the KV cache of a routed model whose requests have state on the workers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm.v1.kv_cache_spec_registry import register_kv_cache_spec

from ..compat import fill_spec_registry
from .pages import PageManager

fill_spec_registry()  # before ours: the first registration otherwise hides vLLM's own


@register_kv_cache_spec(manager_class=PageManager)
@dataclass(frozen=True, kw_only=True)
class PageSpec(AttentionSpec):
    """A token block of a request takes up to `columns` pages.

    `columns` is the number of attention layers where each has pages of its own, and 1 where a page is vLLM's usual
    block, which holds all layers.
    """

    columns: int
    #: page column of each routed layer, in the order of `mod_config.layers`; -1 where skipping it frees no page
    routed: tuple[int, ...]

    def max_num_blocks_per_req(self, vllm_config: Any, max_len: int) -> int:
        """Entries of a request's row. Only the first is used: its slot. Kernels of vLLM's read up to this many."""
        return cdiv(max_len, self.block_size)

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        return self.columns * cdiv(vllm_config.model_config.max_model_len, self.block_size) * self.page_size_bytes

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, Any]) -> bool:
        return all(spec == self for spec in kv_cache_specs.values())
