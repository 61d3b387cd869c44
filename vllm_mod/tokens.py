"""A decision for every token and routed layer (`*_token`).

Where attention is routed, the KV of kept tokens is packed: they lie densely in the request's blocks of that layer. Kept
queries are a suffix of the kept keys, so causal attention that aligns the last query with the last key is exact.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .gate import keeps
from .kept import ALL, NONE, Kept
from .kernels import row_scores
from .kv.messages import StepMessage
from .rows import Subset, download

if TYPE_CHECKING:
    from .stats import RoutingCounts
    from .step import Route, Step


class TokenDecisions:
    """Of one forward; nothing is remembered."""

    def __init__(self, step: Step, counts: RoutingCounts) -> None:
        self._step, self._counts = step, counts

    def kept(self, route: Route, x: Tensor, with_attention: bool) -> Kept:
        """Rows of `x` `[>= N, hidden]` that keep; waits for the device."""
        total = self._step.rows.num_tokens
        if route.cutoff in (-torch.inf, torch.inf):
            kept = ALL if route.cutoff < 0 else NONE
            self._counts.add(route.column, total if kept.all else 0, total)
            return kept
        keep = download(route.agreed(keeps(row_scores(x[:total], route.router.weight), route.cutoff)))
        number = int(keep.sum())
        self._counts.add(route.column, number, total)
        if not number:
            return NONE
        return self._rows_of(route, keep) if with_attention else self._without_attention(keep, number == total)

    def _without_attention(self, keep: Tensor, everything: bool) -> Kept:
        return ALL if everything else Kept(Subset(keep, self._step.rows.upload(keep.nonzero().flatten())))

    def _rows_of(self, route: Route, keep: Tensor) -> Kept:
        raise NotImplementedError  # only packed KV has attention

    def close(self) -> None:
        pass


class PackedState:
    """How many tokens of each running request have KV in each routed layer, by slot (slot 0 is nobody's)."""

    def __init__(self, routed: int, slots: int, device: torch.device) -> None:
        self.stored = torch.zeros(slots, routed, dtype=torch.int32, device=device)

    def begin(self, message: StepMessage) -> None:
        """(Re-)prefills that begin with this step."""
        if message.starts:
            self.stored[torch.tensor([start.slot for start in message.starts], device=self.stored.device)] = 0


class PackedDecisions(TokenDecisions):
    def __init__(self, step: Step, counts: RoutingCounts, state: PackedState) -> None:
        super().__init__(step, counts)
        self._state = state
        self._stored = state.stored[step.slots].long().cpu()  # host, `[R, C]`

    def _rows_of(self, route: Route, keep: Tensor) -> Kept:
        """keep: bool `[N]`, host. A request without a kept token takes no part."""
        rows, step = self._step.rows, self._step
        request = rows.request_of_token_host
        stored = self._stored[:, route.column].clone()
        counts = torch.bincount(request[keep], minlength=rows.num_requests)
        self._stored[:, route.column] += counts
        if bool(keep.all()) and torch.equal(stored, rows.computed_host):
            return ALL
        tokens_host = keep.nonzero().flatten()
        request = request[tokens_host]
        place = stored[request] + torch.arange(tokens_host.numel()) - (counts.cumsum(0) - counts)[request]
        size = step.block_size
        row, column, offset = rows.upload_together(request.numpy(), (place // size).numpy(), (place % size).numpy())
        slots = step.pages.tables[0][row, column].long() * size + offset
        active = counts.nonzero().flatten()
        ends = (stored + counts)[active].numpy()
        subset = rows.subset(keep, tokens_host.numpy(), active.numpy(), counts[active].numpy(), ends)
        subset.slots = slots.to(rows.cm.slot_mapping.dtype)
        return Kept(subset)

    def close(self) -> None:
        self._state.stored[self._step.slots] = self._stored.int().to(self._state.stored.device)
