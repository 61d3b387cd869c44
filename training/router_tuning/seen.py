"""Which requests a checkpoint was fitted on, by the prompts of its samples: an evaluation leaves them out."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from typing import Any


def prompt_digest(sample: Mapping[str, Any]) -> str:
    """Of a sample as `tokenize` gives it: the same whatever answer follows, and wherever that is cut."""
    return blake2b(array("q", sample["input_ids"][: sample["prompt_len"]]).tobytes(), digest_size=6).hexdigest()


def prompt_digests(samples: Iterable[Mapping[str, Any]]) -> list[str]:
    return sorted({prompt_digest(sample) for sample in samples})
