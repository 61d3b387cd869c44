"""What a worker remembers of a running request: frozen decisions, or how much packed KV it has.

A request is named by its first block (its *anchor*), unique while it runs because prefix caching is off. Every
(re-)prefill starts at zero computed tokens and rewrites its row, so that nothing of a block's previous owner is seen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from .batch import Batch
from .gate import keeps, segment_means
from .kernels import row_scores


class Channel(Protocol):
    """What the scheduler told this worker (see `kv.connector`)."""

    def prefill(self, anchor: int) -> tuple[str, int] | None:
        """Request id and prompt length of the request whose (re-)prefill starts in this step."""


class AnchorTable:
    """A row of `width` values per anchor, on the device, at one address for as long as the KV cache lives."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        self.rows = torch.zeros(0, width, dtype=dtype)

    def allocate(self, num_blocks: int, device: torch.device) -> None:
        self.rows = self.rows.new_zeros(num_blocks, self.rows.shape[1], device=device)

    def read(self, anchors: Tensor) -> Tensor:
        """Host copy of the rows of `anchors` (on the device); waits for it."""
        return self.rows[anchors].cpu()

    def write(self, anchors: Tensor, values: Tensor) -> None:
        """values: on the host."""
        self.rows[anchors] = values.to(self.rows.device, non_blocking=True)


def _as_it_is(keep: Tensor) -> Tensor:
    return keep


class SequenceDecisions:
    """One decision per request and routed layer, taken over the prompt and frozen, also across preemption."""

    def __init__(self, num_routed: int) -> None:
        self.running = AnchorTable(num_routed, torch.bool)
        self._by_request: dict[str, Tensor] = {}  # outlives a preemption, ends with the request

    def open(self, batch: Batch, channel: Channel | None) -> None:
        """Look up the decisions of all requests of this forward; those of first prefills are still to take."""
        self._batch = batch
        self.keep = self.running.read(batch.anchors)  # host, bool [R, routed]
        #: requests that keep, per routed layer; None while some have to decide
        self._numbers: list[int] | None = None
        self.fresh = batch.fresh_host
        undecided, lengths, self.new_requests = [], [], []
        if not self.fresh.numel():
            self.undecided, self._numbers = self.fresh, self.keep.sum(0).tolist()
            return
        anchors = batch.anchors[self.fresh.to(batch.device)].tolist()
        for row, anchor in zip(self.fresh.tolist(), anchors, strict=True):
            told = channel.prefill(anchor) if channel else None
            request, prompt_len = told or (None, int(batch.lengths_host[row]))
            if request in self._by_request:
                self.keep[row] = self._by_request[request]
                continue
            if prompt_len > batch.lengths_host[row]:
                raise RuntimeError(
                    f"request {request}: {int(batch.lengths_host[row])} of {prompt_len} prompt tokens in its first "
                    "step; sequence routing needs chunked prefill off"
                )
            undecided.append(row)
            lengths.append(prompt_len)
            self.new_requests.append(request)
        self.undecided = torch.tensor(undecided, dtype=torch.long)
        prompts = torch.tensor(lengths, dtype=torch.long)
        before = batch.starts_host[self.undecided] - (prompts.cumsum(0) - prompts)
        rows = torch.arange(int(prompts.sum())) + torch.repeat_interleave(before, prompts)
        self._prompt_lengths, self._prompt_rows = batch.upload(prompts), batch.upload(rows)

    def decide(
        self, column: int, x: Tensor, weight: Tensor, cutoff: float, agree: Callable[[Tensor], Tensor] = _as_it_is
    ) -> Tensor:
        """Keep mask (host, bool `[R]`) of one routed layer; waits for the device only if a prompt is undecided.

        agree: what becomes of new decisions (device, bool) before they are taken.
        """
        if self.undecided.numel():
            if abs(cutoff) == float("inf"):
                self.keep[self.undecided, column] = cutoff < 0
            else:
                scores = row_scores(x, weight)[self._prompt_rows]
                keep = keeps(segment_means(scores, self._prompt_lengths), cutoff)
                self.keep[self.undecided, column] = agree(keep).cpu()
        return self.keep[:, column]

    def number(self, column: int) -> int:
        """How many requests keep a layer that `decide` was asked for."""
        return int(self.keep[:, column].sum()) if self._numbers is None else self._numbers[column]

    def close(self) -> None:
        """Freeze what this forward decided."""
        if self.fresh.numel():
            self.running.write(self._batch.anchors[self.fresh.to(self._batch.device)], self.keep[self.fresh])
        for row, request in zip(self.undecided.tolist(), self.new_requests, strict=True):
            if request is not None:
                self._by_request[request] = self.keep[row].clone()
        del self._batch

    def collect(self, anchors: Tensor, channel: Channel) -> tuple[list[str], Tensor]:
        """Decisions that a decode step took on the device, of one-token prompts: request ids, keep `[n, routed]`."""
        keep, found = self.running.read(anchors), []
        for row, anchor in enumerate(anchors.tolist()):
            told = channel.prefill(anchor)
            if told is not None and told[0] not in self._by_request:
                self._by_request[told[0]] = keep[row]
                found.append((told[0], row))
        return [request for request, _ in found], keep[[row for _, row in found]]

    def forget(self, finished: set[str]) -> None:
        for request in finished:
            self._by_request.pop(request, None)


class PackedCounts:
    """How many tokens of each request have KV in each routed layer, where the kept ones are packed."""

    def __init__(self, num_routed: int) -> None:
        self.running = AnchorTable(num_routed, torch.int32)

    def open(self, batch: Batch, channel: Channel | None) -> None:
        self._batch = batch
        self.stored = self.running.read(batch.anchors).long()  # host, [R, routed]
        self.stored[batch.fresh_host] = 0

    def column(self, column: int) -> Tensor:
        """int64 `[R]`, host; a copy, `add` does not change it."""
        return self.stored[:, column].clone()

    def add(self, column: int, counts: Tensor) -> None:
        self.stored[:, column] += counts

    def close(self) -> None:
        self.running.write(self._batch.anchors, self.stored.int())
        del self._batch

    def forget(self, finished: set[str]) -> None:
        pass
