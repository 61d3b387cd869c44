"""`router-tuning answers`: prompts with what the base model itself answers, greedily, as data to make patches on.

A patch stands in where answers are generated, and those are the model's own: fitted on them, it is nearer to the model
there, and further away on answers that others have written.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig

from vllm_mod import __version__
from vllm_mod.config import ConfigError
from vllm_mod.files import replacing

from .arguments import AnswersArguments, check_output
from .chat import answered, prompt_digest
from .costs_file import told_by
from .counts import Counts
from .data import check_sources, rows_to_fit_on, shuffled
from .encode import Encoder
from .hub import local_model
from .interrupt import deferred
from .kept_file import KeptFile
from .loading import fitting_dtype, on_best_device
from .model import load_base
from .patching import beside
from .preflight import check_vocabulary, check_writable
from .tokenizer import load_tokenizer
from .values import Unusable

log = logging.getLogger(__name__)

#: What an answer that is caught in a loop says again: at most so many tokens, so many times, and so many tokens in all.
_LONGEST_LOOP, _ROUNDS, _LOOPED = 16, 3, 24


@dataclass(frozen=True)
class Asked:
    """A prompt, as it is served."""

    row: Any
    ids: list[int]


@dataclass
class Report:
    """What became of the prompts."""

    asked: int
    written: int = 0
    #: of those, how many end for their length
    cut: int = 0
    looped: int = 0
    empty: int = 0
    #: whose text is not found again in the rendered chat, or behind another prompt
    changed: int = 0

    def __str__(self) -> str:
        reasons = {
            "end in a loop": self.looped, "say nothing": self.empty,
            "do not come out of the chat template as they were": self.changed,
        }  # fmt: skip
        left_out = ", ".join(f"{number} {words}" for words, number in reasons.items() if number)
        return f"answers: {self.written} of {self.asked}, {self.cut} of them cut at --tokens; left out: " + (
            left_out or "none"
        )


def repeating(answer: Sequence[int]) -> bool:
    """Whether it ends in a loop."""
    for period in range(1, _LONGEST_LOOP + 1):
        end = max(_LOOPED, _ROUNDS * period)
        if len(answer) >= end and all(answer[-i] == answer[-i - period] for i in range(1, end - period + 1)):
            return True
    return False


class Given(KeptFile):
    """Answers, by the number of their prompt, as a JSON file: an interrupted run goes on from it."""

    def __init__(self, path: Path, belongs_to: Mapping[str, str]) -> None:
        """belongs_to: as for `Unfinished`."""
        super().__init__(path, {**belongs_to, "version": __version__})
        self.answers: dict[int, list[int]] = {}
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored["belongs_to"] == self.belongs_to:
                self.answers = {int(number): ids for number, ids in stored["answers"].items()}
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("%s cannot be read, and is begun anew: %s", path, error)

    def write(self) -> None:
        text = json.dumps({"belongs_to": self.belongs_to, "answers": self.answers})
        self._replace(lambda path: path.write_text(text, encoding="utf-8"))

    def contents(self) -> str:
        return f"{len(self.answers)} answers" if self.answers else ""


def answer(args: AnswersArguments) -> tuple[Report, Path]:
    """Generate, write `args.output`; raises ConfigError, with nothing written, where there is nothing to write."""
    output = Path(args.output)
    check_output(output)
    check_sources(args.data)
    base = local_model(args.model)
    check_writable(output, output.absolute().parent)
    tokenizer = load_tokenizer(base)
    asked, counts = _prompts(args, tokenizer)
    log.info("prompts: %s", counts)
    if not asked:
        raise ConfigError(f"{', '.join(args.data)}: no usable prompt ({counts})")
    check_vocabulary(base, [{"input_ids": one.ids} for one in asked])
    model = on_best_device(load_base(base, fitting_dtype(base, args.bf16)).eval())
    prompts = [one.ids for one in asked]
    told = hashlib.sha256(repr(prompts).encode()).hexdigest()
    belongs_to = {"model": told_by(model), "precision": str(model.dtype), "prompts": told, "tokens": str(args.tokens)}
    given = Given(beside(output), belongs_to)
    with given.named_on_interrupt():
        generate(model, tokenizer, prompts, args.tokens, args.batch_size, given)
        report = Report(len(asked))
        lines = [json.dumps(row, ensure_ascii=False) for row in _rows(asked, given, tokenizer, args.tokens, report)]
        if not lines:
            raise ConfigError(f"{', '.join(args.data)}: no answer is of use ({report})")
        with deferred():
            with replacing(output) as (temporary,):
                temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            given.remove()
    return report, output


def _prompts(args: AnswersArguments, tokenizer: Any) -> tuple[list[Asked], Counts]:
    """In the order in which `fit` takes rows with the same flags."""
    rows = rows_to_fit_on(args, args.seed)
    counts, encode = Counts(duplicates=rows.duplicates), Encoder(tokenizer)
    found: dict[tuple[int, ...], Asked] = {}
    for row in shuffled(rows, args.seed):
        if len(found) >= args.max_samples:
            break
        counts.read += 1
        try:
            encoded = encode(row)
            if encoded.prompt_len == len(encoded.ids):
                raise Unusable("no_answer", "the row is text without a prompt")
            if encoded.prompt_len > args.max_length:
                raise Unusable("too_long", f"{encoded.prompt_len} tokens, {args.max_length} are allowed")
        except Unusable as reason:
            counts.leave_out(reason)
            continue
        ids = encoded.ids[: encoded.prompt_len]
        counts.duplicates += tuple(ids) in found
        counts.used += tuple(ids) not in found
        found.setdefault(tuple(ids), Asked(row, ids))
    return list(found.values()), counts


@torch.no_grad()
def generate(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], tokens: int, batch_size: int, given: Given
) -> None:
    """Greedy answers of at most `tokens` to all prompts that have none, without the token that ends them."""
    ends = _ends(model, tokenizer)
    # Whatever the base's own settings say, such as a temperature or a penalty: it is the model that is to be asked.
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=tokens, eos_token_id=sorted(ends) or None, pad_token_id=0
    )
    missing = [number for number in range(len(prompts)) if number not in given.answers]
    by_length = sorted(missing, key=lambda number: len(prompts[number]))
    progress = tqdm(total=len(prompts), initial=len(given.answers), desc="answers", unit="answer", disable=None)
    with progress:
        for first in range(0, len(by_length), batch_size):
            part = by_length[first : first + batch_size]
            batch = _padded([prompts[number] for number in part], model.device)
            found = model.generate(**batch)[:, batch["input_ids"].shape[1] :].tolist()
            for number, ids in zip(part, found, strict=True):
                end = next((place for place, token in enumerate(ids) if token in ends), len(ids))
                given.answers[number] = ids[:end]
            given.write_now_and_then()
            progress.update(len(part))


def _padded(prompts: Sequence[list[int]], device: Any) -> dict[str, Tensor]:
    """Padded on the left, so that all go on in the same place."""
    length = max(map(len, prompts))
    ids = torch.tensor([[0] * (length - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def _ends(model: Any, tokenizer: Any) -> set[int]:
    """What ends an answer in vLLM: the tokenizer's end token, and those of `generation_config.json`."""
    own = model.generation_config.eos_token_id
    found = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
    return {token for token in found if token is not None}


def _rows(
    asked: Sequence[Asked], given: Given, tokenizer: Any, tokens: int, report: Report
) -> Iterator[Mapping[str, Any]]:
    """Rows of prompt and answer, which give the same prompt again; counts in `report`."""
    encode = Encoder(tokenizer)
    for number, one in enumerate(asked):
        ids = given.answers[number]
        text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        text = text.rstrip("\ufffd")  # a character that the cut went through
        if repeating(ids):
            report.looped += 1
        elif not text.strip():
            report.empty += 1
        elif (row := _checked(one, text, encode)) is None:
            report.changed += 1
        else:
            report.written += 1
            report.cut += len(ids) == tokens
            yield row


def _checked(one: Asked, text: str, encode: Encoder) -> Mapping[str, Any] | None:
    row = answered(encode.read(one.row), text)
    try:
        encoded = encode(row)
    except Unusable:
        return None
    same = encoded.ids[: encoded.prompt_len] == one.ids and prompt_digest(row) == prompt_digest(one.row)
    return row if same else None
