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
from .gate import keeps, segment_means, token_scores


class Channel(Protocol):
    """What the scheduler told this worker (see `kv.connector`)."""

    def prefill(self, anchor: int) -> tuple[str, int] | None:
        """Request id and prompt length of the request whose (re-)prefill starts in this step."""


class AnchorTable:
    """A row of `width` values per anchor, grown as blocks come into use."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        self._rows = torch.zeros(0, width, dtype=dtype)

    def reach(self, anchors: Tensor) -> None:
        if anchors.numel() and (need := int(anchors.max()) + 1) > len(self._rows):
            old = self._rows
            self._rows = old.new_zeros(max(need, 2 * len(old)), old.shape[1])
            self._rows[: len(old)] = old

    def read(self, anchors: Tensor) -> Tensor:
        return self._rows[anchors]

    def write(self, anchors: Tensor, values: Tensor) -> None:
        self._rows[anchors] = values


def _as_it_is(keep: Tensor) -> Tensor:
    return keep


class SequenceDecisions:
    """One decision per request and routed layer, taken over the prompt and frozen, also across preemption."""

    def __init__(self, num_routed: int) -> None:
        self._running = AnchorTable(num_routed, torch.bool)
        self._by_request: dict[str, Tensor] = {}  # outlives a preemption, ends with the request

    def open(self, batch: Batch, channel: Channel | None) -> None:
        """Look up the decisions of all requests of this forward; those of first prefills are still to take."""
        self._batch = batch
        anchors = batch.anchors_host
        self._running.reach(anchors)
        self.keep = self._running.read(anchors)  # host, bool [R, routed]
        self.fresh = (batch.computed_host == 0).nonzero().flatten()
        undecided, lengths, self.new_requests = [], [], []
        for row in self.fresh.tolist():
            told = channel.prefill(int(anchors[row])) if channel else None
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
        self._prompt_lengths = torch.tensor(lengths, dtype=torch.long, device=batch.device)
        self._prompt_rows = self._rows_of_prompts(batch)

    def _rows_of_prompts(self, batch: Batch) -> Tensor:
        starts = batch.starts_host[self.undecided].to(batch.device)
        lengths = self._prompt_lengths
        offsets = torch.arange(int(lengths.sum()), device=batch.device)
        return offsets + torch.repeat_interleave(starts - (lengths.cumsum(0) - lengths), lengths)

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
                scores = token_scores(x[self._prompt_rows], weight)
                keep = keeps(segment_means(scores, self._prompt_lengths), cutoff)
                self.keep[self.undecided, column] = agree(keep).cpu()
        return self.keep[:, column]

    def close(self) -> None:
        """Freeze what this forward decided."""
        if self.fresh.numel():
            self._running.write(self._batch.anchors_host[self.fresh], self.keep[self.fresh])
        for row, request in zip(self.undecided.tolist(), self.new_requests, strict=True):
            if request is not None:
                self._by_request[request] = self.keep[row].clone()
        del self._batch

    def forget(self, finished: set[str]) -> None:
        for request in finished:
            self._by_request.pop(request, None)


class PackedCounts:
    """How many tokens of each request have KV in each routed layer, where the kept ones are packed."""

    def __init__(self, num_routed: int) -> None:
        self._running = AnchorTable(num_routed, torch.int64)

    def open(self, batch: Batch, channel: Channel | None) -> None:
        self._batch = batch
        self._running.reach(batch.anchors_host)
        self.stored = self._running.read(batch.anchors_host)  # host, [R, routed]
        self.stored[batch.computed_host == 0] = 0

    def column(self, column: int) -> Tensor:
        """int64 `[R]` on the device; a copy, `add` does not change it."""
        return self.stored[:, column].to(self._batch.device, copy=True)

    def add(self, column: int, counts: Tensor) -> None:
        self.stored[:, column] += counts.cpu()

    def close(self) -> None:
        self._running.write(self._batch.anchors_host, self.stored)
        del self._batch

    def forget(self, finished: set[str]) -> None:
        pass
