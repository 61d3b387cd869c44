"""The scheduler's side of the channel: who waits, what answers say, what is counted."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.sampling_params import SamplingParams

from vllm_mod.architectures import BaseShape
from vllm_mod.calibration import Calibration
from vllm_mod.config import ModConfig
from vllm_mod.knobs import EngineKnobs
from vllm_mod.kv import connector as module
from vllm_mod.kv.connector import MoDConnector
from vllm_mod.kv.messages import Report, Scored, StepMessage
from vllm_mod.plan import Plan

from .simulation import BLOCK, Simulation

CONFIG = ModConfig.parse(
    {"version": 2, "granularity": "attn_sequence", "layers": [1, 2], "window": 8, "cutoff": 0.0}, "test"
)  # fmt: skip
TABLE = Calibration.parse(
    {
        "operating_points": [{"target": 0.5, "kept": 0.5, "cutoff": [40.0, 50.0]}],
        "lowest_scores": [0.0, 10.0],
        "highest_scores": [99.0, 99.0],
    },
    "test",
)
LOAD = {"under_load": {"kept": 0.5, "waiting": [0, 4], "levels": 2}}


class Engine(Simulation):
    """A simulated engine, with the connector in it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, knobs: dict[str, Any], pages: int = 4 * 12) -> None:
        super().__init__(4, (1, 2), pages, 8, 0)
        plan = Plan(CONFIG, EngineKnobs.parse(knobs, "test"), BaseShape("", 4, 8, None), TABLE)
        monkeypatch.setattr(module, "plan_of", lambda _: plan)
        transfer = SimpleNamespace(kv_connector="MoDConnector")
        settings: Any = SimpleNamespace(kv_transfer_config=transfer)
        self.connector = MoDConnector(settings, KVConnectorRole.SCHEDULER, None)
        self.connector.bind_kv_cache_manager(self.kv)

    def arrive(self, length: int, **dial: Any) -> Any:
        simulated = self.add([length // 4, *(n % 2 for n in range(length - 1))], 3)
        del self.manager._live[simulated.name]
        simulated.request.sampling_params = SamplingParams(extra_args=dial or None)
        self.connector.on_new_request(simulated.request)
        return simulated

    def answer(self, simulated: Any) -> Any:
        return self.connector.request_finished_all_groups(simulated.request, ())[1]


def schedule(engine: Engine, simulated: Any) -> StepMessage:
    """Its whole prompt, without computing anything."""
    blocks, found, _ = engine.kv.get_computed_blocks(simulated.request)
    assert engine.connector.get_num_new_matched_tokens(simulated.request, found) == (0, False)
    number = simulated.request.num_tokens - found
    assert engine.kv.allocate_slots(simulated.request, number, found, blocks) is not None
    return engine.connector.build_connector_meta(SimpleNamespace(total_num_scheduled_tokens=number))


def hear(engine: Engine, message: StepMessage, keep: list[bool]) -> None:
    sums = np.array([[1.0 if k else -1.0 for k in keep]] * 2)
    scored = {start.serial: Scored(0, sums, np.array(keep)) for start in message.starts}
    engine.connector.update_connector_output(SimpleNamespace(kv_connector_worker_meta=Report((0, 1), scored)))


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    return Engine(monkeypatch, {})


def test_the_answer_says_what_was_kept(engine: Engine) -> None:
    one, other = engine.arrive(12), engine.arrive(3)
    message = schedule(engine, one)
    assert engine.answer(other) is None  # never decided
    hear(engine, message, [True, False])
    assert engine.answer(one) == {"mod": {"kept_ratio": 0.5, "skipped_layers": [2]}}


def test_a_dial_of_its_own(engine: Engine) -> None:
    dense, table = engine.arrive(12, mod_threshold=0), engine.arrive(20, mod_kept=0.5, other=1)
    (start,) = schedule(engine, dense).starts
    assert start.cutoffs == (-np.inf, -np.inf)
    engine.kv.free(dense.request)
    (start,) = schedule(engine, table).starts
    assert start.cutoffs == (40.0, 50.0)
    hear(engine, StepMessage([start], None), [False, False])  # type: ignore[arg-type]
    said = engine.answer(table)["mod"]
    assert said["dial"] == {"kept": 0.5, "by": "request"} and said["kept_ratio"] == 0
    stats = engine.connector.get_kv_connector_stats()
    assert stats is not None
    assert stats.data["dials"] == {"request: threshold=0": 1, "request: kept=0.5": 1}


def test_who_needs_what_another_computes_waits(engine: Engine) -> None:
    """Rather than compute a block twice in one step; with the report it is there."""
    one, same = engine.arrive(12), engine.arrive(14)
    message = schedule(engine, one)
    engine.kv.get_computed_blocks(same.request)
    assert engine.connector.get_num_new_matched_tokens(same.request, 0) == (None, False)
    hear(engine, message, [True, False])
    _, found, _ = engine.kv.get_computed_blocks(same.request)
    assert found == 3 * BLOCK
    assert engine.connector.get_num_new_matched_tokens(same.request, found) == (0, False)


def test_who_is_preempted_before_its_decision_is_heard_waits_for_it(engine: Engine) -> None:
    one = engine.arrive(12)
    message = schedule(engine, one)
    engine.kv.free(one.request)
    engine.kv.get_computed_blocks(one.request)
    assert engine.connector.get_num_new_matched_tokens(one.request, 0) == (None, False)
    hear(engine, message, [False, True])
    (start,) = schedule(engine, one).starts
    assert start.keep == (False, True) and not start.counts


def test_an_id_that_is_used_again(engine: Engine) -> None:
    """A late report of the first request says nothing of the second."""
    one = engine.arrive(12)
    message = schedule(engine, one)
    engine.connector.request_finished_all_groups(one.request, ())
    engine.kv.free(one.request)
    engine.connector.on_new_request(one.request)
    hear(engine, message, [False, False])
    engine.kv.reset_prefix_cache()
    (start,) = schedule(engine, one).starts
    assert start.keep is None
    assert engine.manager.reports_ignored == 1


def test_depth_under_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is admitted while others wait keeps less, its own dial wins, and an idle engine gives full depth."""
    engine = Engine(monkeypatch, LOAD, pages=4 * 40)
    requests = [engine.arrive(4 * n) for n in (3, 4, 6)]
    own = engine.arrive(20, mod_threshold=0.5)
    found = {}
    for request in [*requests, own]:
        (start,) = schedule(engine, request).starts
        found[request.name] = start.cutoffs
        engine.kv.reset_prefix_cache()
    assert found[requests[0].name] == (40.0, 50.0)  # three wait behind it
    assert found[own.name] == (0.0, 0.0)
    for request in [*requests, own]:
        engine.connector.request_finished_all_groups(request.request, ())
        engine.kv.free(request.request)
    engine.kv.reset_prefix_cache()
    (start,) = schedule(engine, engine.arrive(30)).starts
    assert start.cutoffs == (-np.inf, -np.inf)
    stats = engine.connector.get_kv_connector_stats()
    assert stats is not None
    assert stats.data["dials"]["load: kept=0.5"] >= 1 and stats.data["dials"]["load: kept=1"] == 1


def test_statistics_come_when_something_changed(engine: Engine) -> None:
    assert engine.connector.get_kv_connector_stats() is not None
    assert engine.connector.get_kv_connector_stats() is None
    hear(engine, schedule(engine, engine.arrive(12)), [False, True])
    stats = engine.connector.get_kv_connector_stats()
    assert stats is not None
    assert stats.data["kv"]["pages_freed"] == 3 and stats.data["kv"]["tokens"] == 12
