"""Pages of vLLM's block pool, many at a time.

A token block of a request takes a page per layer, so what vLLM does per block in Python (lists, hashes, events) would
be done tens of times as often. Here that is done once per token block, to one of its pages, its *lead*, by vLLM's own
methods. All pages are known by their numbers, and counted in arrays.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock

from .. import compat
from .free import FreePages


class PagePool:
    """Page numbers are int64 `[n]`, all different, without 0."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self.free = compat.replace_free_queue(pool, FreePages)
        self._requests = np.zeros(pool.num_gpu_blocks, np.int32)  #: that hold each page
        #: it holds a part of a cached token block, and perhaps nobody does: it is free
        self.cached = np.zeros(pool.num_gpu_blocks, bool)
        self._leads = np.zeros(pool.num_gpu_blocks, bool)  # those that vLLM's pool has a hash of
        #: changes with every owner, so that a cached token block knows whether a page is still its own
        self.owners = np.zeros(pool.num_gpu_blocks, np.int64)
        self._last_owner = 0

    def take(self, leads: int, others: int) -> tuple[list[KVCacheBlock], np.ndarray]:
        """(pages under which token blocks can be cached, numbers of more pages); the pool has so many that are free.

        What was cached in them is lost.
        """
        pages = self.free.take(leads + others)
        for page in pages[self._leads[pages]].tolist():
            compat.forget_cached(self._pool, self._pool.blocks[page])
        self._last_owner += 1
        self.owners[pages] = self._last_owner
        self.cached[pages] = self._leads[pages] = False
        self._requests[pages] = 1
        blocks = [self._pool.blocks[page] for page in pages[:leads].tolist()]
        compat.hand_out(self._pool, blocks)
        return blocks, pages[leads:]

    def cache(self, pages: np.ndarray, leads: np.ndarray) -> None:
        """They hold cached token blocks from now on; 0: no page. leads: those of `pages` that are."""
        self.cached[pages] = True
        self.cached[0] = False
        self._leads[leads] = True

    def hold(self, leads: Sequence[KVCacheBlock], others: np.ndarray) -> None:
        """Cached pages that one more request reads."""
        self._pool.touch(leads)  # takes them out of the queue
        self.free.take_out(others[self._requests[others] == 0])
        self._requests[others] += 1
        self._requests[[lead.block_id for lead in leads]] += 1

    def release(self, pages: np.ndarray, leads: Sequence[KVCacheBlock] = ()) -> None:
        """A request reads them no more; leads: those of `pages` that are. Reused first are those that are not cached.

        Both parts keep their order: the first page is reused first.
        """
        for lead in leads:
            lead.ref_cnt -= 1
        self._requests[pages] -= 1
        free = pages[self._requests[pages] == 0]
        cached = self.cached[free]
        self.free.give(free[~cached], last=False)
        self.free.give(free[cached], last=True)

    def number_free(self, pages: np.ndarray) -> int:
        """How many of these pages only the cache holds."""
        return int((self._requests[pages] == 0).sum())
