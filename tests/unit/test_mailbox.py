"""vLLM's runners ask in an order of their own; the first question ends the step, and only once."""

from typing import Any

from vllm_mod.kv.messages import NewPages, Report, StepMessage
from vllm_mod.mailbox import Mailbox
from vllm_mod.stats import RoutingCounts

MESSAGE = StepMessage([], NewPages.none(1))


def test_statistics_before_reports() -> None:
    heard: list[Any] = []
    report = Report((0,), {})
    counts = RoutingCounts([3])

    def end() -> Report:
        heard.append("end")
        counts.add(0, 1, 2)
        return report

    mailbox = Mailbox(counts, heard.append, end)
    assert mailbox.take_counts() is None and mailbox.take_report() is None  # no step yet
    mailbox.deliver(MESSAGE)
    assert heard == [MESSAGE]
    stats = mailbox.take_counts()
    assert stats is not None and stats.data["routed"] == {"3": 2}
    assert mailbox.take_report() is report
    assert heard == [MESSAGE, "end"]
    assert mailbox.take_report() is None


def test_reports_before_statistics() -> None:
    counts = RoutingCounts([3])
    mailbox = Mailbox(counts, lambda message: None, lambda: counts.add(0, 1, 1))  # type: ignore[arg-type, return-value, func-returns-value]
    mailbox.deliver(MESSAGE)
    assert mailbox.take_report() is None
    stats = mailbox.take_counts()
    assert stats is not None and stats.data["kept"] == {"3": 1}
