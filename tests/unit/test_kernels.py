"""The Triton kernels of decode steps against their plain versions (Triton's interpreter; run by parity/test_v2)."""

import copy
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.triton_utils import HAS_TRITON

from vllm_mod import decode, gate, kernels

interpreted = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton, interpreted: see parity/test_v2.py")

ROWS, LAYERS, ROUTED, SIZE, BLOCKS = 6, 5, 3, 4, 7
INF = float("inf")


def make(per_request: bool, seed: int) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Poisoned buffers, an interleaved block table and sequence lengths; the last row is padding."""
    g = torch.Generator().manual_seed(seed)
    pages = torch.randperm(ROWS * LAYERS * BLOCKS, generator=g).int() + 1
    table = torch.full((ROWS, LAYERS * BLOCKS + 3), 10**6, dtype=torch.int32)  # wider than its pages
    table[:, : LAYERS * BLOCKS] = pages.view(ROWS, -1)
    lengths = torch.randint(2, SIZE * BLOCKS, (ROWS,), generator=g).int()
    lengths[1], lengths[2], lengths[3], lengths[-1] = 1, SIZE, SIZE + 1, 0
    table[-1] = 0
    state = torch.randint(0, 2, (len(pages) + 1, ROUTED), generator=g)
    rows = ROWS + 2
    buffers = SimpleNamespace(
        block_size=SIZE,
        per_request=per_request,
        state=state.bool() if per_request else state.int(),
        keep=torch.ones(ROUTED, rows, dtype=torch.bool),
        kept=torch.zeros(ROUTED, dtype=torch.int64),
        layers=list("abcde"),
        columns=torch.tensor([-1, 0, -1, 1, 2], dtype=torch.int32),
        seq_lens=torch.full((LAYERS, rows), -7, dtype=torch.int32),
        slots=torch.full((LAYERS, rows), -7, dtype=torch.int64),
        tables=torch.full((LAYERS, rows, BLOCKS), -7, dtype=torch.int32),
    )
    kept = buffers.state[table[:, 0].long()].bool() | (lengths == 1)[:, None]
    buffers.keep[:, :ROWS] = kept.T
    return buffers, table, lengths


@interpreted
@pytest.mark.parametrize("seed", range(3))
def test_split_pages(seed: int) -> None:
    plain, table, lengths = make(True, seed)
    triton = copy.deepcopy(plain)
    decode.split_pages(plain, table, lengths)
    kernels.split_pages(triton, table, lengths)
    assert torch.equal(plain.seq_lens, triton.seq_lens)
    assert torch.equal(plain.slots, triton.slots)
    assert (plain.slots[:, :ROWS] == -1).any() and (plain.slots[:, :ROWS] >= 0).any()
    for layer in range(LAYERS):
        for row in range(ROWS):  # entries behind a row's last page are never read
            used = -(-int(plain.seq_lens[layer, row]) // SIZE)
            assert torch.equal(plain.tables[layer, row, :used], triton.tables[layer, row, :used])


@interpreted
@pytest.mark.parametrize("cutoff", [0.0, 0.3, INF, -INF])
@pytest.mark.parametrize("index", [None, 3])
@pytest.mark.parametrize("per_request", [True, False])
def test_decide(per_request: bool, index: int | None, cutoff: float) -> None:
    hidden, column = 1100, 1  # more than a chunk
    plain, table, lengths = make(per_request, 5)
    plain.seq_lens[:], plain.slots[:] = 5, 9  # as `prepare` left them
    slot_mapping = torch.arange(ROWS)
    slot_mapping[-1] = -1
    x = torch.randn(ROWS + 1, hidden, generator=torch.Generator().manual_seed(1))[:ROWS]
    x[4] = float("nan")  # keeps
    weight = torch.randn(1, hidden, generator=torch.Generator().manual_seed(2))
    triton = copy.deepcopy(plain)
    for function, buffers in ((decode.decide, plain), (kernels.decide, triton)):
        function(buffers, x, weight, cutoff, column, index, table, lengths, slot_mapping)
    for name in ("keep", "kept", "seq_lens", "slots", "state"):
        assert torch.equal(getattr(plain, name), getattr(triton, name)), name
    keep = plain.keep[column, :ROWS]
    if not per_request:
        assert int(plain.kept[column]) == int(keep.sum())
        if abs(cutoff) != INF:
            assert 0 < int(keep.sum()) < ROWS - 1
            assert keep[4]


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_scores(dtype: torch.dtype) -> None:
    x, weight = torch.randn(5, 2100).to(dtype), torch.randn(1, 2100)
    padded = torch.nn.functional.pad(x, (0, 7))[:, :2100]  # rows further apart than they are long
    torch.testing.assert_close(kernels.token_scores(padded, weight), gate.token_scores(x, weight), rtol=1e-4, atol=1e-3)


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
    assert run.stdout.count("_kernel ") == 14
