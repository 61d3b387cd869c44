"""Instruction data to tokens: which tokens are the prompt, which are supervised.

A *source* is a local file (`files` knows the kinds), a directory of them, a data set on the hub, or a recipe of those.
Rows are `messages`, `prompt` + `completion`, or `text`, or become that (see `converters`). Loss is on the answers only;
a `text` row has no prompt and all of it is supervised. Nothing is dropped silently: see `counts`.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from tqdm import tqdm

from vllm_mod.config import ConfigError

from .chat import fingerprint, prompt_digest
from .counts import Counts
from .encode import Encoded, Encoder
from .recipe import parse_recipe, read_recipe
from .sources import RECIPE_SUFFIXES, Table, looks_local, read_source
from .tokenizer import load_tokenizer
from .values import Unusable

log = logging.getLogger(__name__)

IGNORED = -100
#: Every tenth prompt's samples say how good a fit to the others is.
HELD_OUT = 10


def check_sources(sources: Iterable[str]) -> None:
    """Refuse what can be told without reading rows: files that are not there, recipes that are wrong."""
    for source in sources:
        path = Path(source).expanduser()
        if path.suffix in RECIPE_SUFFIXES:
            parse_recipe(path)
        elif looks_local(source) and not path.exists():
            raise ConfigError(f"{path}: no such file or directory")


def read_sources(sources: Iterable[str]) -> dict[str, Table]:
    """Table name -> its rows, in file order. Raises ConfigError that names what cannot be read or is empty."""
    tables: dict[str, Table] = {}
    for source in sources:
        path = Path(source).expanduser()
        if path.suffix in RECIPE_SUFFIXES:
            tables |= read_recipe(path)
        else:
            tables |= read_source(source)
    if not tables:
        raise ConfigError("no data given; use --data with a file, a directory, a hub name or a recipe")
    return tables


def describe(tables: Mapping[str, Table]) -> list[dict[str, Any]]:
    """For the run record: what each table has, and how much of it is taken."""
    return [
        {"name": name, "rows": len(table)}
        | ({"portion": table.portion} if table.samples is None else {"samples": table.samples})
        | ({"fields_not_read": dict(table.not_read)} if table.not_read else {})
        for name, table in tables.items()
    ]


class Rows(list[Any]):
    """Rows of several tables together."""

    #: equal ones that were left out
    duplicates: int = 0


def split_tail(tables: Mapping[str, list[Any]], fraction: float, seed: int = 0) -> tuple[Rows, Rows]:
    """(training rows, held-out rows): the last `fraction` of every table is held out, at least one row of it.

    Of equal rows one is left, the held-out one if there is any, so nothing that is trained on is held out. Then every
    table gives its amount: which training rows is up to `seed`; the held-out rows mirror the mixture, none twice, and
    are the same for every seed. Raises ConfigError where a table has fewer rows than it should give.
    """
    cuts = {name: _held_out_from(len(rows), fraction) for name, rows in tables.items()}
    seen: set[bytes] = set()
    held_out = {name: _distinct(rows[cuts[name] :], seen) for name, rows in tables.items()}
    train = {name: _distinct(rows[: cuts[name]], seen) for name, rows in tables.items()}
    portions = {name: _portion(name, table, len(train[name])) for name, table in tables.items()}
    most = max(portions.values(), default=0.0) or 1.0
    both = Rows(), Rows()
    for name, portion in portions.items():
        number = max(1, round(portion * len(train[name]))) if portion else 0
        both[0].extend(_take(train[name], number, f"{seed} {name}"))
        wanted = round(portion / most * len(held_out[name]))
        both[1].extend(_take(held_out[name], min(max(wanted, 1), len(held_out[name])), f"0 {name}"))
    for result, parts in zip(both, (train, held_out), strict=True):
        result.duplicates = sum(part.duplicates for part in parts.values())
    return both


def _held_out_from(number: int, fraction: float) -> int:
    return number - max(1, round(number * fraction)) if fraction > 0 and number > 1 else number


def _distinct(rows: list[Any], seen: set[bytes]) -> Rows:
    """Those that `seen` does not know yet; adds them to it."""
    result = Rows()
    for row in rows:
        key = fingerprint(row)
        if key is None or key not in seen:
            result.append(row)
        if key is not None:
            result.duplicates += key in seen
            seen.add(key)
    return result


def _portion(name: str, table: list[Any], number: int) -> float:
    """How often each of a table's `number` training rows is taken."""
    samples = getattr(table, "samples", None)
    if samples is None:
        return getattr(table, "portion", 1.0)
    if samples > number:
        raise ConfigError(
            f"{name}: {samples} samples are asked for, and {number} distinct training rows are there; "
            "lower `samples`, or repeat rows with a `portion` above 1"
        )
    return samples / number if number else 0.0


def _take(rows: list[Any], number: int, seed: str) -> list[Any]:
    """`number` rows in their order; where there are fewer, every row as often as it goes and some once more."""
    if not rows:
        return []
    times, more = divmod(number, len(rows))
    return rows * times + [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), more))]


def shuffled(rows: Sequence[dict[str, Any]], seed: int) -> Iterator[dict[str, Any]]:
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    return (rows[i] for i in order)


def tokenize(
    rows: Sequence[dict[str, Any]], tokenizer: Any, max_length: int, max_samples: int | None = None, seed: int = 0
) -> tuple[Dataset, Counts]:
    """Rows -> dataset of `input_ids`, `labels` (IGNORED outside the answers), `prompt_len` and `asked` (what tells the
    prompt from others, see `chat.prompt_digest`), with its counts.

    With `max_samples`, rows are taken in an order shuffled by `seed` until that many are usable.
    """
    counts = Counts(duplicates=getattr(rows, "duplicates", 0))
    encode = Encoder(tokenizer)
    samples: list[dict[str, Any]] = []
    total = min(len(rows), max_samples or len(rows))
    for row in tqdm(shuffled(rows, seed), desc="tokenize", unit="row", total=total, leave=False, disable=total < 5_000):
        if max_samples is not None and len(samples) >= max_samples:
            break
        counts.read += 1
        try:
            samples.append(_sample(encode(row), max_length, counts) | {"asked": prompt_digest(row)})
        except Unusable as reason:
            counts.leave_out(reason)
    return Dataset.from_list(samples), counts


def prompt_numbers(samples: Sequence[Mapping[str, Any]]) -> list[int]:
    """Which prompt each sample has: numbers, in the order in which they come first.

    Samples of one prompt are no strangers to one another, whatever is answered: what one is held out from must not have
    the others. Where there are fewer prompts than `HELD_OUT`, or samples do not say what they ask, each has its own.
    """
    numbers: dict[Any, int] = {}
    found = [numbers.setdefault(sample.get("asked", place), len(numbers)) for place, sample in enumerate(samples)]
    return found if len(numbers) >= HELD_OUT else list(range(len(samples)))


def held_out_of(samples: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Of each sample whether it is held out: all of every tenth prompt."""
    return [number % HELD_OUT == 0 for number in prompt_numbers(samples)]


def check_fraction(fraction: float) -> None:
    """Raise ConfigError unless so much of a file can be held out, or nothing."""
    if not 0 <= fraction < 1:
        raise ConfigError(f"--eval-fraction {fraction:g}: a number from 0 to below 1 is needed")


def rows_to_fit_on(args: Any, seed: int) -> Rows:
    """Without what training holds out. args: `data` and `eval_fraction`. Raises ConfigError."""
    check_fraction(args.eval_fraction)
    return split_tail(read_sources(args.data), args.eval_fraction, seed)[0]


def calibration_samples(args: Any, base: Path, seed: int = 0) -> tuple[list[dict[str, Any]], Counts]:
    """What patches are fitted on and sublayers chosen by: samples without what training holds out.

    args: `data`, `eval_fraction`, `max_samples` and `max_length`. seed: which rows, in which order. Raises ConfigError
    where no sample is usable.
    """
    rows = rows_to_fit_on(args, seed)
    samples, counts = tokenize(rows, load_tokenizer(base), args.max_length, args.max_samples, seed)
    log.info("calibration data: %s", counts)
    if not counts.used:
        raise ConfigError(f"{', '.join(args.data)}: no usable calibration sample ({counts})")
    return list(samples), counts


def _sample(row: Encoded, max_length: int, counts: Counts) -> dict[str, Any]:
    # The first token has no prediction, so an answer must reach beyond it.
    if not any(row.supervised[1:max_length]):
        if len(row.ids) > max_length:
            raise Unusable("too_long", f"{row.prompt_len} tokens, {max_length} are allowed")
        raise Unusable("no_answer", "the answer is the first token of all")
    counts.used += 1
    counts.truncated += len(row.ids) > max_length
    for name in row.not_shown:
        counts.not_shown[name] = counts.not_shown.get(name, 0) + 1
    labels = [token if s else IGNORED for token, s in zip(row.ids, row.supervised, strict=True)]
    return {
        "input_ids": row.ids[:max_length],
        "labels": labels[:max_length],
        "prompt_len": min(row.prompt_len, max_length),
    }


class Collator:
    """Pads on the right. Adds `prompt_mask`, bool `[B, T]`: what sequence-level decisions are taken from."""

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Samples -> `input_ids`, `labels`, `attention_mask`, `prompt_mask`, all `[B, T]`; of samples that have
        `scores`, `[routed layers]` each, these, float64 `[B, routed layers]`."""
        length = max(len(s["input_ids"]) for s in samples)

        def padded(key: str, filler: int) -> Tensor:
            return torch.tensor([list(s[key]) + [filler] * (length - len(s[key])) for s in samples])

        position = torch.arange(length)[None]
        sizes = torch.tensor([[len(s["input_ids"])] for s in samples])
        prompts = torch.tensor([[s["prompt_len"]] for s in samples])
        batch = {
            "input_ids": padded("input_ids", self.pad_id),
            "labels": padded("labels", IGNORED),
            "attention_mask": (position < sizes).long(),
            "prompt_mask": position < prompts,
        }
        if all("scores" in s for s in samples):
            batch["scores"] = torch.stack([s["scores"] for s in samples])
        return batch
