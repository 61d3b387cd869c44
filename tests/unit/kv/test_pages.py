"""PageManager on vLLM's real block pool, against a model of who owns which page."""

import itertools

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from vllm.utils.math_utils import cdiv
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from vllm_mod.kv.pages import PageManager, PageSpec

BLOCK = 4  # tokens


def page_spec(layers: int) -> PageSpec:
    return PageSpec(block_size=BLOCK, num_kv_heads=2, head_size=8, dtype=torch.float32, num_layers=layers)


def page_manager(layers: int, pages: int) -> PageManager:
    pool = BlockPool(pages + 1, enable_caching=False, hash_block_size=BLOCK)  # one is the null page
    return PageManager(
        page_spec(layers), block_pool=pool, enable_caching=False, kv_cache_group_id=0, scheduler_block_size=BLOCK
    )


def allocate(manager: PageManager, request: str, tokens: int) -> list[int]:
    """What `KVCacheManager.allocate_slots` does; returns the row entries given to the worker."""
    expected = manager.get_num_blocks_to_allocate(request, tokens, (), 0, 0, tokens)
    before = manager.block_pool.get_num_free_blocks()
    new = manager.allocate_new_blocks(request, tokens, tokens)
    assert before - manager.block_pool.get_num_free_blocks() == expected
    return [page.block_id for page in new]


class PageMachine(RuleBasedStateMachine):
    """Requests come, grow, decide, are preempted, resume and end in any order."""

    @initialize(layers=st.integers(1, 6), rows=st.integers(2, 12))
    def start(self, layers: int, rows: int) -> None:
        self.layers, self.total = layers, layers * rows
        self.manager = page_manager(layers, self.total)
        self.tokens: dict[str, int] = {}  # running requests
        self.preempted: dict[str, int] = {}
        self.skipped: dict[str, frozenset[int]] = {}
        self.anchor: dict[str, int] = {}
        self.seen = 0

    def _try(self, request: str, tokens: int) -> bool:
        """Allocate if it fits, as the scheduler does."""
        need = self.manager.get_num_blocks_to_allocate(request, tokens, (), 0, 0, tokens)
        if need > self.manager.block_pool.get_num_free_blocks():
            return False
        allocate(self.manager, request, tokens)
        self.tokens[request] = tokens
        self.anchor.setdefault(request, self.manager.req_to_blocks[request][0].block_id)
        return True

    @rule(tokens=st.integers(1, 20))
    def submit(self, tokens: int) -> None:
        self.seen += 1
        self._try(f"r{self.seen}", tokens)

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), more=st.integers(0, 9))
    def grow(self, data: st.DataObject, more: int) -> None:
        request = data.draw(st.sampled_from(sorted(self.tokens)))
        self._try(request, self.tokens[request] + more)

    @precondition(lambda self: self.tokens or self.preempted)
    @rule(data=st.data())
    def decide(self, data: st.DataObject) -> None:
        """Also for a preempted request (the message was under way), and again (another rank's)."""
        request = data.draw(st.sampled_from(sorted(self.tokens | self.preempted)))
        layers = frozenset(data.draw(st.sets(st.integers(0, self.layers - 1))))
        free = self.manager.block_pool.get_num_free_blocks()
        if request in self.skipped:
            assert self.manager.skip_layers(request, sorted(self.skipped[request])) == 0
            if layers != self.skipped[request]:
                with pytest.raises(RuntimeError, match=request):
                    self.manager.skip_layers(request, sorted(layers))
            assert self.manager.block_pool.get_num_free_blocks() == free
            return
        rows = cdiv(self.tokens.get(request, 0), BLOCK)
        expected = rows * len(layers) - (1 if rows and 0 in layers else 0)
        assert self.manager.skip_layers(request, sorted(layers)) == expected
        assert self.manager.block_pool.get_num_free_blocks() == free + expected
        self.skipped[request] = layers

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(sorted(self.tokens)))
        self.manager.free(request)
        self.preempted[request] = self.tokens.pop(request)
        del self.anchor[request]

    @precondition(lambda self: self.preempted)
    @rule(data=st.data())
    def resume(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(sorted(self.preempted)))
        if self._try(request, self.preempted[request]):
            del self.preempted[request]

    @precondition(lambda self: self.tokens or self.preempted)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(sorted(self.tokens | self.preempted)))
        self.manager.forget(request)  # the connector hears of the end before the blocks are freed
        self.manager.free(request)
        for table in (self.tokens, self.preempted, self.skipped, self.anchor):
            table.pop(request, None)

    @invariant()
    def every_page_has_one_owner(self) -> None:
        owned: list[int] = []
        for request, tokens in self.tokens.items():
            row = self.manager.req_to_blocks[request]
            assert len(row) == cdiv(tokens, BLOCK) * self.layers or len(row) % self.layers == 0
            assert len(row) >= cdiv(tokens, BLOCK) * self.layers
            assert row[0].block_id == self.anchor[request] and not row[0].is_null
            for entry, page in enumerate(row):
                layer_skipped = entry % self.layers in self.skipped.get(request, ())
                assert page.is_null == (layer_skipped and entry > 0)
            owned += [page.block_id for page in row if not page.is_null]
        assert len(set(owned)) == len(owned), "a page has two owners"
        assert all(self.manager.block_pool.blocks[i].ref_cnt == 1 for i in owned)
        assert self.manager.block_pool.get_num_free_blocks() == self.total - len(owned)
        assert self.manager.block_pool.null_block.ref_cnt == 0, "the null page was freed"

    @invariant()
    def nothing_is_kept_of_the_past(self) -> None:
        assert set(self.manager._skipped) == set(self.skipped)
        assert {r for r, row in self.manager.req_to_blocks.items() if row} == set(self.tokens)

    def teardown(self) -> None:
        if hasattr(self, "manager"):
            for request in [*self.tokens, *self.preempted]:
                self.manager.forget(request)
                self.manager.free(request)
            assert self.manager.block_pool.get_num_free_blocks() == self.total
            assert not self.manager._skipped and not self.manager.req_to_blocks


TestPageMachine = PageMachine.TestCase
TestPageMachine.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


def test_rows_are_interleaved() -> None:
    """Entry b * L + l is layer l's page of token block b."""
    manager = page_manager(layers=3, pages=30)
    allocate(manager, "a", 2 * BLOCK)
    assert manager.skip_layers("a", [1]) == 2
    row = manager.req_to_blocks["a"]
    assert [page.is_null for page in row] == [False, True, False] * 2
    assert len(allocate(manager, "a", 3 * BLOCK)) == 3
    assert [page.is_null for page in row] == [False, True, False] * 3


def pages_of_layer(manager: PageManager, request: str, layer: int, layers: int) -> list[int]:
    return [page.block_id for page in manager.req_to_blocks[request][layer::layers]]


def side_by_side(pages: list[int]) -> bool:
    return all(abs(b - a) == 1 for a, b in itertools.pairwise(pages))


def test_pages_of_a_layer_lie_side_by_side() -> None:
    """In a fresh pool, and in one whose pages came back from a request that ended."""
    manager = page_manager(layers=3, pages=15)
    for _ in range(3):
        allocate(manager, "a", 5 * BLOCK)
        assert all(side_by_side(pages_of_layer(manager, "a", layer, 3)) for layer in range(3))
        manager.free("a")


def test_pages_of_skipped_layers_come_back_side_by_side() -> None:
    manager = page_manager(layers=3, pages=15)
    allocate(manager, "a", 5 * BLOCK)
    manager.skip_layers("a", [2])
    manager.skip_layers("b", [0, 2])
    allocate(manager, "b", 4 * BLOCK)
    assert side_by_side(pages_of_layer(manager, "b", 1, 3))


def test_a_page_given_back_is_used_again() -> None:
    manager = page_manager(layers=4, pages=4)
    allocate(manager, "a", 1)
    assert manager.get_num_blocks_to_allocate("b", 1, (), 0, 0, 1) > manager.block_pool.get_num_free_blocks()
    given_back = {manager.req_to_blocks["a"][i].block_id for i in (1, 2, 3)}
    manager.skip_layers("a", [1, 2, 3])
    manager.skip_layers("b", [3])
    assert set(allocate(manager, "b", 1)) - {0} == given_back


def test_all_layers_skipped_takes_one_page() -> None:
    manager = page_manager(layers=4, pages=8)
    manager.skip_layers("a", range(4))
    allocate(manager, "a", 5 * BLOCK)
    assert manager.block_pool.get_num_free_blocks() == 7
    assert manager.skip_layers("b", []) == 0  # nothing is skipped


@pytest.mark.parametrize("layers", [[4], [-1], [0, 99]])
def test_a_layer_that_is_not_there_stops_the_engine(layers: list[int]) -> None:
    manager = page_manager(layers=4, pages=8)
    allocate(manager, "a", 1)
    with pytest.raises(RuntimeError, match=r"request a skips layers"):
        manager.skip_layers("a", layers)
    assert manager.block_pool.get_num_free_blocks() == 4
    assert "a" not in manager._skipped


def test_the_spec_is_registered_beside_vllms_own() -> None:
    assert KVCacheSpecRegistry.get_manager_class(page_spec(4)) is PageManager
    stock = FullAttentionSpec(block_size=BLOCK, num_kv_heads=2, head_size=8, dtype=torch.float32)
    assert KVCacheSpecRegistry.get_manager_class(stock) is FullAttentionManager


def test_specs_are_one_group_only_when_equal() -> None:
    assert page_spec(4).is_uniform_with_collection({"a": page_spec(4), "b": page_spec(4)})
    assert not page_spec(4).is_uniform_with_collection({"a": page_spec(4), "b": page_spec(3)})
    stock = FullAttentionSpec(block_size=BLOCK, num_kv_heads=2, head_size=8, dtype=torch.float32)
    assert not page_spec(4).is_uniform_with_collection({"a": page_spec(4), "b": stock})
