"""What the scheduler's side knows of one live request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from vllm.v1.core.kv_cache_utils import KVCacheBlock

_NO_PAGES = np.zeros((0, 0), np.int32)


class OwnedHashes(list[Any]):
    """A request's block hashes, by which a lookup in the prefix cache knows whose they are.

    vLLM's managers are asked for a hit with the hashes alone; the list of a request is the one thing of its own in it.
    """

    owner: Tracked


@dataclass(eq=False)
class Tracked:
    """Lives from the request's arrival to its end, also while it is preempted."""

    request: Any  #: vLLM's
    prompt_len: int
    #: `D`: tokens its decisions are taken from; 0 where nothing is decided per request
    window_end: int
    cutoffs: np.ndarray  #: float64 `[R]`
    dial: dict[str, Any] | None = None  #: what they come from, if they are not the checkpoint's
    #: page columns that it has pages in besides the lead's; behind its window, once it is decided
    others: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    #: (routed layer, its page column), of those that give pages back where they are skipped
    skippable: Sequence[tuple[int, int]] = ()
    #: bool `[R]`; None until it is decided, then frozen
    keep: np.ndarray | None = None
    key: bytes = b""  #: tells blocks of different decisions apart; before a hash, whose end is what KV events show
    skipped: frozenset[int] = frozenset()  #: page columns that it has no pages in behind its window
    #: it has no pages, and its decisions are on their way
    deciding: bool = False
    #: what it needs next is being computed by another request
    waits: bool = False
    admitted: bool = False  #: it was looked at by the scheduler
    closed: bool = False  #: it has ended; reports may be on their way
    #: blocks that others may find, and whose scores are on their way: those of an earlier prefill, too
    awaited: dict[int, list[Any]] = field(default_factory=dict)
    serials: list[int] = field(default_factory=list)  #: of all its prefills, by which workers report

    # Of its present prefill; empty while it waits or is preempted.
    serial: int = 0
    slot: KVCacheBlock | None = None
    leads: list[KVCacheBlock] = field(default_factory=list)  #: of its token blocks, see `pool`
    table: np.ndarray = field(default_factory=lambda: _NO_PAGES)  #: int32 `[G, token blocks or more]`: see `pages`
    found: int = 0  #: token blocks of the prefix cache that it began with
    found_sums: np.ndarray | None = None  #: their scores
    told: int = 0  #: token blocks whose pages workers know
    scheduled: int = 0  #: tokens, those of the steps under way included
    dispatched: int = 0  #: tokens, without those of the step that is being scheduled
    offered: int = 0  #: token blocks that others may find
    certain: int = 0  #: those of them that were offered in earlier steps, or are sure to be computed
    sums: dict[int, np.ndarray] = field(default_factory=dict)  #: float64 `[R]` per block in the window, as heard
    undecided: int = 0  #: token blocks, if some lie behind its window, while it is not decided

    @property
    def blocks(self) -> int:
        """Token blocks that it has pages for."""
        return len(self.leads)

    @property
    def pages(self) -> np.ndarray:
        """All of them, int32 `[G, token blocks]`; 0 where a layer is skipped."""
        return self.table[:, : len(self.leads)]

    def held(self, columns: np.ndarray) -> np.ndarray:
        """Its pages in these columns, int64 `[n]`, of its last token block first: so far behind, a prefix is least
        likely to be asked for again."""
        if not self.leads:
            return np.zeros(0, np.int64)
        pages = self.pages[columns, ::-1].T.ravel()
        return pages[pages > 0].astype(np.int64)

    def add(self, leads: Sequence[KVCacheBlock], width: int) -> np.ndarray:
        """More token blocks; returns where their pages are to be written, those of the leads among them: `[G, n]`."""
        first, last = len(self.leads), len(self.leads) + len(leads)
        if last > self.table.shape[1]:
            table = np.zeros((width, max(last, 2 * first)), np.int32)
            if first:
                table[:, :first] = self.table[:, :first]
            self.table = table
        self.leads += leads
        return self.table[:, first:last]

    def decide(self, keep: np.ndarray) -> None:
        """keep: bool `[R]`."""
        self.keep, self.key = keep, np.packbits(keep).tobytes()
        self.skipped = frozenset(column for layer, column in self.skippable if not keep[layer])
        self.others = np.array([c for c in self.others.tolist() if c not in self.skipped], np.int64)

    def let_go(self) -> None:
        """It has no pages any more: it has ended, or is preempted."""
        self.deciding = self.keep is None and 0 < self.window_end <= self.dispatched
        self.slot, self.leads, self.table, self.found_sums = None, [], _NO_PAGES, None
        self.found = self.told = self.scheduled = self.dispatched = self.offered = self.certain = 0
        self.waits, self.sums = False, {}
