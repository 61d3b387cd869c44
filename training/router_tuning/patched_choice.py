"""Choices of what is skipped, with patches made for them, and which of them is nearest to the dense model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_mod.config import ModConfig

from .choice import Choice
from .distill import divergence
from .fit_arguments import FitArguments
from .loading import on_best_device, stored_dtype
from .model import attach_routers, load_base, patch_weights
from .patch_record import PatchRecord
from .patches import batch_size, collate, with_patch
from .patching import make_patches
from .per_token import mean_per_token
from .selection import Measured
from .unfinished import Unfinished


@dataclass(frozen=True)
class PatchedChoice:
    """All that a checkpoint needs, beside its base."""

    choice: Choice
    config: ModConfig
    #: per routed layer, as `write_checkpoint` takes them
    weights: dict[int, Tensor]
    patches: dict[int, Any]
    record: PatchRecord
    #: KL to the dense model and tokens of samples, see `distill.divergence`; None where they are not asked for
    divergence: tuple[Tensor, Tensor] | None


@dataclass(frozen=True)
class Patching:
    """What all choices of one `fit` have in common."""

    args: FitArguments
    base: Path
    #: in which patches are fitted
    dtype: torch.dtype
    window: int
    measured: Measured
    samples: Sequence[Mapping[str, Any]]
    #: for hidden states
    place: Path
    #: what was typed, and what became of the rows of the data
    command: str
    rows: dict[str, Any]

    def config(self, choice: Choice) -> ModConfig:
        settings = {
            "version": 2, "granularity": self.args.granularity, "layers": choice.layers, "window": self.window,
            "cutoff": [choice.log_price - choice.routers[layer].offset for layer in choice.layers],
            "target_capacity": choice.kept, "base_model": self.args.model.rstrip("/"),
        }  # fmt: skip
        return ModConfig.parse(settings, "mod_config")

    def of(self, choice: Choice, file: Unfinished, compared: bool) -> PatchedChoice:
        """compared: whether it will be. file: what it has is not made again; the caller removes it once the patches are
        written."""
        args, config = self.args, self.config(choice)
        file.begin(str(choice))
        model = on_best_device(load_base(self.base, self.dtype).eval())
        weights = {layer: choice.routers[layer].weight for layer in choice.layers}
        attach_routers(model, config, weights)
        # Patches are for requests that no router has seen, and that skip other layers than those it was fitted to.
        scores = choice.scores(self.measured, len(self.samples))
        samples = [dict(sample) | {"scores": scores[number]} for number, sample in enumerate(self.samples)]
        batches = collate(samples, config, args.patch_rank, batch_size(model, samples), ", ".join(args.data))
        record = make_patches(model, samples, batches, args.patch_rank, args, self.place, self.command, self.rows, file)
        some = samples[: args.distilled_samples] if compared else []
        apart = divergence(model, some, choice.kept) if some else None
        patches = patch_weights(model, stored_dtype(self.base))
        return PatchedChoice(choice, with_patch(config, args.patch_rank), weights, patches, record, apart)


def nearest(made: Sequence[PatchedChoice]) -> PatchedChoice:
    """One, or the nearer of two: by KL on samples that distillation left out, of which each skips as much as was asked
    for. Its record names both.

    Choices are compared before they have patches, which do more for a static drop: all of a patch's tokens are skipped
    alike there.
    """
    if len(made) == 1:
        return made[0]
    (first, tokens), (second, _) = (one.divergence for one in made if one.divergence is not None)
    found = [mean_per_token(sums, tokens)[0] for sums in (first, second)]
    nats = {str(one.choice): mean for one, mean in zip(made, found, strict=True)}
    taken = min(made, key=lambda one: nats[str(one.choice)])
    print(f"KL where both skip as much: {', '.join(f'{mean:.4f} ({name})' for name, mean in nats.items())};", end=" ")
    print("difference {:+.4f} ± {:.4f}".format(*mean_per_token(second - first, tokens)))
    print(f"taken: {taken.choice}")
    if taken.choice.share is None:
        print("no request skips other layers than the next one; --compare-static false keeps routers that let them")
    return replace(taken, record=taken.record.model_copy(update={"compared": nats}))
