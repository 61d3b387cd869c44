"""Which requests a checkpoint was fitted on, by the prompts of its samples: an evaluation leaves them out."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from typing import Any

#: Tokens that tell a text without a prompt from others, however much of it is taken.
_OPENING = 64


def prompt_digest(sample: Mapping[str, Any]) -> str:
    """Of a sample as `tokenize` gives it: the same whatever answer follows, and wherever that is cut."""
    ids, length = sample["input_ids"], sample["prompt_len"]
    if length == len(ids):  # plain text
        length = min(length, _OPENING)
    return blake2b(array("q", ids[:length]).tobytes(), digest_size=6).hexdigest()


def prompt_digests(samples: Iterable[Mapping[str, Any]]) -> list[str]:
    return sorted({prompt_digest(sample) for sample in samples})
