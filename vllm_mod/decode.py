"""Decode steps at static shapes and without waiting for the device, so that FULL CUDA graphs can hold them.

No row is taken out: linears see the whole batch (a decode step is bound by reading their weights, not by its rows).
In a layer that a row skips its sequence length is 0 and its slot -1, so attention reads nothing and stores nothing,
and its output is replaced. What captured kernels read lies in `DecodeBuffers`, at one address; a `DecodeStep` fills it
before each step, outside the graph, once the scheduler's message is there. Decided inside the graph are single tokens
of a window (a prompt of one token, or a chunk of one) and, at token level, every row.

Not run on a GPU yet; on the CPU the tests let whole engines decode this way.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.triton_utils import HAS_TRITON

from . import kernels
from .compat import replaced
from .gate import keeps, token_scores
from .sequences import SequenceState
from .tokens import PackedState

if TYPE_CHECKING:
    from .rows import Rows
    from .step import Route
    from .tables import PageTables


class DecodeBuffers:
    """`C` routed layers, `A` attention layers, `R` requests at most, `G` page columns, `B` token blocks."""

    def __init__(
        self, routes: list[Route], number: int, state: SequenceState | PackedState | None, tables: PageTables | None,
        block_size: int, rows: int, dense_window: bool, dtype: torch.dtype, device: torch.device,
    ) -> None:  # fmt: skip
        self.state, self.block_size, self.dense_window = state, block_size, dense_window
        self.use_triton = HAS_TRITON and device.type != "cpu"
        self.keep = torch.zeros(number, rows, dtype=torch.bool, device=device)
        self.zero = torch.zeros((), dtype=dtype, device=device)  #: what a row that skips adds
        #: rows of requests, neither padding nor a rehearsal's
        self.live = torch.zeros(rows, dtype=torch.bool, device=device)
        #: kept tokens or pairs since they were last read (token level)
        self.kept = torch.zeros(number, dtype=torch.int64, device=device)
        #: decisions per token: the experts it selects, or 1
        self.places = 1
        self.all_pages = tables.pages if tables is not None else torch.zeros(1, 1, 1, dtype=torch.int32, device=device)
        layout = tables.layout if tables is not None else None
        #: attention layers in the order of the next four
        self.layers = list(layout.names) if layout is not None else []
        self.page_columns_host = list(layout.columns) if layout is not None else []
        routed = {route.kv_layer: route.column for route in routes if route.kv_layer}
        self.columns_host = [routed.get(name, -1) for name in self.layers]
        self.page_columns = torch.tensor(self.page_columns_host or [0], dtype=torch.int32, device=device)
        self.columns = torch.tensor(self.columns_host or [-1], dtype=torch.int32, device=device)
        attention = max(len(self.layers), 1)
        self.seq_lens = torch.zeros(attention, rows, dtype=torch.int32, device=device)
        self.slots = torch.full((attention, rows), -1, dtype=torch.int64, device=device)
        width, _, blocks = self.all_pages.shape
        self.tables = torch.zeros(width, rows if self.layers else 0, blocks, dtype=torch.int32, device=device)


class DecodeStep:
    """One decode step, or the rehearsal that a graph is captured with: `R` requests, padding included."""

    def __init__(self, buffers: DecodeBuffers, rows: Rows) -> None:
        self.buffers, self._cm, self._build = buffers, rows.cm, rows.build
        self.rows = rows.cm.num_reqs
        self.seq_lens, self.block_table = rows.cm.seq_lens[: self.rows], rows.cm.block_table_tensor[: self.rows]
        # Until the step begins nothing is attended to, stored, decided or counted.
        self._split(begun=False)

    def begin(self) -> None:
        """The scheduler's message of this step has come."""
        self._split(begun=True)

    def _split(self, begun: bool) -> None:
        buffers = self.buffers
        if buffers.layers:
            function = kernels.split_pages if buffers.use_triton else split_pages
            function(buffers, self.block_table, self.seq_lens, begun)
        else:
            buffers.live[: self.rows] = self._cm.slot_mapping[: self.rows] >= 0 if begun else False

    def contexts(self, metadata: dict[str, Any], slots: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Attention metadata and slots per layer: views of the buffers."""
        shared, metadata, slots = next(iter(metadata.values())), dict(metadata), dict(slots)
        for index, name in enumerate(self.buffers.layers):
            own = metadata[name] = copy.copy(shared)
            slots[name] = self.buffers.slots[index, : self.rows]
            own.block_table = self.buffers.tables[self.buffers.page_columns_host[index], : self.rows]
            if self.buffers.columns_host[index] >= 0:
                own.seq_lens = self.buffers.seq_lens[index, : self.rows]
                own.scheduler_metadata = None  # made for other lengths; kernels schedule themselves without it
        return metadata, slots

    def decide(self, route: Route, x: Tensor) -> Tensor:
        """Which rows keep a layer, bool `[R]`; sets what its attention sees. x: `[>= R, hidden]`, the normed input."""
        buffers = self.buffers
        index = buffers.layers.index(route.kv_layer) if route.kv_layer in buffers.layers else None
        (kernels.decide if buffers.use_triton else decide)(
            buffers, x[: self.rows], route.router.weight, route.cutoff, route.column, index, self.block_table,
            self.seq_lens,
        )  # fmt: skip
        return self.keep(route)

    def keep(self, route: Route) -> Tensor:
        return self.buffers.keep[route.column, : self.rows]

    def count_pairs(self, route: Route, keep: Tensor) -> None:
        """keep: bool `[R, K]`, (token, expert) pairs."""
        self.buffers.kept[route.column] += (keep & self.buffers.live[: self.rows, None]).sum()
        self.buffers.places = keep.shape[1]

    def rebuilt(self, name: str) -> Any:
        """Metadata of one attention layer, made anew: CPU kernels need a schedule for the true lengths."""
        index, rows = self.buffers.layers.index(name), slice(self.rows)
        cm = replaced(
            self._cm,
            seq_lens=self.buffers.seq_lens[index, rows],
            block_table_tensor=self.buffers.tables[self.buffers.page_columns_host[index], rows],
            slot_mapping=self.buffers.slots[index, rows],
        )
        return self._build(cm)


# ---------------------------------------------------------------- the kernels in plain torch, for the CPU


def split_pages(buffers: DecodeBuffers, block_table: Tensor, seq_lens: Tensor, begun: bool) -> None:
    """Who lives and who keeps what; pages, lengths and slots of every attention layer. Not begun: all are nobody's."""
    rows, size, layers = len(seq_lens), buffers.block_size, torch.arange(len(buffers.layers))
    requests, state = block_table[:, 0].long() * begun, buffers.state
    buffers.live[:rows] = requests > 0
    if isinstance(state, SequenceState):
        inside = seq_lens <= state.window_ends_device[requests]
        open_ = inside if buffers.dense_window else inside & ~state.known_device[requests]
        buffers.keep[:, :rows] = (state.keep[requests] | open_[:, None]).T
    pages = buffers.all_pages.index_select(1, requests)
    kept = buffers.live[:rows].repeat(len(layers), 1)
    if isinstance(state, SequenceState):
        routed = buffers.columns >= 0
        kept[routed] &= buffers.keep[buffers.columns[routed].long(), :rows]
    last = (seq_lens - 1).clamp(min=0).long()
    page = pages[buffers.page_columns.long()[:, None], torch.arange(rows), last // size].long()
    lengths = torch.where(kept, seq_lens, 0)
    buffers.tables[:, :rows] = pages
    buffers.seq_lens[:, :rows] = lengths
    buffers.slots[:, :rows] = torch.where(lengths > 0, page * size + last % size, -1)


def decide(
    buffers: DecodeBuffers, x: Tensor, weight: Tensor, cutoff: float, column: int, index: int | None,
    block_table: Tensor, seq_lens: Tensor,
) -> None:  # fmt: skip
    """Decide of single rows, and set what attention layer `index` (None: there is none) sees of them."""
    if isinstance(buffers.state, SequenceState):
        _decide_of_requests(buffers, buffers.state, x, weight, column, index, block_table[:, 0].long(), seq_lens)
        return
    rows, size, live = len(seq_lens), buffers.block_size, buffers.live[: len(seq_lens)]
    kept = keeps(token_scores(x, weight), cutoff) & live
    buffers.keep[column, :rows] = kept
    buffers.kept[column] += kept.sum()
    if index is not None:
        assert isinstance(buffers.state, PackedState)
        slots = block_table[:, 0].long()
        place = buffers.state.stored[slots, column].long()
        page = buffers.all_pages[0, slots, place // size].long()
        buffers.slots[index, :rows] = torch.where(kept, page * size + place % size, -1)
        buffers.seq_lens[index, :rows] = torch.where(kept, place + 1, 0)
        buffers.state.stored[slots[live], column] = (place + kept)[live].int()


def _decide_of_requests(
    buffers: DecodeBuffers, state: SequenceState, x: Tensor, weight: Tensor, column: int, index: int | None,
    slots: Tensor, seq_lens: Tensor,
) -> None:  # fmt: skip
    """Add the scores of tokens that lie in a window; where it ends, decide."""
    ends = state.window_ends_device[slots]
    undecided = ~state.known_device[slots]
    scored = buffers.live[: len(slots)] & (seq_lens <= ends) & (undecided | buffers.dense_window)
    sums = state.sums[slots, column] + torch.where(scored, token_scores(x, weight), 0).double()
    state.sums[slots[scored], column] = sums[scored]
    deciding = scored & undecided & (seq_lens == ends)
    kept = keeps(sums / ends.clamp(min=1), state.cutoffs[slots, column])
    state.keep[slots[deciding], column] = kept[deciding]
    if not buffers.dense_window:
        buffers.keep[column, : len(slots)] &= kept | ~deciding
        if index is not None:
            buffers.seq_lens[index, : len(slots)].masked_fill_(deciding & ~kept, 0)
            buffers.slots[index, : len(slots)].masked_fill_(deciding & ~kept, -1)
