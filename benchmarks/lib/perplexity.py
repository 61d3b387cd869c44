"""Perplexity of held-out answers by the float32 reference, and what its differences are worth."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_mod.checkpoint import read_json
from vllm_mod.config import ModConfig

from .common import progress

if TYPE_CHECKING:
    from torch import Tensor


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
