"""Flags whose values are words as well as numbers: which layers, which window, which rank."""

from __future__ import annotations

import re
from collections.abc import Sequence

from vllm_mod.config import ConfigError, ModConfig, default_layers

from .fit_arguments import DEFAULT_RANK


def parse_layers(words: Sequence[str] | None, num_layers: int) -> list[int]:
    """`["5-7", "9,10"]` -> `[5, 6, 7, 9, 10]`; None: the default."""
    if words is None:
        return default_layers(num_layers)
    layers: list[int] = []
    for word in (part for w in words for part in w.split(",") if part):
        first, _, last = word.partition("-")
        try:
            layers += range(int(first), int(last or first) + 1)
        except ValueError:
            raise ConfigError(f"--layers: {word!r} is neither a layer number nor a range like 5-10") from None
    return sorted(layers)


def parse_window(word: str) -> int | None:
    """`"64"` -> 64, `"none"` -> None; raises ConfigError."""
    if word == "none":
        return None
    if not re.fullmatch(r"[1-9][0-9]{0,8}", word):
        raise ConfigError(f"--window: a number of tokens, 1 or more, or `none` is needed (got {word!r})")
    return int(word)


def parse_rank(word: str, config: ModConfig, hidden_size: int) -> int | None:
    """What `--patch-rank` says of patches for these routers; raises ConfigError.

    `auto` needs a window: without one decisions depend on what stands in for the layers before, so the kept ratio would
    no longer be the one that was trained.
    """
    if word == "auto":
        return None if config.window is None else min(DEFAULT_RANK, hidden_size // 8)
    if word == "none":
        return None
    if not re.fullmatch(r"[0-9]{1,9}", word):
        raise ConfigError(f"--patch-rank: a number, 0 or more, `auto` or `none` is needed (got {word!r})")
    return int(word)
