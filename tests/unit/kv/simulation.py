"""vLLM's own KV-cache manager and ours, with a scheduler and a worker simulated around them.

The worker has no tensors: a page remembers, for every place in it, *what* was written there. What a token's K/V is
made of is its layer, the tokens before it, and the decisions that these followed, so two contents are equal exactly
where a recomputation would give the same numbers.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request, RequestStatus

from vllm_mod.compat import manager_of
from vllm_mod.kv.messages import Scored, StepMessage
from vllm_mod.kv.pages import PageManager
from vllm_mod.kv.spec import PageSpec

BLOCK = 4  #: tokens
init_none_hash(sha256)
_hasher = get_request_block_hasher(BLOCK, sha256)


def page_spec(columns: int, routed: tuple[int, ...]) -> PageSpec:
    return PageSpec(
        block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32, columns=columns, routed=routed
    )  # fmt: skip


def kv_cache_manager(columns: int, routed: tuple[int, ...], pages: int, caching: bool = True) -> KVCacheManager:
    groups = [KVCacheGroupSpec(["layer"], page_spec(columns, routed))]
    config = KVCacheConfig(num_blocks=pages + 1, kv_cache_tensors=[], kv_cache_groups=groups)  # one is the null page
    return KVCacheManager(
        config, max_model_len=1024, scheduler_block_size=BLOCK, hash_block_size=BLOCK, enable_caching=caching,
        log_stats=True,
    )  # fmt: skip


def score(layer: int, tokens: tuple[int, ...]) -> float:
    """Of the last of `tokens`, in routed layer `layer`: depends on all of them, and adds up exactly."""
    digest = hashlib.blake2b(repr((layer, tokens)).encode(), digest_size=2).digest()
    return int.from_bytes(digest, "little") % 64 - 32


@dataclass(eq=False)
class Simulated:
    """One request."""

    request: Request
    cutoffs: np.ndarray
    answer: int  #: tokens
    keep: tuple[bool, ...]  #: what a recomputation decides
    window_end: int
    # Of its present prefill.
    slot: int = 0
    computed: int = 0
    sums: np.ndarray = field(default_factory=lambda: np.zeros(0))
    decided: tuple[bool, ...] | None = None
    outputs: int = 0

    @property
    def name(self) -> str:
        return self.request.request_id


class Simulation:
    """One step at a time; `delay` reports are under way (asynchronous scheduling)."""

    def __init__(self, columns: int, routed: tuple[int, ...], pages: int, window: int, delay: int) -> None:
        """routed: page column of each routed layer, or -1. window: `W`, 0 for the whole prompt."""
        self.columns, self.routed, self.window, self.delay = columns, routed, window, delay
        self.kv = kv_cache_manager(columns, routed, pages, caching=window > 0)
        manager = manager_of(self.kv)
        assert isinstance(manager, PageManager)
        self.manager = manager
        manager.use_window(window)
        self.waiting: list[Simulated] = []
        self.running: list[Simulated] = []
        self.under_way: list[tuple[list[tuple[Simulated, int]], dict[int, Scored]]] = []
        self.tables: dict[int, dict[int, np.ndarray]] = {}  #: slot -> token block -> pages
        self.content: dict[tuple[int, int], Any] = {}  #: (page, place) -> what was written
        self.by_slot: dict[int, Simulated] = {}
        self.serials: dict[int, int] = {}
        self.hits = self.names = self.finished = 0

    # ---- requests

    def add(self, prompt: list[int], answer: int, cutoff: float = 0.0) -> Simulated:
        self.names += 1
        request = Request(f"r{self.names}", prompt, SamplingParams(max_tokens=answer), None, block_hasher=_hasher)
        number = len(self.routed)
        window_end = min(self.window or len(prompt), len(prompt))
        cutoffs = np.full(number, cutoff)
        means = [sum(score(i, tuple(prompt[: t + 1])) for t in range(window_end)) / window_end for i in range(number)]
        keep = tuple(mean >= cutoff for mean in means)
        simulated = Simulated(request, cutoffs, answer, keep, window_end)
        self.manager.open(request, cutoffs, {"by": "request"} if cutoff else None)
        self.waiting.append(simulated)
        return simulated

    def end(self, simulated: Simulated) -> None:
        """It has its answer, or is aborted."""
        self.manager.close(simulated.name)
        simulated.request.status = RequestStatus.FINISHED_ABORTED
        self.kv.free(simulated.request)
        for queue in (self.waiting, self.running):
            if simulated in queue:
                queue.remove(simulated)
        self.finished += 1

    def preempt(self, simulated: Simulated) -> None:
        self.running.remove(simulated)
        self.kv.free(simulated.request)
        simulated.request.num_computed_tokens = 0
        simulated.request.status = RequestStatus.PREEMPTED
        self.waiting.insert(0, simulated)

    # ---- a step, as vLLM's scheduler does it

    def step(self, budget: int, longest_chunk: int = 1 << 30) -> bool:
        """Schedule, compute, hear; False if nothing could be scheduled."""
        scheduled: list[tuple[Simulated, int]] = []
        preempted = False
        for simulated in list(self.running):
            if simulated not in self.running or not budget:
                continue
            request = simulated.request
            number = min(request.num_tokens - request.num_computed_tokens, budget, longest_chunk)
            if number <= 0:
                continue  # its token is still under way
            while simulated in self.running:
                if self.kv.allocate_slots(request, number) is not None:
                    scheduled.append((simulated, number))
                    budget -= number
                    break
                victim = self.running[-1]
                scheduled = [(s, n) for s, n in scheduled if s is not victim]
                self.preempt(victim)
                preempted = True
        while self.waiting and budget and not preempted:
            admitted = self._admit(budget, longest_chunk)
            if admitted is None:
                break
            scheduled.append(admitted)
            budget -= admitted[1]
        message = self.manager.take_message()
        for simulated, number in scheduled:
            simulated.request.num_computed_tokens += number
        if scheduled:
            self.under_way.append((scheduled, self._compute(message, scheduled)))
        while len(self.under_way) > (self.delay if scheduled else 0):
            self._hear(*self.under_way.pop(0))
        return bool(scheduled)

    def _admit(self, budget: int, longest_chunk: int) -> tuple[Simulated, int] | None:
        for simulated in list(self.waiting):
            request = simulated.request
            blocks, found, _ = self.kv.get_computed_blocks(request)
            if self.manager.must_wait(simulated.name):
                continue  # the next in the queue has its turn
            number = min(request.num_tokens - found, budget, longest_chunk)
            got = self.kv.allocate_slots(
                request, number, num_new_computed_tokens=found, new_computed_blocks=blocks,
                full_sequence_must_fit=False,
            )  # fmt: skip
            if got is None:
                return None
            self.waiting.remove(simulated)
            self.running.append(simulated)
            request.status, request.num_computed_tokens = RequestStatus.RUNNING, found
            self.hits += found
            return simulated, number
        return None

    # ---- the worker

    def _compute(self, message: StepMessage, scheduled: list[tuple[Simulated, int]]) -> dict[int, Scored]:
        by_name = {s.name: s for s, _ in scheduled}
        for start in message.starts:
            simulated = by_name[self.manager._by_serial[start.serial].request.request_id]
            self.tables[start.slot], self.by_slot[start.slot] = {}, simulated
            simulated.slot, simulated.computed, simulated.decided = start.slot, start.computed, start.keep
            assert start.window_end == simulated.window_end
            assert (start.cutoffs is None) == (not simulated.cutoffs.any())
            number = len(self.routed)
            simulated.sums = np.array(start.sums if start.sums is not None else np.zeros(number))
            self.serials[start.slot] = start.serial
        new, at = message.pages, 0
        for slot, first, count in zip(new.slots.tolist(), new.firsts.tolist(), new.counts.tolist(), strict=True):
            for block in range(first, first + count):
                self.tables[slot][block] = new.pages[at]
                at += 1
        scored = {}
        for simulated, number in scheduled:
            assert self.by_slot[simulated.slot] is simulated
            if report := self._run(simulated, number):
                scored[self.serials[simulated.slot]] = report
        return scored

    def _run(self, simulated: Simulated, number: int) -> Scored | None:
        tokens, first = list(simulated.request.all_token_ids), simulated.computed
        simulated.computed = last = first + number
        end, told, blocks = simulated.window_end, [], []
        for t in range(first, min(last, end)):
            simulated.sums = simulated.sums + [score(i, tuple(tokens[: t + 1])) for i in range(len(self.routed))]
            if (t + 1) % BLOCK == 0 or t + 1 == end:
                told.append(simulated.sums)
                blocks.append(t // BLOCK)
        complete = first < end <= last
        if complete and simulated.decided is None:
            simulated.decided = tuple((simulated.sums / end >= simulated.cutoffs).tolist())
        assert simulated.decided is not None or last < end, "behind its window, and undecided"
        if simulated.decided is not None:
            assert simulated.decided == simulated.keep, "decided otherwise than a recomputation"
        for column in range(self.columns):
            self._attend(simulated, column, tokens, first, last)
        if not told and not complete:
            return None
        keep = np.array(simulated.decided) if complete else None
        return Scored(blocks[0] if blocks else 0, np.array(told).reshape(-1, len(self.routed)), keep)

    def _attend(self, simulated: Simulated, column: int, tokens: list[int], first: int, last: int) -> None:
        """Write what this layer keeps of the tokens, then look at everything that they attend to."""
        number = self.routed.index(column) if column in self.routed else None
        kept = number is None or simulated.decided is None or simulated.decided[number]
        dense_end = simulated.window_end if self.window else 0
        present = range(last) if kept else range(min(last, dense_end))
        for t in range(first, last):
            if t in present:
                self.content[self._place(simulated, column, t)] = self._what(simulated, column, tokens, t)
        if first < len(present):  # some of its tokens attend here
            for t in present:
                found = self.content.get(self._place(simulated, column, t))
                assert found == self._what(simulated, column, tokens, t), (simulated.name, column, t)

    def _place(self, simulated: Simulated, column: int, t: int) -> tuple[int, int]:
        page = int(self.tables[simulated.slot][t // BLOCK][column])
        assert page, f"{simulated.name} has no page for token {t} in column {column}"
        return page, t % BLOCK

    def _what(self, simulated: Simulated, column: int, tokens: list[int], t: int) -> Any:
        dense = bool(self.window) and t < simulated.window_end
        return column, tuple(tokens[: t + 1]), None if dense else simulated.decided

    # ---- what comes back

    def _hear(self, scheduled: list[tuple[Simulated, int]], scored: dict[int, Scored]) -> None:
        for simulated, _ in scheduled:
            request = simulated.request
            if simulated not in self.running or simulated.computed < request.num_tokens:
                continue
            if request.num_computed_tokens >= request.num_tokens:
                request.append_output_token_ids(7 + (simulated.outputs + len(request.prompt_token_ids or ())) % 3)
                simulated.outputs += 1
                if simulated.outputs >= simulated.answer:
                    self.end(simulated)
        for serial, report in scored.items():
            self.manager.hear(serial, report)

    def check(self) -> None:
        """Each page is free or referenced, as often as it is counted; slots are nobody's twice."""
        pool = self.kv.block_pool
        held = np.zeros(pool.num_gpu_blocks, int)
        slots, leads = [], Counter[int]()
        for tracked in self.manager._live.values():
            np.add.at(held, tracked.pages[tracked.pages > 0], 1)
            leads.update(lead.block_id for lead in tracked.leads)
            if tracked.slot is not None:
                slots.append(tracked.slot.block_id)
        free = {page.block_id for page in pool.free_block_queue.get_all_free_blocks()}
        assert (self.manager.pages._requests == held).all()
        assert free == set(np.flatnonzero(held[1:] == 0) + 1) and len(free) == pool.get_num_free_blocks()
        for page in pool.blocks[1:]:
            assert page.ref_cnt == leads[page.block_id], page  # vLLM counts leads alone
        known = set(map(id, self.manager.prefix._by_lead.values()))  # one per page at most
        assert {id(cached) for cached in self.manager.prefix._window_ends.values()} <= known
        assert len(slots) == len(set(slots))
        assert len(self.running) == len(slots)
