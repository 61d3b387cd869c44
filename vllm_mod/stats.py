"""How much was kept: counted by the worker, shown in vLLM's log line and on `/metrics`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats


class RoutingCounts:
    """Kept and routed (request, layer) or (token, layer) pairs since the last report."""

    def __init__(self, layers: Sequence[int]) -> None:
        self._layers = tuple(layers)
        self._clear()

    def _clear(self) -> None:
        self._kept = dict.fromkeys(self._layers, 0)
        self._routed = dict.fromkeys(self._layers, 0)

    def add(self, layer: int, kept: int, routed: int) -> None:
        self._kept[layer] += kept
        self._routed[layer] += routed

    def add_all(self, kept: Sequence[int], routed: int) -> None:
        """One entry per routed layer."""
        for layer, number in zip(self._layers, kept, strict=True):
            self.add(layer, number, routed)

    def take(self) -> MoDStats | None:
        """The counts, which start again at zero; None if nothing was routed."""
        if not any(self._routed.values()):
            return None
        # Layers as strings: the payload crosses processes as JSON-like data.
        data = {
            "kept": {str(i): n for i, n in self._kept.items() if self._routed[i]},
            "routed": {str(i): n for i, n in self._routed.items() if n},
        }
        self._clear()
        return MoDStats(data=data)


@dataclass
class MoDStats(KVConnectorStats):
    """`data`: `{"kept": {layer: n}, "routed": {layer: n}}`."""

    def __post_init__(self) -> None:
        for key in ("kept", "routed"):
            self.data.setdefault(key, {})

    def reset(self) -> None:
        self.data = {"kept": {}, "routed": {}}

    def is_empty(self) -> bool:
        return not self.data["routed"]

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        for key, counts in other.data.items():
            mine = self.data.setdefault(key, {})
            for layer, number in counts.items():
                mine[layer] = mine.get(layer, 0) + number
        return self

    def reduce(self) -> dict[str, int | float]:
        kept, routed = self.data["kept"], self.data["routed"]
        result: dict[str, int | float] = {"MoD kept ratio": round(sum(kept.values()) / max(sum(routed.values()), 1), 3)}
        for layer in sorted(routed, key=int):
            result[f"layer {layer}"] = round(kept.get(layer, 0) / routed[layer], 3)
        return result


class MoDPromMetrics(KVConnectorPromMetrics):
    """Counters `vllm:mod_kept_total` and `vllm:mod_routed_total` per routed layer."""

    def __init__(self, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        labels = [*labelnames, "layer"]
        self._counters = {
            key: self._counter_cls(name=f"vllm:mod_{key}", documentation=text, labelnames=labels)
            for key, text in {
                "kept": "Routed sublayer executions: (request, layer) or (token, layer) pairs that were kept.",
                "routed": "Routing decisions: (request, layer) or (token, layer) pairs.",
            }.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for key, counter in self._counters.items():
            for layer, number in transfer_stats_data.get(key, {}).items():
                counter.labels(*self.per_engine_labelvalues[engine_idx], layer).inc(number)
