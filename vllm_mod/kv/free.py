"""vLLM's queue of free blocks, many at a time.

vLLM's own is a linked list, a Python object per block. A token block of a routed request takes a page per layer, so
blocks come and go by the thousand: here they do so in arrays of block numbers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

#: The queue is rebuilt when more than so many places of it, and more than half, hold blocks that were taken out.
_FEW = 1024


class FreePages:
    """In place of a pool's `FreeKVCacheBlockQueue`, in the same order; numbers are int64 `[n]`, all different."""

    def __init__(self, blocks: Sequence[Any], numbers: np.ndarray) -> None:
        """blocks: all of the pool. numbers: those that are free, the first to be used first."""
        self._blocks = blocks
        self._tickets = np.zeros(len(blocks), np.int64)  #: of the chunk that a block waits in; 0: in none
        self._chunks: deque[tuple[int, np.ndarray]] = deque()  #: (ticket, numbers, those taken out since included)
        self._last_ticket = self._places = 0
        self.num_free_blocks = 0
        self.give(numbers, last=True)

    def give(self, numbers: np.ndarray, last: bool) -> None:
        """To be used after all others, or before them."""
        if not len(numbers):
            return
        self._last_ticket += 1
        self._tickets[numbers] = self._last_ticket
        (self._chunks.append if last else self._chunks.appendleft)((self._last_ticket, numbers))
        self.num_free_blocks += len(numbers)
        self._places += len(numbers)

    def take(self, number: int) -> np.ndarray:
        if number > self.num_free_blocks:
            raise ValueError(f"{number} blocks are wanted, {self.num_free_blocks} are free")
        parts, missing, all_wait = [], number, self._places == self.num_free_blocks
        while missing:
            ticket, numbers = self._chunks.popleft()
            first, rest = numbers[:missing], numbers[missing:]
            if len(rest):
                self._chunks.appendleft((ticket, rest))
            self._places -= len(first)
            parts.append(first if all_wait else first[self._tickets[first] == ticket])
            missing -= len(parts[-1])
        taken = parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, np.int64), *parts])
        self._tickets[taken] = 0
        self.num_free_blocks -= number
        return taken

    def take_out(self, numbers: np.ndarray) -> None:
        """From wherever they wait: they are in use again."""
        self._tickets[numbers] = 0
        self.num_free_blocks -= len(numbers)
        if self._places - self.num_free_blocks > max(_FEW, self.num_free_blocks):
            waiting = [(ticket, numbers[self._tickets[numbers] == ticket]) for ticket, numbers in self._chunks]
            self._chunks = deque((ticket, numbers) for ticket, numbers in waiting if len(numbers))
            self._places = self.num_free_blocks

    # ---- what vLLM's pool calls

    def popleft(self) -> Any:
        return self.popleft_n(1)[0]

    def popleft_n(self, n: int) -> list[Any]:
        return [self._blocks[number] for number in self.take(n).tolist()]

    def remove(self, block: Any) -> None:
        self.take_out(np.array([block.block_id]))

    def append(self, block: Any) -> None:
        self.append_n([block])

    def append_n(self, blocks: Sequence[Any]) -> None:
        self.give(np.array([block.block_id for block in blocks], np.int64), last=True)

    def prepend_n(self, blocks: Sequence[Any]) -> None:
        self.give(np.array([block.block_id for block in blocks], np.int64), last=False)

    def get_all_free_blocks(self) -> list[Any]:
        waiting = (numbers[self._tickets[numbers] == ticket] for ticket, numbers in self._chunks)
        return [self._blocks[number] for numbers in waiting for number in numbers.tolist()]
