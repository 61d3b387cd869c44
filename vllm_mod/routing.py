"""The routed layers of one model on one rank, and what outlives a forward: requests' state, page tables, counters."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from vllm.forward_context import get_forward_context
from vllm.triton_utils import HAS_TRITON

from .compat import attention_views
from .config import ModConfig
from .decode import DecodeBuffers, DecodeStep
from .kv.messages import Report, StepMessage
from .mailbox import Mailbox
from .names import SlotNames
from .rows import Rows
from .sequences import SequenceDecisions, SequenceState, decided_in_graph
from .stats import RoutingCounts
from .step import Decisions, Route, Step
from .tables import Layout, PageTables
from .tokens import PackedDecisions, PackedState, TokenDecisions
from .windows import compile_ahead

#: Rows times weights of routed sublayers from which on it pays to wait for the device in each of these, to leave out
#: rows that a decision of the same step skips: half of it, two operations each, is what a GPU computes in the 12 ms
#: that a step takes longer if its host cannot run ahead (an H100, 3 billion weights).
WAIT_FROM = 6 * 10**12
#: Seconds between two readings of counters that are on a GPU.
COUNTS_EVERY = 1.0


class Routing:
    def __init__(self, config: ModConfig) -> None:
        self.config = config
        self.routes: list[Route] = []  #: the routed layers on this pipeline rank
        self.counts = RoutingCounts(config.layers)
        self.mailbox = Mailbox(self.counts, self.begin, self.end)
        self.policy = config.policy
        self.dense_window = config.window is not None
        #: LoRA kernels know a row's adapter by its place in the batch: no row may be taken out before a linear
        self.whole_batch_linears = False
        #: where KV lies, of a model whose requests have state on the workers; None: vLLM's own block table
        self.layout: Layout | None = None
        self.weights = 0  #: of the routed sublayers on this rank
        #: decode steps keep static shapes, for FULL CUDA graphs (see `decode`)
        self.static_decode = False
        self.step: Step | None = None  #: the one that is running
        self._latest: Step | None = None  #: the one that was built last
        self._report: Report | None = None
        self._state: SequenceState | PackedState | None = None
        self._tables: PageTables | None = None
        self._buffers: DecodeBuffers | None = None
        self._names = SlotNames()
        self._wait_from = 0
        self._unread, self._read_next = 0, 0.0  #: decode rows that only the device has counted; when to ask it

    @property
    def columns(self) -> tuple[int, ...]:
        return tuple(route.column for route in self.routes)

    def start(self, vllm_config: Any, block_size: int, device: torch.device) -> None:
        """Called by each metadata builder: vLLM makes these anew with every KV cache, first for profiling."""
        scheduler, number = vllm_config.scheduler_config, len(self.config.layers)
        requests = max(scheduler.max_num_seqs, getattr(scheduler, "max_num_active_seqs", None) or 0)
        self._block_size = block_size
        self._report_size = block_size if vllm_config.cache_config.enable_prefix_caching else None
        if self.policy.by_request:
            on_cpu = device.type == "cpu"  # which waits for nothing
            lag = 0 if on_cpu else 2 if scheduler.async_scheduling else 1
            self._state = SequenceState(self.config.cutoffs, requests + 1, device, lag)
            self._wait_from = 0 if on_cpu else WAIT_FROM // max(self.weights, 1)
            if self.routes and HAS_TRITON and not on_cpu:
                compile_ahead(self._state, self.routes[0].router.weight, vllm_config.model_config.dtype)
        elif self.policy.packs_kv:
            self._state = PackedState(number, requests + 1, device)
        if self.layout is not None:
            blocks = -(-vllm_config.model_config.max_model_len // block_size)
            self._tables = PageTables(self.layout, requests + 1, blocks, device)
        rows = max(scheduler.max_num_seqs, vllm_config.compilation_config.max_cudagraph_capture_size or 0)
        self._buffers, self._latest = None, None
        self._make_buffers = functools.partial(
            DecodeBuffers, self.routes, number, self._state, self._tables, block_size, rows, self.dense_window,
            vllm_config.model_config.dtype, device,
        )  # fmt: skip

    def prepare(self, rows: Rows) -> Step:
        """A forward is coming; called by the metadata builder, before the scheduler's message is there."""
        step = self._latest = Step(rows, self._block_size, self._tables)
        if self.static_decode and rows.cm.max_query_len == 1:
            if self._buffers is None:  # only where they are used: tables reach as far as the longest context
                self._buffers = self._make_buffers()
            step.decode = DecodeStep(self._buffers, rows)
        return step

    def name_rows(self, names: Sequence[str]) -> None:
        """Of the forward that was prepared last: the requests' ids, in the order of its rows."""
        if self._latest is not None:
            self._latest.slots_by_name = functools.partial(self._names.slots, names)

    def begin(self, message: StepMessage) -> None:
        """The scheduler's message, before the forward if there is one; outside of any graph."""
        self._names.begin(message)
        if isinstance(self._state, SequenceState):
            for decided in self._state.settle():
                self.counts.decided(decided, self.columns)
        if self._state is not None:
            self._state.begin(message)
        if self._tables is not None:
            self._tables.update(message.pages)
        for start in message.starts:
            if start.counts and start.keep is not None:
                self.counts.decided(torch.tensor([start.keep]), self.columns)
        if not message.forward:  # what was prepared last is a dummy batch's
            self._latest = None
        step = self._latest
        if step is not None and not step.begun:
            step.begun = True
            if step.decode is not None:
                step.decode.begin()

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Around the model's forward. Without attention metadata (profiling, warm-up) nothing is routed."""
        context = get_forward_context()
        metadata: Any = context.attn_metadata
        self.step = step = next(iter(metadata.values())).mod_step if metadata else None
        try:
            if step is None:
                yield
                return
            slots: Any = context.slot_mapping
            if step.decode is not None:
                views = step.decode.contexts(metadata, slots)
            else:
                views = step.contexts(metadata[self.layout.names[0]]) if self.layout is not None else (metadata, slots)
                step.decisions = self._decisions(step)
            with attention_views(context, *views):
                yield
            if step.begun:
                self._close(step)
        finally:
            self.step = None

    def counts_of(self, step: Step) -> RoutingCounts:
        """Where its decisions are counted; a rehearsal's are not."""
        return self.counts if step.begun else RoutingCounts(self.config.layers)

    def _decisions(self, step: Step) -> Decisions:
        counts = self.counts_of(step)
        if isinstance(self._state, SequenceState):
            return SequenceDecisions(
                step, self._state, self.dense_window, self.columns, self._report_size, self._wait_from
            )
        if isinstance(self._state, PackedState):
            return PackedDecisions(step, counts, self._state)
        return TokenDecisions(step, counts)

    def _close(self, step: Step) -> None:
        if isinstance(step.decisions, SequenceDecisions):
            self._report = step.decisions.close(self.counts)
        elif isinstance(step.decisions, TokenDecisions):
            step.decisions.close()

    def end(self) -> Report | None:
        """After each step: what the scheduler is to know."""
        report, self._report = self._report, None
        step, self._latest = self._latest, None
        if step is None or step.decode is None or not step.begun:
            return report
        if isinstance(self._state, SequenceState):
            return decided_in_graph(
                step, self._state, self.dense_window, self.columns, self._report_size, self.counts
            )  # fmt: skip
        self._unread += step.rows.num_requests
        self._read_counts()
        return report

    def _read_counts(self) -> None:
        """Move the device's counters to the host; now and then, because it waits for the device."""
        assert self._buffers is not None
        if self._buffers.kept.device.type != "cpu" and time.monotonic() < self._read_next:
            return
        kept = self._buffers.kept.tolist()
        for column in self.columns:
            self.counts.add(column, kept[column], self._unread * self._buffers.places)
        self._buffers.kept.zero_()
        self._unread, self._read_next = 0, time.monotonic() + COUNTS_EVERY
