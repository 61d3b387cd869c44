"""What is compared on held-out requests: the requests, the checkpoints, and whether these can be compared at all."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vllm_mod.checkpoint import BaseShape, is_router_only, read_json, read_mod_config
from vllm_mod.config import ConfigError

from .common import fraction, progress


def held_out_arguments(parser: argparse.ArgumentParser, samples: int = 200) -> None:
    """What `held_out` reads, but for `--model` and `--data`."""
    add = parser.add_argument
    add("--fraction", type=fraction, default=0.02, help="held-out part of a file, 1: all of it (default: %(default)s)")
    add("--samples", type=int, default=samples, help="held-out samples (default: %(default)s)")
    add("--max-length", type=int, default=512, help="tokens of a held-out sample (default: %(default)s)")


def held_out(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Tokenised samples, two or more. Raises ConfigError."""
    from router_tuning.data import read_sources, split_tail, tokenize
    from router_tuning.tokenizer import load_tokenizer

    rows = split_tail(read_sources(args.data), args.fraction)[1]
    samples, counts = tokenize(rows, load_tokenizer(args.model), args.max_length, args.samples)
    progress(f"held-out data: {counts}")
    if len(samples) < 2:  # no error could be told
        raise ConfigError(f"--data: {len(samples)} usable held-out samples; give more data, or --fraction, --samples")
    return list(samples)


def names_of(others: Iterable[Path], taken: Iterable[str]) -> dict[str, Path]:
    """Checkpoints by the names of their directories, which results call them by. Raises ConfigError on a name twice."""
    found: dict[str, Path] = {}
    for other in others:
        name = other.absolute().name
        if name in found or name in taken:
            raise ConfigError(f"--others: {other}: {name} is taken; directories with names of their own are needed")
        found[name] = other
    return found


def check_checkpoint(directory: Path, base: Path) -> None:
    """Raise ConfigError unless `directory` is a whole routed or static checkpoint, and `base` a model of its shape."""
    read_mod_config(directory)
    if is_router_only(directory):
        raise ConfigError(
            f"{directory}: routers without their base model; join them: "
            f"router-tuning export --model {base} --routers {directory} --output CKPT"
        )
    own, wanted = (read_json(path / "config.json") for path in (directory, base))
    if "mod_config" in wanted:
        raise ConfigError(f"--model {base}: a routed checkpoint; give its base model")
    if _shape(own, directory) != _shape(wanted, base):
        raise ConfigError(f"{directory}: of another base model than --model {base}")


def _shape(config: dict[str, Any], directory: Path) -> tuple[int, int, int, Any]:
    shape = BaseShape.of(config, str(directory / "config.json"))
    return shape.num_layers, shape.hidden_size, shape.num_experts, config.get("vocab_size")
