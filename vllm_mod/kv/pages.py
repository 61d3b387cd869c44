"""KV pages per (request, layer): the pages of skipped layers go back to the pool.

In vLLM a block holds one token block's KV of every layer of a group, so a layer that a request skips costs as much as
any other. Here a page holds *one* layer's KV of one token block, all layers draw pages from one pool, and a request's
row of the block table is interleaved: entry `b * L + l` is layer l's page of token block b.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry, register_kv_cache_spec

# The first registration otherwise hides vLLM's own (0.32 fills the registry only while it is empty).
KVCacheSpecRegistry._ensure_registered()


class PageManager(FullAttentionManager):
    """Allocates rows of L pages per token block, less those of the layers a request has skipped.

    A layer's pages are taken, and given back, side by side: a CPU reads neighbours faster than pages that lie L apart.
    """

    def __init__(self, kv_cache_spec: PageSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self._num_layers = kv_cache_spec.num_layers
        self._skipped: dict[str, frozenset[int]] = {}  # survives a preemption, ends with the request
        self.pages_released = 0
        self.token_slots = 0  #: of all requests, in any layer; `block_size` per row of L entries

    @property
    def bytes_held(self) -> int:
        pool = self.block_pool
        return (pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()) * self.kv_cache_spec.page_size_bytes

    def get_num_blocks_to_allocate(self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any) -> int:
        held = len(self.req_to_blocks.get(request_id, ()))
        return self._pages(request_id, held // self._num_layers, cdiv(num_tokens, self.block_size))

    def _pages(self, request_id: str, first_row: int, last_row: int) -> int:
        """Pages that rows `first_row` to `last_row` (exclusive) take; the anchor is always one of them."""
        skipped = self._skipped.get(request_id, frozenset())
        rows = max(last_row - first_row, 0)
        anchor = 1 if rows and first_row == 0 and 0 in skipped else 0
        return rows * (self._num_layers - len(skipped)) + anchor

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:  # fmt: skip
        blocks = self.req_to_blocks[request_id]
        first, last = len(blocks) // self._num_layers, cdiv(num_tokens, self.block_size)
        if last <= first:
            return []
        rows, skipped = last - first, self._skipped.get(request_id, frozenset())
        pages = self.block_pool.get_new_blocks(self._pages(request_id, first, last))
        new = [self._null_block] * (rows * self._num_layers)
        start = 0
        for layer in range(self._num_layers):
            if layer not in skipped:
                new[layer :: self._num_layers] = pages[start : start + rows]
                start += rows
        if start < len(pages):
            new[0] = pages[start]  # the anchor, where layer 0 is skipped
        blocks.extend(new)
        self.token_slots += rows * self.block_size
        return new

    def skip_layers(self, request_id: str, layers: Collection[int]) -> int:
        """Freeze which layers a request skips and give their pages back at once; returns how many.

        The first entry of a row stays: workers know a request by it. A preempted request has no pages now; it gets
        none for these layers when it resumes.
        """
        if request_id in self._skipped:
            if self._skipped[request_id] != frozenset(layers):
                raise RuntimeError(f"request {request_id}: its routing decision changed, from another rank or in time")
            return 0
        if not all(0 <= layer < self._num_layers for layer in layers):
            raise RuntimeError(f"request {request_id} skips layers {layers}, and there are {self._num_layers} of them")
        self._skipped[request_id] = frozenset(layers)
        blocks: list[KVCacheBlock] = self.req_to_blocks.get(request_id, [])
        freed: list[KVCacheBlock] = []
        for layer in sorted(self._skipped[request_id]):
            column = slice(layer or self._num_layers, None, self._num_layers)  # of layer 0, all but the anchor
            freed += blocks[column]
            blocks[column] = [self._null_block] * len(blocks[column])
        self.block_pool.free_blocks(freed)
        self.pages_released += len(freed)
        return len(freed)

    def forget(self, request_id: str) -> None:
        self._skipped.pop(request_id, None)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        blocks = super().pop_blocks_for_free(request_id)
        self.token_slots -= len(blocks) // self._num_layers * self.block_size
        by_layer: list[KVCacheBlock] = []
        for layer in range(self._num_layers):
            by_layer += blocks[layer :: self._num_layers]
        return [page for page in by_layer if page is not self._null_block]

    def cache_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Prefix caching is off: a decision needs its whole prompt."""

    def get_num_common_prefix_blocks(self, running_request_id: str) -> int:
        return 0


@register_kv_cache_spec(manager_class=PageManager)
@dataclass(frozen=True, kw_only=True)
class PageSpec(AttentionSpec):
    """One layer's page; a token block of a request takes up to `num_layers` of them."""

    num_layers: int

    def max_num_blocks_per_req(self, vllm_config: Any, max_len: int) -> int:
        return self.num_layers * cdiv(max_len, self.block_size)

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        return self.max_num_blocks_per_req(vllm_config, vllm_config.model_config.max_model_len) * self.page_size_bytes

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, Any]) -> bool:
        return all(spec == self for spec in kv_cache_specs.values())
