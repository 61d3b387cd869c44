"""Which rows of a forward keep a routed sublayer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_tp_group
from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group
from vllm.forward_context import get_forward_context

from .batch import Batch, Subset, with_table
from .config import ModConfig
from .gate import keeps, token_scores
from .kv.connector import MoDConnector
from .requests import PackedCounts, SequenceDecisions
from .stats import RoutingCounts

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
        #: positions in `config.layers` of the layers on this pipeline rank
        self.columns: list[int] = []
        #: LoRA kernels know a row's adapter by its place in the batch: no row may be taken out before a linear
        self.whole_batch_linears = False
        #: adapters are sharded so that tensor-parallel ranks gather rows inside every linear
        self.shares_rows = False
        #: attention layers that share pages, in table order; None with vLLM's own allocation
        self.paged_layers: list[str] | None = None
        self.counts = RoutingCounts(config.layers)
        self.state: SequenceDecisions | PackedCounts | None = None
        if config.level == "sequence":
            self.state = SequenceDecisions(len(config.layers))
        elif config.packs_kv:
            self.state = PackedCounts(len(config.layers))

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Around the model's forward. Without attention metadata (profiling, warm-up) nothing is routed."""
        context = get_forward_context()
        metadata: Any = context.attn_metadata
        batch = next(iter(metadata.values())).mod_batch if metadata else None
        if batch is None:
            yield
            return
        channel = _channel()
        if channel is not None:
            channel.attach(self)
        self.batch = batch
        if self.paged_layers is not None:
            pages = batch.split_pages(self.paged_layers)
            shared = metadata[self.paged_layers[0]]
            tables = zip(pages.names, pages.tables, strict=True)
            context.attn_metadata = {name: with_table(shared, table) for name, table in tables}
            context.slot_mapping = dict(zip(pages.names, pages.slots, strict=True))
        if self.state is not None:
            self.state.open(batch, channel)
        try:
            yield
            if self.state is not None:
                self.state.close()
        finally:
            self.batch = None
        if isinstance(self.state, SequenceDecisions):
            decided = self.state.keep[self.state.undecided]
            for column, kept in enumerate(decided.sum(0).tolist()):
                if column in self.columns:
                    self.counts.add(self.config.layers[column], kept, len(decided))
            if channel is not None and self.paged_layers is not None:
                channel.publish(self.state.new_requests, decided)


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
        number = int(keep.sum())
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
        keep = self._agreed(keeps(token_scores(x[:total], self.router.weight), self.cutoff))
        number = int(keep.sum())
        self.routing.counts.add(self.layer, number, total)
        if number == 0:
            return NONE
        if not with_attention:
            return ALL if number == total else Subset(keep.nonzero().flatten())
        assert isinstance(state, PackedCounts)
        stored = state.column(self.column)
        state.add(self.column, batch.tokens_per_request(keep))
        if number == total and torch.equal(stored.cpu(), batch.computed_host):
            return ALL
        return batch.packed_tokens(keep, stored)
