"""Triton kernels: scores of rows, and what decode steps need (see `decode`); one program per row."""

from __future__ import annotations

from typing import Any

import torch
from vllm.triton_utils import HAS_TRITON, tl, triton

from . import gate

#: Elements of a row that are multiplied at once.
_CHUNK = 1024


@triton.jit(do_not_specialize=["begun"], do_not_specialize_on_alignment=["known", "state"])
def _split_pages_kernel(
    block_table, table_stride, begun, seq_lens, live, keep, keep_stride, routed, layers, columns, page_columns,
    window_ends, known, state, state_stride,
    pages, pages_stride_column, pages_stride_slot, tables, tables_stride_column, tables_stride_row,
    layer_seq_lens, layer_slots, stride_layer,
    BLOCK_SIZE: tl.constexpr, DECIDED: tl.constexpr, DENSE: tl.constexpr, SHARED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    row, index = tl.program_id(0), tl.program_id(1)
    slot = tl.load(block_table + row * table_stride).to(tl.int64) * begun
    whole = tl.load(seq_lens + row)
    window = 0  # this token lies in a window that keeps it
    if DECIDED:
        window = (whole <= tl.load(window_ends + slot)).to(tl.int32)
        if not DENSE:
            window = window * (tl.load(known + slot).to(tl.int32) == 0)
        if index < routed:
            tl.store(keep + index * keep_stride + row, (tl.load(state + slot * state_stride + index) | window) != 0)
    if index == 0:
        tl.store(live + row, slot > 0)
    if index < layers:
        column, page_column = tl.load(columns + index), tl.load(page_columns + index)
        whole = tl.where(slot > 0, whole, 0)
        length = whole
        if DECIDED:
            kept = tl.load(state + slot * state_stride + tl.maximum(column, 0)) | window
            length = tl.where((column < 0) | (kept != 0), whole, 0)
        tl.store(layer_seq_lens + index * stride_layer + row, length)
        own = pages + page_column * pages_stride_column + slot * pages_stride_slot
        last = tl.maximum(length - 1, 0)
        page = tl.load(own + last // BLOCK_SIZE).to(tl.int64)
        place = tl.where(length > 0, page * BLOCK_SIZE + last % BLOCK_SIZE, -1)
        tl.store(layer_slots + index * stride_layer + row, place)
        # Layers that share a page column share its table: one of them copies it, as long as any layer reads.
        blocks = (length + BLOCK_SIZE - 1) // BLOCK_SIZE
        if SHARED:
            blocks = tl.where(index == 0, (whole + BLOCK_SIZE - 1) // BLOCK_SIZE, 0)
        for first in range(0, blocks, CHUNK):
            block = first + tl.arange(0, CHUNK)
            values = tl.load(own + block, mask=block < blocks, other=0)
            tl.store(tables + page_column * tables_stride_column + row * tables_stride_row + block, values,
                     mask=block < blocks)  # fmt: skip


@triton.jit
def _dot(x, x_stride, weight, hidden, row, CHUNK: tl.constexpr):
    """`w . x` of one row in float32."""
    total = tl.zeros([CHUNK], tl.float32)
    for first in range(0, hidden, CHUNK):
        i = first + tl.arange(0, CHUNK)
        values = tl.load(x + row * x_stride + i, mask=i < hidden, other=0.0).to(tl.float32)
        total += values * tl.load(weight + i, mask=i < hidden, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _keeps(x, x_stride, weight, hidden, row, cutoff, CONSTANT: tl.constexpr, CHUNK: tl.constexpr):
    """`w . x >= cutoff` of one row, as int32; NaN keeps. CONSTANT: 1 keeps, 0 skips, -1 asks the score."""
    if CONSTANT >= 0:
        kept = (row * 0 + CONSTANT).to(tl.int32)
    else:
        kept = tl.where(_dot(x, x_stride, weight, hidden, row, CHUNK) < cutoff, 0, 1)
    return kept


@triton.jit
def _scores_kernel(x, x_stride, weight, hidden, scores, CHUNK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    tl.store(scores + row, _dot(x, x_stride, weight, hidden, row, CHUNK))


@triton.jit
def _row_scores_kernel(x, x_stride, rows, weight, hidden, scores, CHUNK: tl.constexpr):
    index = tl.program_id(0)
    tl.store(scores + index, _dot(x, x_stride, weight, hidden, tl.load(rows + index), CHUNK))


@triton.jit
def _below(mean, cutoff):
    """Whether a score is skipped, see `gate.keeps`."""
    return (mean < cutoff) & (cutoff != float("-inf")) | (cutoff == float("inf"))


@triton.jit(do_not_specialize_on_alignment=["state_sums", "state_keep", "cutoffs", "sums", "decided"])
def _window_sums_kernel(
    scores, first_row, first_piece, slots, ends, number, state_sums, state_keep, cutoffs, state_stride, sums, decided,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """One program per request: its sums at the end of each piece, and its decision where its window ends."""
    request = tl.program_id(0)
    at = tl.load(slots + request) * state_stride
    total = tl.load(state_sums + at)
    for piece in range(tl.load(first_piece + request), tl.load(first_piece + request + 1)):
        low, high = tl.load(first_row + piece), tl.load(first_row + piece + 1)
        part = tl.zeros([CHUNK], tl.float64)
        for first in range(low, high, CHUNK):
            i = first + tl.arange(0, CHUNK)
            part += tl.load(scores + i, mask=i < high, other=0.0).to(tl.float64)
        total += tl.sum(part, 0)
        tl.store(sums + piece, total)
    tl.store(state_sums + at, total)
    where = tl.load(number + request)
    if where >= 0:
        below = _below(total / tl.load(ends + request).to(tl.float64), tl.load(cutoffs + at))
        tl.store(decided + where, below == 0)
        tl.store(state_keep + at, below == 0)


@triton.jit(do_not_specialize_on_alignment=["cutoffs", "state", "sums", "keep", "layer_seq_lens", "layer_slots"])
def _decide_requests_kernel(
    x, x_stride, weight, hidden, cutoffs, seq_lens, live, block_table, table_stride, window_ends, known,
    state, sums, state_stride, keep, layer_seq_lens, layer_slots,
    ATTENTION: tl.constexpr, DENSE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(block_table + row * table_stride).to(tl.int64)
    length, end = tl.load(seq_lens + row), tl.load(window_ends + slot)
    undecided = tl.load(known + slot).to(tl.int32) == 0
    # Where there is a window, requests that are decided already are scored, too: others may go on from their blocks.
    if (tl.load(live + row).to(tl.int32) != 0) & (length <= end) & (undecided | DENSE):
        at = slot * state_stride
        total = tl.load(sums + at) + _dot(x, x_stride, weight, hidden, row, CHUNK).to(tl.float64)
        tl.store(sums + at, total)
        if (length == end) & undecided:
            cutoff, mean = tl.load(cutoffs + at), total / end.to(tl.float64)
            below = _below(mean, cutoff)
            tl.store(state + at, below == 0)
            if not DENSE:
                tl.store(keep + row, below == 0)
                if ATTENTION:  # noqa: SIM102 (known when compiled, the other is not)
                    if below:
                        tl.store(layer_seq_lens + row, 0)
                        tl.store(layer_slots + row, -1)


@triton.jit(do_not_specialize_on_alignment=["stored", "keep", "layer_seq_lens", "layer_slots", "kept_count"])
def _decide_tokens_kernel(
    x, x_stride, weight, hidden, cutoff, live, block_table, table_stride, stored, stored_stride, pages,
    pages_stride_slot, keep, layer_seq_lens, layer_slots, kept_count,
    BLOCK_SIZE: tl.constexpr, ATTENTION: tl.constexpr, CONSTANT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    lives = tl.load(live + row).to(tl.int32) != 0
    kept = tl.where(lives, _keeps(x, x_stride, weight, hidden, row, cutoff, CONSTANT, CHUNK), 0)
    tl.store(keep + row, kept != 0)
    if kept != 0:
        tl.atomic_add(kept_count, 1)
    if ATTENTION:
        slot = tl.load(block_table + row * table_stride).to(tl.int64)
        place = tl.load(stored + slot * stored_stride)
        page = tl.load(pages + slot * pages_stride_slot + place // BLOCK_SIZE).to(tl.int64)
        tl.store(layer_slots + row, tl.where(kept != 0, page * BLOCK_SIZE + place % BLOCK_SIZE, -1))
        tl.store(layer_seq_lens + row, tl.where(kept != 0, place + 1, 0))
        if lives:
            tl.store(stored + slot * stored_stride, place + kept)


def _constant(cutoff: float) -> int:
    return -1 if abs(cutoff) != float("inf") else int(cutoff < 0)


def token_scores(x: Any, weight: Any) -> Any:
    """As `gate.token_scores` of `x` `[N, hidden]`, without a float32 copy of it. Returns float32 `[N]`."""
    scores = x.new_empty(len(x), dtype=torch.float32)
    if len(x):
        _scores_kernel[(len(x),)](x, x.stride(0), weight, x.shape[1], scores, CHUNK=_CHUNK)
    return scores


def row_scores(x: Any, weight: Any) -> Any:
    """`w . x` of every row, by the kernel where there is a GPU."""
    return token_scores(x, weight) if x.is_cuda and HAS_TRITON else gate.token_scores(x, weight)


def add_window_scores(
    x: Any, weight: Any, rows: Any, first_row: Any, first_piece: Any, slots: Any, ends: Any, number: Any,
    state_sums: Any, state_keep: Any, cutoffs: Any, scores: Any, sums: Any, decided: Any,
) -> None:  # fmt: skip
    """See `windows.add_window_scores`."""
    _row_scores_kernel[(len(rows),)](x, x.stride(0), rows, weight, x.shape[1], scores, CHUNK=_CHUNK)
    _window_sums_kernel[(len(slots),)](
        scores, first_row, first_piece, slots, ends, number, state_sums, state_keep, cutoffs, state_sums.stride(0),
        sums, decided, CHUNK=128,
    )  # fmt: skip


def split_pages(buffers: Any, block_table: Any, seq_lens: Any, begun: bool) -> None:
    """Who lives and who keeps what; `tables`, `seq_lens` and `slots` of all attention layers: see `decode`."""
    rows, layers, state = len(seq_lens), len(buffers.layers), buffers.state
    decided = hasattr(state, "keep")
    known = (
        (state.window_ends_device, state.known_device, state.keep)
        if decided
        else (seq_lens, buffers.live, buffers.keep)
    )
    routed = state.keep.shape[1] if decided else 0
    _split_pages_kernel[(rows, max(layers, routed))](
        block_table, block_table.stride(0), int(begun), seq_lens, buffers.live, buffers.keep, buffers.keep.stride(0),
        routed, layers, buffers.columns, buffers.page_columns, *known, known[2].stride(0),
        buffers.all_pages, buffers.all_pages.stride(0), buffers.all_pages.stride(1),
        buffers.tables, buffers.tables.stride(0), buffers.tables.stride(1),
        buffers.seq_lens, buffers.slots, buffers.slots.stride(0),
        BLOCK_SIZE=buffers.block_size, DECIDED=decided, DENSE=buffers.dense_window, SHARED=len(buffers.tables) == 1,
        CHUNK=128,
    )  # fmt: skip


def decide(
    buffers: Any, x: Any, weight: Any, cutoff: float, column: int, index: int | None, block_table: Any, seq_lens: Any
) -> None:
    """Decide of single rows, and set what attention layer `index` (None: there is none) sees of them."""
    attention, state = index is not None, buffers.state
    row = (x, x.stride(0), weight, x.shape[1])
    table = (block_table, block_table.stride(0))
    sees = (buffers.keep[column], buffers.seq_lens[index or 0], buffers.slots[index or 0])
    if hasattr(state, "keep"):
        _decide_requests_kernel[(len(seq_lens),)](
            *row, state.cutoffs[:, column], seq_lens, buffers.live, *table, state.window_ends_device,
            state.known_device, state.keep[:, column], state.sums[:, column], state.sums.stride(0), *sees,
            ATTENTION=attention, DENSE=buffers.dense_window, CHUNK=_CHUNK,
        )  # fmt: skip
        return
    stored = state.stored[:, column] if attention else buffers.kept
    _decide_tokens_kernel[(len(seq_lens),)](
        *row, cutoff if _constant(cutoff) < 0 else 0.0, buffers.live, *table, stored, stored.stride(0),
        buffers.all_pages[0], buffers.all_pages.stride(1), *sees, buffers.kept[column : column + 1],
        BLOCK_SIZE=buffers.block_size, ATTENTION=attention, CONSTANT=_constant(cutoff), CHUNK=_CHUNK,
    )  # fmt: skip
