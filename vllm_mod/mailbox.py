"""Between the connector, which vLLM calls, and the model's routing; both live in one worker process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .compat import layers_by_name
from .kv.messages import Report, StepMessage
from .stats import MoDStats, RoutingCounts


class Mailbox:
    """Made with the model; the connector, made later, finds it through the attention layers."""

    def __init__(
        self, counts: RoutingCounts, begin: Callable[[StepMessage], None], end: Callable[[], Report | None]
    ) -> None:
        """begin: called before each forward, outside of any graph. end: after it."""
        self._counts, self._begin, self._end = counts, begin, end
        self._running = False
        self._report: Report | None = None

    def deliver(self, message: StepMessage) -> None:
        """The step begins."""
        self._running, self._report = True, None
        self._begin(message)

    def _finish(self) -> None:
        # vLLM's runners ask for statistics and reports in an order of their own: the first question ends the step.
        if self._running:
            self._running = False
            self._report = self._end()

    def take_counts(self) -> MoDStats | None:
        """What was kept since the last time."""
        self._finish()
        return self._counts.take()

    def take_report(self) -> Report | None:
        self._finish()
        report, self._report = self._report, None
        return report


def mailbox_of(vllm_config: Any) -> Mailbox | None:
    """That of the model which was built for `vllm_config`, None before there is one."""
    layers = layers_by_name(vllm_config).values()
    return next((layer.mod_mailbox for layer in layers if hasattr(layer, "mod_mailbox")), None)
