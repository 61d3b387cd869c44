"""Instruction data to tokens: which tokens are the prompt, which are supervised.

A *source* is a local `.json`/`.jsonl` file (also `.gz`, `.xz`), a directory of them, or a dataset on the hub. Rows are
`messages`, `prompt` + `completion`, or `text`. Loss is on the answers only; a `text` row has no prompt and all of it
is supervised. Nothing is dropped silently: see `Counts`.
"""

from __future__ import annotations

import gzip
import json
import logging
import lzma
import random
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from vllm_mod.config import ConfigError

from .chat import NoAnswer, encode

log = logging.getLogger(__name__)

IGNORED = -100
SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".json.xz", ".jsonl.xz")


@dataclass
class Counts:
    """What became of the rows; part of the run record."""

    read: int = 0
    used: int = 0
    no_answer: int = 0
    truncated: int = 0
    too_long: int = 0

    def __str__(self) -> str:
        return (
            f"{self.used} of {self.read} rows used; {self.no_answer} without an answer skipped, "
            f"{self.truncated} truncated, {self.too_long} dropped because the prompt alone is too long"
        )

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


def read_sources(sources: Iterable[str]) -> dict[str, list[dict[str, Any]]]:
    """Source name -> its rows, in file order. Raises ConfigError that names what cannot be read or is empty."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for source in sources:
        path = Path(source)
        if path.is_dir():
            files = sorted(f for f in path.rglob("*") if f.name.endswith(SUFFIXES) and f.is_file())
            if not files:
                raise ConfigError(f"{path}: no {', '.join(SUFFIXES)} file in this directory")
        elif path.exists():
            files = [path]
        elif _looks_local(source):
            raise ConfigError(f"{path}: no such file or directory")
        else:
            tables[source] = _read_hub(source)
            continue
        tables |= {str(file): _read_file(file) for file in files}
    for name, rows in tables.items():
        if not rows:
            raise ConfigError(f"{name}: no rows in it")
    if not tables:
        raise ConfigError("no data given; use --data with a file, a directory or a hub name")
    return tables


def _looks_local(source: str) -> bool:
    """A hub name is `name` or `owner/name`; anything else was meant as a path."""
    return source.endswith(SUFFIXES) or source.startswith((".", "/", "~")) or source.count("/") > 1


def _read_hub(name: str) -> list[dict[str, Any]]:
    from datasets import load_dataset

    try:
        return list(load_dataset(name, split="train"))
    except Exception as error:  # anything from the network to a broken script
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{name}: neither a local file nor a readable dataset on the hub: {reason}") from None


def _read_file(path: Path) -> list[dict[str, Any]]:
    opener: Any = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            text = file.read()
    except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    if path.name.removesuffix(path.suffix if path.suffix in (".gz", ".xz") else "").endswith(".json"):
        try:
            rows = json.loads(text) if text.strip() else []
        except json.JSONDecodeError:
            rows = _read_lines(text, path)  # many a .json file holds one object per line
    else:
        rows = _read_lines(text, path)
    if not isinstance(rows, list) or any(not isinstance(row, dict) for row in rows):
        raise ConfigError(f"{path}: a list of JSON objects is needed")
    return rows


def _read_lines(text: str, path: Path) -> list[Any]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ConfigError(f"{path}: line {number} is not JSON: {error.msg}") from None
    return rows


def split_tail(tables: dict[str, list[Any]], fraction: float) -> tuple[list[Any], list[Any]]:
    """(training rows, held-out rows): the last `fraction` of every table is held out, at least one row of it."""
    train: list[Any] = []
    held_out: list[Any] = []
    for rows in tables.values():
        cut = len(rows) - max(1, round(len(rows) * fraction)) if fraction > 0 and len(rows) > 1 else len(rows)
        train += rows[:cut]
        held_out += rows[cut:]
    return train, held_out


def tokenize(
    rows: list[dict[str, Any]], tokenizer: Any, max_length: int, max_samples: int | None = None, seed: int = 0
) -> tuple[Dataset, Counts]:
    """Rows -> dataset of `input_ids`, `labels` (IGNORED outside the answers) and `prompt_len`, with its counts.

    With `max_samples`, rows are taken in an order shuffled by `seed` until that many are usable.
    """
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    counts = Counts()
    samples: list[dict[str, Any]] = []
    for i in order:
        if max_samples is not None and len(samples) >= max_samples:
            break
        counts.read += 1
        try:
            ids, supervised = encode(rows[i], tokenizer)
        except NoAnswer:
            counts.no_answer += 1
            continue
        cut = len(ids) > max_length
        ids, supervised = ids[:max_length], supervised[:max_length]
        first = next((t for t, s in enumerate(supervised) if s), len(ids))
        # The first token has no prediction, so an answer must reach beyond it.
        if not any(supervised[1:]):
            counts.too_long += cut
            counts.no_answer += not cut
            continue
        counts.truncated += cut
        counts.used += 1
        labels = [token if s else IGNORED for token, s in zip(ids, supervised, strict=True)]
        # No prompt (`text`): a decision can only be taken over all of it.
        samples.append({"input_ids": ids, "labels": labels, "prompt_len": first or len(ids)})
    return Dataset.from_list(samples), counts


class Collator:
    """Pads on the right. Adds `prompt_mask`, bool `[B, T]`: what sequence-level decisions are taken from."""

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Samples -> `input_ids`, `labels`, `attention_mask`, `prompt_mask`, all `[B, T]`."""
        length = max(len(s["input_ids"]) for s in samples)

        def padded(key: str, filler: int) -> Tensor:
            return torch.tensor([list(s[key]) + [filler] * (length - len(s[key])) for s in samples])

        position = torch.arange(length)[None]
        sizes = torch.tensor([[len(s["input_ids"])] for s in samples])
        prompts = torch.tensor([[s["prompt_len"]] for s in samples])
        return {
            "input_ids": padded("input_ids", self.pad_id),
            "labels": padded("labels", IGNORED),
            "attention_mask": (position < sizes).long(),
            "prompt_mask": position < prompts,
        }
