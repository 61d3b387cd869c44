"""Perplexity of held-out answers by the float32 reference, and what its differences are worth."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_mod.checkpoint import read_json
from vllm_mod.config import ModConfig

from .common import progress

if TYPE_CHECKING:
    from torch import Tensor


def held_out_arguments(parser: argparse.ArgumentParser, samples: int = 200) -> None:
    """What `held_out` reads, but for `--model` and `--data`."""
    add = parser.add_argument
    add("--fraction", type=float, default=0.02, help="held-out part of a file (default: %(default)s)")
    add("--samples", type=int, default=samples, help="held-out samples (default: %(default)s)")
    add("--max-length", type=int, default=512, help="tokens of a held-out sample (default: %(default)s)")


def held_out(args: argparse.Namespace) -> list[dict[str, Any]]:
    from router_tuning.data import read_sources, split_tail, tokenize
    from router_tuning.tokenizer import load_tokenizer

    rows = split_tail(read_sources(args.data), args.fraction)[1]
    samples, counts = tokenize(rows, load_tokenizer(args.model), args.max_length, args.samples)
    progress(f"held-out data: {counts}")
    return list(samples)


def answer_losses(model: Any, samples: Iterable[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """Per sample the loss of its answer (nats, summed) and the answer's tokens, float64 `[N]` each.

    By the reference, so a sequence decision is taken from the prompt alone.
    """
    import torch

    from router_tuning.data import IGNORED
    from router_tuning.model import reference_logits

    losses, counts = [], []
    for sample in samples:
        logits = reference_logits(model, sample["input_ids"], sample["prompt_len"])
        labels = torch.tensor(sample["labels"])[1:]
        losses.append(torch.nn.functional.cross_entropy(logits[:-1], labels, ignore_index=IGNORED, reduction="sum"))
        counts.append((labels != IGNORED).sum())
    return torch.stack(losses).double(), torch.stack(counts).double()


@dataclass(frozen=True)
class Answers:
    """What one system makes of the samples' answers, sums over the tokens of each: float64 `[N]`."""

    losses: Tensor
    #: KL to the first system, nats
    divergence: Tensor
    #: tokens whose most likely successor is the first system's
    same: Tensor
    #: sublayers that were skipped, not by token
    skipped: Tensor


def compare(systems: Mapping[str, Any], samples: Iterable[dict[str, Any]]) -> tuple[dict[str, Answers], Tensor]:
    """Of models that the reference runs, sample by sample, and the answers' tokens; the first is what is compared to.

    At sequence level or static: what is skipped is the same for all tokens of an answer. Ctrl-C ends it with the
    samples that all systems have seen.
    """
    import torch

    from router_tuning.data import IGNORED
    from router_tuning.model import reference_logits

    measured: list[tuple[dict[str, list[float]], int]] = []  #: per sample: a row of each system, the answer's tokens

    def measure(sample: dict[str, Any]) -> tuple[dict[str, list[float]], int]:
        labels = torch.tensor(sample["labels"])[1:]
        answer, first, rows = labels != IGNORED, None, {}
        for name, model in systems.items():
            logits = reference_logits(model, sample["input_ids"], sample["prompt_len"])[:-1][answer].log_softmax(-1)
            first = logits if first is None else first
            divergence = torch.nn.functional.kl_div(logits, first, reduction="none", log_target=True).sum(-1)
            row = [
                -logits.gather(1, labels[answer, None]).double().sum(),
                divergence.double().sum(),
                (logits.argmax(-1) == first.argmax(-1)).sum(),
                _skipped(model),
            ]
            rows[name] = [float(value) for value in row]
        return rows, int(answer.sum())

    try:
        for sample in samples:
            rows, tokens = measure(sample)
            measured.append((rows, tokens))
    except KeyboardInterrupt:
        if len(measured) < 2:  # no error could be told
            raise
        progress(f"interrupted: the result is that of {len(measured)} samples")
    columns = {
        name: Answers(*torch.tensor([rows[name] for rows, _ in measured], dtype=torch.float64).T) for name in systems
    }
    return columns, torch.tensor([tokens for _, tokens in measured], dtype=torch.float64)


def _skipped(model: Any) -> float:
    """Sublayers that the last forward skipped."""
    from router_tuning.model import reference_decisions, routing_of

    config = routing_of(model).config
    if config.is_static:
        return float(len(config.layers))
    return sum(float((~keep).double().mean()) for keep in reference_decisions(model).values())


def mean_per_token(sums: Tensor, counts: Tensor) -> tuple[float, float]:
    """With its standard error, over samples."""
    return float(sums.sum() / counts.sum()), _spread(sums, counts)


def perplexity(losses: Tensor, counts: Tensor) -> tuple[float, float]:
    """Of all answer tokens, and its standard error (over samples, delta method)."""
    value = math.exp(losses.sum() / counts.sum())
    return value, value * _spread(losses, counts)


def perplexity_ratio(losses: Tensor, others: Tensor, counts: Tensor) -> tuple[float, float]:
    """Perplexity relative to that of another model on the same samples; the error is that of the paired difference,
    which is far smaller than what either perplexity has by itself."""
    value = math.exp((losses - others).sum() / counts.sum())
    return value, value * _spread(losses - others, counts)


def _spread(losses: Tensor, counts: Tensor) -> float:
    mean = losses.sum() / counts.sum()
    return float((losses - mean * counts).std() * math.sqrt(len(losses)) / counts.sum())


def load_system(model: Path, config: ModConfig | None) -> Any:
    """The reference of a checkpoint (None: as it is stored), of other thresholds, or of a static drop of a base."""
    import torch

    from router_tuning.model import attach_routers, load_base, load_reference

    if config is None or "mod_config" in read_json(model / "config.json"):
        return load_reference(model, config=config)
    loaded = load_base(model, torch.float32).eval()
    attach_routers(loaded, config)
    return loaded


def dense_config(model: Path) -> ModConfig:
    """Routers that are zero keep everything: the base model, as the reference runs it."""
    last = read_json(model / "config.json")["num_hidden_layers"] - 1
    return ModConfig.parse({"version": 1, "granularity": "attn_sequence", "layers": [last]}, "dense")
