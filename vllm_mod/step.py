"""One forward: its rows, where their KV lies, and who keeps what."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from vllm.distributed import get_tp_group

from .kept import Kept
from .patch import Patch
from .rows import Rows, Subset, download, with_table
from .tables import Layout, PageTables

if TYPE_CHECKING:
    from .decode import DecodeStep


class Router(nn.Module):
    """The gate's weight, `[1 or num_experts, hidden]`, float32 whatever the model's dtype, and what a skip adds."""

    def __init__(self, hidden_size: int, rows: int = 1, patch: Patch | None = None) -> None:
        """rows: 0 where there is nothing to decide (static granularities)."""
        super().__init__()
        if rows:
            self.weight = nn.Parameter(torch.zeros(rows, hidden_size, dtype=torch.float32), requires_grad=False)
        self.patch = patch


@dataclass
class Route:
    """One routed layer."""

    layer: int
    column: int  #: position in `mod_config.layers`
    router: Router
    cutoff: float
    #: its attention layer, None where only the MLP is routed
    kv_layer: str | None = None
    #: tensor-parallel ranks exchange its kept rows before they attend, so they must keep the same ones
    shares_rows: bool = False

    def agreed(self, keep: Tensor) -> Tensor:
        """Rank 0's decision (bool, on the device), where ranks that kept different rows would wait for each other."""
        return get_tp_group().broadcast(keep.to(torch.uint8)).bool() if self.shares_rows else keep


class Decisions(Protocol):
    def kept(self, route: Route, x: Tensor, with_attention: bool) -> Kept: ...


@dataclass(frozen=True)
class Pages:
    """Of the requests of one forward; `R` requests, `B` token blocks, `N` rows."""

    layout: Layout
    tables: Tensor  #: int32 `[G, R, B]`
    slots: Tensor  #: `[G, N]`: where each row's K/V goes

    def column(self, layer_name: str) -> int:
        return self.layout.columns[self.layout.names.index(layer_name)]


@dataclass
class Step:
    rows: Rows
    block_size: int
    tables: PageTables | None  #: None where vLLM's own block table is used
    #: the scheduler's message of this step has come; without one it is a rehearsal, whose rows are nobody's
    begun: bool = False
    #: set where the whole forward is to keep static shapes, see `decode`
    decode: DecodeStep | None = None
    decisions: Decisions | None = None
    slots_by_name: Callable[[], Tensor] | None = None  #: int64 `[R]`, on the host, where the runner names its rows
    _of_blocks: dict[int, Kept] = field(default_factory=dict, repr=False)

    @functools.cached_property
    def slots(self) -> Tensor:
        """int64 `[R]`: what names each request on this worker, see `kv.pages`; 0 is nobody."""
        slots = self.rows.cm.block_table_tensor[: self.rows.num_requests, 0].long()
        return slots if self.begun else torch.zeros_like(slots)

    @functools.cached_property
    def slots_host(self) -> Tensor:
        """As `slots`. Waits for the device, unless the runner names its rows."""
        if not self.begun:
            return torch.zeros(self.rows.num_requests, dtype=torch.int64)
        return download(self.slots) if self.slots_by_name is None else self.slots_by_name()

    @functools.cached_property
    def pages(self) -> Pages:
        """Of all layers, taken together once per forward."""
        assert self.tables is not None
        rows, size = self.rows, self.block_size
        tables = self.tables.of(self.slots, -(-rows.cm.max_seq_len // size))
        of = rows.request_of_token_host
        request, position = rows.upload_together(of.numpy(), (rows.place_host + rows.computed_host[of]).numpy())
        slots = tables[:, request, position // size].long() * size + position % size
        if not self.begun:
            slots.fill_(-1)
        return Pages(self.tables.layout, tables, slots.to(rows.cm.slot_mapping.dtype))

    def contexts(self, metadata: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Attention metadata and slots per layer, all rows; metadata: of the whole batch."""
        pages = self.pages
        own = [with_table(metadata, table) for table in pages.tables]
        names = list(zip(pages.layout.names, pages.layout.columns, strict=True))
        return {name: own[column] for name, column in names}, {name: pages.slots[column] for name, column in names}

    def contexts_of(self, layer_name: str, subset: Subset) -> tuple[Any, Tensor]:
        """Attention metadata and slots of one layer, for the rows of `subset`."""
        assert subset.requests is not None
        column, slots = self.pages.column(layer_name), subset.slots
        if slots is None:  # of packed KV they are places of its own
            slots = self.pages.slots[column].index_select(0, subset.tokens)
        return with_table(subset.metadata, self.pages.tables[column].index_select(0, subset.requests)), slots

    def store_only(self, route: Route, rows: Tensor, keep: Tensor) -> None:
        """Of these rows, int64 `[m]`, store K/V in one layer only where they keep it, bool `[m]`. Where layers share
        pages, what is stored for one that skips is never read."""
        assert route.kv_layer is not None
        if self.pages.layout.width > 1:
            slots = self.pages.slots[self.pages.column(route.kv_layer)]
            slots.index_copy_(0, rows, torch.where(keep, slots.index_select(0, rows), -1))

    def kept(self, route: Route, x: Tensor, with_attention: bool, whole_block: bool) -> Kept:
        """Rows of `x` `[>= N, hidden]` that keep the layer's sublayer; the MLP of a block follows its attention."""
        assert self.decisions is not None
        if whole_block and not with_attention:
            return self._of_blocks[route.layer]
        kept = self.decisions.kept(route, x, with_attention)
        if whole_block:
            self._of_blocks[route.layer] = kept
        return kept
