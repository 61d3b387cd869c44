"""`router-tuning train --dry-run`: all but the training, to find out in a minute what else is found out in hours."""

from __future__ import annotations

import contextlib
import itertools
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_mod.checkpoint import write_checkpoint
from vllm_mod.config import ModConfig

from . import card
from .arguments import RouterArguments, check_output
from .data import IGNORED
from .model import router_weights
from .trainer import RouterTrainer

RECORD = "train_command.txt"
#: Characters of a prompt or an answer that are shown.
_SHOWN = 600


def output_of(args: RouterArguments) -> Path:
    """Not `--output` itself: the same command without --dry-run is to find that free."""
    return Path(args.output.rstrip("/") + ".dry-run")


def clear_output(args: RouterArguments) -> None:
    """Remove what an earlier dry run wrote; raises ConfigError if something else is there."""
    output = output_of(args)
    with contextlib.suppress(OSError):
        if "--dry-run" in (output / RECORD).read_text(encoding="utf-8"):
            shutil.rmtree(output)
    check_output(output)


def finish(
    trainer: RouterTrainer,
    args: RouterArguments,
    tokenizer: Any,
    base: Path,
    config: ModConfig,
    records: Mapping[str, str],
) -> int:
    """Show a sample and the loss of one held-out batch, write a checkpoint with routers of zeros; returns 0."""
    held_out: Any = trainer.eval_dataset
    trainer.eval_dataset = held_out.select(range(min(len(held_out), trainer.args.per_device_eval_batch_size)))
    dense = trainer.measure(threshold=0.0)
    if trainer.is_world_process_zero():
        train_set: Any = trainer.train_dataset
        for line in describe_sample(train_set[0], tokenizer):
            print(line)
        number = len(trainer.eval_dataset)
        print(f"loss of {number} held-out samples: {dense.loss:.3f}, perplexity {dense.perplexity:.2f}")
        output = output_of(args)
        write_checkpoint(base, output, config, router_weights(trainer.model), records)
        card.write(output)
        print(f"written: {output} (its routers are zero and keep everything, so it equals the base model)")
        with contextlib.suppress(OSError):  # Trainer makes its directory; a run that is to be resumed is in it or not
            Path(trainer.args.output_dir or "").rmdir()
    trainer.accelerator.wait_for_everyone()
    return 0


def describe_sample(sample: Mapping[str, Sequence[int]], tokenizer: Any) -> Iterator[str]:
    """`prompt | …`, `answer | …` and, between two answers, `turn   | …`: one line each, decoded, escaped."""
    ids, labels, prompt = sample["input_ids"], sample["labels"], sample["prompt_len"]
    yield f"a training sample, {len(ids)} tokens; decisions are taken from its first {prompt}, the loss is on answers:"
    for supervised, group in itertools.groupby(range(len(ids)), key=lambda i: labels[i] != IGNORED):
        places = list(group)
        name = "answer" if supervised else "prompt" if places[0] == 0 else "turn"
        text = tokenizer.decode([ids[i] for i in places], clean_up_tokenization_spaces=False)
        if len(text) > _SHOWN:
            text = f"{text[: _SHOWN // 2]} … {text[-_SHOWN // 2 :]}"
        yield f"  {name:<6} | {text!r}"
