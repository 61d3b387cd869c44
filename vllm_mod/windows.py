"""What the tokens that decisions are taken from score in one forward, and what is decided by it, on the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from vllm.triton_utils import HAS_TRITON

from . import kernels
from .gate import keeps, token_scores

if TYPE_CHECKING:
    from .rows import Rows
    from .sequences import SequenceState
    from .step import Route


class WindowScores:
    """Of one forward: `Q` requests, `M` rows of theirs, in `K` pieces: the rows of one request and one token block.

    `n` of the requests have their decisions taken, `C` layers are routed.
    """

    def __init__(
        self, rows: Rows, state: SequenceState, slots: np.ndarray, scored: np.ndarray, inside: np.ndarray,
        deciding: np.ndarray, block_size: int | None,
    ) -> None:  # fmt: skip
        """slots, inside: int64 `[R]`, of all requests of the forward; inside: rows that lie in windows. scored: int64
        `[Q]`, numbers of requests; deciding: bool `[Q]`. block_size: None where scores are not to be told per block."""
        self._state = state
        count, computed = inside[scored], rows.computed_host.numpy()[scored]
        of = np.arange(len(scored)).repeat(count)  # request of each row
        place = np.arange(len(of)) - (count.cumsum() - count)[of]
        position = place + computed[of]
        block = position // block_size if block_size else np.zeros_like(position)
        first = np.concatenate([[True], (of[1:] != of[:-1]) | (block[1:] != block[:-1])]).nonzero()[0]
        #: of each piece: number of its request among the scored ones, token block, tokens up to its end
        self.request, self.block, ends = of[first], block[first], position[np.append(first[1:], len(of)) - 1] + 1
        windows = state.window_ends.numpy()[slots[scored]]
        at_end = ends == windows[self.request]
        #: pieces whose scores the scheduler is told: a token block ends there, or the window
        self.told = (ends % block_size == 0) | at_end if block_size else np.zeros_like(at_end)
        number = np.where(deciding, deciding.cumsum() - 1, -1)  # among the n, of each of the Q
        self._rows, self._first_row, self._first_piece, self._slots, self._ends, self._number = rows.upload_together(
            place + rows.starts_host.numpy()[scored][of], np.append(first, len(of)),
            self.request.searchsorted(np.arange(len(scored) + 1)), slots[scored], windows, number,
        )  # fmt: skip
        routed = state.sums.shape[1]
        #: float64 `[C, K]`: of `w . x` from the request's first token to the end of the piece
        self.sums = torch.zeros(routed, len(first), dtype=torch.float64, device=rows.device)
        #: bool `[C, n]`
        self.decided = torch.ones(routed, int(deciding.sum()), dtype=torch.bool, device=rows.device)
        self._scores = torch.empty(len(of), dtype=torch.float32, device=rows.device)

    def add(self, route: Route, x: Tensor) -> Tensor:
        """Score rows of `x` `[>= N, hidden]`, the input of one routed sublayer. Returns what is decided by it, `[n]`.

        The state's sums go on to the end of these rows; what is decided is in the state, too.
        """
        column = route.column
        on_gpu = HAS_TRITON and x.is_cuda
        function = kernels.add_window_scores if on_gpu else add_window_scores
        function(x, route.router.weight, *self.arguments(column))
        if route.shares_rows and self.decided.shape[1]:
            self.decided[column] = route.agreed(self.decided[column])
            self._state.keep[self._slots[self._number >= 0], column] = self.decided[column]
        return self.decided[column]

    def means(self, column: int) -> Tensor:
        """Float64 `[n]`: of `w . x` over the windows that were decided from, in one routed layer."""
        decided = self._number >= 0
        return self._state.sums[self._slots[decided], column] / self._ends[decided]

    def arguments(self, column: int) -> tuple[Tensor, ...]:
        """Of `add_window_scores`, for one routed layer."""
        state = self._state
        return (
            self._rows, self._first_row, self._first_piece, self._slots, self._ends, self._number,
            state.sums[:, column], state.keep[:, column], state.cutoffs[:, column], self._scores, self.sums[column],
            self.decided[column],
        )  # fmt: skip


def add_window_scores(
    x: Tensor, weight: Tensor, rows: Tensor, first_row: Tensor, first_piece: Tensor, slots: Tensor, ends: Tensor,
    number: Tensor, state_sums: Tensor, state_keep: Tensor, cutoffs: Tensor, scores: Tensor, sums: Tensor,
    decided: Tensor,
) -> None:  # fmt: skip
    """The kernels of this name in plain torch, for the CPU. Of one routed layer: state_*, cutoffs `[S]`, sums `[K]`."""
    scores.copy_(token_scores(x[rows], weight))
    sums.copy_(torch.segment_reduce(scores.double(), "sum", lengths=first_row.diff(), unsafe=True))
    pieces = first_piece.diff()
    request = torch.repeat_interleave(torch.arange(len(pieces)), pieces)
    # Pieces of a request side by side, so that its sums can be added up: those of others must not round them.
    grid = sums.new_zeros(len(pieces), int(pieces.max()) + 1)
    place = torch.arange(len(request)) - first_piece[request] + 1
    grid[:, 0] = state_sums[slots]
    grid[request, place] = sums
    grid = grid.cumsum(1)
    sums.copy_(grid[request, place])
    state_sums[slots] = total = grid.gather(1, pieces[:, None])[:, 0]
    deciding = number >= 0
    if bool(deciding.any()):
        mine = slots[deciding]
        decided.copy_(keeps(total[deciding] / ends[deciding], cutoffs[mine]))
        state_keep[mine] = decided


def compile_ahead(state: SequenceState, weight: Tensor, dtype: torch.dtype) -> None:
    """Compile the kernels before there is a request, whose first token would wait for it. weight: a router's; dtype: of
    hidden states. A row of zeros is scored for slot 0, which is nobody's."""
    device = weight.device
    first, two = torch.zeros(1, dtype=torch.int64, device=device), torch.arange(2, device=device)
    kernels.add_window_scores(
        torch.zeros(1, weight.shape[1], dtype=dtype, device=device), weight, first, two, two, first, first + 1,
        first - 1, state.sums[:, 0], state.keep[:, 0], state.cutoffs[:, 0], torch.zeros(1, device=device),
        torch.zeros(1, dtype=torch.float64, device=device), torch.zeros(1, dtype=torch.bool, device=device),
    )  # fmt: skip
