"""One decision per request and routed layer (`*_sequence`), taken over its first tokens and frozen.

With a window (design section 2, version 2) the decision is the mean of `w . x` over the first `D = min(W, P)` of `P`
prompt tokens; these keep every sublayer, and all later tokens follow the decision. Without one it is the mean over the
whole prompt, whose tokens follow it, too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .kept import ALL, NONE, Kept
from .kv.messages import Report, Scored, StepMessage
from .rows import Download, download, upload_together
from .windows import WindowScores

if TYPE_CHECKING:
    from .stats import RoutingCounts
    from .step import Route, Step


class SequenceState:
    """What a worker remembers of running requests, by slot (`S` of them; slot 0 is nobody's, and keeps everything).

    Everything of a slot is written anew when a (re-)prefill starts, so nothing of its previous owner is seen.
    """

    def __init__(self, cutoffs: Sequence[float], slots: int, device: torch.device, lag: int = 0) -> None:
        """lag: after how many steps the host reads what the device decided in one; 2 where it runs a step ahead."""
        routed = len(cutoffs)
        self.default_cutoffs = torch.tensor(cutoffs, dtype=torch.float64)
        self.serials = torch.zeros(slots, dtype=torch.int64)
        self.window_ends = torch.zeros(slots, dtype=torch.int64)
        self.known = torch.ones(slots, dtype=torch.bool)  #: its decisions are taken
        self.keep_host = torch.ones(slots, routed, dtype=torch.bool)
        self.on_host = torch.ones(slots, dtype=torch.bool)  #: its decisions, if they are taken, are in `keep_host`
        self._coming: deque[list[_Coming]] = deque([[] for _ in range(lag)])  #: of the last steps
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
            (self.keep_host, keep), (self.on_host, np.True_),
        ):  # fmt: skip
            host.numpy()[slots] = values
        where, *uploaded = upload_together(self.keep.device, slots, ends.astype(np.int32), known, keep, sums, cutoffs)
        tables = self.window_ends_device, self.known_device, self.keep, self.sums, self.cutoffs
        for table, new in zip(tables, uploaded, strict=True):
            table[where] = new

    def decide(self, slots: Tensor, decided: Download, now: bool) -> list[Tensor]:
        """Decisions taken in this step. slots: int64 `[n]`, on the host; decided: bool `[C, n]`, on its way there.

        now: they are there already. Returns those that have come, bool `[n, C]` each.
        """
        self.known[slots] = True
        self.on_host[slots] = False
        coming = _Coming(slots, self.serials[slots], decided)
        if now or not self._coming:
            return self._read([coming])
        self._coming[-1].append(coming)
        return []

    def settle(self) -> list[Tensor]:
        """A step begins: wait for what the device decided `lag` steps ago. All ranks do so in the same step."""
        if not self._coming:
            return []
        self._coming.append([])
        return self._read(self._coming.popleft())

    def _read(self, found: Sequence[_Coming]) -> list[Tensor]:
        decisions = []
        for coming in found:
            decisions.append(decided := coming.decided.wait().T)
            same = self.serials[coming.slots] == coming.serials  # others have ended, or were preempted, since
            self.keep_host[coming.slots[same]] = decided[same]
            self.on_host[coming.slots[same]] = True
        return decisions


@dataclass
class _Coming:
    """Decisions on their way to the host, and whose they are: slots and prefills."""

    slots: Tensor
    serials: Tensor
    decided: Download


class SequenceDecisions:
    """Of one forward. `R` requests, `C` routed layers."""

    def __init__(
        self, step: Step, state: SequenceState, dense_window: bool, columns: tuple[int, ...], block_size: int | None,
        wait_from: int = 0,
    ) -> None:  # fmt: skip
        """columns: the routed layers of this rank. block_size: of token blocks, at whose ends scores are reported.
        wait_from: where decisions of this forward have so many rows behind them, these are left out in layers that they
        skip, for which the host waits for the device in every layer; fewer are computed and replaced."""
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
        behind = rows.lengths_host - self.inside if dense_window else rows.lengths_host
        self._waits = int(behind[self.deciding].sum()) >= max(wait_from, 1)
        undecided = ~state.on_host[slots]
        undecided[self.deciding] = not self._waits
        self._undecided = self._rows_behind(undecided, behind) if undecided.any() else None
        self._kept: dict[bytes, Kept] = {}  #: by who keeps
        self._settled: dict[int, Kept] = {}  #: by routed layer, once nothing is left to wait for
        #: requests that keep, per routed layer; None while some are to be decided
        self._number = None if self._waits else self.keep.sum(0).tolist()

    def _rows_behind(self, requests: Tensor, behind: Tensor) -> tuple[Tensor, Tensor] | None:
        """The last `behind` rows of each of these requests (bool `[R]`), and the slot of each: int64 `[m]`."""
        rows = self._step.rows
        of = rows.request_of_token_host
        chosen = (requests[of] & (rows.lengths_host[of] - rows.place_host <= behind[of])).nonzero().flatten()
        if not len(chosen):
            return None
        numbers, slots = rows.upload_together(chosen.numpy(), self._step.slots_host[of[chosen]].numpy())
        return numbers, slots

    def kept(self, route: Route, x: Tensor, with_attention: bool) -> Kept:
        """Rows of `x` `[>= N, hidden]` that keep."""
        if self._windows is not None:
            decided = self._windows.add(route, x)
            if self._waits:
                self.keep[self.deciding, route.column] = download(decided)
        if self._number is None:
            kept = self._kept_of(route.column, with_attention)
        else:
            if not self._settled:
                # Together: between two layers' attentions the same work finds nothing in the processor's caches.
                self._settled = {column: self._kept_of(column, with_attention) for column in self._columns}
            kept = self._settled[route.column]
        if self._undecided is None:
            return kept
        rows, slots = self._undecided
        keep = self._state.keep[:, route.column].index_select(0, slots)
        if with_attention:
            self._step.store_only(route, rows, keep)
        return replace(kept, undecided=(rows, keep))

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
        slots, decided = self._step.slots_host, Download(self._windows.decided)
        if self.deciding.numel():
            for found in self._state.decide(slots[self.deciding], decided, self._waits):
                counts.decided(found, self._columns)
        self._state.open.difference_update(slots[self._complete].tolist())
        return self._report(self._windows, decided)

    def _report(self, windows: WindowScores, decided: Download) -> Report | None:
        serials, complete = self._state.serials[self._step.slots_host].tolist(), self._complete.tolist()
        entries = []
        for number, row in enumerate(self.scored.tolist()):
            (mine,) = (windows.told & (windows.request == number)).nonzero()
            if len(mine) or complete[row]:
                entries.append((serials[row], row, int(windows.block[mine[0]]) if len(mine) else 0, mine))
        if not entries:
            return None
        sums, keep, deciding = Download(windows.sums), self.keep.numpy(), self.deciding.numpy()

        def scored() -> dict[int, Scored]:
            keep[deciding] = decided.wait().numpy().T
            values = sums.wait().numpy().T
            return {
                serial: Scored(first, values[mine], keep[row].copy() if complete[row] else None)
                for serial, row, first, mine in entries
            }

        return Report(self._columns, scored)


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
    found: dict[int, Scored] = {}
    serials = state.serials[slots].tolist()
    for number, row in enumerate(chosen.tolist()):
        block = (int(ends[row]) - 1) // block_size if block_size else 0
        scored = sums[number : number + 1].numpy() if told[row] else sums[:0].numpy()
        found[serials[row]] = Scored(block, scored, keep[number].numpy() if complete[row] else None)
    return Report(columns, found)
