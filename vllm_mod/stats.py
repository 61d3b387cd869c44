"""How much was kept: counted by the worker, shown in vLLM's log line and on `/metrics`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from . import compat


class RoutingCounts:
    """Kept and routed (request, layer) or (token, layer) pairs since the last report; columns as in `layers`."""

    def __init__(self, layers: Sequence[int]) -> None:
        self._layers = tuple(layers)
        # Kept, routed. No tensor: models are built where new tensors lie on the GPU.
        self._pairs = np.zeros((2, len(self._layers)), np.int64)

    def add(self, column: int, kept: int, routed: int) -> None:
        self._pairs[:, column] += kept, routed

    def decided(self, keep: Tensor, columns: Sequence[int]) -> None:
        """keep: bool `[requests, C]`, on the host, of which `columns` count."""
        where = list(columns)
        self._pairs[0, where] += keep[:, where].sum(0).numpy()
        self._pairs[1, where] += len(keep)

    def take(self) -> MoDStats | None:
        """The counts, which start again at zero; None if nothing was routed."""
        kept, routed = self._pairs.tolist()
        if not any(routed):
            return None
        self._pairs.fill(0)
        # Layers as strings: the payload crosses processes as JSON-like data.
        pairs = [(str(layer), k, n) for layer, k, n in zip(self._layers, kept, routed, strict=True) if n]
        return MoDStats(data={"kept": {i: k for i, k, _ in pairs}, "routed": {i: n for i, _, n in pairs}})


@dataclass
class MoDStats(KVConnectorStats):
    """`data` is sums, so that reports of workers, scheduler and steps add up:

    - `kept`, `routed`: `{layer: n}`
    - `kv`: `pages_freed` early, `messages_ignored`; `bytes` held and `tokens` they are for, summed over reports
    - `dials`: requests admitted by a dial, their own or the load's: `{"load: kept=0.75": n}`
    """

    KEYS = ("kept", "routed", "kv", "dials")

    def __post_init__(self) -> None:
        for key in self.KEYS:
            self.data.setdefault(key, {})

    def reset(self) -> None:
        self.data: dict[str, Any] = {}
        self.__post_init__()

    def is_empty(self) -> bool:
        return not any(self.data.values())

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        for key, counts in other.data.items():
            mine = self.data.setdefault(key, {})
            for label, number in counts.items():
                mine[label] = mine.get(label, 0) + number
        return self

    def reduce(self) -> dict[str, int | float | str]:
        """What vLLM's periodic log line shows; only what there is to say."""
        kept, routed, kv, _ = (self.data[key] for key in self.KEYS)
        line: dict[str, int | float | str] = {}
        if routed:
            line["MoD kept"] = f"{sum(kept.values()) / sum(routed.values()):.1%}"
            ratios = (f"{layer}:{kept.get(layer, 0) / routed[layer]:.0%}" for layer in sorted(routed, key=int))
            line["MoD kept per layer"] = " ".join(ratios)
        if kv:
            line["KV pages freed early"] = kv.get("pages_freed", 0)
            line["late decisions ignored"] = kv.get("messages_ignored", 0)
        if kv.get("tokens"):
            line["KV bytes per token"] = round(kv["bytes"] / kv["tokens"])
        return line


class MoDPromMetrics(KVConnectorPromMetrics):
    """`vllm:mod_kept_total` and `vllm:mod_routed_total` per routed layer, and what became of the KV pages."""

    def __init__(self, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        counter, gauge = compat.metric_types(self)
        self._per_layer = {
            key: counter(name=f"vllm:mod_{key}", documentation=text, labelnames=[*labelnames, "layer"])
            for key, text in {
                "kept": "Routed sublayer executions: (request, layer) or (token, layer) pairs that were kept.",
                "routed": "Routing decisions: (request, layer) or (token, layer) pairs.",
            }.items()
        }
        self._of_kv = {
            key: counter(name=f"vllm:mod_{name}", documentation=text, labelnames=labelnames)
            for key, name, text in (
                ("pages_freed", "kv_pages_freed", "KV pages of skipped layers given back while their request runs."),
                ("messages_ignored", "messages_ignored", "Decisions that arrived after their request had ended."),
            )
        }
        self._dials = counter(
            name="vllm:mod_dial",
            documentation="Requests admitted by a dial: their own (request: ...) or the load policy's (load: ...).",
            labelnames=[*labelnames, "dial"],
        )
        self._bytes_per_token = gauge(
            name="vllm:mod_kv_bytes_per_token",
            documentation="KV-cache bytes held per token slot of the running requests, when last they changed.",
            labelnames=labelnames,
            multiprocess_mode="mostrecent",
        )

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        labels = self.per_engine_labelvalues[engine_idx]
        for key, per_layer in self._per_layer.items():
            for layer, number in transfer_stats_data.get(key, {}).items():
                per_layer.labels(*labels, layer).inc(number)
        for dial, number in transfer_stats_data.get("dials", {}).items():
            self._dials.labels(*labels, dial).inc(number)
        kv = transfer_stats_data.get("kv", {})
        for key, of_kv in self._of_kv.items():
            of_kv.labels(*labels).inc(kv.get(key, 0))  # shown from the first report on, be it 0
        if kv.get("tokens"):
            self._bytes_per_token.labels(*labels).set(kv["bytes"] / kv["tokens"])
