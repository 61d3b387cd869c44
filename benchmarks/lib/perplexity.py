"""Perplexity of held-out answers by the float32 reference, and what its differences are worth."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from router_tuning.per_token import mean_per_token
from vllm_mod.checkpoint import read_json
from vllm_mod.config import ModConfig

from .common import progress

if TYPE_CHECKING:
    from torch import Tensor

#: Samples of a forward, and on a GPU, which a few would leave idle.
_TOGETHER, _TOGETHER_ON_GPU = 8, 32


def answer_losses(model: Any, samples: Iterable[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """Per sample the loss of its answer (nats, summed) and the answer's tokens, float64 `[N]` each.

    By the reference, so a sequence decision is taken from the prompt alone.
    """
    import torch

    from router_tuning.data import IGNORED
    from router_tuning.model import reference_logits

    losses, counts = [], []
    for sample in samples:
        logits = reference_logits(model, sample["input_ids"], sample["prompt_len"]).cpu()
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


def compare(
    systems: Mapping[str, Any], samples: Iterable[dict[str, Any]], together: int | None = None
) -> tuple[dict[str, Answers], Tensor]:
    """Of models that the reference runs, and the answers' tokens; the first is what is compared to.

    At sequence level or static: what is skipped is the same for all tokens of an answer. together: samples of a forward
    (None: as suits the device). Ctrl-C ends it with the samples that all systems have seen.
    """
    import torch

    if together is None:
        on_gpu = next(iter(systems.values())).device.type == "cuda"
        together = _TOGETHER_ON_GPU if on_gpu else _TOGETHER
    measured: dict[str, list[Tensor]] = {name: [] for name in systems}  #: `[4, B]` each
    counts: list[Tensor] = []
    try:
        for batch in _batched(samples, together):
            found, tokens = _measure(systems, batch)
            for name, columns in found.items():
                measured[name].append(columns)
            counts.append(tokens)
    except KeyboardInterrupt:
        number = sum(map(len, counts))
        if number < 2:  # no error could be told
            raise
        progress(f"interrupted: the result is that of {number} samples")
    return {name: Answers(*torch.cat(parts, 1)) for name, parts in measured.items()}, torch.cat(counts)


def _batched(samples: Iterable[dict[str, Any]], number: int) -> Iterator[list[dict[str, Any]]]:
    rest = iter(samples)
    while batch := list(islice(rest, number)):
        yield batch


def _measure(systems: Mapping[str, Any], samples: list[dict[str, Any]]) -> tuple[dict[str, Tensor], Tensor]:
    """The fields of `Answers`, float64 `[4, B]` on the CPU, and the answers' tokens `[B]`."""
    import torch

    from router_tuning.data import Collator
    from router_tuning.layerwise import answer_logits, supervised
    from router_tuning.predictions import divergences, log_probabilities, losses

    batch = Collator(0)([dict(sample) for sample in samples])
    answers, found = supervised(batch), {}
    device = next(iter(systems.values())).device
    labels, owner = batch["labels"][:, 1:][answers].to(device), answers.nonzero()[:, 0].to(device)

    def per_sample(values: Tensor) -> Tensor:
        return torch.zeros(len(samples), dtype=torch.float64, device=device).index_add_(0, owner, values.double()).cpu()

    with torch.no_grad():
        for name, model in systems.items():
            logits = answer_logits(model, batch)
            likeliest = logits.argmax(-1)
            if not found:
                first, first_likeliest = log_probabilities(logits), likeliest
            found[name] = torch.stack(
                [
                    per_sample(losses(logits, labels)),
                    per_sample(divergences(logits, first)),
                    per_sample(likeliest == first_likeliest),
                    _skipped(model, len(samples)),
                ]
            )
    return found, answers.sum(1).double()


def _skipped(model: Any, number: int) -> Tensor:
    """Sublayers that each of the `number` samples of the last forward skipped, float64."""
    import torch

    from router_tuning.model import reference_decisions, routing_of

    config = routing_of(model).config
    if config.is_static:
        return torch.full((number,), float(len(config.layers)), dtype=torch.float64)
    valid = routing_of(model).valid
    total = torch.zeros(number, dtype=torch.float64)
    for keep in reference_decisions(model).values():
        skipped = (~keep).double()
        if skipped.dim() > 1:  # by token, or by each of its experts
            counted = torch.ones(skipped.shape[:2], device=skipped.device) if valid is None else valid.double()
            skipped = (skipped.flatten(2).mean(2) if skipped.dim() > 2 else skipped) * counted
            skipped = skipped.sum(1) / counted.sum(1)
        total += skipped.cpu()
    return total


def kept_ratios(decisions: Sequence[Mapping[int, Tensor]], counts: Tensor, by_request: bool) -> dict[int, float]:
    """Routed layer -> kept ratio. decisions: of each sample, see `reference_decisions`; counts: their answers' tokens.

    A request's decision counts as its answer has tokens: perplexity is a mean over them, and so is what a static drop
    skips. Short answers are often those that skip most.
    """
    import torch

    found = {}
    for layer in decisions[0]:
        keep = torch.cat([sample[layer].flatten().cpu() for sample in decisions]).double()
        weights = counts if by_request else torch.ones_like(keep)
        found[layer] = float((keep * weights).sum() / weights.sum())
    return found


def perplexity(losses: Tensor, counts: Tensor) -> tuple[float, float]:
    """Of all answer tokens, and its standard error (over samples, delta method)."""
    mean, error = mean_per_token(losses, counts)
    return math.exp(mean), math.exp(mean) * error


def perplexity_ratio(losses: Tensor, others: Tensor, counts: Tensor) -> tuple[float, float]:
    """Perplexity relative to that of another model on the same samples; the error is that of the paired difference,
    which is far smaller than what either perplexity has by itself."""
    return perplexity(losses - others, counts)


def load_system(model: Path, config: ModConfig | None) -> Any:
    """The reference of a checkpoint (None: as it is stored), of other thresholds, or of a static drop of a base."""
    import torch

    from router_tuning.loading import on_best_device
    from router_tuning.model import attach_routers, load_base, load_reference

    if config is None or "mod_config" in read_json(model / "config.json"):
        return on_best_device(load_reference(model, config=config))
    loaded = load_base(model, torch.float32).eval()
    attach_routers(loaded, config)
    return on_best_device(loaded)


def dense_config(model: Path) -> ModConfig:
    """Routers that are zero keep everything: the base model, as the reference runs it."""
    last = read_json(model / "config.json")["num_hidden_layers"] - 1
    return ModConfig.parse({"version": 1, "granularity": "attn_sequence", "layers": [last]}, "dense")
