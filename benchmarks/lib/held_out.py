"""What is compared on held-out requests: the requests, the checkpoints, and whether these can be compared at all."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm_mod.architectures import BaseShape
from vllm_mod.checkpoint import is_router_only, read_json, read_mod_config
from vllm_mod.config import ConfigError, ModConfig

from .common import fraction, progress


def held_out_arguments(parser: argparse.ArgumentParser, samples: int = 200) -> None:
    """What `held_out` reads, but for `--model` and `--data`."""
    add = parser.add_argument
    add("--fraction", type=fraction, default=0.02, help="held-out part of a file, 1: all of it (default: %(default)s)")
    add("--samples", type=int, default=samples, help="held-out samples (default: %(default)s)")
    add("--max-length", type=int, default=512, help="tokens of a held-out sample (default: %(default)s)")


def held_out(args: argparse.Namespace, checkpoints: Iterable[Path]) -> list[dict[str, Any]]:
    """Tokenised samples, two or more, of requests that none of the checkpoints was fitted on. Raises ConfigError."""
    from router_tuning.data import read_sources, split_tail, tokenize
    from router_tuning.patch_record import fitted_on
    from router_tuning.tokenizer import load_tokenizer

    seen: set[str] = set()
    for checkpoint in checkpoints:
        _check_trained(checkpoint, args)
        prompts = fitted_on(checkpoint)
        if not prompts and read_mod_config(checkpoint).patch is not None:
            progress(f"{checkpoint}: made by an older version, so that what it was fitted on may be held out here")
        seen |= prompts
    rows = split_tail(read_sources(args.data), args.fraction)[1]
    # Each digest may take more than one away, of rows that ask the same.
    found, counts = tokenize(rows, load_tokenizer(args.model), args.max_length, None if seen else args.samples)
    progress(f"held-out data: {counts}")
    samples = [sample for sample in found if sample["asked"] not in seen]
    if len(samples) < len(found):
        progress(f"left out: {len(found) - len(samples)} that a checkpoint was fitted on")
    if len(samples) < 2:  # no error could be told
        raise ConfigError(f"--data: {len(samples)} usable held-out samples; give more data, or --fraction, --samples")
    return samples[: args.samples]


def prompts_of(samples: Iterable[Mapping[str, Any]]) -> list[list[int]]:
    """What serving would submit of samples as `tokenize` gives them."""
    return [list(sample["input_ids"][: sample["prompt_len"]]) for sample in samples]


def _check_trained(checkpoint: Path, args: argparse.Namespace) -> None:
    """Raise ConfigError if routers were trained on what is to be held out: of too many rows to be named one by one."""
    from router_tuning.records import ARGUMENTS_FILE, read_arguments

    trained = read_arguments(checkpoint)
    if trained is None or trained.eval_fraction is None or args.fraction <= trained.eval_fraction:
        return
    files = {Path(name).name for name in trained.data or ()}
    if same := [name for name in args.data if Path(name).name in files]:
        raise ConfigError(
            f"--fraction {args.fraction:g}: {checkpoint} was trained on all of {same[0]} but its last "
            f"{trained.eval_fraction:g} ({ARGUMENTS_FILE}); name no more than that, or other data"
        )


def names_of(others: Iterable[Path], taken: Iterable[str]) -> dict[str, Path]:
    """Checkpoints by the names of their directories, which results call them by. Raises ConfigError on a name twice."""
    found: dict[str, Path] = {}
    for other in others:
        name = other.absolute().name
        if name in found or name in taken:
            raise ConfigError(f"--others: {other}: {name} is taken; directories with names of their own are needed")
        found[name] = other
    return found


def check_checkpoint(directory: Path, base: Path) -> ModConfig:
    """What a whole routed or static checkpoint of this base model routes. Raises ConfigError on anything else."""
    config = read_mod_config(directory)
    if is_router_only(directory):
        raise ConfigError(
            f"{directory}: routers without their base model; join them: "
            f"router-tuning export --model {base} --routers {directory} --output CKPT"
        )
    own, wanted = (read_json(path / "config.json") for path in (directory, base))
    if "mod_config" in wanted:
        raise ConfigError(f"--model {base}: a routed checkpoint; give its base model")
    shape, of_base = (BaseShape.of(found, str(path)) for found, path in ((own, directory), (wanted, base)))
    same = replace(shape, architecture=of_base.architecture) == of_base  # a routed one's has another name
    if not same or own.get("vocab_size") != wanted.get("vocab_size"):
        raise ConfigError(f"{directory}: of another base model than --model {base}")
    config.check_fits(shape.num_layers, shape.num_experts, shape.dense_layers)
    return config
