"""`Batch` against a brute-force reading of the same tables, token by token."""

import functools
import itertools
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm_mod.batch import Batch, Subset, attending, with_table

BLOCK = 4


@dataclass
class Request:
    computed: int  #: tokens of earlier steps
    query: int  #: tokens of this step
    blocks: list[int]  #: its row of the block table

    @property
    def end(self) -> int:
        return self.computed + self.query


def fake_build(cm: CommonAttentionMetadata, *, builder: Any) -> CommonAttentionMetadata:
    return cm


def make_batch(
    requests: list[Request], padded_requests: int = 0, padded_rows: int = 0, known_on_host: bool = True
) -> Batch:
    """A batch as the runners hand it over: padded requests have no query, padded rows no request."""
    total = len(requests) + padded_requests
    lengths = torch.tensor([r.query for r in requests] + [0] * padded_requests)
    starts = torch.zeros(total + 1, dtype=torch.int32)
    starts[1:] = lengths.cumsum(0)
    ends = torch.tensor([r.end for r in requests] + [0] * padded_requests, dtype=torch.int32)
    table = torch.full((total, max(len(r.blocks) for r in requests)), -7, dtype=torch.int32)
    for row, request in enumerate(requests):
        table[row, : len(request.blocks)] = torch.tensor(request.blocks)
    positions = [p for r in requests for p in range(r.computed, r.end)]
    # Interleaved tables make the runner's own slots meaningless, and shorter than positions would need.
    slots = [
        r.blocks[p // BLOCK] * BLOCK + p % BLOCK if p // BLOCK < len(r.blocks) else -3
        for r in requests
        for p in range(r.computed, r.end)
    ]
    cm = CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=ends,
        num_reqs=total,
        num_actual_tokens=len(positions) + padded_rows,
        max_query_len=int(lengths.max()),
        max_seq_len=int(ends.max()),
        block_table_tensor=table,
        slot_mapping=torch.tensor(slots + [-1] * padded_rows),
        positions=torch.tensor(positions + [0] * padded_rows),
        is_prefilling=torch.tensor([r.computed == 0 for r in requests] + [False] * padded_requests),
        seq_lens_cpu_upper_bound=ends if known_on_host else None,
    )
    cm.compute_num_computed_tokens()  # cached, as another builder may have done
    builder = SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=BLOCK))
    return Batch(cm, functools.partial(fake_build, builder=builder))


@st.composite
def requests_and_padding(draw: st.DrawFn, layers: int = 1) -> tuple[list[Request], int, int]:
    requests, taken = [], 0
    order = draw(st.permutations(range(1, 60 * layers)))  # no block belongs to two requests
    for _ in range(draw(st.integers(1, 5))):
        computed, query = draw(st.integers(0, 12)), draw(st.integers(1, 9))
        need = -(-(computed + query) // BLOCK) * layers
        requests.append(Request(computed, query, list(order[taken : taken + need])))
        taken += need
    return requests, draw(st.integers(0, 3)), draw(st.integers(0, 4))


def rows_of(requests: list[Request]) -> list[tuple[int, int]]:
    """(request, position) of each query token."""
    return [(n, p) for n, r in enumerate(requests) for p in range(r.computed, r.end)]


def own_slots(request: Request) -> list[int]:
    return [b * BLOCK + i for b in request.blocks for i in range(BLOCK)]


@given(requests_and_padding(), st.booleans())
def test_what_is_read(case: tuple[list[Request], int, int], known_on_host: bool) -> None:
    requests, padded_requests, padded_rows = case
    batch = make_batch(requests, padded_requests, padded_rows, known_on_host)
    assert batch.num_requests == len(requests)
    assert batch.num_tokens == sum(r.query for r in requests)
    assert batch.lengths_host.tolist() == [r.query for r in requests]
    assert batch.computed_host.tolist() == [r.computed for r in requests]
    assert batch.anchors.tolist() == [r.blocks[0] for r in requests]
    assert batch.request_of_token_host.tolist() == [n for n, _ in rows_of(requests)]
    assert batch.fresh_host.tolist() == [n for n, r in enumerate(requests) if r.computed == 0]


@given(requests_and_padding(), st.data())
def test_whole_requests(case: tuple[list[Request], int, int], data: st.DataObject) -> None:
    requests, padded_requests, padded_rows = case
    batch = make_batch(requests, padded_requests, padded_rows)
    keep = data.draw(st.lists(st.booleans(), min_size=len(requests), max_size=len(requests)).filter(any))
    subset = batch.whole_requests(torch.tensor(keep), None)
    rows = rows_of(requests)
    tokens = [row for row, (n, _) in enumerate(rows) if keep[n]]
    kept = [r for n, r in enumerate(requests) if keep[n]]
    assert subset.tokens.tolist() == tokens
    assert subset.slots is not None and subset.slots.tolist() == [
        requests[n].blocks[p // BLOCK] * BLOCK + p % BLOCK for n, p in rows if keep[n]
    ]
    check_reduced(
        subset.metadata, kept, [r.query for r in kept], [r.end for r in kept], [p for n, p in rows if keep[n]]
    )
    assert batch.whole_requests(torch.tensor(keep), None) is subset  # built once, however many layers share it


def check_reduced(
    cm: CommonAttentionMetadata, requests: list[Request], queries: list[int], ends: list[int], positions: list[int]
) -> None:
    starts = [sum(queries[:n]) for n in range(len(queries) + 1)]
    assert cm.query_start_loc.tolist() == cm.query_start_loc_cpu.tolist() == starts
    assert cm.query_start_loc.dtype == cm.query_start_loc_cpu.dtype == torch.int32
    assert cm.seq_lens.tolist() == ends and cm.seq_lens.dtype == torch.int32
    assert cm.seq_lens_cpu_upper_bound is not None and cm.seq_lens_cpu_upper_bound.tolist() == ends
    assert (cm.num_reqs, cm.num_actual_tokens) == (len(requests), sum(queries))
    assert (cm.max_query_len, cm.max_seq_len) == (max(queries), max(ends))
    for row, request in zip(cm.block_table_tensor.tolist(), requests, strict=True):
        assert row[: len(request.blocks)] == request.blocks
    assert cm.positions is not None and cm.positions.tolist() == positions
    assert cm.is_prefilling is not None and cm.is_prefilling.tolist() == [r.computed == 0 for r in requests]
    assert len(cm.slot_mapping) == sum(queries)
    # Derived values would be those of the whole batch.
    assert cm.compute_num_computed_tokens().tolist() == [e - q for e, q in zip(ends, queries, strict=True)]


@given(requests_and_padding(), st.data())
def test_packed_tokens(case: tuple[list[Request], int, int], data: st.DataObject) -> None:
    """KV of kept tokens lies densely behind what is stored, inside the request's own blocks."""
    requests, padded_requests, padded_rows = case
    batch = make_batch(requests, padded_requests, padded_rows)
    stored = [data.draw(st.integers(0, r.computed)) for r in requests]
    rows = rows_of(requests)
    keep = data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)).filter(any))
    counts = batch.tokens_per_request(torch.tensor(keep)).tolist()
    assert counts == [sum(k for k, (n, _) in zip(keep, rows, strict=True) if n == m) for m in range(len(requests))]
    subset = batch.packed_tokens(torch.tensor(keep), torch.tensor(stored))

    expected_slots, fill = [], list(stored)
    for kept, (n, _) in zip(keep, rows, strict=True):
        if kept:
            expected_slots.append(own_slots(requests[n])[fill[n]])
            fill[n] += 1
    assert subset.tokens.tolist() == [row for row, kept in enumerate(keep) if kept]
    assert subset.slots is not None and subset.slots.tolist() == expected_slots
    assert len(set(expected_slots)) == len(expected_slots)
    active = [n for n in range(len(requests)) if counts[n]]
    check_reduced(
        subset.metadata,
        [requests[n] for n in active],
        [counts[n] for n in active],
        [fill[n] for n in active],
        [p for kept, (_, p) in zip(keep, rows, strict=True) if kept],
    )


@given(requests_and_padding(), st.data())
def test_packing_in_chunks_fills_the_same_slots(case: tuple[list[Request], int, int], data: st.DataObject) -> None:
    """Prefilled at once or in chunks (then token by token): a kept token's K/V lies in the same place."""
    [whole, *_], _, _ = case
    keep = data.draw(st.lists(st.booleans(), min_size=whole.end, max_size=whole.end))
    cuts = sorted({0, whole.end, *data.draw(st.sets(st.integers(1, whole.end)))})
    slots, stored = [], 0
    for start, end in itertools.pairwise(cuts):
        batch = make_batch([Request(start, end - start, whole.blocks)])
        part = torch.tensor(keep[start:end])
        if part.any():
            subset = batch.packed_tokens(part, torch.tensor([stored]))
            assert subset.slots is not None
            slots += subset.slots.tolist()
            stored += int(part.sum())
            assert subset.metadata.seq_lens.tolist() == [stored]
    assert slots == own_slots(whole)[: sum(keep)]


@pytest.mark.parametrize("padding", [0, 1, 5])
@given(case=requests_and_padding(layers=3), data=st.data())
def test_split_pages(padding: int, case: tuple[list[Request], int, int], data: st.DataObject) -> None:
    """Entry b * L + l of a row is layer l's page of token block b; the runner pads rows to its own alignment."""
    layers, names = 3, ["x", "y", "z"]
    requests, padded_requests, padded_rows = case
    for request in requests:
        request.blocks += [99] * padding
    batch = make_batch(requests, padded_requests, padded_rows)
    pages = batch.split_pages(names)
    rows = rows_of(requests)
    for layer in range(layers):
        for n, request in enumerate(requests):
            own = [request.blocks[b * layers + layer] for b in range(-(-request.end // BLOCK))]
            assert pages.tables[layer, n, : len(own)].tolist() == own
        expected = [requests[n].blocks[p // BLOCK * layers + layer] * BLOCK + p % BLOCK for n, p in rows]
        assert pages.slots[layer].tolist() == expected
    assert len(set(pages.slots.flatten().tolist())) == pages.slots.numel(), "a slot is shared"

    keep = data.draw(st.lists(st.booleans(), min_size=len(requests), max_size=len(requests)).filter(any))
    for layer, name in enumerate(names):
        subset = batch.whole_requests(torch.tensor(keep), name)
        assert subset.slots is not None and subset.slots.tolist() == pages.slots[layer][subset.tokens].tolist()
        assert subset.metadata.block_table.tolist() == pages.tables[layer][torch.tensor(keep)].tolist()


def test_a_table_is_set_on_a_copy() -> None:
    metadata = SimpleNamespace(block_table=1, other=2)
    assert vars(with_table(metadata, 5)) == {"block_table": 5, "other": 2}  # type: ignore[arg-type]
    assert metadata.block_table == 1


def test_attending_ends_with_its_block() -> None:
    context: Any = SimpleNamespace(attn_metadata={"a": 1, "b": 2}, slot_mapping={"a": 3, "b": 4})
    subset = Subset(torch.tensor([0]), metadata=5, slots=torch.tensor([6]))

    def run() -> None:
        with attending(context, "a", subset):
            assert context.attn_metadata == {"a": 5, "b": 2} and context.slot_mapping["a"] is subset.slots
            raise KeyError("boom")

    with pytest.raises(KeyError, match="boom"):
        run()
    assert context.attn_metadata == {"a": 1, "b": 2} and context.slot_mapping == {"a": 3, "b": 4}
