"""One forward's requests and rows, and the attention metadata of any subset of them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.forward_context import ForwardContext
from vllm.v1.attention.backend import CommonAttentionMetadata, subclass_attention_backend

if TYPE_CHECKING:
    from .decode import DecodeStep
    from .routing import Routing


@dataclass(frozen=True)
class Pages:
    """The interleaved table of `kv.pages`, taken apart. `L` layers, `B` token blocks."""

    names: list[str]  #: attention layers in table order
    tables: Tensor  #: `[L, R, B]`: pages of each request
    slots: Tensor  #: `[L, N]`: where each token's K/V goes


@dataclass
class Subset:
    """Rows that keep a sublayer, and what their attention needs (None where no attention is involved)."""

    tokens: Tensor  #: int64 `[n]`, row numbers in the batch, ascending
    metadata: Any = None
    slots: Tensor | None = None


class Batch:
    """Read once per forward from vLLM's `CommonAttentionMetadata`; padded requests and rows are left out.

    `R` requests with `N` query tokens in all. Tensors named `*_host` are on the CPU, the others on the device.
    """

    def __init__(self, cm: CommonAttentionMetadata, build: Callable[[CommonAttentionMetadata], Any]) -> None:
        self._cm, self.build = cm, build
        lengths = cm.query_start_loc_cpu.diff()
        # Padded requests follow the real ones and have no query tokens.
        self.num_requests = R = int((lengths > 0).sum())
        self.num_tokens = int(cm.query_start_loc_cpu[R])
        self.device = cm.seq_lens.device
        self.lengths_host = lengths[:R].long()
        self.starts_host = cm.query_start_loc_cpu[:R].long()
        ends = cm.seq_lens_cpu_upper_bound if cm.seq_lens_cpu_upper_bound is not None else cm.seq_lens.cpu()
        #: tokens of each request that earlier steps computed; 0 in a (re-)prefill's first step
        self.computed_host = ends[:R].long() - self.lengths_host
        self.block_table = cm.block_table_tensor[:R]
        self._by_requests: dict[bytes, tuple[Subset, Tensor]] = {}
        self.pages: Pages | None = None
        #: set where the whole forward is to keep static shapes, see `decode`
        self.decode: DecodeStep | None = None

    @functools.cached_property
    def anchors(self) -> Tensor:
        """First block of each request: names it for as long as it runs (prefix caching is off)."""
        return self.block_table[:, 0].long()

    @functools.cached_property
    def fresh_host(self) -> Tensor:
        """int64: requests whose (re-)prefill starts with this forward."""
        return (self.computed_host == 0).nonzero().flatten()

    @functools.cached_property
    def request_of_token_host(self) -> Tensor:
        """int64 `[N]`."""
        return torch.repeat_interleave(torch.arange(self.num_requests), self.lengths_host)

    def split_pages(self, names: list[str]) -> Pages:
        """Read the block table as pages per layer; `names` are the layers in table order."""
        size, layers, longest = self._block_size, len(names), self._cm.max_seq_len
        blocks = -(-longest // size)
        # The runner pads rows to its own alignment.
        table = self.block_table[:, : blocks * layers].view(self.num_requests, blocks, layers)
        tables = table.permute(2, 0, 1).contiguous()
        request = self.request_of_token_host
        first = (self.computed_host - self.starts_host)[request]
        position = self.upload(torch.arange(self.num_tokens) + first)
        request = self.upload(request)
        slots = tables[:, request, position // size].long() * size + position % size
        self.pages = Pages(names, tables, slots.to(self._cm.slot_mapping.dtype))
        return self.pages

    def whole_requests(self, keep: Tensor, layer_name: str | None) -> Subset:
        """All rows of the requests that `keep` (host, bool `[R]`, neither all nor none) selects.

        Built once per distinct `keep`, however many layers share it.
        """
        key = keep.numpy().tobytes()
        if key not in self._by_requests:
            # Row numbers are made on the host, where lengths are known: the device is not waited for.
            index_host = keep.nonzero().flatten()
            index = self.upload(index_host)
            tokens = self.upload(keep[self.request_of_token_host].nonzero().flatten())
            cm = self._reduced(
                requests=index,
                requests_host=index_host,
                lengths_host=self.lengths_host[index_host],
                seq_lens=self._cm.seq_lens[index],
                seq_lens_host=(self.computed_host + self.lengths_host)[index_host],
                slots=self._cm.slot_mapping[tokens],
                tokens=tokens,
            )
            self._by_requests[key] = Subset(tokens, self.build(cm), cm.slot_mapping), index
        subset, index = self._by_requests[key]
        if self.pages is None or layer_name is None:
            return subset
        column = self.pages.names.index(layer_name)
        table = self.pages.tables[column][index]
        return Subset(subset.tokens, with_table(subset.metadata, table), self.pages.slots[column][subset.tokens])

    def packed_tokens(self, keep: Tensor, stored: Tensor) -> Subset:
        """The kept tokens, their KV packed behind the `stored` entries (int64 `[R]`) that a request already has.

        keep: bool `[N]`; both on the host. A request without a kept token takes no part. Kept queries are a suffix of
        the kept keys, so causal attention that aligns the last query with the last key is exact.
        """
        tokens_host = keep.nonzero().flatten()
        request = self.request_of_token_host[tokens_host]
        counts = self.tokens_per_request(keep)
        rank = torch.arange(tokens_host.numel()) - (counts.cumsum(0) - counts)[request]
        place = stored[request] + rank
        block_size = self._block_size
        tokens, row, column, offset = (
            self.upload(t) for t in (tokens_host, request, place // block_size, place % block_size)
        )
        slots = self.block_table[row, column].long() * block_size + offset
        active = counts.nonzero().flatten()
        seq_lens = (stored + counts)[active].to(torch.int32)
        cm = self._reduced(
            requests=self.upload(active),
            requests_host=active,
            lengths_host=counts[active],
            seq_lens=self.upload(seq_lens),
            seq_lens_host=seq_lens,
            slots=slots.to(self._cm.slot_mapping.dtype),
            tokens=tokens,
        )
        return Subset(tokens, self.build(cm), cm.slot_mapping)

    def tokens_per_request(self, keep: Tensor) -> Tensor:
        """int64 `[R]`: kept tokens of each request; keep: bool `[N]`, host."""
        return torch.bincount(self.request_of_token_host[keep], minlength=self.num_requests)

    def upload(self, values: Tensor) -> Tensor:
        """Host tensor to the device, without waiting for what that is doing."""
        return values if self.device.type == "cpu" else values.pin_memory().to(self.device, non_blocking=True)

    @functools.cached_property
    def _block_size(self) -> int:
        return self.build.keywords["builder"].kv_cache_spec.block_size  # type: ignore[attr-defined]

    def _reduced(
        self, *, requests: Tensor, requests_host: Tensor, lengths_host: Tensor, seq_lens: Tensor, seq_lens_host: Tensor,
        slots: Tensor, tokens: Tensor,
    ) -> CommonAttentionMetadata:  # fmt: skip
        starts = torch.zeros(len(lengths_host) + 1, dtype=torch.int32)
        starts[1:] = lengths_host.cumsum(0)
        cm = self._cm
        return cm.replace(
            query_start_loc=self.upload(starts),
            query_start_loc_cpu=starts,
            seq_lens=seq_lens,
            seq_lens_cpu_upper_bound=seq_lens_host.to(torch.int32),
            num_reqs=len(lengths_host),
            num_actual_tokens=tokens.numel(),
            max_query_len=int(lengths_host.max()),
            max_seq_len=int(seq_lens_host.max()),
            block_table_tensor=self.block_table[requests],
            slot_mapping=slots,
            positions=None if cm.positions is None else cm.positions[tokens],
            is_prefilling=None if cm.is_prefilling is None else cm.is_prefilling[requests_host],
            req_idx=None,
            # Caches of the whole batch; dataclasses.replace() would copy them.
            _num_computed_tokens_cache=None,
            _token_to_req_indices_cache=None,
        )


def with_table(metadata: Any, table: Tensor) -> Any:
    """A copy of `metadata`, which the layers of a step share, that reads other pages."""
    metadata = copy.copy(metadata)
    metadata.block_table = table
    return metadata


@contextmanager
def attending(context: ForwardContext, layer_name: str, subset: Subset) -> Iterator[None]:
    """Let the attention layer `layer_name` see the rows of `subset` only."""
    metadata, slots = context.attn_metadata, context.slot_mapping
    assert isinstance(metadata, dict) and isinstance(slots, dict) and subset.slots is not None
    before = metadata[layer_name], slots[layer_name]
    metadata[layer_name], slots[layer_name] = subset.metadata, subset.slots
    try:
        yield
    finally:
        metadata[layer_name], slots[layer_name] = before


@functools.cache
def batch_backend(backend: type) -> type:
    """`backend`, its metadata carrying the `Batch` it was built from as attribute `mod_batch`."""
    stock = backend.get_builder_cls()  # type: ignore[attr-defined]

    class BatchBuilder(stock):  # type: ignore[misc, valid-type]
        def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
            super().__init__(kv_cache_spec, layer_names, vllm_config, device)
            layers = vllm_config.compilation_config.static_forward_context
            self._routing: Routing = layers[layer_names[0]].mod_routing
            self._routing.start(vllm_config, kv_cache_spec.block_size, device)

        def build(
            self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
        ) -> Any:
            metadata = copy.copy(super().build(common_prefix_len, common_attn_metadata, fast_build))
            batch = Batch(common_attn_metadata, functools.partial(_build_subset, builder=self))
            self._routing.prepare(batch, common_attn_metadata)
            metadata.mod_batch = batch
            return metadata

    def _build_subset(cm: CommonAttentionMetadata, *, builder: Any) -> Any:
        # fast_build: schedules of kernels go into one buffer per builder, which is the whole batch's.
        return stock.build(builder, 0, cm, fast_build=True)

    return subclass_attention_backend("MoD", backend, BatchBuilder)
