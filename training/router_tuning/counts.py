"""What became of the rows: counted, logged, kept in the run record and shown in the model card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .values import Unusable

#: Why a row is left out -> how that is said.
LEFT_OUT = {
    "no_answer": "without an answer",
    "unreadable": "not of a form that is read",
    "bad_value": "with a value that is not text",
    "template_refused": "refused by the chat template",
    "tokenizer_failed": "that the tokenizer failed on",
    "unverified": "whose answer could not be found for certain in the rendered chat",
    "too_long": "whose prompt alone is too long",
}


@dataclass
class Counts:
    """Of the rows that were looked at: how many are used, and how many left out for which reason."""

    read: int = 0
    used: int = 0
    no_answer: int = 0
    unreadable: int = 0
    bad_value: int = 0
    template_refused: int = 0
    tokenizer_failed: int = 0
    unverified: int = 0
    too_long: int = 0
    #: used, without what is behind the length limit
    truncated: int = 0
    #: left out before rows were taken, so not part of `read`
    duplicates: int = 0
    #: why the first row of each kind was left out
    reasons: dict[str, str] = field(default_factory=dict)
    #: what used rows have and the chat template does not show -> number of rows
    not_shown: dict[str, int] = field(default_factory=dict)

    def leave_out(self, row: Unusable) -> None:
        setattr(self, row.kind, getattr(self, row.kind) + 1)
        self.reasons.setdefault(row.kind, row.reason)

    def __str__(self) -> str:
        return summary(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def summary(counts: Mapping[str, Any]) -> str:
    """One line. counts: as `Counts.to_dict` writes them, also of older records."""
    reasons = counts.get("reasons", {})
    left_out = [
        f"{number} {words}" + (f" ({reasons[kind]})" if kind in reasons else "")
        for kind, words in LEFT_OUT.items()
        if (number := counts.get(kind, 0))
    ]
    not_shown = [f"{name} of {number} rows" for name, number in counts.get("not_shown", {}).items()]
    return (
        f"{counts['used']} of {counts['read']} rows that were looked at are used; "
        + (f"left out: {', '.join(left_out)}; " if left_out else "none left out; ")
        + (f"not shown by the chat template: {', '.join(not_shown)}; " if not_shown else "")
        + f"{counts['truncated']} truncated; {counts.get('duplicates', 0)} duplicates left out before"
    )
