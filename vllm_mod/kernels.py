"""Triton kernels: scores of rows, and what decode steps need (see `decode`); one program per row."""

from __future__ import annotations

from typing import Any

import torch
from vllm.triton_utils import HAS_TRITON, tl, triton

from . import gate

#: Elements of a row that are multiplied at once.
_CHUNK = 1024


@triton.jit
def _split_pages_kernel(
    block_table, table_stride, seq_lens, state, state_stride, columns,
    tables, tables_stride_layer, tables_stride_row, layer_seq_lens, layer_slots, stride_layer,
    num_layers, BLOCK_SIZE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    row, layer = tl.program_id(0), tl.program_id(1)
    length = tl.load(seq_lens + row)
    column = tl.load(columns + layer)
    anchor = tl.load(block_table + row * table_stride).to(tl.int64)
    # A one-token prompt has no decision yet: `decide` takes it.
    kept = tl.load(state + anchor * state_stride + tl.maximum(column, 0)).to(tl.int32)
    length = tl.where((column < 0) | (kept != 0) | (length == 1), length, 0)
    tl.store(layer_seq_lens + layer * stride_layer + row, length)
    last = tl.maximum(length - 1, 0)
    page = tl.load(block_table + row * table_stride + last // BLOCK_SIZE * num_layers + layer).to(tl.int64)
    slot = tl.where(length > 0, page * BLOCK_SIZE + last % BLOCK_SIZE, -1)
    tl.store(layer_slots + layer * stride_layer + row, slot)
    blocks = (length + BLOCK_SIZE - 1) // BLOCK_SIZE
    for first in range(0, blocks, CHUNK):
        block = first + tl.arange(0, CHUNK)
        pages = tl.load(block_table + row * table_stride + block * num_layers + layer, mask=block < blocks, other=0)
        tl.store(tables + layer * tables_stride_layer + row * tables_stride_row + block, pages, mask=block < blocks)


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
def _decide_prompts_kernel(
    x, x_stride, weight, hidden, cutoff, seq_lens, block_table, table_stride, state, state_stride,
    keep, layer_seq_lens, layer_slots, ATTENTION: tl.constexpr, CONSTANT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if tl.load(seq_lens + row) == 1:
        kept = _keeps(x, x_stride, weight, hidden, row, cutoff, CONSTANT, CHUNK)
        anchor = tl.load(block_table + row * table_stride).to(tl.int64)
        tl.store(state + anchor * state_stride, kept != 0)
        tl.store(keep + row, kept != 0)
        if ATTENTION:  # noqa: SIM102 (known when compiled, the other is not)
            if kept == 0:
                tl.store(layer_seq_lens + row, 0)
                tl.store(layer_slots + row, -1)


@triton.jit
def _decide_tokens_kernel(
    x, x_stride, weight, hidden, cutoff, seq_lens, block_table, table_stride, stored, stored_stride,
    keep, layer_seq_lens, layer_slots, slot_mapping, kept_count,
    BLOCK_SIZE: tl.constexpr, ATTENTION: tl.constexpr, CONSTANT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    length = tl.load(seq_lens + row)
    kept = tl.where(length > 0, _keeps(x, x_stride, weight, hidden, row, cutoff, CONSTANT, CHUNK), 0)
    tl.store(keep + row, kept != 0)
    if (kept != 0) & (tl.load(slot_mapping + row) >= 0):  # padding and dummy runs have no slots
        tl.atomic_add(kept_count, 1)
    if ATTENTION:
        anchor = tl.load(block_table + row * table_stride).to(tl.int64)
        place = tl.where(length == 1, 0, tl.load(stored + anchor * stored_stride))
        page = tl.load(block_table + row * table_stride + place // BLOCK_SIZE).to(tl.int64)
        tl.store(layer_slots + row, tl.where(kept != 0, page * BLOCK_SIZE + place % BLOCK_SIZE, -1))
        tl.store(layer_seq_lens + row, tl.where(kept != 0, place + 1, 0))
        if length > 0:
            tl.store(stored + anchor * stored_stride, place + kept)


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


def split_pages(buffers: Any, block_table: Any, seq_lens: Any) -> None:
    """Fill `tables`, `layer_seq_lens` and `layer_slots` of all layers, see `decode.DecodeBuffers`."""
    rows, layers = len(seq_lens), len(buffers.columns)
    _split_pages_kernel[(rows, layers)](
        block_table, block_table.stride(0), seq_lens, buffers.state, buffers.state.stride(0), buffers.columns,
        buffers.tables, buffers.tables.stride(0), buffers.tables.stride(1),
        buffers.seq_lens, buffers.slots, buffers.slots.stride(0), layers, BLOCK_SIZE=buffers.block_size, CHUNK=128,
    )  # fmt: skip


def decide(
    buffers: Any, x: Any, weight: Any, cutoff: float, column: int, index: int | None, block_table: Any, seq_lens: Any,
    slot_mapping: Any,
) -> None:  # fmt: skip
    """Decide of single rows, and set what attention layer `index` (None: there is none) sees of them."""
    attention = index is not None
    args = (x, x.stride(0), weight, x.shape[1], cutoff if _constant(cutoff) < 0 else 0.0, seq_lens, block_table,
            block_table.stride(0), buffers.state[:, column], buffers.state.stride(0), buffers.keep[column],
            buffers.seq_lens[index or 0], buffers.slots[index or 0])  # fmt: skip
    flags = {"ATTENTION": attention, "CONSTANT": _constant(cutoff), "CHUNK": _CHUNK}
    if buffers.per_request:
        _decide_prompts_kernel[(len(seq_lens),)](*args, **flags)
    else:
        counter = buffers.kept[column : column + 1]
        _decide_tokens_kernel[(len(seq_lens),)](*args, slot_mapping, counter, BLOCK_SIZE=buffers.block_size, **flags)
