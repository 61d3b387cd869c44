"""The channel between scheduler and workers, as a KV connector that moves no KV.

It is vLLM's one official path that carries data both ways, for every tensor- and pipeline-parallel rank, whose
statistics reach the log line and `/metrics`, and whose parameters reach the answer. See `messages` for what is said.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole, SupportsHMA
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

from ..admission import Admissions
from ..compat import manager_of
from ..mailbox import Mailbox, mailbox_of
from ..plan import plan_of
from ..stats import MoDPromMetrics, MoDStats
from .messages import NewPages, Report, StepMessage
from .pages import PageManager
from .tracked import Tracked


class MoDConnector(KVConnectorBase_V1, SupportsHMA):
    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._plan = plan_of(vllm_config)
        self._admissions = Admissions(self._plan)
        self._manager: PageManager | None = None  # scheduler: where requests have state on the workers
        self._dials: Counter[str] = Counter()  # scheduler: requests admitted by a dial since the last report
        self._reported: dict[str, int] = {}  # scheduler: totals at the last report of statistics
        self._mailbox: Mailbox | None = None  # worker

    @property
    def requires_kv_delivery(self) -> bool:
        """A producer's preempted requests would lose their tokens in flight; nothing is delivered here."""
        return False

    # ---- scheduler

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        super().bind_kv_cache_manager(kv_cache_manager)
        manager = manager_of(kv_cache_manager)
        if isinstance(manager, PageManager):
            self._manager = manager
            manager.use_window(self._plan.config.window or 0)
            manager.admit = self._admit

    def on_new_request(self, request: Any) -> None:
        if self._manager is not None:
            parameters = request.sampling_params
            admission = self._admissions.on_arrival(parameters.extra_args if parameters is not None else None)
            self._manager.open(request, admission.cutoffs, admission.dial)

    def _admit(self, tracked: Tracked) -> None:
        """It is about to be scheduled for the first time; its own dial wins."""
        assert self._manager is not None
        if tracked.dial is None:
            usage = self._manager.block_pool.get_usage()
            admission = self._admissions.under_load(usage, self._manager.number_waiting - 1)
            if admission is not None:
                tracked.cutoffs, tracked.dial = admission.cutoffs, admission.dial
        if tracked.dial is not None:
            label = " ".join(f"{key}={value:g}" for key, value in tracked.dial.items() if key != "by")
            self._dials[f"{tracked.dial['by']}: {label}"] += 1

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        wait = self._manager is not None and self._manager.must_wait(request.request_id)
        return (None if wait else 0), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        pass

    def build_connector_meta(self, scheduler_output: Any) -> StepMessage:
        return self._manager.take_message() if self._manager is not None else StepMessage([], NewPages.none(1))

    def update_connector_output(self, connector_output: Any) -> None:
        report = connector_output.kv_connector_worker_meta
        if self._manager is not None and isinstance(report, Report):
            for serial, scored in report.scored.items():
                self._manager.hear(serial, scored)

    def request_finished_all_groups(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        tracked = self._manager.close(request.request_id) if self._manager is not None else None
        if tracked is None or tracked.keep is None:
            return False, None
        keep, layers = tracked.keep.tolist(), self._plan.config.layers
        skipped = [layer for layer, kept in zip(layers, keep, strict=True) if not kept]
        said = {"kept_ratio": sum(keep) / len(keep), "skipped_layers": skipped}
        return False, {"mod": said | ({"dial": tracked.dial} if tracked.dial is not None else {})}

    def _scheduler_stats(self) -> MoDStats | None:
        """What has changed since the last report; the worker's counts are added to it by the scheduler."""
        manager = self._manager
        if manager is None:
            return None
        totals = {"messages_ignored": manager.reports_ignored, "pages_freed": manager.pages_released}
        totals["token_slots"] = manager.token_slots
        if totals == self._reported and not self._dials:
            return None
        before, self._reported = self._reported, totals
        kv = {key: totals[key] - before.get(key, 0) for key in totals if key != "token_slots"}
        if manager.by_layer:  # otherwise vLLM's own metrics say it
            kv |= {"bytes": manager.bytes_held, "tokens": manager.token_slots}
        dials, self._dials = dict(self._dials), Counter()
        return MoDStats(data={"kv": kv, "dials": dials})

    # ---- worker

    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        """Both runners call it before each forward, and before a graph is replayed."""
        super().bind_connector_metadata(connector_metadata)
        if self._mailbox is None:
            self._mailbox = mailbox_of(self._vllm_config)
        if self._mailbox is not None:
            self._mailbox.deliver(connector_metadata)

    def build_connector_worker_meta(self) -> Report | None:
        return self._mailbox.take_report() if self._mailbox is not None else None

    def get_kv_connector_stats(self) -> MoDStats | None:
        if self.role is KVConnectorRole.SCHEDULER:
            return self._scheduler_stats()
        counts = self._mailbox.take_counts() if self._mailbox is not None else None
        return counts if get_tensor_model_parallel_rank() == 0 else None  # tensor-parallel ranks count the same

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
        pass
