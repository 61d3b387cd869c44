"""One forward's requests and rows, and the attention metadata of any subset of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.forward_context import ForwardContext
from vllm.v1.attention.backend import CommonAttentionMetadata

from .compat import replaced


@dataclass
class Subset:
    """Rows that keep a sublayer, and what their attention needs (None where no attention is involved)."""

    mask_host: Tensor  #: bool `[N]`, of all rows of the batch
    tokens: Tensor  #: int64 `[n]`, their numbers, ascending
    requests: Tensor | None = None  #: int64 `[r]`: those that have rows among them
    metadata: Any = None
    slots: Tensor | None = None

    @functools.cached_property
    def others(self) -> Tensor:
        """int64 `[N - n]`: the numbers of the other rows."""
        return upload((~self.mask_host).nonzero().flatten(), self.tokens.device)


def upload(values: Tensor, device: torch.device) -> Tensor:
    """Host tensor to the device, without waiting for what that is doing."""
    return values if device.type == "cpu" else values.pin_memory().to(device, non_blocking=True)


class Rows:
    """Read once per forward from vLLM's `CommonAttentionMetadata`; padded requests and rows are left out.

    `R` requests with `N` query tokens in all. Tensors named `*_host` are on the CPU, the others on the device.
    """

    def __init__(self, cm: CommonAttentionMetadata, build: Callable[[CommonAttentionMetadata], Any]) -> None:
        self.cm, self.build = cm, build
        lengths = cm.query_start_loc_cpu.diff()
        # Padded requests follow the real ones and have no query tokens.
        self.num_requests = R = int((lengths > 0).sum())
        self.num_tokens = int(cm.query_start_loc_cpu[R])
        self.device = cm.seq_lens.device
        self.lengths_host = lengths[:R].long()
        self.starts_host = cm.query_start_loc_cpu[:R].long()
        ends = cm.seq_lens_cpu_upper_bound if cm.seq_lens_cpu_upper_bound is not None else cm.seq_lens.cpu()
        #: tokens of each request that earlier steps computed, or found in the prefix cache
        self.computed_host = ends[:R].long() - self.lengths_host

    @functools.cached_property
    def request_of_token_host(self) -> Tensor:
        """int64 `[N]`."""
        return torch.repeat_interleave(torch.arange(self.num_requests), self.lengths_host)

    @functools.cached_property
    def place_host(self) -> Tensor:
        """int64 `[N]`: each row's number among those of its request."""
        return torch.arange(self.num_tokens) - self.starts_host[self.request_of_token_host]

    def upload(self, values: Tensor) -> Tensor:
        return upload(values, self.device)

    def first_of_each(self, counts: np.ndarray, with_attention: bool) -> Subset:
        """The first `counts[r]` rows of each request r; counts: int64 `[R]`, neither all rows nor none.

        Row numbers are made on the host, where lengths are known: the device is not waited for. This runs for every
        layer of every step, so in numpy, whose small operations are quicker than torch's.
        """
        mask = self.place_host.numpy() < counts[self.request_of_token_host.numpy()]
        tokens = self.upload(torch.from_numpy(mask.nonzero()[0]))
        if not with_attention:
            return Subset(torch.from_numpy(mask), tokens)
        (active,) = counts.nonzero()
        # A row each: the numbers of rows are those of requests.
        requests = tokens if self.num_tokens == self.num_requests else self.upload(torch.from_numpy(active))
        ends = (self.computed_host.numpy() + counts)[active]
        cm = self.reduced(requests, active, counts[active], ends, tokens)
        return Subset(torch.from_numpy(mask), tokens, requests, self.build(cm))

    def reduced(
        self, requests: Tensor, requests_host: np.ndarray, lengths: np.ndarray, ends: np.ndarray, tokens: Tensor
    ) -> CommonAttentionMetadata:
        """Metadata of some requests and rows; pages and slots are set per layer.

        lengths, ends: of each of these requests, how many rows it has, and how many tokens with these.
        """
        offsets = np.zeros(len(lengths) + 1, np.int32)
        lengths.cumsum(out=offsets[1:])
        starts, seq_lens = torch.from_numpy(offsets), torch.from_numpy(ends.astype(np.int32))
        cm = self.cm
        return replaced(
            cm,
            query_start_loc=self.upload(starts),
            query_start_loc_cpu=starts,
            seq_lens=self.upload(seq_lens),
            seq_lens_cpu_upper_bound=seq_lens,
            num_reqs=len(lengths),
            num_actual_tokens=len(tokens),
            max_query_len=int(lengths.max()),
            max_seq_len=int(ends.max()),
            block_table_tensor=cm.block_table_tensor.index_select(0, requests),
            slot_mapping=cm.slot_mapping.index_select(0, tokens),
            positions=None if cm.positions is None else cm.positions.index_select(0, tokens),
            is_prefilling=None if cm.is_prefilling is None else cm.is_prefilling[torch.from_numpy(requests_host)],
            req_idx=None,
        )


def with_table(metadata: Any, table: Tensor) -> Any:
    """A copy of `metadata`, which the layers of a step share, that reads other pages."""
    kind: Any = type(metadata)
    other = kind.__new__(kind)  # copy.copy takes four times as long, and this runs for every layer of every step
    vars(other).update(vars(metadata), block_table=table)
    return other


@contextmanager
def attending(context: ForwardContext, layer_name: str, metadata: Any, slots: Tensor) -> Iterator[None]:
    """Meanwhile the attention layer `layer_name` sees other rows."""
    by_layer, slot_mapping = context.attn_metadata, context.slot_mapping
    assert isinstance(by_layer, dict) and isinstance(slot_mapping, dict)
    before = by_layer[layer_name], slot_mapping[layer_name]
    by_layer[layer_name], slot_mapping[layer_name] = metadata, slots
    try:
        yield
    finally:
        by_layer[layer_name], slot_mapping[layer_name] = before
