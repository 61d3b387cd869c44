"""The Triton kernels of decode steps against their plain versions (Triton's interpreter; run by parity/test_v2)."""

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from vllm.triton_utils import HAS_TRITON

from tests.support.batches import metadata
from vllm_mod import decode, gate, kernels
from vllm_mod.decode import DecodeBuffers, DecodeStep
from vllm_mod.rows import Rows
from vllm_mod.sequences import SequenceState
from vllm_mod.step import Route, Router
from vllm_mod.tables import Layout, PageTables
from vllm_mod.tokens import PackedState
from vllm_mod.windows import WindowScores, add_window_scores, compile_ahead

interpreted = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton, interpreted: see parity/test_v2.py")

ROWS, SLOTS, ROUTED, SIZE, BLOCKS = 7, 9, 3, 4, 7
NAMES = list("abcde")
COLUMNS = {"b": 0, "d": 1, "e": 2}  #: routed column of an attention layer
INF = float("inf")


def make(kind: str, shared: bool, seed: int) -> tuple[DecodeBuffers, DecodeStep]:
    """Poisoned buffers and a step that has begun; the last row is padding."""
    g = torch.Generator().manual_seed(seed)
    cpu = torch.device("cpu")
    tables = PageTables(Layout(NAMES, [0] * 5 if shared else list(range(5))), SLOTS, BLOCKS, cpu)
    tables.pages[:, 1:] = torch.randint(1, 99, tables.pages[:, 1:].shape, generator=g, dtype=torch.int32)
    state: Any = PackedState(ROUTED, SLOTS, cpu)
    state.stored[1:] = torch.randint(0, SIZE * BLOCKS - 1, (SLOTS - 1, ROUTED), generator=g).int()
    if kind != "tokens":
        state = SequenceState([0.3, -INF, INF], SLOTS, cpu)
        state.keep[1:] = torch.rand(SLOTS - 1, ROUTED, generator=g) < 0.5
        state.known_device[1:] = torch.rand(SLOTS - 1, generator=g) < 0.3
        state.window_ends_device[1:] = torch.randint(1, 12, (SLOTS - 1,), generator=g).int()
        state.sums[1:] = torch.randn(SLOTS - 1, ROUTED, generator=g, dtype=torch.float64)
        state.cutoffs[4:] = torch.tensor([INF, 0.1, -INF])  # dials
    routes = [Route(i, COLUMNS[name], Router(8), 0.0, kv_layer=name) for i, name in enumerate(COLUMNS)]
    buffers = DecodeBuffers(routes, ROUTED, state, tables, SIZE, ROWS + 2, kind == "window", torch.float32, cpu)
    for buffer in (buffers.keep, buffers.live, buffers.seq_lens, buffers.slots, buffers.tables):
        buffer.copy_(torch.randint(0, 2, buffer.shape, generator=g) if buffer.dtype == torch.bool else buffer - 7)
    slots = torch.randperm(SLOTS - 1, generator=g)[:ROWS] + 1
    ends = torch.randint(1, 12, (ROWS,), generator=g)
    if kind != "tokens":  # some at the end of their window, some inside
        ends[:4] = state.window_ends_device[slots[:4]]
        state.known_device[slots[:2]] = False
    requests = [(int(slot), int(end) - 1, 1) for slot, end in zip(slots, ends, strict=True)]
    rows = Rows(metadata(requests[:-1], padded_requests=1), lambda cm: cm)
    rows.cm.seq_lens[-1] = 1  # a runner's padding may say anything
    step = DecodeStep(buffers, rows)
    assert not buffers.live[:ROWS].any() and (buffers.slots[:, :ROWS] == -1).all()
    return buffers, step


@interpreted
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", ["prompt", "window", "tokens"])
@pytest.mark.parametrize("begun", [True, False])
def test_split_pages(kind: str, shared: bool, seed: int, begun: bool) -> None:
    plain, step = make(kind, shared, seed)
    step.begin()
    triton = copy.deepcopy(plain)
    for buffers in (plain, triton):
        buffers.seq_lens[:], buffers.slots[:], buffers.tables[:] = -7, -7, -7
        buffers.live[:], buffers.keep[:] = buffers is plain, buffers is plain
    decode.split_pages(plain, step.block_table, step.seq_lens, begun)
    kernels.split_pages(triton, step.block_table, step.seq_lens, begun)
    assert plain.live[:ROWS].any() == begun
    assert torch.equal(plain.live[:ROWS], triton.live[:ROWS])
    assert kind == "tokens" or torch.equal(plain.keep[:, :ROWS], triton.keep[:, :ROWS])
    assert torch.equal(plain.seq_lens, triton.seq_lens)
    assert torch.equal(plain.slots, triton.slots)
    assert (plain.slots[:, ROWS - 1] == -1).all() and (plain.slots[:, : ROWS - 1] >= 0).any() == begun
    for layer, column in enumerate(plain.page_columns_host):
        for row in range(ROWS):  # entries behind a row's last page are never read
            used = -(-int(plain.seq_lens[layer, row]) // SIZE)
            assert torch.equal(plain.tables[column, row, :used], triton.tables[column, row, :used])


@interpreted
@pytest.mark.parametrize("cutoff", [0.0, 0.3, INF, -INF])
@pytest.mark.parametrize("index", [None, 3])
@pytest.mark.parametrize("kind", ["prompt", "window", "tokens"])
def test_decide(kind: str, index: int | None, cutoff: float) -> None:
    hidden, column = 1100, 1  # more than a chunk
    for column in range(ROUTED) if kind != "tokens" else (1,):
        plain, step = make(kind, False, 5)
        step.begin()
        x = torch.randn(ROWS + 1, hidden, generator=torch.Generator().manual_seed(1))[:ROWS] / 30
        x[1] = float("nan")  # keeps, between the ends of the scale
        weight = torch.randn(1, hidden, generator=torch.Generator().manual_seed(2))
        triton = copy.deepcopy(plain)
        for function, buffers in ((decode.decide, plain), (kernels.decide, triton)):
            function(buffers, x, weight, cutoff, column, index, step.block_table, step.seq_lens)
        for name in ("keep", "kept", "seq_lens", "slots"):
            assert torch.equal(getattr(plain, name), getattr(triton, name)), name
        if isinstance(plain.state, SequenceState) and isinstance(triton.state, SequenceState):
            assert torch.equal(plain.state.keep, triton.state.keep)
            torch.testing.assert_close(plain.state.sums, triton.state.sums, equal_nan=True, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(plain.state.stored, triton.state.stored)  # type: ignore[union-attr]
            keep = plain.keep[column, :ROWS]
            assert int(plain.kept[column]) == int(keep.sum()) and not keep[-1]
            if abs(cutoff) != INF:
                assert 0 < int(keep.sum()) < ROWS - 1 and keep[1]


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_scores(dtype: torch.dtype) -> None:
    x, weight = torch.randn(5, 2100).to(dtype), torch.randn(1, 2100)
    padded = torch.nn.functional.pad(x, (0, 7))[:, :2100]  # rows further apart than they are long
    torch.testing.assert_close(kernels.token_scores(padded, weight), gate.token_scores(x, weight), rtol=1e-4, atol=1e-3)


@interpreted
@pytest.mark.parametrize("block_size", [None, 4])
@pytest.mark.parametrize("seed", range(3))
def test_window_scores(seed: int, block_size: int | None) -> None:
    """Windows that end in this step, that go on, of one row, longer than a chunk; and a request that has none."""
    rng = np.random.default_rng(seed)
    lengths = np.array([5, 1, 300, 7, 2, 9])
    computed, order = rng.integers(0, 6, 6), rng.permutation(8)[:6] + 1
    state = SequenceState([0.0, -INF, INF], SLOTS, torch.device("cpu"))
    inside = np.minimum(lengths, [5, 1, 299, 0, 2, 4])
    state.window_ends[order] = torch.from_numpy(computed + inside + np.array([0, 3, 0, 0, 0, 0]))
    state.sums[1:] = torch.randn(SLOTS - 1, ROUTED, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    state.cutoffs[3:6] = torch.tensor([0.1, INF, 0.3])  # dials
    requests = list(zip(order.tolist(), computed.tolist(), lengths.tolist(), strict=True))
    rows = Rows(metadata(requests, padded_rows=2), lambda cm: cm)
    scored, deciding = np.array([0, 1, 2, 4, 5]), np.array([True, False, True, False, True])
    states = state, copy.deepcopy(state)
    plain, triton = (WindowScores(rows, s, order, scored, inside, deciding, block_size) for s in states)
    x = torch.randn(len(rows.place_host) + 2, 1100, generator=torch.Generator().manual_seed(seed)) / 30
    x[0] = float("nan")
    weight = torch.randn(1, 1100, generator=torch.Generator().manual_seed(9))
    for column in range(ROUTED):
        for function, scores in ((add_window_scores, plain), (kernels.add_window_scores, triton)):
            function(x, weight, *scores.arguments(column))
    assert torch.equal(plain.decided, triton.decided) and torch.equal(states[0].keep, states[1].keep)
    assert plain.decided[0].tolist() != plain.decided[1].tolist() and plain.decided[0, 0]  # NaN keeps
    for left, right in ((plain.sums, triton.sums), (states[0].sums, states[1].sums)):
        torch.testing.assert_close(left, right, equal_nan=True, rtol=1e-5, atol=1e-5)


@interpreted
def test_window_kernels_are_compiled_ahead() -> None:
    """By a launch that changes nothing of anybody's state."""
    state = SequenceState([0.0, INF], SLOTS, torch.device("cpu"))
    before = copy.deepcopy(state)
    compile_ahead(state, torch.ones(1, 40), torch.bfloat16)
    assert torch.equal(state.sums, before.sums) and torch.equal(state.keep, before.keep)


@pytest.mark.skipif(HAS_TRITON, reason="the interpreter has taken the compiler's place")
def test_they_compile_for_a_gpu(tmp_path: Path) -> None:
    """What the interpreter lets pass may still be refused by the compiler."""
    pytest.importorskip("triton.backends.nvidia")
    run = subprocess.run(
        [sys.executable, "-m", "tests.support.compile_kernels"],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("_kernel ") == 17
