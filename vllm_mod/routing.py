"""Which rows of a forward keep a routed sublayer."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_tp_group
from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group
from vllm.forward_context import get_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata

from .batch import Batch, Subset, with_table
from .config import ModConfig
from .decode import DecodeBuffers, DecodeStep
from .gate import keeps
from .kernels import row_scores
from .kv.connector import MoDConnector
from .requests import PackedCounts, SequenceDecisions
from .stats import RoutingCounts

#: Seconds between two readings of counters that are on a GPU.
COUNTS_EVERY = 1.0
ALL, NONE = "all", "none"
#: Rows that keep a sublayer: the short ways, or a proper subset.
Kept = Subset | str


class Router(nn.Module):
    """The gate's weight, `[1 or num_experts, hidden]`, float32 whatever the model's dtype."""

    def __init__(self, hidden_size: int, rows: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(rows, hidden_size, dtype=torch.float32), requires_grad=False)


class Routing:
    """All routed layers of one model (on one rank): the current batch, the requests' state, the counters."""

    def __init__(self, config: ModConfig) -> None:
        self.config = config
        self.batch: Batch | None = None
        #: the routed layers on this pipeline rank
        self.routes: list[Route] = []
        #: LoRA kernels know a row's adapter by its place in the batch: no row may be taken out before a linear
        self.whole_batch_linears = False
        #: adapters are sharded so that tensor-parallel ranks gather rows inside every linear
        self.shares_rows = False
        #: attention layers that share pages, in table order; None with vLLM's own allocation
        self.paged_layers: list[str] | None = None
        #: decode steps keep static shapes, for FULL CUDA graphs (see `decode`)
        self.static_decode = False
        self._decode: DecodeBuffers | None = None
        self._step: DecodeStep | None = None  #: of this step, if it is one
        self._unread, self._read_next = 0, 0.0  #: decode rows that only the device has counted; when to ask it
        self.counts = RoutingCounts(config.layers)
        self.state: SequenceDecisions | PackedCounts | None = None
        if config.level == "sequence":
            self.state = SequenceDecisions(len(config.layers))
        elif config.packs_kv:
            self.state = PackedCounts(len(config.layers))

    def start(self, vllm_config: Any, block_size: int, device: torch.device) -> None:
        """Called by each metadata builder, once the size of the KV cache is known."""
        if self.state is not None:
            self.state.running.allocate(vllm_config.cache_config.num_gpu_blocks, device)
        self._decode = None
        self._make_buffers = functools.partial(DecodeBuffers, self, vllm_config, block_size, device)

    def prepare(self, batch: Batch, cm: CommonAttentionMetadata) -> None:
        """Before each step, outside of any graph: `forward` does not run where one is replayed."""
        channel, self._step = _channel(), None
        if channel is not None:
            channel.attach(self)
        if self.static_decode and cm.max_query_len == 1:
            if self._decode is None:  # only where they are used: tables reach as far as the longest context
                self._decode = self._make_buffers()
            batch.decode = self._step = DecodeStep(self._decode, batch, cm)

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Around the model's forward. Without attention metadata (profiling, warm-up) nothing is routed."""
        context = get_forward_context()
        metadata: Any = context.attn_metadata
        self.batch = next(iter(metadata.values())).mod_batch if metadata else None
        try:
            if self.batch is None:
                yield
            elif self.batch.decode is not None:
                slots: Any = context.slot_mapping
                context.attn_metadata, context.slot_mapping = self.batch.decode.contexts(metadata, slots)
                yield
            else:
                with self._compacting(self.batch):
                    yield
        finally:
            self.batch = None

    @contextmanager
    def _compacting(self, batch: Batch) -> Iterator[None]:
        context, channel = get_forward_context(), _channel()
        if self.paged_layers is not None:
            metadata: Any = context.attn_metadata
            pages = batch.split_pages(self.paged_layers)
            shared = metadata[self.paged_layers[0]]
            tables = zip(pages.names, pages.tables, strict=True)
            context.attn_metadata = {name: with_table(shared, table) for name, table in tables}
            context.slot_mapping = dict(zip(pages.names, pages.slots, strict=True))
        if self.state is not None:
            self.state.open(batch, channel)
        yield
        if self.state is not None:
            self.state.close()
        if isinstance(self.state, SequenceDecisions) and self.state.undecided.numel():
            self._tell(channel, self.state.new_requests, self.state.keep[self.state.undecided])

    def collect(self, channel: MoDConnector) -> None:
        """After each step: what a decode step, perhaps a replayed graph, decided on the device."""
        step, self._step = self._step, None
        if step is None:
            return
        if isinstance(self.state, SequenceDecisions):
            rows = step.batch.fresh_host
            if rows.numel():
                anchors = step.batch.anchors[rows.to(step.batch.device)]
                self._tell(channel, *self.state.collect(anchors, channel))
        else:
            self._unread += step.batch.num_requests
            self._read_counts()

    def _read_counts(self) -> None:
        """Move the device's counters to the host; now and then, because it waits for the device."""
        assert self._decode is not None
        if self._decode.kept.device.type != "cpu" and time.monotonic() < self._read_next:
            return
        kept = self._decode.kept.tolist()
        for route in self.routes:
            self.counts.add(route.layer, kept[route.column], self._unread * self._decode.places)
        self._decode.kept.zero_()
        self._unread, self._read_next = 0, time.monotonic() + COUNTS_EVERY

    def _tell(self, channel: MoDConnector | None, requests: Sequence[str | None], keep: Tensor) -> None:
        """Count decisions just taken, and send them to the scheduler; keep: host, bool `[requests, routed]`."""
        kept = keep.sum(0).tolist()
        for route in self.routes:
            self.counts.add(route.layer, kept[route.column], len(keep))
        if channel is not None and self.paged_layers is not None:
            channel.publish(requests, keep)


def _channel() -> MoDConnector | None:
    if not has_kv_transfer_group():
        return None
    connector = get_kv_transfer_group()
    return connector if isinstance(connector, MoDConnector) else None


@dataclass
class Route:
    """One routed layer."""

    layer: int
    column: int  #: position in `mod_config.layers`
    router: Router
    cutoff: float
    routing: Routing
    #: its attention layer, None where only the MLP is routed
    kv_layer: str | None = None
    #: tensor-parallel ranks exchange its kept rows before they attend, so they must keep the same ones
    shares_rows: bool = False
    #: `block` only: the decision its attention took, for its MLP
    _decided: tuple[Batch, Kept] | None = field(default=None, repr=False)

    def kept(self, x: Tensor, with_attention: bool) -> Kept:
        """Rows of `x` `[>= N, hidden]` that keep this layer's sublayer."""
        batch, config = self.routing.batch, self.routing.config
        assert batch is not None
        if config.target == "expert":
            return ALL  # its experts decide, see `experts`
        if config.target == "block" and not with_attention:
            assert self._decided is not None and self._decided[0] is batch, "a block's attention runs before its MLP"
            return self._decided[1]
        kept = self._by_sequence(batch, x) if config.level == "sequence" else self._by_token(batch, x, with_attention)
        self._decided = (batch, kept)
        return kept

    def _agreed(self, keep: Tensor) -> Tensor:
        """Rank 0's decision, where ranks that kept different rows would wait for each other."""
        if self.shares_rows or self.routing.shares_rows:
            return get_tp_group().broadcast(keep.to(torch.uint8)).bool()
        return keep

    def _by_sequence(self, batch: Batch, x: Tensor) -> Kept:
        state = self.routing.state
        assert isinstance(state, SequenceDecisions)
        keep = state.decide(self.column, x, self.router.weight, self.cutoff, self._agreed)
        number = state.number(self.column)
        if number == len(keep):
            return ALL
        return batch.whole_requests(keep, self.kv_layer) if number else NONE

    def _by_token(self, batch: Batch, x: Tensor, with_attention: bool) -> Kept:
        total, state = batch.num_tokens, self.routing.state
        if self.cutoff == float("-inf"):  # nothing is ever packed: positions are places
            self.routing.counts.add(self.layer, total, total)
            return ALL
        if self.cutoff == float("inf"):
            self.routing.counts.add(self.layer, 0, total)
            return NONE
        keep = self._agreed(keeps(row_scores(x[:total], self.router.weight), self.cutoff)).cpu()
        number = int(keep.sum())
        self.routing.counts.add(self.layer, number, total)
        if number == 0:
            return NONE
        if not with_attention:
            return ALL if number == total else Subset(batch.upload(keep.nonzero().flatten()))
        assert isinstance(state, PackedCounts)
        stored = state.column(self.column)
        state.add(self.column, batch.tokens_per_request(keep))
        if number == total and torch.equal(stored, batch.computed_host):
            return ALL
        return batch.packed_tokens(keep, stored)
