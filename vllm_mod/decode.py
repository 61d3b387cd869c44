"""Decode steps at static shapes and without waiting for the device, so that FULL CUDA graphs can hold them.

No row is taken out: linears see the whole batch (a decode step is bound by reading their weights, not by its rows).
In a layer that a row skips its sequence length is 0 and its slot -1, so attention reads nothing and stores nothing,
and its output is replaced by zero. What captured kernels read lies in `DecodeBuffers`, at one address. A `DecodeStep`
fills it before each step, outside the graph: a request's decisions are known by then. Decided inside the graph are
one-token prompts (a decode step to vLLM) and, at token level, every row.

Not run on a GPU yet; on the CPU the tests let whole engines decode this way.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.triton_utils import HAS_TRITON
from vllm.v1.attention.backend import CommonAttentionMetadata

from . import kernels
from .gate import keeps, token_scores

if TYPE_CHECKING:
    from .batch import Batch
    from .routing import Route, Routing


class DecodeBuffers:
    """`C` routed layers (columns), `A` attention layers with lengths or tables of their own, `R` requests at most."""

    def __init__(self, routing: Routing, vllm_config: Any, block_size: int, device: torch.device) -> None:
        config, number = routing.config, len(routing.config.layers)
        rows = max(
            vllm_config.scheduler_config.max_num_seqs, vllm_config.compilation_config.max_cudagraph_capture_size or 0
        )
        self.block_size = block_size
        self.per_request = config.level == "sequence"
        self.use_triton = HAS_TRITON and device.type != "cpu"
        #: decisions (bool) or stored KV entries (int32) per anchor, `[blocks, C]`; one row where nothing is remembered
        self.state = routing.state.running.rows if routing.state is not None else torch.zeros(1, number, device=device)
        self.keep = torch.zeros(number, rows, dtype=torch.bool, device=device)
        #: kept tokens or pairs since they were last read (token level)
        self.kept = torch.zeros(number, dtype=torch.int64, device=device)
        #: decisions per token: the experts it selects, or 1
        self.places = 1
        self.paged = routing.paged_layers is not None
        routed = {route.kv_layer: route.column for route in routing.routes if route.kv_layer}
        #: attention layers in the order of the next three
        self.layers = routing.paged_layers if routing.paged_layers is not None else list(routed)
        self.columns_host = [routed.get(name, -1) for name in self.layers]
        self.columns = torch.tensor(self.columns_host, dtype=torch.int32, device=device)
        layers = max(len(self.layers), 1)
        self.seq_lens = torch.zeros(layers, rows, dtype=torch.int32, device=device)
        self.slots = torch.full((layers, rows), -1, dtype=torch.int64, device=device)
        blocks = -(-vllm_config.model_config.max_model_len // block_size) if self.paged else 0
        self.tables = torch.zeros(layers, rows, blocks, dtype=torch.int32, device=device)


class DecodeStep:
    """One decode step, or the dummy one that a graph is captured with: `R` requests, padding included."""

    def __init__(self, buffers: DecodeBuffers, batch: Batch, cm: CommonAttentionMetadata) -> None:
        self.buffers, self.batch, self._cm = buffers, batch, cm
        self.rows = cm.num_reqs
        self.seq_lens, self.block_table = cm.seq_lens[: self.rows], cm.block_table_tensor[: self.rows]
        if not buffers.per_request:
            return
        kept = buffers.state[self.block_table[:, 0].long()] | (self.seq_lens == 1)[:, None]
        buffers.keep[:, : self.rows] = kept.T
        if buffers.paged:
            (kernels.split_pages if buffers.use_triton else split_pages)(buffers, self.block_table, self.seq_lens)
        elif buffers.layers:
            kept = kept.T[buffers.columns.long()]
            buffers.seq_lens[:, : self.rows] = torch.where(kept, self.seq_lens, 0)
            buffers.slots[:, : self.rows] = torch.where(kept, cm.slot_mapping[: self.rows], -1)

    def contexts(self, metadata: dict[str, Any], slots: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Attention metadata and slots per layer; those of `DecodeBuffers.layers` are views of the buffers."""
        shared, metadata, slots = next(iter(metadata.values())), dict(metadata), dict(slots)
        for index, (name, column) in enumerate(zip(self.buffers.layers, self.buffers.columns_host, strict=True)):
            own = metadata[name] = copy.copy(metadata.get(name, shared))
            slots[name] = self.buffers.slots[index, : self.rows]
            if self.buffers.paged:
                own.block_table = self.buffers.tables[index, : self.rows]
            if column >= 0:
                own.seq_lens = self.buffers.seq_lens[index, : self.rows]
                own.scheduler_metadata = None  # made for other lengths; kernels schedule themselves without it
        return metadata, slots

    def decide(self, route: Route, x: Tensor) -> Tensor:
        """Which rows keep a layer, bool `[R]`; sets what its attention sees. x: `[>= R, hidden]`, the normed input."""
        buffers, name = self.buffers, route.kv_layer
        index = None if name is None else buffers.layers.index(name)
        (kernels.decide if buffers.use_triton else decide)(
            buffers, x[: self.rows], route.router.weight, route.cutoff, route.column, index, self.block_table,
            self.seq_lens, self._cm.slot_mapping,
        )  # fmt: skip
        return self.keep(route)

    def keep(self, route: Route) -> Tensor:
        return self.buffers.keep[route.column, : self.rows]

    def count_pairs(self, route: Route, keep: Tensor) -> None:
        """keep: bool `[R, K]`, (token, expert) pairs."""
        self.buffers.kept[route.column] += (keep & (self._cm.slot_mapping[: self.rows] >= 0)[:, None]).sum()
        self.buffers.places = keep.shape[1]

    def rebuilt(self, name: str) -> Any:
        """Metadata of one attention layer, made anew: CPU kernels need a schedule for the true lengths."""
        index = self.buffers.layers.index(name)
        rows = slice(self.rows)
        table = self.buffers.tables[index, rows] if self.buffers.paged else self.block_table
        cm = self._cm.replace(
            seq_lens=self.buffers.seq_lens[index, rows], block_table_tensor=table,
            slot_mapping=self.buffers.slots[index, rows], _num_computed_tokens_cache=None,
            _token_to_req_indices_cache=None,
        )  # fmt: skip
        return self.batch.build(cm)


# ---------------------------------------------------------------- the kernels in plain torch, for the CPU


def split_pages(buffers: DecodeBuffers, block_table: Tensor, seq_lens: Tensor) -> None:
    """Pages, lengths and slots of every attention layer from the interleaved table (see `kv.pages`)."""
    rows, layers, size = len(seq_lens), len(buffers.layers), buffers.block_size
    blocks = buffers.tables.shape[2]
    pages = block_table[:, : blocks * layers].view(rows, blocks, layers).permute(2, 0, 1)
    kept = torch.ones(layers, rows, dtype=torch.bool)
    routed = buffers.columns >= 0
    kept[routed] = buffers.keep[buffers.columns[routed].long(), :rows]
    last = (seq_lens - 1).clamp(min=0).long()
    page = pages[:, torch.arange(rows), last // size].long()
    lengths = torch.where(kept, seq_lens, 0)
    buffers.tables[:, :rows] = pages
    buffers.seq_lens[:, :rows] = lengths
    buffers.slots[:, :rows] = torch.where(lengths > 0, page * size + last % size, -1)


def decide(
    buffers: DecodeBuffers, x: Tensor, weight: Tensor, cutoff: float, column: int, index: int | None,
    block_table: Tensor, seq_lens: Tensor, slot_mapping: Tensor,
) -> None:  # fmt: skip
    """Decide of single rows, and set what attention layer `index` (None: there is none) sees of them."""
    rows, size = len(seq_lens), buffers.block_size
    anchors = block_table[:, 0].long()
    kept = keeps(token_scores(x, weight), cutoff)
    if buffers.per_request:
        fresh = seq_lens == 1
        buffers.keep[column, :rows] = torch.where(fresh, kept, buffers.keep[column, :rows])
        buffers.state[anchors[fresh], column] = kept[fresh]
        if index is not None:
            buffers.seq_lens[index, :rows].masked_fill_(fresh & ~kept, 0)
            buffers.slots[index, :rows].masked_fill_(fresh & ~kept, -1)
        return
    kept &= seq_lens > 0
    buffers.keep[column, :rows] = kept
    buffers.kept[column] += (kept & (slot_mapping[:rows] >= 0)).sum()  # padding and dummy runs have no slots
    if index is not None:
        place = torch.where(seq_lens == 1, 0, buffers.state[anchors, column]).long()
        page = block_table[torch.arange(rows), place // size].long()
        buffers.slots[index, :rows] = torch.where(kept, page * size + place % size, -1)
        buffers.seq_lens[index, :rows] = torch.where(kept, place + 1, 0)
        real = seq_lens > 0
        buffers.state[anchors[real], column] = (place + kept)[real].to(buffers.state.dtype)
