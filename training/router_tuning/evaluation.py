"""Loss and kept ratios of held-out samples: every sample once, by however many processes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .data import IGNORED
from .model import given_prompts, routing_of


@dataclass(frozen=True)
class Evaluation:
    """Held-out results. `kept`: ratio per routed layer."""

    loss: float
    kept: dict[int, float]
    #: Per routed layer, where experts are routed: how often each was kept, and selected at all; float64 `[2, experts]`.
    experts: dict[int, Tensor] = field(default_factory=dict)

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    @property
    def mean_kept(self) -> float:
        return sum(self.kept.values()) / len(self.kept) if self.kept else 0.0

    def to_dict(self) -> dict[str, Any]:
        data: dict[str, Any] = {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "kept": self.mean_kept,
            "kept_per_layer": {str(layer): ratio for layer, ratio in self.kept.items()},
        }
        if self.experts:
            counts = {str(layer): counts.tolist() for layer, counts in self.experts.items()}
            data["kept_per_expert"] = {
                layer: [k / s if s else None for k, s in zip(kept, selected, strict=True)]
                for layer, (kept, selected) in counts.items()
            }
            data["selected_per_expert"] = {layer: [int(n) for n in selected] for layer, (_, selected) in counts.items()}
        return data

    def __str__(self) -> str:
        """`5: 0.42  6: 0.61 …`"""
        return "  ".join(f"{layer}: {ratio:.2f}" for layer, ratio in self.kept.items())


def share(samples: int, batch_size: int, process: int, processes: int) -> Iterator[tuple[range, bool]]:
    """(samples of a batch, does it count?): one process's part of the samples in their order.

    Batches are the same whatever the number of processes, and so is what is measured. Where the last round has fewer
    batches than processes, those left over repeat the first and count nothing: a forward of a sharded model needs all.
    """
    batches = [range(i, min(i + batch_size, samples)) for i in range(0, samples, batch_size)]
    for first in range(0, len(batches), processes):
        mine = first + process
        yield (batches[mine], True) if mine < len(batches) else (batches[0], False)


@torch.no_grad()
def measure(trainer: Any) -> Evaluation:
    """The held-out results of a RouterTrainer's model, which is in evaluation mode, from all processes together."""
    args, state = trainer.args, routing_of(trainer.model)
    model = trainer.model_wrapped if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled else trainer.model
    layers = state.config.layers
    zeros: dict[str, Any] = {"dtype": torch.float64, "device": args.device}
    totals = torch.zeros(2 + 2 * len(layers), **zeros)  # loss, supervised tokens, (kept, routed) of each layer
    routed = layers if state.config.policy.by_experts else ()
    experts = {layer: torch.zeros(2, len(state.routers[layer].weight), **zeros) for layer in routed}
    parts = share(len(trainer.eval_dataset), args.per_device_eval_batch_size, args.process_index, args.world_size)
    for samples, counts in parts:
        inputs = trainer._prepare_inputs(trainer.data_collator([trainer.eval_dataset[i] for i in samples]))
        supervised = int((inputs["labels"][:, 1:] != IGNORED).sum())
        with given_prompts(model, inputs.pop("prompt_mask")) as state, trainer.compute_loss_context_manager():
            loss = model(**inputs).loss
        if counts:
            pairs = state.counts()
            row = [float(loss) * supervised, supervised, *(n for layer in layers for n in pairs[layer])]
            totals += torch.tensor(row, **zeros)
            for layer, found in state.expert_counts().items():
                experts[layer] += found
    values = trainer.accelerator.reduce(totals, "sum").tolist()
    kept = {layer: values[2 + 2 * i] / values[3 + 2 * i] for i, layer in enumerate(layers)}
    experts = {layer: trainer.accelerator.reduce(found, "sum").cpu() for layer, found in experts.items()}
    return Evaluation(values[0] / values[1], kept, experts)
