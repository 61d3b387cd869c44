"""Decisions of tokens, and where the KV of kept ones is packed."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.batches import step
from vllm_mod.kv.messages import NewPages, Start, StepMessage
from vllm_mod.stats import RoutingCounts
from vllm_mod.step import Route, Router
from vllm_mod.tables import Layout
from vllm_mod.tokens import PackedDecisions, PackedState, TokenDecisions

from .test_rows import SIZE, page_tables

HIDDEN = 3


def route(cutoff: float = 0.0) -> Route:
    router = Router(HIDDEN)
    router.weight.data = torch.tensor([[1.0, 0.0, 0.0]])
    return Route(0, 0, router, cutoff)


def states(keep: list[bool]) -> torch.Tensor:
    x = torch.zeros(len(keep) + 2, HIDDEN)  # two padded rows
    x[: len(keep), 0] = torch.tensor([1.0 if k else -1.0 for k in keep])
    x[len(keep) :] = math.nan
    return x


@given(st.lists(st.booleans(), min_size=1, max_size=9))
def test_rows_of_a_sublayer_without_attention(keep: list[bool]) -> None:
    counts = RoutingCounts([0])
    kept = TokenDecisions(step([(1, 0, len(keep))], padded_rows=2), counts).kept(route(), states(keep), False)
    expected = [i for i, k in enumerate(keep) if k]
    found = kept.subset.tokens.tolist() if kept.subset else expected if kept.all else []
    assert found == expected and kept.none == (not expected) and kept.all == all(keep)
    stats = counts.take()
    assert stats is not None and (stats.data["kept"], stats.data["routed"]) == ({"0": len(expected)}, {"0": len(keep)})


def test_the_ends_are_exact() -> None:
    for cutoff in (-math.inf, math.inf):
        counts = RoutingCounts([0])
        kept = TokenDecisions(step([(1, 0, 2)], padded_rows=2), counts).kept(route(cutoff), states([True, False]), True)
        assert (kept.all, kept.none) == (cutoff < 0, cutoff > 0)


@given(st.data())
def test_packing(data: st.DataObject) -> None:
    """Token by token, over several steps: the k-th kept token of a request has the k-th place of its pages."""
    slots = [3, 6]
    tables, pages = page_tables([(slot, 0, 1) for slot in slots], Layout(["a"], [0]))
    state = PackedState(1, 8, torch.device("cpu"))
    state.stored[:] = 99  # of previous owners
    state.begin(StepMessage([Start(slot, slot, 0) for slot in slots], NewPages.none(1)))
    done, stored = [0, 0], [0, 0]
    for _ in range(data.draw(st.integers(1, 4))):
        chunks = [data.draw(st.integers(1, 5)) for _ in slots]
        keep = [data.draw(st.lists(st.booleans(), min_size=n, max_size=n)) for n in chunks]
        requests = [(slot, d, n) for slot, d, n in zip(slots, done, chunks, strict=True)]
        current = step(requests, tables, SIZE, padded_rows=2)
        decisions = PackedDecisions(current, RoutingCounts([0]), state)
        kept = decisions.kept(route(), states([k for ks in keep for k in ks]), True)
        decisions.close()
        places, row, rows = [], 0, []
        before = list(stored)
        for n, ks in enumerate(keep):
            for k in ks:
                if k:
                    rows.append(row)
                    places.append(pages[0, slots[n], stored[n] // SIZE] * SIZE + stored[n] % SIZE)
                    stored[n] += 1
                row += 1
        if kept.subset is not None:
            metadata, own = current.contexts_of("a", kept.subset)
            assert kept.subset.tokens.tolist() == rows and own.tolist() == places
            active = [n for n, ks in enumerate(keep) if any(ks)]
            assert metadata.seq_lens.tolist() == [stored[n] for n in active]
            assert metadata.block_table[:, 0].tolist() == [pages[0, slots[n], 0] for n in active]
        elif kept.all:  # places are positions
            assert before == done and rows == list(range(row))
        else:
            assert not rows
        done = [d + n for d, n in zip(done, chunks, strict=True)]
        assert state.stored[slots, 0].tolist() == stored
