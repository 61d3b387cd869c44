"""What scheduler and workers tell each other in every step. Requests are named by numbers: ids may be used again.

scheduler -> worker   `StepMessage`: (re-)prefills that begin with this step, and pages newly given to requests
worker -> scheduler   `Report`: decisions newly taken, and the scores behind them
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorWorkerMetadata


@dataclass
class Start:
    """A request whose prefill, or re-prefill after a preemption, begins with this step. `R` routed layers."""

    slot: int  #: names the request on workers from now on: first entry of its row in the block table, 1 or more
    serial: int  #: names it to the scheduler
    window_end: int  #: `D`: its decisions are taken from its first `D` tokens
    computed: int = 0  #: its first tokens, whose KV was found in the prefix cache
    keep: tuple[bool, ...] | None = None  #: `[R]`: its decisions, where they are known; they are frozen then
    sums: tuple[float, ...] | None = None  #: `[R]`: of `w . x` over those of the computed tokens that lie in the window
    cutoffs: tuple[float, ...] | None = None  #: `[R]`: its own, in place of the checkpoint's
    counts: bool = False  #: the decisions are new: they belong into the statistics
    name: str = ""  #: the request's id, by which a runner may name a row


@dataclass
class NewPages:
    """Pages of `n` requests, in one array: it crosses a process boundary every step. `G` pages per token block."""

    slots: np.ndarray  #: int64 `[n]`
    firsts: np.ndarray  #: int64 `[n]`: the first token block that is new
    counts: np.ndarray  #: int64 `[n]`: how many are
    pages: np.ndarray  #: int32 `[sum(counts), G]`; 0 where a layer is skipped

    @classmethod
    def none(cls, width: int) -> NewPages:
        empty = np.zeros(0, np.int64)
        return cls(empty, empty, empty, np.zeros((0, width), np.int32))


@dataclass
class StepMessage(KVConnectorMetadata):
    starts: list[Start]
    pages: NewPages
    freed: list[int] = field(default_factory=list)  #: slots that nobody has any more, or another request now
    forward: bool = True  #: one is coming; without any, the last one that workers prepared was nobody's


@dataclass
class Scored:
    """What one request's tokens in the window scored in this step."""

    first_block: int  #: the first token block whose end, or the window's, was reached in this step
    sums: np.ndarray  #: float64 `[blocks, R]`: of `w . x` from the request's first token to that end
    keep: np.ndarray | None = None  #: bool `[R]`: the decisions, once the window is complete


class Report(KVConnectorWorkerMetadata):
    """Of one step and rank. What is on its way from the device is waited for when it is first read, or sent on."""

    def __init__(self, columns: tuple[int, ...], scored: dict[int, Scored] | Callable[[], dict[int, Scored]]) -> None:
        """columns: routed layers of the sender; pipeline stages have some each. scored: by serial number."""
        self.columns, self._scored = columns, scored

    @property
    def scored(self) -> dict[int, Scored]:
        if callable(self._scored):
            self._scored = self._scored()
        return self._scored

    def __getstate__(self) -> dict[str, Any]:
        return {"columns": self.columns, "_scored": self.scored}

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """Join the reports of two ranks. Raises RuntimeError where they disagree: pages would be corrupted."""
        assert isinstance(other, Report)
        if self.scored.keys() != other.scored.keys():
            raise RuntimeError(f"ranks report on different requests: {set(self.scored) ^ set(other.scored)}")
        same = self.columns == other.columns
        for serial, mine in self.scored.items():
            theirs = other.scored[serial]
            if same:
                if not _equal(mine.keep, theirs.keep):
                    raise RuntimeError(f"ranks disagree on routing decisions: {mine.keep} and {theirs.keep}")
                continue
            columns = list(other.columns)  # a tuple would index one element
            mine.sums[:, columns] = theirs.sums[:, columns]
            if mine.keep is not None and theirs.keep is not None:
                mine.keep[columns] = theirs.keep[columns]
        return self if same else Report((*self.columns, *other.columns), self.scored)


def _equal(left: np.ndarray | None, right: np.ndarray | None) -> bool:
    return left is right or (left is not None and right is not None and np.array_equal(left, right))
