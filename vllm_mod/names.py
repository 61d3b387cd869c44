"""Which requests a forward's rows belong to, by the names that vLLM's Model Runner V2 gives its models.

Without them (the older runner) a row's request is read off the block table, for which the host waits for the device.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .kv.messages import StepMessage


class SlotNames:
    """Slots of running requests, by request id."""

    def __init__(self) -> None:
        self._slots: dict[str, int] = {}
        self._names: dict[int, str] = {}

    def begin(self, message: StepMessage) -> None:
        for slot in message.freed:
            self._forget(slot)
        for start in message.starts:
            self._forget(start.slot)
            self._slots[start.name], self._names[start.slot] = start.slot, start.name

    def _forget(self, slot: int) -> None:
        name = self._names.pop(slot, None)
        if name is not None and self._slots.get(name) == slot:  # a request that was preempted has another slot now
            del self._slots[name]

    def slots(self, names: Sequence[str]) -> Tensor:
        """int64 `[R]`, on the host."""
        return torch.tensor([self._slots[name] for name in names], dtype=torch.int64, device="cpu")


@functools.cache
def naming(stock: type) -> type:
    """`stock`, a model state of Model Runner V2, that tells the model's `Routing` whose rows a forward has."""

    class NamingModelState(stock):
        def prepare_attn(self, input_batch: Any, *args: Any, **kwargs: Any) -> Any:
            metadata = super().prepare_attn(input_batch, *args, **kwargs)
            routing = getattr(self.model, "routing", None)  # static models have none
            if routing is not None:
                routing.name_rows(input_batch.req_ids)
            return metadata

    return NamingModelState


def model_state_class() -> type:
    """What `get_model_state_cls` of a routed model returns, which Model Runner V2 asks for."""
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState

    return naming(DefaultModelState)
