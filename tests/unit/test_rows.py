"""`Rows` and `Step` against a brute-force reading of the same requests, token by token."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.batches import step
from vllm_mod.kv.messages import NewPages
from vllm_mod.rows import Subset, attending, pack, with_table
from vllm_mod.tables import Layout, PageTables

SIZE = 4
Request = tuple[int, int, int]


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[Request], int, int]:
    number = draw(st.integers(1, 5))
    slots = draw(st.permutations(range(1, 8)))[:number]
    requests = [(slot, draw(st.integers(0, 12)), draw(st.integers(1, 9))) for slot in slots]
    return requests, draw(st.integers(0, 3)), draw(st.integers(0, 4))


@given(batches(), st.booleans())
def test_what_is_read(case: tuple[list[Request], int, int], on_host: bool) -> None:
    requests, padded_requests, padded_rows = case
    rows = step(requests, padded_requests=padded_requests, padded_rows=padded_rows, on_host=on_host).rows
    assert (rows.num_requests, rows.num_tokens) == (len(requests), sum(query for _, _, query in requests))
    assert rows.computed_host.tolist() == [done for _, done, _ in requests]
    assert rows.request_of_token_host.tolist() == [n for n, (_, _, q) in enumerate(requests) for _ in range(q)]
    assert rows.place_host.tolist() == [i for _, _, q in requests for i in range(q)]


@given(batches(), st.data())
def test_the_first_rows_of_each(case: tuple[list[Request], int, int], data: st.DataObject) -> None:
    requests, padded_requests, padded_rows = case
    counts = [data.draw(st.integers(0, query)) for _, _, query in requests]
    rows = step(requests, padded_requests=padded_requests, padded_rows=padded_rows).rows
    if not 0 < sum(counts) < rows.num_tokens:
        return
    subset = rows.first_of_each(np.array(counts), with_attention=True)
    alone = rows.first_of_each(np.array(counts), with_attention=False)
    assert (alone.tokens.tolist(), alone.metadata) == (subset.tokens.tolist(), None)
    expected, start = [], 0
    for (_, _, query), count in zip(requests, counts, strict=True):
        expected += range(start, start + count)
        start += query
    assert subset.tokens.tolist() == expected
    assert sorted([*expected, *subset.others.tolist()]) == list(range(rows.num_tokens))
    active = [n for n, count in enumerate(counts) if count]
    cm = subset.metadata
    assert subset.requests is not None and subset.requests.tolist() == active
    assert cm.query_start_loc_cpu.diff().tolist() == [counts[n] for n in active]
    assert cm.seq_lens.tolist() == [requests[n][1] + counts[n] for n in active]
    assert (cm.num_reqs, cm.num_actual_tokens) == (len(active), len(expected))
    assert (cm.max_query_len, cm.max_seq_len) == (max(counts), max(cm.seq_lens.tolist()))
    assert cm.positions.tolist() == [requests[n][1] + i for n in active for i in range(counts[n])]
    assert cm.compute_num_computed_tokens().tolist() == [requests[n][1] for n in active]  # not the whole batch's


def page_tables(requests: list[Request], layout: Layout, seed: int = 0) -> tuple[PageTables, np.ndarray]:
    """Tables as messages fill them, some blocks at a time, and all pages `[G, S, B]`."""
    rng = np.random.default_rng(seed)
    pages = rng.permutation(np.arange(1, 1 + layout.width * 8 * 6)).reshape(layout.width, 8, 6).astype(np.int32)
    tables = PageTables(layout, 8, 6, torch.device("cpu"))
    for first, last in ((0, 1), (1, 4), (4, 6)):
        slots = np.array([slot for slot, _, _ in requests])
        new = np.concatenate([pages[:, slot, first:last].T for slot in slots])
        counts = np.full(len(slots), last - first)
        tables.update(NewPages(slots, np.full(len(slots), first), counts, new))
    return tables, pages


@pytest.mark.parametrize("layout", [Layout(["a", "b", "c"], [0, 1, 2]), Layout(["a", "b", "c"], [0, 0, 0])])
def test_pages_and_slots(layout: Layout) -> None:
    requests = [(3, 5, 7), (1, 0, 9), (7, 11, 1)]
    tables, pages = page_tables(requests, layout)
    current = step(requests, tables, SIZE, padded_requests=2, padded_rows=3)
    contexts, slots = current.contexts(SimpleNamespace(block_table=None))
    for name, column in zip(layout.names, layout.columns, strict=True):
        expected = [
            pages[column, slot, p // SIZE] * SIZE + p % SIZE
            for slot, done, q in requests
            for p in range(done, done + q)
        ]
        assert slots[name].tolist() == expected
        for row, (slot, done, query) in enumerate(requests):
            blocks = -(-(done + query) // SIZE)
            assert contexts[name].block_table[row, :blocks].tolist() == pages[column, slot, :blocks].tolist()
        subset = current.rows.first_of_each(np.array([2, 0, 1]), with_attention=True)
        reduced, own = current.contexts_of(name, subset)
        assert own.tolist() == [expected[0], expected[1], expected[16]]
        assert reduced.block_table[:, 0].tolist() == [pages[column, 3, 0], pages[column, 7, 0]]


def test_a_rehearsal_is_nobodys() -> None:
    """Without a message nothing is stored, whatever the block table holds."""
    tables, _ = page_tables([(3, 5, 7)], Layout(["a"], [0]))
    current = step([(3, 5, 7)], tables, SIZE)
    current.begun = False
    assert current.slots.tolist() == [0]
    assert set(current.pages.slots.flatten().tolist()) == {-1}
    assert current.pages.tables.sum() == 0


def test_what_a_layer_sees_meanwhile() -> None:
    context: Any = SimpleNamespace(attn_metadata={"a": "whole", "b": "whole"}, slot_mapping={"a": 1, "b": 1})

    def attend() -> None:
        with attending(context, "a", "part", torch.tensor(2)):
            assert context.attn_metadata == {"a": "part", "b": "whole"}
            assert context.slot_mapping == {"a": torch.tensor(2), "b": 1}
            raise RuntimeError

    with pytest.raises(RuntimeError):
        attend()
    assert context.attn_metadata == {"a": "whole", "b": "whole"}
    assert context.slot_mapping == {"a": 1, "b": 1}


def test_metadata_that_layers_share_is_copied() -> None:
    shared = SimpleNamespace(block_table=1, seq_lens=2)
    assert with_table(shared, torch.tensor(3)).block_table == 3
    assert shared.block_table == 1
    assert Subset(torch.tensor([False, True, True, False]), torch.tensor([1, 2])).others.tolist() == [0, 3]


def test_packed_arrays_are_what_they_were() -> None:
    """Of several types, empty ones and transposed ones among them; each begins where Triton wants pointers to."""
    arrays = [np.arange(5), np.zeros(0), np.array([[True, False]]), np.arange(6, dtype=np.int32).reshape(2, 3).T]
    packed, places = pack(arrays)
    for array, (first, last, dtype, shape) in zip(arrays, places, strict=True):
        assert first % 16 == 0
        found = packed[first:last].view(dtype).view(shape)
        assert found.dtype == torch.from_numpy(array).dtype and np.array_equal(found.numpy(), array)
