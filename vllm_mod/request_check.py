"""Bad dials are refused where requests come in, so that the client is told (HTTP 400).

vLLM asks custom logits processors whether they accept a request's parameters: its one official check of `extra_args`.
This one changes no logits.
"""

from __future__ import annotations

from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.v1.sample.logits_processor.interface import LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as LogitsProcessorV2

from .config import ConfigError
from .dial import requested_cutoffs
from .plan import Plan


class RequestCheck(LogitsProcessor, LogitsProcessorV2):
    """For both model runners; a subclass for each checkpoint has its plan."""

    plan: Plan

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        try:
            requested_cutoffs(sampling_params.extra_args, cls.plan.config, cls.plan.table)
        except ConfigError as error:
            raise VLLMValidationError(f"vllm_xargs: {error}", parameter="vllm_xargs") from None

    def __init__(self, vllm_config: Any, *_: Any) -> None:
        pass

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        return False

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: Any) -> None:
        pass

    def apply(self, logits: Any, *_: Any) -> Any:
        return logits


class FrontendOnly(list[Any]):
    """`ModelConfig.logits_processors` of the process that accepts requests; without the check in all others.

    Engine processes get the config by pickling. Model Runner V1 would wait there for each step's tokens before it
    starts the next one, as some custom processors need.
    """

    def __init__(self, own: list[Any], check: type[RequestCheck]) -> None:
        super().__init__([*own, check])
        self._own = own

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (self._own,)


def check_requests(model_config: Any, plan: Plan) -> None:
    """Have each request's dial checked when it is accepted. Calling it again changes nothing."""
    own = [p for p in model_config.logits_processors or [] if not _is_check(p)]
    model_config.logits_processors = FrontendOnly(own, type("RequestCheck", (RequestCheck,), {"plan": plan}))


def _is_check(processor: Any) -> bool:
    return isinstance(processor, type) and issubclass(processor, RequestCheck)
