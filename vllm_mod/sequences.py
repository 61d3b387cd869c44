"""One decision per request and routed layer (`*_sequence`), taken over its first tokens and frozen.

With a window (design section 2, version 2) the decision is the mean of `w . x` over the first `D = min(W, P)` of `P`
prompt tokens; these keep every sublayer, and all later tokens follow the decision. Without one it is the mean over the
whole prompt, whose tokens follow it, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .gate import keeps
from .kept import ALL, NONE, Kept
from .kernels import row_scores
from .kv.messages import Report, Scored, StepMessage

if TYPE_CHECKING:
    from .stats import RoutingCounts
    from .step import Route, Step


class SequenceState:
    """What a worker remembers of running requests, by slot (`S` of them; slot 0 is nobody's, and keeps everything).

    Everything of a slot is written anew when a (re-)prefill starts, so nothing of its previous owner is seen.
    """

    def __init__(self, cutoffs: Sequence[float], slots: int, device: torch.device) -> None:
        routed = len(cutoffs)
        self.default_cutoffs = torch.tensor(cutoffs, dtype=torch.float64)
        self.serials = torch.zeros(slots, dtype=torch.int64)
        self.window_ends = torch.zeros(slots, dtype=torch.int64)
        self.known = torch.ones(slots, dtype=torch.bool)  #: its decisions are taken
        self.open: set[int] = set()  #: slots whose window is not complete
        # The same on the device, for decode steps in graphs; there, too:
        self.window_ends_device = torch.zeros(slots, dtype=torch.int32, device=device)
        self.known_device = torch.ones(slots, dtype=torch.bool, device=device)
        self.keep = torch.ones(slots, routed, dtype=torch.bool, device=device)
        #: of `w . x` over the tokens of the window so far
        self.sums = torch.zeros(slots, routed, dtype=torch.float64, device=device)
        self.cutoffs = self.default_cutoffs.repeat(slots, 1).to(device)

    def begin(self, message: StepMessage) -> None:
        """(Re-)prefills that begin with this step."""
        starts = message.starts
        self.open.difference_update(message.freed)
        self.open.update(start.slot for start in starts if start.computed < start.window_end)
        if not starts:
            return
        slots = torch.tensor([start.slot for start in starts])
        routed, nothing = len(self.default_cutoffs), self.default_cutoffs.tolist()
        self.serials[slots] = torch.tensor([start.serial for start in starts])
        self.window_ends[slots] = ends = torch.tensor([start.window_end for start in starts])
        self.known[slots] = known = torch.tensor([start.keep is not None for start in starts])
        keep = torch.tensor([start.keep or (True,) * routed for start in starts])
        sums = torch.tensor([start.sums or (0.0,) * routed for start in starts], dtype=torch.float64)
        cutoffs = torch.tensor([start.cutoffs or nothing for start in starts], dtype=torch.float64)
        on_device, where = self.keep.device, slots.to(self.keep.device)
        for table, values in (
            (self.window_ends_device, ends.int()), (self.known_device, known), (self.keep, keep), (self.sums, sums),
            (self.cutoffs, cutoffs),
        ):  # fmt: skip
            table[where] = values.to(on_device)


class SequenceDecisions:
    """Of one forward. `R` requests, `C` routed layers, `K` pieces of prompts: a token block's rows of one request."""

    def __init__(
        self, step: Step, state: SequenceState, dense_window: bool, columns: tuple[int, ...], block_size: int | None
    ) -> None:
        """columns: the routed layers of this rank. block_size: of token blocks, at whose ends scores are reported."""
        self._step, self._state, self._dense = step, state, dense_window
        self._columns, self._block_size = columns, block_size
        rows, slots = step.rows, step.slots_host
        #: rows of each request that lie in its window, host int64 `[R]`
        self.inside = (state.window_ends[slots] - rows.computed_host).clamp(min=0).minimum(rows.lengths_host)
        self._complete = (rows.computed_host + self.inside == state.window_ends[slots]) & (self.inside > 0)
        undecided = ~state.known[slots]
        #: requests whose rows are scored; where there is no window, what is frozen needs no score
        self.scored = ((self.inside > 0) & (undecided | dense_window)).nonzero().flatten()
        #: those whose decisions are taken in this forward
        self.deciding = (self._complete & undecided).nonzero().flatten()
        self.keep = state.keep[step.slots].cpu()  #: host, bool `[R, C]`; waits for the device
        if self.scored.numel():
            self._split()
        self._kept: dict[bytes, Kept] = {}  #: by who keeps
        self._settled: dict[int, Kept] = {}  #: by routed layer, once nothing is left to be decided
        #: requests that keep, per routed layer; None while some are to be decided
        self._number = None if self.deciding.numel() else self.keep.sum(0).tolist()

    def _split(self) -> None:
        """Which rows are scored, and how they fall into pieces: the rows of one request and one token block."""
        rows, state, step = self._step.rows, self._state, self._step
        inside, computed = self.inside[self.scored], rows.computed_host[self.scored]
        request = torch.repeat_interleave(torch.arange(len(inside)), inside)
        place = torch.arange(len(request)) - (inside.cumsum(0) - inside)[request]
        position = place + computed[request]
        self._rows = rows.upload(place + rows.starts_host[self.scored][request])
        block = position // self._block_size if self._block_size else torch.zeros_like(position)
        _, lengths = torch.unique_consecutive(request * (int(block.max()) + 1) + block, return_counts=True)
        last = lengths.cumsum(0) - 1
        self._lengths = rows.upload(lengths)
        self._piece_request, self._piece_block = request[last], block[last]
        ends = position[last] + 1
        at_end = ends == state.window_ends[step.slots_host[self.scored]][self._piece_request]
        #: pieces whose scores the scheduler is told: a token block ends there, or the window
        self._told = (ends % self._block_size == 0) | at_end if self._block_size else at_end & False
        # Pieces of a request side by side, `[requests, most pieces]`, so that their sums can be added up.
        number = torch.bincount(self._piece_request, minlength=len(inside))
        first = number.cumsum(0) - number
        at = torch.arange(len(last)) - first[self._piece_request]
        self._grid, self._shape = (rows.upload(self._piece_request), rows.upload(at)), (len(inside), int(number.max()))
        self._last_piece = first + number - 1
        self._prior = state.sums[step.slots[rows.upload(self.scored)]]
        #: float64 `[K, C]`: of `w . x` from the request's first token to the end of the piece
        self._sums = torch.zeros(len(last), self.keep.shape[1], dtype=torch.float64, device=rows.device)
        deciding = torch.isin(self.scored, self.deciding)
        self._deciding_piece = rows.upload(self._last_piece[deciding])
        self._counts = rows.upload(state.window_ends[step.slots_host[self.deciding]])
        self._cutoffs = state.cutoffs[step.slots[rows.upload(self.deciding)]]

    def kept(self, route: Route, x: Tensor, with_attention: bool) -> Kept:
        """Rows of `x` `[>= N, hidden]` that keep; waits for the device only where decisions are taken."""
        if self.scored.numel():
            self._score(route, x)
        if self._number is None:
            return self._kept_of(route.column, with_attention)
        if not self._settled:
            # Together: between two layers' attentions the same work finds nothing in the processor's caches.
            self._settled = {column: self._kept_of(column, with_attention) for column in self._columns}
        return self._settled[route.column]

    def _kept_of(self, column: int, with_attention: bool) -> Kept:
        if self._number is not None and self._number[column] == len(self.keep):
            return ALL
        keep = self.keep.numpy()[:, column]
        key = keep.tobytes()
        if key not in self._kept:
            self._kept[key] = self._rows_of(keep, with_attention)
        return self._kept[key]

    def _rows_of(self, keep: np.ndarray, with_attention: bool) -> Kept:
        lengths = self._step.rows.lengths_host.numpy()
        counts = np.where(keep, lengths, self.inside.numpy() if self._dense else 0)
        if (counts == lengths).all():
            return ALL
        return Kept(self._step.rows.first_of_each(counts, with_attention)) if counts.any() else NONE

    def _score(self, route: Route, x: Tensor) -> None:
        column = route.column
        scores = row_scores(x[self._rows], route.router.weight)
        # The check of lengths would wait for the device, in every layer; these were made on the host.
        sums = torch.segment_reduce(scores.double(), "sum", lengths=self._lengths, unsafe=True)
        grid = sums.new_zeros(self._shape)
        grid[self._grid] = sums
        self._sums[:, column] = (grid.cumsum(1) + self._prior[:, column, None])[self._grid]
        if self.deciding.numel():
            mean = self._sums[self._deciding_piece, column] / self._counts
            self.keep[self.deciding, column] = route.agreed(keeps(mean, self._cutoffs[:, column])).cpu()

    def close(self, counts: RoutingCounts) -> Report | None:
        """Freeze what was decided; returns what the scheduler is to know."""
        if not self.scored.numel():
            return None
        state, step, upload = self._state, self._step, self._step.rows.upload
        state.sums[step.slots[upload(self.scored)]] = self._sums[upload(self._last_piece)]
        if self.deciding.numel():
            decided = self.keep[self.deciding]
            state.keep[step.slots[upload(self.deciding)]] = upload(decided)
            state.known[step.slots_host[self.deciding]] = True
            counts.decided(decided, self._columns)
        state.open.difference_update(step.slots_host[self._complete].tolist())
        return self._report()

    def _report(self) -> Report | None:
        report = Report(self._columns)
        sums = self._sums.cpu().numpy() if self._told.any() else np.zeros((len(self._sums), self.keep.shape[1]))
        serials = self._state.serials[self._step.slots_host].tolist()
        for number, row in enumerate(self.scored.tolist()):
            told = (self._told & (self._piece_request == number)).nonzero().flatten()
            complete = bool(self._complete[row])
            if told.numel() or complete:
                first = int(self._piece_block[told[0]]) if told.numel() else 0
                keep = self.keep[row].numpy().copy() if complete else None
                report.scored[serials[row]] = Scored(first, sums[told.numpy()], keep)
        return report if report.scored else None


def decided_in_graph(
    step: Step, state: SequenceState, dense_window: bool, columns: tuple[int, ...], block_size: int | None,
    counts: RoutingCounts,
) -> Report | None:  # fmt: skip
    """After a decode step (see `decode`): what single tokens in windows have scored, decisions where a window ended.

    Waits for the device, if there are such tokens.
    """
    rows = step.rows
    if not state.open:
        return None
    slots, ends = step.slots_host, rows.computed_host + 1
    inside = ends <= state.window_ends[slots]
    complete, undecided = ends == state.window_ends[slots], ~state.known[slots]
    told = (ends % block_size == 0) | complete if block_size else torch.zeros_like(inside)
    chosen = (inside & (dense_window | undecided) & (told | complete)).nonzero().flatten()
    if not chosen.numel():
        return None
    where = step.slots[rows.upload(chosen)]
    sums, keep = state.sums[where].cpu(), state.keep[where].cpu()
    deciding = (complete & undecided)[chosen]
    state.known[slots[chosen[deciding]]] = True
    state.open.difference_update(slots[chosen[complete[chosen]]].tolist())
    counts.decided(keep[deciding], columns)
    report, serials = Report(columns), state.serials[slots].tolist()
    for number, row in enumerate(chosen.tolist()):
        block = (int(ends[row]) - 1) // block_size if block_size else 0
        scored = sums[number : number + 1].numpy() if told[row] else sums[:0].numpy()
        report.scored[serials[row]] = Scored(block, scored, keep[number].numpy() if complete[row] else None)
    return report
