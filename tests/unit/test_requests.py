"""What a worker remembers of its requests, and what it must never see of another."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm_mod.requests import PackedCounts, SequenceDecisions

INF = float("inf")


def batch(*rows: tuple[int, int, int]) -> Any:
    """One (anchor, computed tokens, query tokens) per request."""
    anchors, computed, lengths = (torch.tensor(column) for column in zip(*rows, strict=True))
    return SimpleNamespace(
        anchors=anchors,
        computed_host=computed,
        fresh_host=(computed == 0).nonzero().flatten(),
        lengths_host=lengths,
        starts_host=lengths.cumsum(0) - lengths,
        device=torch.device("cpu"),
        upload=lambda values: values,
    )


def allocated(state: Any) -> Any:
    """For a KV cache of 64 blocks."""
    state.running.allocate(64, torch.device("cpu"))
    return state


class Channel:
    """What the scheduler says of this step's prefills: anchor -> (request, prompt length)."""

    def __init__(self, **requests: tuple[int, int]) -> None:
        self._told = {anchor: (request, prompt) for request, (anchor, prompt) in requests.items()}

    def prefill(self, anchor: int) -> tuple[str, int] | None:
        return self._told.get(anchor)


WEIGHT = torch.tensor([[1.0]])  # so that x is its own score


def step(
    state: SequenceDecisions,
    rows: list[tuple[int, int, int]],
    channel: Channel | None,
    x: list[float],
    columns: int = 1,
) -> list[list[bool]]:
    """One forward: decisions `[R][routed]`, with cutoff 0."""
    state.open(batch(*rows), channel)
    inputs = torch.tensor(x)[:, None]
    kept = [state.decide(column, inputs, WEIGHT, 0.0).tolist() for column in range(columns)]
    state.close()
    return [list(row) for row in zip(*kept, strict=True)]


KEEP, SKIP = 1.0, -1.0


def test_the_mean_over_the_prompt_decides_and_is_frozen() -> None:
    state = allocated(SequenceDecisions(1))
    channel = Channel(a=(5, 3), b=(9, 2))
    first = step(state, [(5, 0, 3), (9, 0, 2)], channel, [3, -1, -1, 1, -2])
    assert first == [[True], [False]]  # means 1/3 and -1/2
    for n in range(3):  # decoding: what a generated token would say does not count, nor do neighbours
        assert step(state, [(9, 2 + n, 1), (5, 3 + n, 1)], Channel(), [KEEP, SKIP]) == [[False], [True]]


def test_what_ranks_agreed_on_is_taken_and_frozen() -> None:
    state, x = allocated(SequenceDecisions(1)), torch.tensor([[KEEP], [SKIP]])
    state.open(batch((5, 0, 1), (9, 0, 1)), None)
    assert state.decide(0, x, WEIGHT, 0.0, torch.logical_not).tolist() == [False, True]
    state.close()
    assert step(state, [(5, 1, 1), (9, 1, 1)], None, [KEEP, SKIP]) == [[False], [True]]


def test_a_previous_owner_of_the_anchor_is_never_seen() -> None:
    state = allocated(SequenceDecisions(2))
    assert step(state, [(7, 0, 1)], Channel(a=(7, 1)), [SKIP], columns=2) == [[False, False]]
    state.forget({"a"})
    assert step(state, [(7, 0, 1)], Channel(b=(7, 1)), [KEEP], columns=2) == [[True, True]]
    assert step(state, [(7, 1, 1)], Channel(), [SKIP], columns=2) == [[True, True]]
    assert set(state._by_request) == {"b"}


def test_a_resumed_request_keeps_its_decision() -> None:
    """Deciding again would answer otherwise: the prompt's rows read differently, and generated tokens follow them."""
    state = allocated(SequenceDecisions(1))
    step(state, [(3, 0, 2)], Channel(a=(3, 2)), [SKIP, SKIP])
    assert step(state, [(8, 0, 4)], Channel(a=(8, 2)), [KEEP] * 4) == [[False]]
    assert not state.undecided.numel(), "it is not reported as new again"
    assert step(state, [(8, 4, 1)], Channel(), [KEEP]) == [[False]]
    state.forget({"a"})
    assert step(state, [(3, 0, 2)], Channel(a=(3, 2)), [KEEP, KEEP]) == [[True]]  # the id of an ended request


def test_generated_tokens_never_count() -> None:
    """Resumed before the worker had decided anything (it was restarted, say): only the prompt's rows are averaged."""
    state = allocated(SequenceDecisions(1))
    rows = [(4, 0, 2), (3, 0, 5), (6, 2, 1)]
    channel = Channel(a=(3, 2), b=(4, 2))
    assert step(state, rows, channel, [1, 1, SKIP, SKIP, 9, 9, 9, 5]) == [[True], [False], [False]]


def test_old_and_new_requests_in_one_batch() -> None:
    state = allocated(SequenceDecisions(1))
    step(state, [(3, 0, 1)], Channel(a=(3, 1)), [SKIP])
    answer = step(state, [(8, 0, 2), (3, 1, 1), (5, 0, 1)], Channel(b=(8, 2), c=(5, 1)), [KEEP, KEEP, KEEP, SKIP])
    assert answer == [[True], [False], [False]]
    assert state.new_requests == ["b", "c"] and state.undecided.tolist() == [0, 2]


def test_a_prompt_in_pieces_is_refused() -> None:
    state = allocated(SequenceDecisions(1))
    with pytest.raises(RuntimeError, match=r"request a: 2 of 5 prompt tokens.*chunked prefill"):
        state.open(batch((3, 0, 2)), Channel(a=(3, 5)))


def test_a_dummy_run_leaves_nothing_behind() -> None:
    """Warm-up without a channel, and rows the scheduler has not named: decided, not remembered by request."""
    state = allocated(SequenceDecisions(1))
    assert step(state, [(0, 0, 2)], None, [SKIP, SKIP]) == [[False]]
    assert step(state, [(1, 0, 2)], Channel(), [KEEP, KEEP]) == [[True]]
    assert not state._by_request
    assert state.new_requests == [None]
    assert step(state, [(0, 0, 1)], Channel(a=(0, 1)), [KEEP]) == [[True]]


@pytest.mark.parametrize(("cutoff", "kept"), [(-INF, True), (INF, False)])
def test_an_infinite_cutoff_asks_no_router(cutoff: float, kept: bool) -> None:
    state = allocated(SequenceDecisions(2))
    state.open(batch((3, 0, 2)), Channel(a=(3, 2)))
    assert state.decide(1, torch.full((2, 1), torch.nan), WEIGHT, cutoff).tolist() == [kept]
    state.close()
    assert state._by_request["a"].tolist() == [False, kept]


@given(st.data())
def test_many_steps_against_a_dictionary(data: st.DataObject) -> None:
    """Requests begin, decode, are preempted, resume at another anchor and end; anchors go from hand to hand."""
    state, free, anchors, decided, generated = allocated(SequenceDecisions(1)), list(range(6)), {}, {}, {}
    seen = 0
    for _ in range(data.draw(st.integers(1, 12))):
        rows, told, x, expected = [], {}, [], []
        for request in list(anchors):  # running
            match data.draw(st.sampled_from(["decode", "preempt", "end"])):
                case "decode":
                    generated[request] += 1
                    rows.append((anchors[request], 1 + generated[request], 1))
                    x.append(data.draw(st.sampled_from([KEEP, SKIP])))
                    expected.append(decided[request])
                case "preempt":
                    free.append(anchors.pop(request))
                case "end":
                    free.append(anchors.pop(request))
                    del decided[request], generated[request]
                    state.forget({request})
        candidates = [r for r in decided if r not in anchors] + [f"r{seen + n}" for n in range(3)]
        seen += 3
        for request in candidates:
            if not free or not data.draw(st.booleans()):
                continue
            anchors[request] = free.pop(data.draw(st.integers(0, len(free) - 1)))
            generated.setdefault(request, 0)
            score = data.draw(st.sampled_from([KEEP, SKIP]))
            decided.setdefault(request, score == KEEP)
            rows.append((anchors[request], 0, 1 + generated[request]))
            x += [score] + [-score] * generated[request]
            told[request] = (anchors[request], 1)
            expected.append(decided[request])
        if rows:
            assert step(state, rows, Channel(**told), x) == [[e] for e in expected]
        assert set(state._by_request) == set(decided)


def packed(state: PackedCounts, rows: list[tuple[int, int, int]], counts: list[int]) -> list[int]:
    """One forward that stores `counts`; returns what was stored before."""
    state.open(batch(*rows), None)
    before = state.column(0)
    state.add(0, torch.tensor(counts))
    assert before.tolist() == (state.column(0) - torch.tensor(counts)).tolist(), "a column is a copy"
    state.close()
    return before.tolist()


def test_packed_counts_add_up_and_start_at_zero() -> None:
    state = allocated(PackedCounts(2))
    assert packed(state, [(3, 0, 4), (40, 0, 2)], [2, 0]) == [0, 0]
    assert packed(state, [(40, 2, 1), (3, 4, 3)], [1, 3]) == [0, 2]
    assert packed(state, [(3, 7, 1)], [0]) == [5]
    # Block 3 has a new owner, or its request was preempted: its row starts again.
    assert packed(state, [(3, 0, 6), (40, 3, 1)], [4, 1]) == [0, 1]
    assert packed(state, [(3, 6, 1), (40, 4, 1)], [1, 1]) == [4, 2]
    state.open(batch((3, 7, 1)), None)
    assert state.column(1).tolist() == [0]  # another layer's count is its own
