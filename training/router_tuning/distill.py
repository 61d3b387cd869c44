"""Patches after their fit: a few steps that bring the routed model's predictions nearer to the dense model's.

    minimise   mean over answer tokens of KL(p || q)      p: nothing is skipped, q: as the routers decide

in the patches alone; routers, thresholds and base stay. The closed form makes each sublayer's output right on average,
whatever becomes of it; this weighs its errors by what they do to the predictions.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup

from vllm_mod.config import ConfigError

from .cost_routers import cut
from .data import Collator, held_out_of
from .interrupt import deferred
from .layerwise import Batch, HiddenStates, advance, answer_logits, supervised
from .model import decoder_layers
from .patch_record import Distilled
from .patches import chance
from .predictions import divergences, log_probabilities
from .routing import routing_of
from .sublayers import nothing_skipped
from .unfinished import Unfinished

#: Samples of a step.
_BATCH = 4
#: Adam's, rising over the first of the steps and falling to zero: entries of a fitted patch are about 0.01 to 0.1.
RATE, _RISING = 1e-3, 0.1
#: Parts that are tried of the way from the fitted patches to where the steps led: Adam's are as long where little is to
#: be gained, and then most of the way is noise.
_SHARES = (0.25, 0.5, 1.0)


def distill(
    model: Any,
    samples: Sequence[Mapping[str, Any]],
    directory: Path,
    passes: int = 1,
    rate: float = RATE,
    quiet: bool = False,
    file: Unfinished | None = None,
) -> Distilled:
    """Passes over `samples`, but for every tenth: these say how far to go along the way that the passes led.

    If no part of it helps, patches stay as they were.

    model: routed or static, in evaluation mode, with patches; its parameters are frozen. directory: for hidden states
    of the dense model, in an unnamed file. file: steps that it has are not taken again, and what is done goes there. It
    costs a forward over the samples, and about three for each pass. Raises ConfigError where a loss is not finite, or
    memory does not do.
    """
    state = routing_of(model)
    model.requires_grad_(False)
    parameters = [parameter for patch in state.patches.values() for parameter in patch.parameters()]
    held_out, rest = map(_batches, _parts(samples))
    order = [i for number in range(passes) for i in random.Random(number).sample(range(len(rest)), len(rest))]
    fitted = [parameter.detach().clone() for parameter in parameters]
    steps = _Steps(parameters, rate, len(order))
    known = None if file is None else file.distillation
    done = 0 if known is None else known["done"]
    total = (2 + len(_SHARES)) * len(held_out) + len(rest) + len(order)
    initial = 0 if known is None else done + len(held_out)
    progress = tqdm(total=total, initial=initial, desc="distilling patches", disable=True if quiet else None)
    with progress, contextlib.closing(_Dense(model, directory)) as dense:
        for batch in (*held_out, *rest):
            dense.note(batch)
            progress.update()
        if known is None:
            before = _mean(model, held_out, dense, progress)
        else:
            before = known["before"]
            steps.load(known["steps"])
        for parameter in parameters:
            parameter.requires_grad_(True)
        try:
            with chance(state, quiet=True):
                for place, i in enumerate(order[done:], done):
                    loss = _divergences(model, rest[i], dense.predictions(len(held_out) + i, rest[i])).mean()
                    if not loss.isfinite():
                        raise ConfigError(
                            "distilling: the loss is not finite; the base model overflows on these samples"
                        )
                    steps.clear()
                    loss.backward()
                    with deferred():  # a step is taken whole, or not at all
                        steps.take()
                        if file is not None:
                            file.distillation = {"done": place + 1, "before": before, "steps": steps.state()}
                            file.write_now_and_then()
                    progress.update()
                    progress.set_postfix_str(f"{loss.item():.3f} nats per token")
        except torch.OutOfMemoryError as error:
            longest = max(len(sample["input_ids"]) for sample in samples)
            raise ConfigError(
                f"distilling: {_BATCH} samples of up to {longest} tokens at a time are too many for the memory of "
                f"{model.device}; lower --max-length, or leave patches as fitted with --distilled-samples 0"
            ) from error
        finally:
            for parameter in parameters:
                parameter.requires_grad_(False)
        led_to = [parameter.detach() for parameter in parameters]
        found = {0.0: before}
        for share in _SHARES:
            _go(parameters, fitted, led_to, share)
            found[share] = _mean(model, held_out, dense, progress)
    best = min(found, key=lambda share: found[share])
    _go(parameters, fitted, led_to, best)
    return Distilled(samples=len(samples), passes=passes, before=before, after=found[best])


@torch.no_grad()
def divergence(model: Any, samples: Sequence[Mapping[str, Any]], kept: float) -> tuple[Tensor, Tensor]:
    """KL, summed over a sample's answer tokens, and their number, both float64 `[N]`, of the samples that `distill`
    leaves out, where these keep the ratio `kept`.

    All cutoffs are moved alike for it: as few samples as that skip more or less than was asked for. model: routed per
    request. samples: those given to `distill`. It costs three forwards over every tenth of them.
    """
    state, batches = routing_of(model), _batches(_parts(samples)[0])
    above, tokens = [], []
    for batch in batches:
        answer_logits(model, batch)
        scores = [state.decisions[layer].score.double() - state.cutoff(layer) for layer in state.config.layers]
        above.append(torch.stack(scores, 1).cpu())
        tokens.append(supervised(batch).sum(1))
    moved = cut(torch.cat(above), kept, torch.cat(tokens))
    own, found = state.cutoffs, []
    state.cutoffs = tuple(state.cutoff(layer) + moved for layer in state.config.layers)
    try:
        for batch, numbers in zip(batches, tokens, strict=True):
            with nothing_skipped(model):
                dense = log_probabilities(answer_logits(model, batch))
            rows = _divergences(model, batch, dense).double().cpu().split(numbers.tolist())
            found.append(torch.stack([row.sum() for row in rows]))
    finally:
        state.cutoffs = own
    return torch.cat(found), torch.cat(tokens).double()


def _go(parameters: Sequence[Tensor], start: Sequence[Tensor], end: Sequence[Tensor], share: float) -> None:
    """Give parameters the values that are this share of the way, in memory of their own: `end`, and what is kept of the
    steps, lie where they were."""
    for parameter, first, last in zip(parameters, start, end, strict=True):
        parameter.data = first.lerp(last, share)


class _Steps:
    """Adam's, of patches' parameters."""

    def __init__(self, parameters: Sequence[nn.Parameter], rate: float, number: int) -> None:
        self._parameters = parameters
        self._optimizer = torch.optim.Adam(parameters, lr=rate)
        self._schedule = get_cosine_schedule_with_warmup(self._optimizer, round(_RISING * number), number)

    def clear(self) -> None:
        self._optimizer.zero_grad()

    def take(self) -> None:
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        self._schedule.step()

    def state(self) -> dict[str, Any]:
        """What `load` takes; its tensors are those of the next step, too."""
        return {
            "parameters": [parameter.detach() for parameter in self._parameters],
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
        }

    @torch.no_grad()
    def load(self, state: Mapping[str, Any]) -> None:
        for parameter, value in zip(self._parameters, state["parameters"], strict=True):
            parameter.copy_(value)
        self._optimizer.load_state_dict(dict(state["optimizer"]))
        self._schedule.load_state_dict(dict(state["schedule"]))


class _Dense:
    """The dense model's predictions, from the hidden states before its last layer: they are the same in each pass."""

    def __init__(self, model: Any, directory: Path) -> None:
        self._model, self._last = model, len(decoder_layers(model)) - 1
        self._states, self._number = HiddenStates(directory), 0

    def note(self, batch: Batch) -> None:
        """The next batch."""
        with nothing_skipped(self._model):
            self._states.put(self._number, advance(self._model, batch, None, 0, self._last))
        self._number += 1

    def predictions(self, number: int, batch: Batch) -> Tensor:
        """Log probabilities, float32 `[tokens, vocabulary]`."""
        with nothing_skipped(self._model), torch.no_grad():
            return log_probabilities(answer_logits(self._model, batch, self._states.get(number), self._last))

    def close(self) -> None:
        self._states.close()


def _parts(samples: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """(those that are left out, those that steps are taken on): every tenth prompt's, and the others."""
    parts: tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]] = [], []
    for sample, held_out in zip(samples, held_out_of(samples), strict=True):
        parts[not held_out].append(sample)
    return parts


def _batches(samples: Sequence[Mapping[str, Any]]) -> list[Batch]:
    """Of similar length."""
    order = sorted(samples, key=lambda sample: len(sample["input_ids"]))
    return [Collator(0)([dict(s) for s in order[first : first + _BATCH]]) for first in range(0, len(order), _BATCH)]


@torch.no_grad()
def _mean(model: Any, batches: Sequence[Batch], dense: _Dense, progress: Any) -> float:
    found = []
    with chance(routing_of(model), quiet=True):  # which begins anew: the same draws before and after
        for number, batch in enumerate(batches):
            found.append(_divergences(model, batch, dense.predictions(number, batch)))
            progress.update()
    return float(torch.cat(found).double().mean())


def _divergences(model: Any, batch: Batch, dense: Tensor) -> Tensor:
    """KL of each answer token, float32 `[tokens]`."""
    return divergences(answer_logits(model, batch), dense)
