"""Pages of vLLM's block pool, many at a time.

A token block of a request takes a page per layer, so what vLLM does per block in Python (lists, hashes, events) would
be done tens of times as often. Here all of that is done once per token block, to one of its pages, its *lead*, by
vLLM's own methods. The others are taken from and given back to the pool's queue of free pages by two short loops.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock

from .. import compat

if TYPE_CHECKING:
    from .prefix import CachedBlock


class PagePool:
    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        #: the cached token block that a page holds a part of; it may be free all the same
        self._owners: list[CachedBlock | None] = [None] * pool.num_gpu_blocks

    def leads(self, number: int) -> list[KVCacheBlock]:
        """Pages under which token blocks can be cached."""
        pages = self._pool.get_new_blocks(number)
        self._take_from_owners([page.block_id for page in pages])
        return pages

    def take(self, number: int) -> list[int]:
        """Numbers of pages that nobody holds; the pool has so many. What was cached in them is lost."""
        pages = compat.take_free_blocks(self._pool, number)
        for page in pages:
            page.ref_cnt = 1
        numbers = [page.block_id for page in pages]
        self._take_from_owners(numbers)
        return numbers

    def _take_from_owners(self, numbers: Sequence[int]) -> None:
        owners = self._owners
        for number in numbers:
            if (owner := owners[number]) is not None:
                owners[number] = None
                owner.lost.add(number)

    def hold(self, numbers: Iterable[int]) -> None:
        """Cached pages that one more request reads."""
        blocks = self._pool.blocks
        for number in numbers:
            page = blocks[number]
            if not page.ref_cnt:
                compat.take_out_of_queue(self._pool, page)
            page.ref_cnt += 1

    def release(self, numbers: Iterable[int]) -> None:
        """A request reads them no more, leads among them. The first are reused first; those that are cached last."""
        blocks, owners = self._pool.blocks, self._owners
        unknown: list[KVCacheBlock] = []
        cached: list[KVCacheBlock] = []
        for number in numbers:
            page = blocks[number]
            page.ref_cnt -= 1
            if not page.ref_cnt:
                (unknown if owners[number] is None else cached).append(page)
        compat.give_blocks_back(self._pool, unknown, cached)

    def own(self, numbers: Iterable[int], owner: CachedBlock) -> None:
        owners = self._owners
        for number in numbers:
            owners[number] = owner

    def number_free(self, numbers: Iterable[int]) -> int:
        """How many of these pages only the cache holds."""
        blocks = self._pool.blocks
        return sum(not blocks[number].ref_cnt for number in numbers)
