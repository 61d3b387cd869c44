"""Races between worker and scheduler that engine tests hardly ever meet."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

from vllm_mod.config import ModConfig
from vllm_mod.kv.connector import MoDConnector, NewDecisions
from vllm_mod.stats import RoutingCounts

from .test_pages import BLOCK, allocate, page_manager

LAYERS = 4


class Scheduler:
    """The calls that vLLM's scheduler makes, in its order."""

    def __init__(self, manager: Any = None) -> None:
        self.connector = connector(KVConnectorRole.SCHEDULER)
        self.manager = manager or page_manager(LAYERS, pages=LAYERS * 8)
        coordinator = SimpleNamespace(single_type_managers=[self.manager])
        pool = getattr(self.manager, "block_pool", None)
        self.connector.bind_kv_cache_manager(SimpleNamespace(coordinator=coordinator, block_pool=pool))

    @property
    def free(self) -> int:
        return self.manager.block_pool.get_num_free_blocks()

    def add(self, request: str, prompt: int = BLOCK) -> None:
        self.connector.on_new_request(SimpleNamespace(request_id=request, num_prompt_tokens=prompt))

    def run(self, request: str, tokens: int = BLOCK) -> int:
        """Schedule its (re-)prefill; returns the anchor."""
        allocate(self.manager, request, tokens)
        return self.manager.req_to_blocks[request][0].block_id

    def preempt(self, request: str) -> None:
        self.manager.free(request)

    def finish(self, request: str) -> None:
        assert self.connector.request_finished_all_groups(SimpleNamespace(request_id=request), ()) == (False, None)
        self.manager.free(request)

    def hear(self, message: NewDecisions | None) -> None:
        self.connector.update_connector_output(SimpleNamespace(kv_connector_worker_meta=message))

    def tell(self, new: list[str], resumed: list[str]) -> dict[int, tuple[str, int]]:
        output = SimpleNamespace(
            scheduled_new_reqs=[SimpleNamespace(req_id=i) for i in new],
            scheduled_cached_reqs=SimpleNamespace(resumed_req_ids=set(resumed)),
        )
        return self.connector.build_connector_meta(output).by_anchor


def connector(role: KVConnectorRole) -> MoDConnector:
    config = SimpleNamespace(kv_transfer_config=SimpleNamespace(kv_connector="MoDConnector"))
    return MoDConnector(config, role, None)


@pytest.fixture
def scheduler() -> Scheduler:
    return Scheduler()


def test_a_decision_frees_pages_before_the_next_schedule(scheduler: Scheduler) -> None:
    scheduler.add("a")
    scheduler.run("a")
    free = scheduler.free
    scheduler.hear(NewDecisions({"a": (1, 3)}))
    assert scheduler.free == free + 2
    scheduler.hear(None)  # most steps decide nothing
    scheduler.finish("a")
    assert scheduler.free == LAYERS * 8
    assert not scheduler.manager._skipped and not scheduler.connector._prompt_lengths


def test_a_decision_after_the_end_is_ignored_and_counted(scheduler: Scheduler) -> None:
    scheduler.add("a")
    scheduler.add("b")
    scheduler.run("a")
    scheduler.finish("a")  # max_tokens=1, or aborted while its prefill ran
    scheduler.run("b")  # perhaps in the pages of "a"
    free = scheduler.free
    scheduler.hear(NewDecisions({"a": (1, 3), "b": (2,)}))
    assert scheduler.connector.messages_ignored == 1
    assert scheduler.free == free + 1
    assert set(scheduler.manager._skipped) == {"b"}  # no entry that a later request could see


def test_a_decision_of_a_request_unheard_of_is_ignored(scheduler: Scheduler) -> None:
    scheduler.hear(NewDecisions({"ghost": (1,)}))
    assert scheduler.connector.messages_ignored == 1 and not scheduler.manager._skipped


def test_a_decision_after_preemption_holds_when_the_request_resumes(scheduler: Scheduler) -> None:
    scheduler.add("a")
    scheduler.run("a")
    scheduler.preempt("a")
    free = scheduler.free
    scheduler.hear(NewDecisions({"a": (0, 1, 3)}))
    assert scheduler.free == free, "it has no pages: those it had may be another's by now"
    scheduler.run("a", 3 * BLOCK)
    assert scheduler.free == free - 3 - 1  # three rows of layer 2, and the anchor
    assert scheduler.connector.messages_ignored == 0


def test_a_decision_after_resumption_frees_the_new_pages(scheduler: Scheduler) -> None:
    scheduler.add("a")
    scheduler.add("b")
    scheduler.run("a")
    scheduler.preempt("a")
    scheduler.run("b")
    scheduler.run("a", 2 * BLOCK)
    other = list(scheduler.manager.req_to_blocks["b"])
    scheduler.hear(NewDecisions({"a": (1,)}))
    assert [page.is_null for page in scheduler.manager.req_to_blocks["a"]] == [False, True, False, False] * 2
    assert scheduler.manager.req_to_blocks["b"] == other and not any(page.is_null for page in other)


def test_the_same_decision_again_changes_nothing(scheduler: Scheduler) -> None:
    scheduler.add("a")
    scheduler.run("a", 2 * BLOCK)
    for _ in range(2):
        scheduler.hear(NewDecisions({"a": (1, 3)}))
    assert scheduler.free == LAYERS * 8 - 4


def test_another_decision_stops_the_engine(scheduler: Scheduler) -> None:
    scheduler.add("a")
    scheduler.run("a")
    scheduler.hear(NewDecisions({"a": (1, 3)}))
    free = scheduler.free
    with pytest.raises(RuntimeError, match="request a"):
        scheduler.hear(NewDecisions({"a": (1,)}))
    assert scheduler.free == free


@pytest.mark.parametrize("layers", [(LAYERS,), (-1,), (1, 40)])
def test_a_layer_out_of_range_stops_the_engine(scheduler: Scheduler, layers: tuple[int, ...]) -> None:
    scheduler.add("a")
    scheduler.run("a")
    with pytest.raises(RuntimeError, match="request a"):
        scheduler.hear(NewDecisions({"a": layers}))


def test_ranks_must_agree() -> None:
    mine = NewDecisions({"a": (1,), "b": ()})
    assert mine.aggregate(NewDecisions({"a": (1,), "b": ()})).skipped == {"a": (1,), "b": ()}
    for other in ({"a": (1,)}, {"a": (2,), "b": ()}, {}):
        with pytest.raises(RuntimeError, match="ranks disagree"):
            mine.aggregate(NewDecisions(other))


def test_workers_hear_of_first_and_repeated_prefills(scheduler: Scheduler) -> None:
    """Model Runner V1 lists resumed requests apart, V2 among the new ones."""
    scheduler.add("a", prompt=BLOCK)
    scheduler.add("b", prompt=2)
    anchors = {request: scheduler.run(request) for request in "ab"}
    told = {anchors["a"]: ("a", BLOCK), anchors["b"]: ("b", 2)}
    assert scheduler.tell(["a"], ["b"]) == told
    assert scheduler.tell(["a", "b"], []) == told
    assert scheduler.tell([], []) == {}


def test_an_anchor_names_its_new_owner() -> None:
    scheduler = Scheduler(page_manager(LAYERS, pages=LAYERS))
    anchors = []
    for request, prompt in (("a", 1), ("b", 2), ("c", 3)):
        scheduler.add(request, prompt)
        anchors.append(scheduler.run(request))
        assert scheduler.tell([request], []) == {anchors[-1]: (request, prompt)}
        scheduler.finish(request)
    assert anchors[0] == anchors[2]  # the pool turns a row around each time


def test_stock_allocation_has_nothing_to_free() -> None:
    """`kv_reclaim: false`: the channel carries prompt lengths, decisions change no page."""
    blocks = {"a": [SimpleNamespace(block_id=7)]}
    scheduler = Scheduler(SimpleNamespace(req_to_blocks=blocks, free=lambda request: None))
    scheduler.add("a", prompt=5)
    assert scheduler.tell(["a"], []) == {7: ("a", 5)}
    scheduler.hear(NewDecisions({"a": (1,)}))
    scheduler.finish("a")
    scheduler.hear(NewDecisions({"a": (1,)}))
    assert scheduler.connector.messages_ignored == 1


def test_scheduler_statistics(scheduler: Scheduler) -> None:
    report = scheduler.connector.get_kv_connector_stats
    page = scheduler.manager.kv_cache_spec.page_size_bytes
    first = report()  # so that the counters are there from the start, at 0
    assert first is not None and first.data["kv"] == {"messages_ignored": 0, "pages_freed": 0, "bytes": 0, "tokens": 0}
    assert report() is None
    scheduler.add("a")
    scheduler.run("a", 2 * BLOCK)
    scheduler.hear(NewDecisions({"a": (1, 2, 3), "gone": ()}))
    stats = report()
    assert stats is not None
    assert stats.data["kv"] == {"messages_ignored": 1, "pages_freed": 6, "bytes": 2 * page, "tokens": 2 * BLOCK}
    assert report() is None
    scheduler.finish("a")
    stats = report()
    assert stats is not None and stats.data["kv"]["bytes"] == stats.data["kv"]["tokens"] == 0


class Worker:
    def __init__(self) -> None:
        self.connector = connector(KVConnectorRole.WORKER)
        config = ModConfig.parse({"version": 1, "granularity": "attn_sequence", "layers": [1, 3]}, "test")
        self.forgotten: set[str] = set()
        state = SimpleNamespace(forget=self.forgotten.update)
        self.connector.attach(SimpleNamespace(config=config, state=state, counts=RoutingCounts([1, 3])))  # type: ignore[arg-type]


def test_a_worker_sends_each_decision_once() -> None:
    worker = Worker().connector
    worker.publish(["a", None, "b"], torch.tensor([[True, False], [False, False], [True, True]]))
    message = worker.build_connector_worker_meta()
    assert message is not None and message.skipped == {"a": (3,), "b": ()}
    assert worker.build_connector_worker_meta() is None


@pytest.mark.parametrize("keep", [torch.ones(1, 3, dtype=torch.bool), torch.ones(2, 2, dtype=torch.bool)])
def test_a_row_of_the_wrong_length_stops_the_engine(keep: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="zip"):
        Worker().connector.publish(["a"], keep)


def test_a_worker_forgets_what_has_ended() -> None:
    worker = Worker()
    assert worker.connector.get_finished({"a", "b"}) == (None, None)
    assert worker.forgotten == {"a", "b"}


def test_a_dummy_run_is_told_nothing() -> None:
    assert Worker().connector.prefill(3) is None
