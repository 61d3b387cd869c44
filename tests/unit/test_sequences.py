"""Decisions of requests: whatever the chunks and the neighbours, what the whole prompt would give."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.batches import step
from vllm_mod.kept import Kept
from vllm_mod.kv.messages import NewPages, Report, Start, StepMessage
from vllm_mod.sequences import SequenceDecisions, SequenceState
from vllm_mod.stats import RoutingCounts
from vllm_mod.step import Route, Router

HIDDEN, SIZE, LAYERS = 5, 4, (2, 4)
CUTOFFS = (0.1, -0.2)


def routes() -> list[Route]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for column, layer in enumerate(LAYERS):
        router = Router(HIDDEN)
        router.weight.data = torch.randn(1, HIDDEN, generator=generator)
        made.append(Route(layer, column, router, CUTOFFS[column]))
    return made


ROUTES = routes()


def inputs(seed: int, length: int) -> torch.Tensor:
    """A request's hidden states `[C, length, hidden]`, one per routed layer."""
    return torch.randn(len(LAYERS), length, HIDDEN, generator=torch.Generator().manual_seed(seed))


class Worker:
    """One worker's state, stepped by hand."""

    def __init__(self, dense_window: bool, caching: bool = True, slots: int = 8) -> None:
        self.state = SequenceState(CUTOFFS, slots, torch.device("cpu"))
        self.dense, self.size = dense_window, SIZE if caching else None
        self.counts = RoutingCounts(LAYERS)

    def start(self, *starts: Start) -> None:
        self.state.begin(StepMessage(list(starts), NewPages.none(1)))

    def run(self, requests: list[tuple[int, int, int]], x: list[torch.Tensor]) -> tuple[list[Kept], Report | None]:
        """requests: (slot, computed, tokens); x: all hidden states of each. Returns who keeps per layer, the report."""
        current = step(requests, padded_requests=1, padded_rows=2)
        decisions = SequenceDecisions(current, self.state, self.dense, (0, 1), self.size)
        kept = []
        for route in ROUTES:
            rows = [h[route.column, done : done + n] for h, (_, done, n) in zip(x, requests, strict=True)]
            padded = torch.cat([*rows, torch.full((2, HIDDEN), math.nan)])
            kept.append(decisions.kept(route, padded, True))
        return kept, decisions.close(self.counts)


def wanted(x: torch.Tensor, end: int, cutoffs: tuple[float, ...] = CUTOFFS) -> list[bool]:
    return [bool((x[c, :end] @ ROUTES[c].router.weight[0]).double().mean() >= cutoffs[c]) for c in range(len(LAYERS))]


def rows_kept(kept: Kept, total: int) -> list[int]:
    if kept.subset is None:
        return list(range(total)) if kept.all else []
    return kept.subset.tokens.tolist()


@given(st.data())
def test_windows_in_chunks(data: st.DataObject) -> None:
    """Tokens of the window keep, later ones follow; sums are told at the ends of blocks and of the window."""
    worker = Worker(dense_window=True)
    number = data.draw(st.integers(1, 3))
    lengths = [data.draw(st.integers(1, 15)) for _ in range(number)]
    ends = [min(data.draw(st.sampled_from([1, 3, 4, 6, 8, 99])), n) for n in lengths]
    x = [inputs(seed, n + 3) for seed, n in enumerate(lengths)]
    worker.start(*(Start(n + 1, 100 + n, end) for n, end in enumerate(ends)))
    done, decided = [0] * number, [False] * number
    told: list[dict[int, np.ndarray]] = [{} for _ in range(number)]
    while min(d - n for d, n in zip(done, lengths, strict=True)) < 3:
        active = [i for i in range(number) if done[i] < lengths[i] + 3]
        chunks = [data.draw(st.integers(1, lengths[i] + 3 - done[i])) for i in active]
        requests = [(i + 1, done[i], n) for i, n in zip(active, chunks, strict=True)]
        kept, report = worker.run(requests, [x[i] for i in active])
        for column in range(len(LAYERS)):
            expected, start = [], 0
            for i, n in zip(active, chunks, strict=True):
                keep = wanted(x[i], ends[i])[column]
                expected += [start + t for t in range(n) if keep or done[i] + t < ends[i]]
                start += n
            assert rows_kept(kept[column], start) == expected
        for i, n in zip(active, chunks, strict=True):
            done[i] += n
            scored = report.scored.get(100 + i) if report else None
            complete = not decided[i] and done[i] >= ends[i]
            decided[i] |= complete
            assert (scored is not None and scored.keep is not None) == complete
            if scored is not None:
                told[i].update(enumerate(scored.sums, scored.first_block))
                assert scored.keep is None or scored.keep.tolist() == wanted(x[i], ends[i])
    for i in range(number):
        boundaries = sorted({*range(SIZE, ends[i] + 1, SIZE), ends[i]})
        assert sorted(told[i]) == [(b - 1) // SIZE for b in boundaries]
        for b in boundaries:
            sums = [(x[i][c, :b] @ ROUTES[c].router.weight[0]).double().sum() for c in range(len(LAYERS))]
            np.testing.assert_allclose(told[i][(b - 1) // SIZE], sums, rtol=1e-5, atol=1e-5)
    stats = worker.counts.take()
    assert stats is not None and stats.data["routed"] == {str(layer): number for layer in LAYERS}
    assert not worker.state.open


def test_a_prompt_that_goes_on_from_the_cache() -> None:
    """The sums of its cached tokens come with it."""
    x, worker = inputs(3, 12), Worker(dense_window=True)
    sums = tuple(float((x[c, :4] @ ROUTES[c].router.weight[0]).double().sum()) for c in range(2))
    worker.start(Start(2, 7, 6, computed=4, sums=sums))
    _, report = worker.run([(2, 4, 8)], [x])
    assert report is not None and report.scored[7].keep is not None
    assert report.scored[7].keep.tolist() == wanted(x, 6)
    assert report.scored[7].first_block == 1


def test_whole_prompts_follow_their_own_decision() -> None:
    """Version 1; nothing of a slot's previous owner is seen, and frozen decisions are not taken again."""
    worker, x, other = Worker(dense_window=False, caching=False), inputs(1, 9), inputs(2, 9)
    worker.start(Start(1, 1, 9))
    kept, report = worker.run([(1, 0, 9)], [x])
    assert [k.all for k in kept] == wanted(x, 9)
    assert report is not None and report.scored[1].sums.shape == (0, 2)
    worker.start(Start(1, 2, 5))
    kept, _ = worker.run([(1, 0, 5)], [other])
    assert [k.all for k in kept] == wanted(other, 5)
    frozen = tuple(not keep for keep in wanted(x, 9))
    worker.start(Start(1, 3, 9, keep=frozen))  # resumed: prompt and answer are prefilled again
    kept, report = worker.run([(1, 0, 9)], [x])
    assert [k.all for k in kept] == list(frozen) and report is None
    kept, _ = worker.run([(1, 9, 1)], [inputs(1, 10)])
    assert [k.all for k in kept] == list(frozen)
    stats = worker.counts.take()
    assert stats is not None and stats.data["routed"] == {"2": 2, "4": 2}


@pytest.mark.parametrize(("cutoffs", "keep"), [((-math.inf,) * 2, True), ((math.inf,) * 2, False)])
def test_a_dial_at_its_ends_is_exact(cutoffs: tuple[float, ...], keep: bool) -> None:
    worker, x = Worker(dense_window=True), inputs(1, 9).fill_(math.nan)
    worker.start(Start(1, 1, 4, cutoffs=cutoffs), Start(2, 2, 4))
    _, report = worker.run([(1, 0, 9), (2, 0, 9)], [x, x])
    assert report is not None
    assert report.scored[1].keep.tolist() == [keep] * 2  # type: ignore[union-attr]
    assert report.scored[2].keep.tolist() == [True] * 2  # type: ignore[union-attr]  # NaN keeps


def test_neighbours_do_not_matter() -> None:
    x = [inputs(seed, 11) for seed in range(3)]
    together, alone = Worker(dense_window=True), []
    together.start(*(Start(n + 1, n, 6) for n in range(3)))
    _, report = together.run([(n + 1, 0, 11) for n in range(3)], x)
    for n in range(3):
        worker = Worker(dense_window=True)
        worker.start(Start(5, n, 6))
        alone.append(worker.run([(5, 0, 11)], [x[n]])[1])
    assert report is not None
    for n in range(3):
        assert np.array_equal(report.scored[n].sums, alone[n].scored[n].sums)


def test_ranks_may_share_a_decision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where rows are exchanged inside the attention, what rank 0 decided holds."""
    worker, x = Worker(dense_window=True), inputs(1, 8)
    group: Any = SimpleNamespace(broadcast=lambda keep: 1 - keep)
    monkeypatch.setattr("vllm_mod.step.get_tp_group", lambda: group)
    for route in ROUTES:
        monkeypatch.setattr(route, "shares_rows", True)
    worker.start(Start(1, 1, 4))
    _, report = worker.run([(1, 0, 8)], [x])
    assert report is not None
    assert report.scored[1].keep.tolist() == [not keep for keep in wanted(x, 4)]  # type: ignore[union-attr]
