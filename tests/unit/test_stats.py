"""Counters -> log line and Prometheus."""

from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from vllm_mod.stats import MoDPromMetrics, MoDStats, RoutingCounts


def test_counts_are_taken_once() -> None:
    counts = RoutingCounts([3, 5])
    assert counts.take() is None
    counts.add(0, 1, 2)
    counts.add(1, 0, 2)
    counts.decided(torch.tensor([[False, True], [True, True]]), [1])
    stats = counts.take()
    assert stats is not None and stats.data["kept"] == {"3": 1, "5": 2} and stats.data["routed"] == {"3": 2, "5": 4}
    assert counts.take() is None


def test_counts_lie_on_the_host() -> None:
    """Models are built where new tensors lie on the GPU; decisions that are counted are on the host."""
    with torch.device("meta"):
        counts = RoutingCounts([3])
    counts.add(0, 1, 2)
    counts.decided(torch.tensor([[True]]), [0])
    stats = counts.take()
    assert stats is not None and stats.data["kept"] == {"3": 2}


def test_only_layers_that_were_routed_are_reported() -> None:
    """A pipeline rank counts its own layers."""
    counts = RoutingCounts([3, 5])
    counts.add(1, 0, 2)
    stats = counts.take()
    assert stats is not None and stats.data["kept"] == {"5": 0} and stats.data["routed"] == {"5": 2}


def test_reports_of_worker_and_scheduler_add_up() -> None:
    worker = MoDStats(data={"kept": {"3": 1, "10": 4}, "routed": {"3": 2, "10": 4}})
    scheduler = MoDStats(data={"kv": {"pages_freed": 6, "messages_ignored": 0, "bytes": 512, "tokens": 64}})
    later = MoDStats(data={"routed": {"3": 2}, "kept": {"3": 0}, "kv": {"pages_freed": 1, "bytes": 128, "tokens": 64}})
    total = worker.aggregate(scheduler).aggregate(later)
    assert total.reduce() == {
        "MoD kept": "62.5%",
        "MoD kept per layer": "3:25% 10:100%",
        "KV pages freed early": 7,
        "late decisions ignored": 0,
        "KV bytes per token": 5,
    }
    assert not total.is_empty()
    total.reset()
    assert total.is_empty() and total.reduce() == {}


class Registered:
    """vLLM's table of metric types, in a registry of the test's own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

    def types(self) -> dict[type, Any]:
        def bound(kind: type) -> Any:
            return lambda **kwargs: kind(registry=self.registry, **kwargs)

        return {kind: bound(kind) for kind in (Gauge, Counter, Histogram)}

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(name, {"model_name": "m", "engine": "0", **labels})


@pytest.fixture
def registered() -> Registered:
    return Registered()


def test_prometheus(registered: Registered) -> None:
    config = type("Config", (), {"kv_transfer_config": None})
    metrics = MoDPromMetrics(config, registered.types(), ["model_name", "engine"], {0: ["m", "0"]})
    metrics.observe({"kept": {"3": 1}, "routed": {"3": 2}, "kv": {}})
    assert registered.value("vllm:mod_kv_pages_freed_total") == 0
    metrics.observe({"kept": {"3": 1}, "routed": {"3": 1}, "kv": {"pages_freed": 4, "bytes": 4096, "tokens": 8}})
    metrics.observe({"kv": {"messages_ignored": 2, "bytes": 0, "tokens": 0}})
    assert registered.value("vllm:mod_kept_total", layer="3") == 2
    assert registered.value("vllm:mod_routed_total", layer="3") == 3
    assert registered.value("vllm:mod_kv_pages_freed_total") == 4
    assert registered.value("vllm:mod_messages_ignored_total") == 2
    assert registered.value("vllm:mod_kv_bytes_per_token") == 512  # of the last report that had any
