"""KV pages per (request, layer): the pages of skipped layers go back to the pool.

In vLLM a block holds one token block's KV of every layer of a group, so a layer that a request skips costs as much as
any other. Here a page holds *one* layer's KV of one token block, and all layers draw pages from one pool.

A request's row of vLLM's block table holds one number, its *slot*, by which workers know the request for as long as it
runs. Its pages travel in the step's message (see `messages`), as many as are new, and workers keep the tables.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

from .messages import NewPages, Scored, Start, StepMessage
from .pool import PagePool
from .prefix import PrefixCache
from .tracked import OwnedHashes, Tracked

if TYPE_CHECKING:
    from collections.abc import Callable

    from .spec import PageSpec

#: Token blocks taken at once from which on their pages are put in order: a CPU reads neighbours faster.
_SORTED_FROM = 4


def _as_it_came(tracked: Tracked) -> None:
    pass


class PageManager(FullAttentionManager):
    """vLLM's manager of the one KV-cache group. `G` page columns, `R` routed layers."""

    def __init__(self, kv_cache_spec: PageSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self._width = kv_cache_spec.columns
        routed = kv_cache_spec.routed
        #: the column that every request has pages in
        self._lead = next((c for c in range(self._width) if c not in routed), 0)
        self._all = np.arange(self._width)
        self._others = np.delete(self._all, self._lead)
        self._skippable = [(i, column) for i, column in enumerate(routed) if column not in (-1, self._lead)]
        self._window = 0
        self.pages = PagePool(self.block_pool)
        self.prefix = self._prefix_cache()
        self._live: dict[str, Tracked] = {}
        self._by_serial: dict[int, Tracked] = {}
        self._serials = itertools.count(1)
        self._free_slots: list[KVCacheBlock] = []
        self._number_of_slots = 0
        self._freed_slots: list[int] = []  # since the last step
        # Of the step that is being scheduled: its requests, those that begin, those that have new pages.
        self._stepping: dict[str, Tracked] = {}
        self._starting: dict[str, Tracked] = {}
        self._grown: dict[str, Tracked] = {}
        #: called once per request, when the scheduler first looks at it: it may set its cutoffs
        self.admit: Callable[[Tracked], None] = _as_it_came
        self.pages_released = 0
        self.token_slots = 0  #: of all requests, in any layer; `block_size` per token block
        self.reports_ignored = 0  #: they were of requests that have ended

    def _prefix_cache(self) -> PrefixCache:
        return PrefixCache(self.block_pool, self.pages, self.block_size, self._window, self._width, self._lead)

    @property
    def by_layer(self) -> bool:
        """Whether each layer has pages of its own; if not, a page is vLLM's usual block."""
        return self._width > 1

    @property
    def bytes_held(self) -> int:
        pool = self.block_pool
        return (pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()) * self.kv_cache_spec.page_size_bytes

    # ---- requests

    def use_window(self, window: int) -> None:
        """Before the first request: decisions are taken from the first `window` tokens; 0: from the whole prompt."""
        self._window = window
        self.prefix = self._prefix_cache()

    def open(self, request: Any, cutoffs: np.ndarray, dial: dict[str, Any] | None = None) -> Tracked:
        """A request has arrived. cutoffs: float64 `[R]`; dial: what they come from, if not from the checkpoint."""
        prompt = request.num_prompt_tokens
        window_end = (min(self._window, prompt) if self._window else prompt) if len(cutoffs) else 0
        tracked = Tracked(request, prompt, window_end, cutoffs, dial, self._others, self._skippable)
        self._live[request.request_id] = tracked
        request.block_hashes = OwnedHashes(request.block_hashes)
        request.block_hashes.owner = tracked
        return tracked

    def close(self, request_id: str) -> Tracked | None:
        """The request has ended; vLLM will free its pages next."""
        tracked = self._live.get(request_id)
        if tracked is not None:
            tracked.closed = True
        return tracked

    @property
    def number_waiting(self) -> int:
        """Requests that have no pages: new ones, and preempted ones."""
        return len(self._live) - (self._number_of_slots - len(self._free_slots))

    def must_wait(self, request_id: str) -> bool:
        """Not to be prefilled in this step: what it needs is on its way."""
        tracked = self._live[request_id]
        return tracked.waits or tracked.deciding

    # ---- what vLLM asks for

    def find_longest_cache_hit(self, block_hashes: Any, max_length: int, **_: Any) -> Any:
        """(lead pages of the token blocks found, tokens in them). vLLM calls it on the instance."""
        owner = getattr(block_hashes, "owner", None)
        if owner is None:
            return ([],), 0
        self._admit(owner)
        longest = min(max_length // self.block_size, len(block_hashes))
        found = self.prefix.find(owner, block_hashes, longest)
        return ([cached.lead for cached in found],), len(found) * self.block_size

    def _admit(self, tracked: Tracked) -> None:
        if not tracked.admitted:
            tracked.admitted = True
            self.admit(tracked)

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, new_computed_blocks: Sequence[KVCacheBlock] = (), *_: Any, **__: Any
    ) -> int:
        tracked = self._live[request_id]
        last = cdiv(num_tokens, self.block_size)
        if not new_computed_blocks:  # most steps of most requests need nothing
            return self._number_of_pages(tracked, first, last) if last > (first := len(tracked.leads)) else 0
        found = self._found_pages(tracked, list(new_computed_blocks))
        return self.pages.number_free(found[found > 0]) + self._number_of_pages(tracked, found.shape[1], last)

    def _found_pages(self, tracked: Tracked, leads: Sequence[KVCacheBlock]) -> np.ndarray:
        """Pages that the request takes over, int32 `[G, token blocks]`; 0 where it needs none."""
        needed = self.prefix.needed(tracked, len(leads))
        found = np.zeros((self._width, len(leads)), np.int32)
        found[needed] = np.stack([self.prefix.of(lead).pages for lead in leads], 1)[needed]
        return found

    def _number_of_pages(self, tracked: Tracked, first: int, last: int) -> int:
        """Of token blocks `first` to `last` (exclusive)."""
        if last <= first:
            return 0
        dense = self._dense_blocks(tracked, first, last)
        return dense * self._width + (last - first - dense) * (1 + len(tracked.others))

    def _dense_blocks(self, tracked: Tracked, first: int, last: int) -> int:
        """How many of these have pages of all layers: those with tokens of its window, where it skips any."""
        if not tracked.skipped:
            return last - first
        window = cdiv(tracked.window_end, self.block_size) if self._window else 0
        return min(max(window - first, 0), last - first)

    def add_local_computed_blocks(
        self, request_id: str, new_computed_blocks: Sequence[KVCacheBlock], *_: Any, **__: Any
    ) -> None:
        if not new_computed_blocks:
            return
        tracked, leads = self._live[request_id], list(new_computed_blocks)
        assert not tracked.blocks
        tracked.add(leads, self._width)[:] = self._found_pages(tracked, leads)
        tracked.found = tracked.offered = len(leads)
        tracked.found_sums = self._found_sums(tracked, leads)
        self.pages.hold(leads, tracked.held(self._others))
        self.token_slots += len(leads) * self.block_size
        self._grown[request_id] = tracked
        self._take_slot(request_id, tracked)

    def _found_sums(self, tracked: Tracked, leads: Sequence[KVCacheBlock]) -> np.ndarray | None:
        """What the tokens of its window among the found ones have scored."""
        inside = min(len(leads), cdiv(tracked.window_end, self.block_size)) if self._window else 0
        return self.prefix.of(leads[inside - 1]).sums if inside else None

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:  # fmt: skip
        """Give the request pages for `num_tokens` tokens; returns what is new in its row: its slot, or nothing."""
        tracked = self._stepping[request_id] = self._live[request_id]
        tracked.scheduled = num_tokens
        if num_tokens > (first := len(tracked.leads)) * self.block_size:
            last = cdiv(num_tokens, self.block_size)
            self._grow(tracked, first, last)
            self._grown[request_id] = tracked
            self.token_slots += (last - first) * self.block_size
        is_new = tracked.slot is None or request_id in self._starting
        return self._take_slot(request_id, tracked) if is_new else []

    def _grow(self, tracked: Tracked, first: int, last: int) -> None:
        number = last - first
        dense = self._dense_blocks(tracked, first, last)
        pages_of_dense = dense * len(self._others)
        leads, others = self.pages.take(number, pages_of_dense + (number - dense) * len(tracked.others))
        if number >= _SORTED_FROM:
            others.sort()
        pages = tracked.add(leads, self._width)
        pages[self._lead] = [lead.block_id for lead in leads]
        # A layer's pages lie side by side.
        if dense:
            pages[self._others, :dense] = others[:pages_of_dense].reshape(-1, dense)
        if dense < number:
            pages[tracked.others, dense:] = others[pages_of_dense:].reshape(-1, number - dense)

    def _take_slot(self, request_id: str, tracked: Tracked) -> list[KVCacheBlock]:
        if tracked.slot is None:
            self._admit(tracked)
            tracked.serial = next(self._serials)
            self._by_serial[tracked.serial] = tracked
            tracked.serials.append(tracked.serial)
            if not self._free_slots:
                self._number_of_slots += 1
                self._free_slots.append(KVCacheBlock(self._number_of_slots))
            tracked.slot = self._free_slots.pop()
            self.req_to_blocks[request_id] = [tracked.slot]
            self.num_cached_block[request_id] = tracked.found
            self._starting[request_id] = tracked
        return [tracked.slot]

    def cache_blocks(self, request: Any, *_: Any, **__: Any) -> None:
        """vLLM calls it for every request that it schedules, if prefix caching is on."""
        tracked = self._live[request.request_id]
        if tracked.scheduled // self.block_size > tracked.offered:
            self._offer(tracked)

    def _offer(self, tracked: Tracked) -> None:
        offered = tracked.offered
        self.prefix.offer(tracked)
        if tracked.slot is not None and tracked.offered > offered:
            # vLLM reads from the blocks of a row how many tokens a request has left in the cache.
            tracked.slot.reset_hash()
            lead = tracked.leads[tracked.offered - 1]
            tracked.slot.set_block_hash(lead.block_hash, tracked.offered * self.block_size)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """A request has ended, or is preempted. Gives its pages back itself: nothing is left to vLLM."""
        super().pop_blocks_for_free(request_id)
        self._starting.pop(request_id, None)
        self._grown.pop(request_id, None)
        tracked = self._live.get(request_id)
        if tracked is None:
            return []
        if self._stepping.pop(request_id, None) is not None:
            self.prefix.withdraw(tracked, tracked.certain)
        self.prefix.let_go(tracked)
        if tracked.slot is not None:
            tracked.slot.reset_hash()
            self._free_slots.append(tracked.slot)
            self._freed_slots.append(tracked.slot.block_id)
        self.token_slots -= tracked.blocks * self.block_size
        self.pages.release(tracked.held(self._all), tracked.leads)
        tracked.let_go()
        if tracked.closed:
            del self._live[request_id]
            self._drop_if_done(tracked)
        return []

    def _drop_if_done(self, tracked: Tracked) -> None:
        """Forget a request that has ended, if nothing more will be heard of it."""
        if tracked.closed and not tracked.deciding and not any(tracked.awaited.values()):
            for serial in tracked.serials:
                self._by_serial.pop(serial, None)

    def get_num_common_prefix_blocks(self, running_request_id: str) -> int:
        """Abstract in vLLM 0.31; nobody asks from 0.32 on."""
        return 0

    # ---- what workers are told, and tell

    def take_message(self) -> StepMessage:
        """Of the step that was just scheduled."""
        starting, self._starting = self._starting, {}
        grown, self._grown = self._grown, {}
        stepping, self._stepping = self._stepping, {}
        for tracked in stepping.values():
            tracked.certain, tracked.dispatched = tracked.offered, tracked.scheduled
        freed, self._freed_slots = self._freed_slots, []
        return StepMessage([self._start(t) for t in starting.values()], self._new_pages(list(grown.values())), freed)

    def _start(self, tracked: Tracked) -> Start:
        assert tracked.slot is not None
        return Start(
            slot=tracked.slot.block_id,
            serial=tracked.serial,
            window_end=tracked.window_end,
            computed=tracked.found * self.block_size,
            keep=None if tracked.keep is None else tuple(tracked.keep.tolist()),
            sums=None if tracked.found_sums is None else tuple(tracked.found_sums.tolist()),
            cutoffs=None if tracked.dial is None else tuple(tracked.cutoffs.tolist()),
            counts=len(tracked.serials) == 1,
            name=tracked.request.request_id,
        )

    def _new_pages(self, grown: list[Tracked]) -> NewPages:
        if not grown:
            return NewPages.none(self._width)
        counts = [tracked.blocks - tracked.told for tracked in grown]
        pages = [t.pages[:, t.told :] for t in grown]
        result = NewPages(
            np.array([t.slot.block_id for t in grown], np.int64),  # type: ignore[union-attr]
            np.array([t.told for t in grown], np.int64),
            np.array(counts, np.int64),
            np.concatenate(pages, axis=1).T,
        )
        for tracked in grown:
            tracked.told = tracked.blocks
        return result

    def hear(self, serial: int, scored: Scored) -> None:
        """A worker's report of one request: others may go on from its blocks, and pages that it skips come back."""
        tracked = self._by_serial.get(serial)
        if tracked is None or tracked.closed:
            self.reports_ignored += scored.keep is not None
        if tracked is None:
            return
        tracked.sums.update(enumerate(scored.sums, scored.first_block))
        if scored.keep is not None:
            if tracked.keep is not None and not np.array_equal(tracked.keep, scored.keep):
                raise RuntimeError(f"request {tracked.request.request_id}: its routing decision changed")
            tracked.decide(scored.keep)
            tracked.deciding = False
        self.prefix.heard(tracked)
        if serial != tracked.serial or not tracked.leads:  # it has ended, or was preempted and perhaps goes on
            self._drop_if_done(tracked)
            return
        if scored.keep is not None:
            if self.enable_caching:
                self._offer(tracked)
                tracked.certain = tracked.offered
            self._release(tracked)

    def _release(self, tracked: Tracked) -> None:
        """Give the pages of skipped layers back: its window is complete."""
        skipped = np.array(list(tracked.skipped), np.int64)
        freed = tracked.held(skipped)
        tracked.pages[skipped] = 0
        self.pages.release(freed)
        self.pages_released += len(freed)
