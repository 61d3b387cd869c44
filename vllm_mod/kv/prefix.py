"""Prefix caching of routed requests: pages per (layer, token block) that later requests find again.

What a token's KV holds depends on the tokens before it, and beyond the window on the decisions, too. So a token block
is known by its hash, and one that reaches beyond the window by its decisions and its hash. vLLM's pool keeps one page
of a block, its *lead*, under that key; the block's other pages carry the same key object. The pool takes it from a page
that it hands to somebody else, so a page that was lost is noticed.

A block in the window has the sums of `w . x` up to its end with it: a request that finds it goes on from there, and
one that finds the whole window knows its decisions before it is prefilled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock

from ..gate import keeps
from .tracked import Tracked


def decisions(sums: np.ndarray, count: int, cutoffs: np.ndarray) -> np.ndarray:
    """Keep per routed layer, bool `[R]`, from the sums of `w . x` over `count` tokens; float64 `[R]` both."""
    return keeps(torch.from_numpy(sums / count), torch.from_numpy(cutoffs)).numpy()


@dataclass(eq=False)
class CachedBlock:
    """The pages of one token block, one per column; None where its decisions skip a layer."""

    key: Any
    pages: list[KVCacheBlock | None]
    #: float64 `[R]`: of `w . x` up to the end of the block or the window. None until it is heard, and behind that
    sums: np.ndarray | None

    def has(self, columns: Sequence[int]) -> bool:
        """Are the pages of these columns still its own, those that it had?"""
        return all((page := self.pages[c]) is None or page.block_hash is self.key for c in columns)


class PrefixCache:
    def __init__(
        self, pool: BlockPool, block_size: int, window: int, columns: int, lead: int, routed: Sequence[int]
    ) -> None:
        """window: `W`. lead: the page column that no request skips. routed: page column of each routed layer, or -1."""
        self._pool, self._size, self._window = pool, block_size, window
        self._all, self._lead = range(columns), lead
        self._routed = [(i, column) for i, column in enumerate(routed) if column not in (-1, lead)]
        self._by_lead: dict[int, CachedBlock] = {}
        #: hash of the block with the window's last token -> the block
        self._window_ends: dict[bytes, CachedBlock] = {}
        #: hashes of blocks behind a window that are being computed by requests whose decisions are not known yet
        self._undecided: Counter[bytes] = Counter()

    def skipped(self, tracked: Tracked) -> list[int]:
        """Page columns that the request takes no pages in behind its window; none before it is decided."""
        if tracked.keep is None:
            return []
        return [column for i, column in self._routed if not tracked.keep[i]]

    # ---- finding

    def find(self, tracked: Tracked, hashes: Sequence[Any], longest: int) -> list[CachedBlock]:
        """The longest prefix that is there, of at most `longest` token blocks; decides where that can be known.

        Sets `tracked.waits` where more of it will be there after the steps that are under way.
        """
        tracked.waits = False
        inside, found = min(tracked.window_end // self._size, longest), []
        for block in range(inside):
            cached = self._at(hashes[block])
            if cached is None:
                break
            if cached.sums is None:
                tracked.waits = True
                break
            found.append(cached)
        if len(found) == inside and self._decide(tracked, hashes, found):
            decided = key_of(tracked)
            for block in range(inside, longest):
                if (cached := self._at(decided + hashes[block])) is None:
                    break
                found.append(cached)
        usable = self._usable(tracked, found)
        if len(usable) < len(found):
            tracked.waits = False  # pages are lost before the place that it would wait for
        elif len(found) < longest and hashes[len(found)] in self._undecided:
            tracked.waits = True
        return usable

    def _at(self, key: bytes) -> CachedBlock | None:
        blocks = self._pool.get_cached_block(key, [0])
        cached = self._by_lead.get(blocks[0].block_id) if blocks else None
        return cached if cached is not None and cached.has([self._lead]) else None

    def _decide(self, tracked: Tracked, hashes: Sequence[Any], found: list[CachedBlock]) -> bool:
        """Are its decisions known? They are taken here if all tokens of its window are cached, with their scores."""
        if tracked.keep is not None:
            return True
        last = (self._window - 1) // self._size
        if tracked.window_end < self._window or last >= len(hashes):
            return False
        cached = found[last] if last < len(found) else self._window_ends.get(hashes[last])
        if cached is None:
            return False
        if not cached.has([self._lead]):
            del self._window_ends[hashes[last]]
            return False
        if cached.sums is None:
            tracked.waits = True
            return False
        tracked.keep = decisions(cached.sums, self._window, tracked.cutoffs)
        return True

    def _usable(self, tracked: Tracked, found: list[CachedBlock]) -> list[CachedBlock]:
        """Up to the first block that lacks a page the request needs: any while its window is not complete."""
        needed = self.needed(tracked, len(found))
        for number, cached in enumerate(found):
            if not cached.has(needed):
                return self._usable(tracked, found[:number])
        return found

    def needed(self, tracked: Tracked, blocks: int) -> Sequence[int]:
        """Page columns of the cached blocks that a request goes on from, if it begins with so many of them."""
        complete = tracked.keep is not None and blocks * self._size >= tracked.window_end
        skipped = self.skipped(tracked) if complete else ()
        return [c for c in self._all if c not in skipped]

    def of(self, lead: KVCacheBlock) -> CachedBlock:
        """The block that `find` has just found."""
        return self._by_lead[lead.block_id]

    # ---- offering

    def offer(self, tracked: Tracked) -> None:
        """Let others find its token blocks up to `tracked.scheduled`, computed in this step at the latest.

        In the window at once; what they score is filled in when it is heard. Behind it as soon as it is decided.
        """
        hashes, size = tracked.request.block_hashes, self._size
        # Behind a prompt that is shorter than the window, another request's prompt would run dense.
        last = len(hashes) if tracked.window_end == self._window else tracked.window_end // size
        end = min(tracked.scheduled // size, last, len(hashes))
        inside = min(tracked.window_end // size, end)
        self._add(tracked, tracked.request, tracked.offered, inside)
        if tracked.keep is not None:
            keyed = _Keyed(tracked.request, key_of(tracked), inside, end)
            self._add(tracked, keyed, max(tracked.offered, inside), end)
        else:
            for block in range(inside + len(tracked.undecided), end):
                tracked.undecided.append(hashes[block])
                self._undecided[hashes[block]] += 1

    def _add(self, tracked: Tracked, request: Any, first: int, last: int) -> None:
        if last <= first:
            return
        leads = tracked.columns[self._lead]
        self._pool.cache_full_blocks(request, leads, first, last, self._size, 0)
        window_end = (self._window - 1) // self._size
        for block in range(first, last):
            pages = [None if (page := column[block]).is_null else page for column in tracked.columns]
            lead = leads[block]
            for page in pages:
                if page is not None and page is not lead:
                    page.set_block_hash(lead.block_hash, lead.block_hash_num_tokens)
            cached = CachedBlock(lead.block_hash, pages, tracked.sums.get(block))
            self._by_lead[lead.block_id] = cached
            if block <= window_end and cached.sums is None:
                tracked.awaited.setdefault(block, []).append(cached)
            if block == window_end:
                self._window_ends[tracked.request.block_hashes[block]] = cached
        tracked.offered = last

    def heard(self, tracked: Tracked) -> None:
        """`tracked.sums` has more of what its blocks have scored, and perhaps it is decided."""
        for block in [b for b in tracked.awaited if b in tracked.sums]:
            for cached in tracked.awaited.pop(block):
                cached.sums = tracked.sums[block]
        if tracked.keep is not None:
            self._forget_undecided(tracked)

    def _forget_undecided(self, tracked: Tracked) -> None:
        for block_hash in tracked.undecided:
            self._undecided[block_hash] -= 1
            if not self._undecided[block_hash]:
                del self._undecided[block_hash]
        tracked.undecided.clear()

    def withdraw(self, tracked: Tracked, first: int) -> None:
        """Its blocks from `first` on will not be computed: it loses its pages before the step begins."""
        leads = tracked.columns[self._lead][first : tracked.offered]
        for block, lead in enumerate(leads, first):
            cached = self._by_lead.pop(lead.block_id)
            if block in tracked.awaited:
                tracked.awaited[block].remove(cached)
        self._pool.evict_blocks({lead.block_id for lead in leads})

    def let_go(self, tracked: Tracked) -> None:
        """It computes nothing any more, beyond the steps that are under way."""
        self._forget_undecided(tracked)


def key_of(tracked: Tracked) -> bytes:
    """What tells blocks of different decisions apart. Before a hash, whose end is what KV events show."""
    assert tracked.keep is not None
    return np.packbits(tracked.keep).tobytes()


class _Keyed:
    """A request whose blocks behind the window are cached under its decisions, too."""

    def __init__(self, request: Any, decided: bytes, inside: int, end: int) -> None:
        self._request = request
        hashes = request.block_hashes
        self.block_hashes = _KeyedHashes(hashes, decided, inside, end)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._request, name)


class _KeyedHashes(Sequence[Any]):
    def __init__(self, hashes: Sequence[Any], decided: bytes, inside: int, end: int) -> None:
        self._hashes, self._decided, self._inside, self._end = hashes, decided, inside, end

    def __len__(self) -> int:
        return self._end

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._end))]
        return self._hashes[index] if index < self._inside else self._decided + self._hashes[index]
