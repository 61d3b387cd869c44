"""One forward's requests and rows, and the attention metadata of any subset of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.forward_context import ForwardContext
from vllm.v1.attention.backend import CommonAttentionMetadata

from .compat import changed, replaced


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


class Download:
    """A tensor on its way from the device to the host, into memory that the device writes to itself."""

    def __init__(self, values: Tensor) -> None:
        self._host, self._there = values, None
        if values.device.type != "cpu":
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._there = torch.Event(values.device)
            self._there.record()

    def wait(self) -> Tensor:
        if self._there is not None:
            self._there.synchronize()
        return self._host


def download(values: Tensor) -> Tensor:
    """To the host; waits for the device."""
    return Download(values).wait()


def upload_together(device: torch.device, *arrays: np.ndarray) -> list[Tensor]:
    """As `upload` of each, in one copy: on a GPU a copy of a few numbers takes as long as one of many."""
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    packed, places = pack(arrays)
    on_device = upload(packed, device)
    return [on_device[first:last].view(dtype).view(shape) for first, last, dtype, shape in places]


def pack(arrays: Sequence[np.ndarray]) -> tuple[Tensor, list[tuple[int, int, torch.dtype, tuple[int, ...]]]]:
    """Their bytes one after the other, uint8 on the host, and of each: where from, where to, dtype and shape."""
    places, first = [], 0
    for array in arrays:
        last = first + array.nbytes
        places.append((first, last, torch.from_numpy(array).dtype, array.shape))
        first = -(-last // 16) * 16  # Triton compiles a kernel anew for pointers that are not aligned to that
    packed = torch.empty(first, dtype=torch.uint8)
    for array, (first, last, _, _) in zip(arrays, places, strict=True):
        packed.numpy()[first:last] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return packed, places


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

    def upload_together(self, *arrays: np.ndarray) -> list[Tensor]:
        return upload_together(self.device, *arrays)

    def first_of_each(self, counts: np.ndarray, with_attention: bool) -> Subset:
        """The first `counts[r]` rows of each request r; counts: int64 `[R]`, neither all rows nor none.

        Row numbers are made on the host, where lengths are known: the device is not waited for. This runs for every
        layer of every step, so in numpy, whose small operations are quicker than torch's.
        """
        a_row_each = self.num_tokens == self.num_requests
        mask = counts > 0 if a_row_each else self.place_host.numpy() < counts[self.request_of_token_host.numpy()]
        (tokens,) = mask.nonzero()
        if not with_attention:
            return Subset(torch.from_numpy(mask), *self.upload_together(tokens))
        active = tokens if a_row_each else counts.nonzero()[0]
        ends = self.computed_host.numpy()[active] + counts[active]
        return self.subset(torch.from_numpy(mask), tokens, active, counts[active], ends)

    def subset(
        self, mask: Tensor, tokens: np.ndarray, requests: np.ndarray, lengths: np.ndarray, ends: np.ndarray
    ) -> Subset:
        """Some rows, and metadata of their requests; pages and slots are set per layer.

        mask: bool `[N]`, the rows; tokens: their numbers, int64. requests: int64, their requests' numbers; lengths,
        ends: of each of these, how many rows it has, and how many tokens with these.
        """
        offsets = np.zeros(len(lengths) + 1, np.int32)
        lengths.astype(np.int32).cumsum(out=offsets[1:])  # of another type it takes three times as long
        ends = ends.astype(np.int32)
        where, of, starts, seq_lens = self.upload_together(tokens, requests, offsets, ends)
        number, total = len(requests), len(tokens)
        cm = replaced(
            self.cm,
            query_start_loc=starts,
            query_start_loc_cpu=torch.from_numpy(offsets),
            seq_lens=seq_lens,
            seq_lens_cpu_upper_bound=torch.from_numpy(ends),
            num_reqs=number,
            num_actual_tokens=total,
            max_query_len=int(lengths.max()),
            max_seq_len=int(ends.max()),
            # Of the right shape: each layer has others (`Step.contexts_of`).
            block_table_tensor=self.cm.block_table_tensor[:number],
            slot_mapping=self.cm.slot_mapping[:total],
            positions=None if self.cm.positions is None else self.cm.positions.index_select(0, where),
            is_prefilling=None if self.cm.is_prefilling is None else self.cm.is_prefilling[torch.from_numpy(requests)],
            req_idx=None,
        )
        return Subset(mask, where, of, self.build(cm))


def with_table(metadata: Any, table: Tensor) -> Any:
    """A copy of `metadata`, which the layers of a step share, that reads other pages."""
    return changed(metadata, block_table=table)


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
