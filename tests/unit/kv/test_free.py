"""The queue of free blocks, against vLLM's own."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue, KVCacheBlock

from vllm_mod.kv import free
from vllm_mod.kv.free import FreePages

NUMBER = 24


def numbers(blocks: list[Any]) -> list[int]:
    return [block.block_id for block in blocks]


@given(st.lists(st.tuples(st.sampled_from(["take", "take_out", "front", "back"]), st.integers(0, 99)), max_size=60))
def test_the_order_is_that_of_vllms(steps):
    """Taken from the front or anywhere, given back to the front or the end: the same blocks in the same order."""
    theirs = FreeKVCacheBlockQueue([KVCacheBlock(n) for n in range(NUMBER)])
    blocks = [KVCacheBlock(n) for n in range(NUMBER)]
    their_blocks = {block.block_id: block for block in theirs.get_all_free_blocks()}
    ours, used = FreePages(blocks, np.arange(NUMBER)), []
    few, free._FEW = free._FEW, 4
    try:
        for what, n in steps:
            waiting = numbers(theirs.get_all_free_blocks())
            if what == "take":
                count = n % (len(waiting) + 1)
                taken = ours.take(count).tolist()
                assert numbers(theirs.popleft_n(count)) == taken
                used += taken
            elif what == "take_out" and waiting:
                chosen = sorted({waiting[n % len(waiting)], waiting[-1 - n // 2 % len(waiting)]})
                for number in chosen:
                    theirs.remove(their_blocks[number])
                ours.take_out(np.array(chosen))
                used += chosen
            elif what in ("front", "back") and used:
                given_back, used = used[: n % len(used) + 1], used[n % len(used) + 1 :]
                give = theirs.append_n if what == "back" else theirs.prepend_n
                give([their_blocks[number] for number in given_back])
                ours.give(np.array(given_back), last=what == "back")
            assert numbers(ours.get_all_free_blocks()) == numbers(theirs.get_all_free_blocks())
            assert ours.num_free_blocks == theirs.num_free_blocks
    finally:
        free._FEW = few


def test_a_prefix_that_is_read_again_and_again_fills_no_memory():
    queue = FreePages([KVCacheBlock(n) for n in range(100)], np.arange(100))
    for _ in range(1000):
        queue.take_out(np.arange(50))
        queue.give(np.arange(50), last=True)
    assert queue._places <= 2 * 100 + free._FEW


def test_more_than_there_are():
    queue = FreePages([KVCacheBlock(n) for n in range(3)], np.arange(1, 3))
    with pytest.raises(ValueError, match="3 blocks are wanted, 2 are free"):
        queue.take(3)
    assert queue.num_free_blocks == 2
