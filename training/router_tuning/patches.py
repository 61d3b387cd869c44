"""Patches for a routed or static model, fitted in closed form (see `ridge`), in one pass from the first layer on.

A layer's patch is fitted to the activations that it will have: upstream the routers have decided, or the sublayers are
dropped for good, and patches that are fitted already stand in. All tokens that may skip count, whether supervised or
not, those of requests that keep the layer less; those of a decision window never skip.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from vllm_mod.config import ConfigError, ModConfig
from vllm_mod.tensors import Patch

from .data import HELD_OUT, Collator, held_out_of
from .layerwise import Batch, HiddenStates, advance, requests_of, sublayer
from .ridge import Fitted, Moments, TooLowRank, fit
from .routing import LinearPatch, ModelRouting, routing_of
from .unfinished import Unfinished

log = logging.getLogger(__name__)

#: As many as `router-tuning patch` takes by default.
PATCH_SAMPLES = 512
#: Patches are for requests that skip: a token of any other counts so much of one of theirs.
KEPT_WEIGHT = 0.1
#: Samples of a forward; on a GPU, which a few may leave idle, as many as have no more tokens than these.
_TOGETHER, _GPU_TOKENS = 16, 32768
_MORE = "give more --data or --max-samples, or a lower rank"


def check_rank(rank: int, config: ModConfig, hidden_size: int, flag: str) -> None:
    """Raise ConfigError, naming `flag`, unless patches of this rank can be had."""
    if config.policy.by_experts:
        raise ConfigError(f"{flag}: {config.granularity} has no patches; attn_*, mlp_* and block_* may have them")
    if rank > hidden_size:
        raise ConfigError(f"{flag} {rank}: the model's hidden size is {hidden_size}, so no patch has a higher rank")


def with_patch(config: ModConfig, rank: int | None) -> ModConfig:
    """The same routing with patches of this rank (None: without)."""
    data = {key: value for key, value in config.to_dict().items() if key != "patch"}
    more = {} if rank is None else {"version": 2, "patch": {"rank": rank}}
    return ModConfig.parse(data | more, "mod_config")


def batch_size(model: Any, samples: Sequence[Mapping[str, Any]]) -> int:
    """For `collate`."""
    if model.device.type != "cuda":
        return _TOGETHER
    return max(_GPU_TOKENS // max(len(sample["input_ids"]) for sample in samples), 1)


def collate(
    samples: Sequence[Mapping[str, Any]], config: ModConfig, rank: int, batch_size: int, where: str
) -> list[dict[str, Tensor]]:
    """Batches of similar length, with `held_out`, bool `[B]`.

    Raises ConfigError, naming `where`, if there are too few samples, or too few tokens that may skip for the rank.
    """
    if len(samples) < HELD_OUT:
        raise ConfigError(f"{where}: {len(samples)} usable samples; patches need {HELD_OUT}, one of them held out")
    skippable = [_may_skip(sample, config) for sample in samples]
    order = [number for number, tokens in enumerate(skippable) if tokens]
    random.Random(0).shuffle(order)
    held_out = set(itertools.compress(order, held_out_of([samples[number] for number in order])))
    tokens = sum(skippable[number] for number in order if number not in held_out)
    if tokens <= rank:
        behind = "" if config.window is None else f" behind the window of {config.window} tokens"
        raise ConfigError(f"{where}: {tokens} tokens{behind} to fit patches of rank {rank} on; {_MORE}")
    by_length = sorted(range(len(samples)), key=lambda number: len(samples[number]["input_ids"]))
    batches = []
    for first in range(0, len(by_length), batch_size):
        part = by_length[first : first + batch_size]
        batch = Collator(0)([dict(samples[number]) for number in part])  # what fills the masked places does not matter
        del batch["labels"]
        batches.append(batch | {"held_out": torch.tensor([number in held_out for number in part])})
    return batches


def _may_skip(sample: Mapping[str, Any], config: ModConfig) -> int:
    """Tokens of a sample behind its window."""
    length = len(sample["input_ids"])
    return length if config.window is None else length - min(config.window, sample["prompt_len"] or length)


def fit_patches(
    model: Any,
    batches: Sequence[Batch],
    rank: int,
    directory: Path,
    quiet: bool = False,
    kept_weight: float = KEPT_WEIGHT,
    file: Unfinished | None = None,
    by_chance: bool = False,
) -> dict[int, Fitted]:
    """Fit a patch for every routed layer of a model in evaluation mode, give it to the model, and return them all.

    What patches the model has are replaced. batches: see `collate`. Hidden states are kept in an unnamed file in
    `directory`. kept_weight: what a token of a request that keeps the sublayer counts, where requests decide. file:
    patches that it has, of the first layers, are not fitted again, and what is fitted goes there. by_chance: routers
    are zero on purpose, see `chance`. It costs about two forward passes over the data. Raises ConfigError, with the
    model's patches as far as they were fitted, where activations are not finite or differ in fewer directions than the
    rank.
    """
    state = routing_of(model)
    fitted = {} if file is None else file.fitted
    state.patches.clear()
    for layer, found in fitted.items():
        give(state, layer, found.patch, model)
    known, layers = len(fitted), state.config.layers
    total = 2 * (len(layers) - known) * len(batches)
    progress = tqdm(total=total, desc="patches", unit="batch", disable=True if quiet else None)
    with progress, contextlib.closing(HiddenStates(directory)) as states, chance(state, quiet or by_chance):
        for place, layer in enumerate(layers[known:], known):
            progress.set_postfix_str(f"layer {layer}")
            first = layers[place - 1] if place > known else 0
            for number, batch in enumerate(batches):
                before = states.get(number) if place > known else None
                states.put(number, advance(model, batch, before, first, layer))
                progress.update()
            moments = _moments(model, batches, states, layer, kept_weight, progress)
            fitted[layer] = _fitted(layer, *moments, rank)
            give(state, layer, fitted[layer].patch, model)
            if file is not None:
                file.write_now_and_then()
    return fitted


def _moments(
    model: Any, batches: Sequence[Batch], states: HiddenStates, layer: int, kept_weight: float, progress: Any
) -> tuple[Moments, Moments]:
    """Of the samples that are fitted on, and of those held out."""
    hidden_size = model.config.hidden_size
    train, held_out = Moments(hidden_size, model.device), Moments(hidden_size, model.device)
    for number, batch in enumerate(batches):
        x, y, may_skip = sublayer(model, batch, states.get(number), layer)
        keep = _kept(model, batch, layer, x) if kept_weight != 1.0 else torch.zeros(len(x), dtype=torch.bool)
        for moments, rows in ((train, ~batch["held_out"]), (held_out, batch["held_out"])):
            for weight, these in ((1.0, rows & ~keep), (kept_weight, rows & keep)):
                tokens = may_skip & these[:, None].to(may_skip.device)
                moments.add(x[tokens], y[tokens], weight)
        progress.update()
    return train, held_out


@torch.no_grad()
def _kept(model: Any, batch: Batch, layer: int, x: Tensor) -> Tensor:
    """bool `[B]`, on the CPU: which requests keep the sublayer whose input is x; none where requests do not decide."""
    state = routing_of(model)
    if state.config.is_static or not state.config.policy.by_request:
        return torch.zeros(len(x), dtype=torch.bool)
    with requests_of(model, batch):
        return state.decide(layer, x).keep.cpu()


def _fitted(layer: int, train: Moments, held_out: Moments, rank: int) -> Fitted:
    if not (train.is_finite() and held_out.is_finite()):
        raise ConfigError(f"layer {layer}: activations are not finite; the base model overflows on these samples")
    try:
        return fit(train, held_out, rank)
    except TooLowRank as error:
        raise ConfigError(f"layer {layer}: {error}, which does not do for a patch of rank {rank}; {_MORE}") from None


@torch.no_grad()
def give(state: ModelRouting, layer: int, patch: Patch, model: Any) -> None:
    """Put `patch` in a layer's place, as a module that nothing trains."""
    rank = 0 if patch.down is None else len(patch.down)
    module = LinearPatch(len(patch.bias), rank, model.device)
    for parameter, value in zip(module.parts(), (patch.bias, patch.down, patch.up), strict=True):
        if parameter is not None and value is not None:
            parameter.copy_(value)
    state.patches[layer] = module.requires_grad_(False)


# ---------------------------------------------------------------- routers that know nothing yet


class _Chance(nn.Module):
    """In place of a router: it keeps by chance, as often as it shall, a request or a token at a time."""

    def __init__(self, by_token: bool, cutoff: float, kept: float, seed: int) -> None:
        super().__init__()
        self.by_token, self.level_of_keeping, self.draws = by_token, cutoff + kept, torch.Generator().manual_seed(seed)

    def forward(self, x: Tensor) -> Tensor:
        """x: `[B, T, hidden]` -> scores `[B, T]`, equal within a request at sequence level."""
        batch, length = x.shape[:2]
        drawn = torch.rand(batch, length if self.by_token else 1, generator=self.draws)
        return (self.level_of_keeping - drawn).expand(batch, length).to(x.device)


@contextlib.contextmanager
def chance(state: ModelRouting, quiet: bool) -> Iterator[None]:
    """While it lasts, routers of zeros (which were never trained) keep what the config's target says, or half."""
    untrained = {i: r for i, r in state.routers.items() if not r.weight.any() and state.cutoff(i) == 0.0}
    kept = 0.5 if state.config.target_capacity is None else state.config.target_capacity
    if untrained and not quiet:
        log.warning("routers of layers %s are zero: while patches are fitted, chance keeps %g", list(untrained), kept)
    for layer in untrained:
        state.routers[layer] = _Chance(state.config.policy.by_token, state.cutoff(layer), kept, layer)  # type: ignore[assignment]
    try:
        yield
    finally:
        state.routers.update(untrained)
