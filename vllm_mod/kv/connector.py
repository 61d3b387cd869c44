"""The channel between scheduler and workers, as a KV connector that moves no KV.

It is vLLM's one official path that carries data both ways, for every tensor- and pipeline-parallel rank, and whose
statistics reach the log line and `/metrics`. Messages are keyed by request id.

    scheduler -> worker   for each (re-)prefill of this step: anchor block -> (request id, prompt length)
    worker -> scheduler   decisions newly taken: request id -> routed layers it skips; statistics

A worker remembers the decisions of its live requests itself, so that one which is preempted keeps them without asking.
The scheduler needs them to give pages back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

from ..stats import MoDPromMetrics, MoDStats
from .pages import PageManager

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ..routing import Routing


@dataclass
class StepPrefills(KVConnectorMetadata):
    by_anchor: dict[int, tuple[str, int]]


@dataclass
class NewDecisions(KVConnectorWorkerMetadata):
    skipped: dict[str, tuple[int, ...]]

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """Tensor-parallel ranks must agree; raises RuntimeError rather than let pages be corrupted."""
        assert isinstance(other, NewDecisions)
        if self.skipped != other.skipped:
            raise RuntimeError(f"ranks disagree on routing decisions: {self.skipped} and {other.skipped}")
        return self


class MoDConnector(KVConnectorBase_V1, SupportsHMA):
    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._prompt_lengths: dict[str, int] = {}  # scheduler: live requests
        self.messages_ignored = 0  # scheduler: about requests that have ended since
        self._reported: dict[str, int] = {}  # scheduler: totals at the last report of statistics
        self._routing: Routing | None = None  # worker: the model's
        self._outbox: dict[str, tuple[int, ...]] = {}  # worker

    @property
    def requires_kv_delivery(self) -> bool:
        """A producer's preempted requests would lose their tokens in flight; nothing is delivered here."""
        return False

    # ---- scheduler ----

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        super().bind_kv_cache_manager(kv_cache_manager)
        self._manager = kv_cache_manager.coordinator.single_type_managers[0]

    def on_new_request(self, request: Any) -> None:
        self._prompt_lengths[request.request_id] = request.num_prompt_tokens

    def build_connector_meta(self, scheduler_output: Any) -> StepPrefills:
        # Model Runner V2 lists resumed requests among the new ones, V1 has them apart.
        ids = [r.req_id for r in scheduler_output.scheduled_new_reqs]
        ids += scheduler_output.scheduled_cached_reqs.resumed_req_ids
        blocks = self._manager.req_to_blocks
        return StepPrefills({blocks[i][0].block_id: (i, self._prompt_lengths[i]) for i in ids if blocks.get(i)})

    def update_connector_output(self, connector_output: Any) -> None:
        message = connector_output.kv_connector_worker_meta
        for request_id, layers in message.skipped.items() if message else ():
            if request_id not in self._prompt_lengths:
                self.messages_ignored += 1
            elif isinstance(self._manager, PageManager):
                self._manager.skip_layers(request_id, layers)

    def request_finished_all_groups(self, request: Any, block_ids: Any) -> tuple[bool, None]:
        self._prompt_lengths.pop(request.request_id, None)
        if isinstance(self._manager, PageManager):
            self._manager.forget(request.request_id)
        return False, None

    def _scheduler_stats(self) -> MoDStats | None:
        """What has changed since the last report; the worker's counts are added to it by the scheduler."""
        totals = {"messages_ignored": self.messages_ignored}
        if paged := isinstance(self._manager, PageManager):
            totals |= {"pages_freed": self._manager.pages_released, "token_slots": self._manager.token_slots}
        if totals == self._reported:
            return None
        before, self._reported = self._reported, totals
        kv = {key: totals[key] - before.get(key, 0) for key in totals if key != "token_slots"}
        if paged:
            kv |= {"bytes": self._manager.bytes_held, "tokens": self._manager.token_slots}
        return MoDStats(data={"kv": kv})

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        pass

    # ---- worker ----

    def attach(self, routing: Routing) -> None:
        self._routing = routing

    def prefill(self, anchor: int) -> tuple[str, int] | None:
        if not self.has_connector_metadata():
            return None  # a dummy run
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, StepPrefills)
        return metadata.by_anchor.get(anchor)

    def publish(self, requests: Sequence[str | None], keep: Tensor) -> None:
        """Decisions just taken; keep: host, bool `[requests, routed]`."""
        assert self._routing is not None
        layers = self._routing.config.layers
        for request, row in zip(requests, keep.tolist(), strict=True):
            if request is not None:
                self._outbox[request] = tuple(i for i, kept in zip(layers, row, strict=True) if not kept)

    def build_connector_worker_meta(self) -> NewDecisions | None:
        skipped, self._outbox = self._outbox, {}
        return NewDecisions(skipped) if skipped else None

    def get_finished(self, finished_req_ids: set[str]) -> tuple[None, None]:
        if self._routing is not None and self._routing.state is not None:
            self._routing.state.forget(finished_req_ids)
        return None, None

    def get_kv_connector_stats(self) -> MoDStats | None:
        if self.role is KVConnectorRole.SCHEDULER:
            return self._scheduler_stats()
        if self._routing is None or get_tensor_model_parallel_rank() > 0:  # tensor-parallel ranks count the same
            return None
        return self._routing.counts.take()

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> MoDStats:
        return MoDStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any
    ) -> MoDPromMetrics:
        return MoDPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        return False  # nothing is moved per layer; decode steps keep static shapes, see `decode`

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        pass

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass

    def save_kv_layer(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_for_save(self) -> None:
        """After each step in both runners, before statistics and messages are asked for."""
        if self._routing is not None and self.has_connector_metadata():
            self._routing.collect(self)
