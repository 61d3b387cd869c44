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

from .kept import ALL, NONE, Kept
from .kv.messages import Report, Scored, StepMessage
from .rows import download, upload_together
from .windows import WindowScores

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
        self.keep_host = torch.ones(slots, routed, dtype=torch.bool)
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
        routed, nothing = len(self.default_cutoffs), self.default_cutoffs.tolist()
        slots = np.array([start.slot for start in starts])
        ends = np.array([start.window_end for start in starts])
        known = np.array([start.keep is not None for start in starts])
        keep = np.array([start.keep or (True,) * routed for start in starts])
        sums = np.array([start.sums or (0.0,) * routed for start in starts])
        cutoffs = np.array([start.cutoffs or nothing for start in starts])
        for host, values in (
            (self.serials, np.array([start.serial for start in starts])), (self.window_ends, ends), (self.known, known),
            (self.keep_host, keep),
        ):  # fmt: skip
            host.numpy()[slots] = values
        where, *uploaded = upload_together(self.keep.device, slots, ends.astype(np.int32), known, keep, sums, cutoffs)
        tables = self.window_ends_device, self.known_device, self.keep, self.sums, self.cutoffs
        for table, new in zip(tables, uploaded, strict=True):
            table[where] = new


class SequenceDecisions:
    """Of one forward. `R` requests, `C` routed layers."""

    def __init__(
        self, step: Step, state: SequenceState, dense_window: bool, columns: tuple[int, ...], block_size: int | None
    ) -> None:
        """columns: the routed layers of this rank. block_size: of token blocks, at whose ends scores are reported."""
        self._step, self._state, self._dense = step, state, dense_window
        self._columns = columns
        rows, slots = step.rows, step.slots_host
        #: rows of each request that lie in its window, host int64 `[R]`
        self.inside = (state.window_ends[slots] - rows.computed_host).clamp(min=0).minimum(rows.lengths_host)
        self._complete = (rows.computed_host + self.inside == state.window_ends[slots]) & (self.inside > 0)
        undecided = ~state.known[slots]
        #: requests whose rows are scored; where there is no window, what is frozen needs no score
        self.scored = ((self.inside > 0) & (undecided | dense_window)).nonzero().flatten()
        #: those whose decisions are taken in this forward
        self.deciding = (self._complete & undecided).nonzero().flatten()
        self.keep = state.keep_host[slots]  #: bool `[R, C]`
        self._windows: WindowScores | None = None
        if self.scored.numel():
            deciding = torch.isin(self.scored, self.deciding).numpy()
            self._windows = WindowScores(
                rows, state, slots.numpy(), self.scored.numpy(), self.inside.numpy(), deciding, block_size
            )
        #: some rows depend on what is decided in this forward
        self._waits = bool(
            (self.inside < rows.lengths_host)[self.deciding].any() if dense_window else len(self.deciding)
        )
        self._kept: dict[bytes, Kept] = {}  #: by who keeps
        self._settled: dict[int, Kept] = {}  #: by routed layer, once nothing is left to wait for
        #: requests that keep, per routed layer; None while some are to be decided
        self._number = None if self._waits else self.keep.sum(0).tolist()

    def kept(self, route: Route, x: Tensor, with_attention: bool) -> Kept:
        """Rows of `x` `[>= N, hidden]` that keep; waits for the device only where a decision has rows behind it."""
        if self._windows is not None:
            decided = self._windows.add(route, x)
            if self._waits:
                self.keep[self.deciding, route.column] = download(decided)
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

    def close(self, counts: RoutingCounts) -> Report | None:
        """Freeze what was decided; returns what the scheduler is to know."""
        if self._windows is None:
            return None
        state, slots = self._state, self._step.slots_host
        if self.deciding.numel():
            self.keep[self.deciding] = decided = download(self._windows.decided).T
            state.keep_host[slots[self.deciding]] = decided
            state.known[slots[self.deciding]] = True
            counts.decided(decided, self._columns)
        state.open.difference_update(slots[self._complete].tolist())
        return self._report(self._windows)

    def _report(self, windows: WindowScores) -> Report | None:
        report = Report(self._columns)
        told, shape = windows.told, (windows.sums.shape[1], windows.sums.shape[0])
        sums = download(windows.sums).numpy().T if told.any() else np.zeros(shape)
        serials = self._state.serials[self._step.slots_host].tolist()
        for number, row in enumerate(self.scored.tolist()):
            (mine,) = (told & (windows.request == number)).nonzero()
            complete = bool(self._complete[row])
            if len(mine) or complete:
                first = int(windows.block[mine[0]]) if len(mine) else 0
                keep = self.keep[row].numpy().copy() if complete else None
                report.scored[serials[row]] = Scored(first, sums[mine], keep)
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
    state.keep_host[slots[chosen[deciding]]] = keep[deciding]
    state.open.difference_update(slots[chosen[complete[chosen]]].tolist())
    counts.decided(keep[deciding], columns)
    report, serials = Report(columns), state.serials[slots].tolist()
    for number, row in enumerate(chosen.tolist()):
        block = (int(ends[row]) - 1) // block_size if block_size else 0
        scored = sums[number : number + 1].numpy() if told[row] else sums[:0].numpy()
        report.scored[serials[row]] = Scored(block, scored, keep[number].numpy() if complete[row] else None)
    return report
