"""Batches as vLLM's runners hand them to a metadata builder, without a runner."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_mod.rows import Rows
from vllm_mod.step import Step
from vllm_mod.tables import PageTables


def metadata(
    requests: Sequence[tuple[int, int, int]], padded_requests: int = 0, padded_rows: int = 0, on_host: bool = True
) -> CommonAttentionMetadata:
    """requests: (slot, tokens computed before, tokens of this step). Padded requests have no tokens."""
    total = len(requests) + padded_requests
    lengths = torch.tensor([query for _, _, query in requests] + [0] * padded_requests)
    starts = torch.zeros(total + 1, dtype=torch.int32)
    starts[1:] = lengths.cumsum(0)
    ends = torch.tensor([done + query for _, done, query in requests] + [0] * padded_requests, dtype=torch.int32)
    table = torch.full((total, 3), -7, dtype=torch.int32)  # behind the first entry nothing may be read
    table[:, 0] = torch.tensor([slot for slot, _, _ in requests] + [0] * padded_requests)
    positions = [p for _, done, query in requests for p in range(done, done + query)]
    cm = CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=ends,
        num_reqs=total,
        num_actual_tokens=len(positions) + padded_rows,
        max_query_len=int(lengths.max()),
        max_seq_len=int(ends.max()),
        block_table_tensor=table,
        slot_mapping=torch.tensor([-3] * len(positions) + [-1] * padded_rows),
        positions=torch.tensor(positions + [0] * padded_rows),
        is_prefilling=torch.tensor([done == 0 for _, done, _ in requests] + [False] * padded_requests),
        seq_lens_cpu_upper_bound=ends if on_host else None,
    )
    cm.compute_num_computed_tokens()  # cached, as another builder may have done
    return cm


def step(
    requests: Sequence[tuple[int, int, int]], tables: PageTables | None = None, block_size: int = 4, **padding: Any
) -> Step:
    """A step whose message has come; a subset's metadata is vLLM's common one itself."""
    return Step(Rows(metadata(requests, **padding), lambda cm: cm), block_size, tables, begun=True)
