"""Prefix caching of routed requests: pages per (layer, token block) that later requests find again.

What a token's KV holds depends on the tokens before it, and beyond the window on the decisions, too. So a token block
is known by its hash, and one that reaches beyond the window by its decisions and its hash. vLLM's pool has one page of
a block, its lead, under that key; the block's other pages may be lost to other requests, and are remembered as lost.

A block in the window has the sums of `w . x` up to its end with it: a request that finds it goes on from there, and
one that finds the whole window knows its decisions before it is prefilled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock

from ..gate import keeps
from .pool import PagePool
from .tracked import Tracked


def decisions(sums: np.ndarray, count: int, cutoffs: np.ndarray) -> np.ndarray:
    """Keep per routed layer, bool `[R]`, from the sums of `w . x` over `count` tokens; float64 `[R]` both."""
    return keeps(torch.from_numpy(sums / count), torch.from_numpy(cutoffs)).numpy()


class CachedBlock:
    """The pages of one token block, int32 `[G]`: 0 where its decisions skip a layer."""

    __slots__ = ("key", "lead", "owner", "pages", "sums", "window_end")

    def __init__(self, lead: KVCacheBlock, pages: np.ndarray, owner: int, sums: np.ndarray | None) -> None:
        """sums: float64 `[R]`, of `w . x` up to the end of the block or window. None until heard, and behind that.

        owner: of all its pages now; those that have another one later are lost.
        """
        self.lead, self.key, self.pages, self.owner, self.sums = lead, lead.block_hash, pages, owner, sums
        self.window_end: bytes | None = None  #: hash of the block, if the window's last token is in it

    @property
    def is_there(self) -> bool:
        """vLLM's pool takes the key from a lead that it hands to somebody else."""
        return self.lead.block_hash is self.key


class PrefixCache:
    def __init__(
        self, pool: BlockPool, pages: PagePool, block_size: int, window: int, columns: int, lead: int,
    ) -> None:  # fmt: skip
        """window: `W`. lead: the page column that no request skips."""
        self._pool, self._pages, self._size, self._window = pool, pages, block_size, window
        self._all, self._lead = np.arange(columns), lead
        self._by_lead: dict[int, CachedBlock] = {}
        #: hash of the block with the window's last token -> the block
        self._window_ends: dict[bytes | None, CachedBlock] = {}
        #: hash of the first block behind a window -> requests whose decisions are not known yet, and that compute it
        self._undecided: dict[bytes, list[Tracked]] = {}

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
            decided = tracked.key
            for block in range(inside, longest):
                if (cached := self._at(decided + hashes[block])) is None:
                    break
                found.append(cached)
        usable = self._usable(tracked, found)
        if len(usable) < len(found):
            tracked.waits = False  # pages are lost before the place that it would wait for
        elif len(found) < longest and self._is_coming(hashes, len(found)):
            tracked.waits = True
        return usable

    def _is_coming(self, hashes: Sequence[Any], block: int) -> bool:
        """It lies behind the window, and is being computed by a request whose decisions are not known yet."""
        behind = self._window // self._size
        same = self._undecided.get(hashes[behind], ()) if block >= behind else ()
        return any(t.undecided > block and t.request.block_hashes[block] == hashes[block] for t in same)

    def _at(self, key: bytes) -> CachedBlock | None:
        blocks = self._pool.get_cached_block(key, [0])
        cached = self._by_lead.get(blocks[0].block_id) if blocks else None
        return cached if cached is not None and cached.is_there else None

    def _decide(self, tracked: Tracked, hashes: Sequence[Any], found: list[CachedBlock]) -> bool:
        """Are its decisions known? They are taken here if all tokens of its window are cached, with their scores."""
        if tracked.keep is not None:
            return True
        last = (self._window - 1) // self._size
        if tracked.window_end < self._window or last >= len(hashes):
            return False
        cached = found[last] if last < len(found) else self._window_ends.get(hashes[last])
        if cached is None or not cached.is_there:
            return False
        if cached.sums is None:
            tracked.waits = True
            return False
        tracked.decide(decisions(cached.sums, self._window, tracked.cutoffs))
        return True

    def _usable(self, tracked: Tracked, found: list[CachedBlock]) -> list[CachedBlock]:
        """Up to the first block that lacks a page the request needs: any while its window is not complete."""
        if not found:
            return found
        needed = self.needed(tracked, len(found))
        pages, owners = np.stack([c.pages for c in found]), np.array([c.owner for c in found])
        there = (self._pages.owners[pages[:, needed]] == owners[:, None]).all(1)
        return found if there.all() else self._usable(tracked, found[: int(there.argmin())])

    def needed(self, tracked: Tracked, blocks: int) -> np.ndarray:
        """Page columns of the cached blocks that a request goes on from, if it begins with so many of them."""
        complete = tracked.keep is not None and blocks * self._size >= tracked.window_end
        return np.delete(self._all, list(tracked.skipped)) if complete and tracked.skipped else self._all

    def of(self, lead: KVCacheBlock) -> CachedBlock:
        """The block that `find` has just found."""
        return self._by_lead[lead.block_id]

    # ---- offering

    def offer(self, tracked: Tracked) -> None:
        """Let others find its token blocks up to `tracked.scheduled`, computed in this step at the latest.

        In the window at once; what they score is filled in when it is heard. Behind it as soon as it is decided.
        """
        size, hashes = self._size, tracked.request.block_hashes
        # Behind a prompt that is shorter than the window, another request's prompt would run dense.
        last = len(hashes) if tracked.window_end == self._window else tracked.window_end // size
        end = min(tracked.scheduled // size, last, len(hashes))
        inside = min(tracked.window_end // size, end)
        if inside > tracked.offered:
            self._add(tracked, tracked.request, tracked.offered, inside)
        if tracked.keep is not None:
            if end > (first := max(tracked.offered, inside)):
                self._add(tracked, _Keyed(tracked.request, tracked.key, inside, end), first, end)
        elif end > inside:
            if not tracked.undecided:
                self._undecided.setdefault(hashes[inside], []).append(tracked)
            tracked.undecided = end

    def _add(self, tracked: Tracked, request: Any, first: int, last: int) -> None:
        self._pool.cache_full_blocks(request, tracked.leads, first, last, self._size, 0)
        window_end = (self._window - 1) // self._size
        new = tracked.pages[:, first:last].T.copy()
        leads = new[:, self._lead]
        self._pages.cache(new, leads)
        owners = self._pages.owners[leads].tolist()  # a token block's pages were taken at once
        for block, lead, row, owner in zip(range(first, last), tracked.leads[first:last], new, owners, strict=True):
            if lead.block_id in self._by_lead:
                self._forget(lead)
            cached = self._by_lead[lead.block_id] = CachedBlock(lead, row, owner, tracked.sums.get(block))
            if block <= window_end:
                if cached.sums is None:
                    tracked.awaited.setdefault(block, []).append(cached)
                if block == window_end:
                    cached.window_end = tracked.request.block_hashes[block]
                    self._window_ends[cached.window_end] = cached
        tracked.offered = last

    def _forget(self, lead: KVCacheBlock) -> CachedBlock | None:
        """What was known under a lead before it was handed out again; returns that, if anything."""
        cached = self._by_lead.pop(lead.block_id, None)
        if cached is not None and self._window_ends.get(cached.window_end) is cached:
            del self._window_ends[cached.window_end]
        return cached

    def heard(self, tracked: Tracked) -> None:
        """`tracked.sums` has more of what its blocks have scored, and perhaps it is decided."""
        for block in [b for b in tracked.awaited if b in tracked.sums]:
            for cached in tracked.awaited.pop(block):
                cached.sums = tracked.sums[block]
        if tracked.keep is not None:
            self._forget_undecided(tracked)

    def _forget_undecided(self, tracked: Tracked) -> None:
        if tracked.undecided:
            behind = tracked.request.block_hashes[self._window // self._size]
            self._undecided[behind].remove(tracked)
            if not self._undecided[behind]:
                del self._undecided[behind]
        tracked.undecided = 0

    def withdraw(self, tracked: Tracked, first: int) -> None:
        """Its blocks from `first` on will not be computed: it loses its pages before the step begins."""
        leads = tracked.leads[first : tracked.offered]
        for block, lead in enumerate(leads, first):
            cached = self._forget(lead)
            if block in tracked.awaited:
                tracked.awaited[block].remove(cached)
        self._pool.evict_blocks({lead.block_id for lead in leads})

    def let_go(self, tracked: Tracked) -> None:
        """It computes nothing any more, beyond the steps that are under way."""
        self._forget_undecided(tracked)


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
            first, end, step = index.indices(self._end)
            inside = self._hashes[first : min(end, self._inside) : step]
            return [*inside, *(self._decided + h for h in self._hashes[first + step * len(inside) : end : step])]
        return self._hashes[index] if index < self._inside else self._decided + self._hashes[index]
