"""Which layers a request skips: a few ways to choose them from what was measured, and which is best together.

Single costs do not add up: requests all of whose layers are cheap would skip most of them, and pay more for that than
the others gain. How far routers should follow such differences depends on how much is skipped, so it is tried: from not
at all over in part (see `cost_routers.moderated`) to fully, and the same layers for everyone beside them. What costs
least, with all of it skipped, is taken; with the patches that costs were measured with, routers are therefore never
worse than that static drop on their own samples. KL alone would not do: a request whose predictions are easily moved is
not one whose answer is easily lost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_mod.config import ConfigError

from .cost_routers import RIDGES, CostRouter, Inputs, cut, fit_router, moderated, price, spared
from .per_token import mean_per_token
from .selection import Measured, cheaper_half
from .together import Lost, lost

#: Shares of what a request's layers have in common that routers may learn.
SHARES = (0.0, 0.5, 1.0)
#: Samples that choices are compared on: a quarter of those measured, but no fewer and no more than these numbers.
_FEWEST_COMPARED, _MOST_COMPARED = 128, 512
#: A choice that skips less than this part of what was asked for is none: whole layers may be too coarse.
_NEAR = 0.95


@dataclass(frozen=True)
class Choice:
    """Routers for some layers, and the price above which their predicted costs keep a layer."""

    #: None: the same layers for everyone
    share: float | None
    layers: list[int]
    #: of every layer that was measured
    routers: Mapping[int, CostRouter]
    log_price: float
    #: kept ratio asked for, of token-layer pairs of `layers`
    kept: float

    def skips(self, measured: Measured, rows: Tensor) -> Tensor:
        """bool `[rows, layers measured]`, by predictions of fits that had not seen the sample.

        At the price at which these rows keep what was asked for, so that choices skip alike on them.
        """
        routed = torch.tensor([layer in self.layers for layer in measured.layers])
        predicted = torch.stack([self.routers[layer].predicted[rows] for layer in measured.layers], 1)
        return (predicted < cut(predicted[:, routed], self.kept, measured.tokens[rows])) & routed

    def scores(self, measured: Measured, number: int) -> Tensor:
        """float64 `[number, routed layers]`: what routers give each sample, by fits that had not seen it; NaN of those
        that were not measured."""
        found = torch.full((number, len(self.layers)), torch.nan, dtype=torch.float64)
        for place, layer in enumerate(self.layers):
            router = self.routers[layer]
            found[measured.sample, place] = router.predicted - router.offset
        return found

    def __str__(self) -> str:
        if self.share is None:
            return "the same layers for everyone"
        return f"routed, {self.share:g} of what a request's layers have in common"


def choices(
    measured: Measured, static: bool, layers: list[int] | None, skip: float | None, kept: float
) -> list[Choice]:
    """The static one first. layers: those routed, or None for the cheaper half; skip: see `--skip`, which is in place
    of layers and `kept`. Raises ConfigError where none skips anything.
    """
    found = []
    inputs = inputs_of(measured)
    for share in (None, *(() if static else SHARES)):
        routers = routers_of(measured, inputs, share)
        if skip is None:
            routed, ratio = layers or cheaper_half(measured.costs()), kept
        else:
            routed = spared(measured.layers, routers, skip, measured.tokens)
            ratio = max(1.0 - skip / len(routed), 0.0) if routed else 1.0
        if routed:
            log_price = price([routers[layer] for layer in routed], ratio, measured.tokens)
            found.append(Choice(share, routed, routers, log_price, ratio))
    if not found:
        raise ConfigError(f"--skip {skip:g}: hardly any request would skip a layer; a higher number is needed")
    return found


def inputs_of(measured: Measured) -> list[Inputs]:
    """Layer by layer; most of what routers of many requests take."""
    places = range(len(measured.layers))
    return [Inputs.of(measured.inputs[:, place], measured.tokens, measured.prompt) for place in places]


def routers_of(measured: Measured, inputs: Sequence[Inputs], share: float | None) -> dict[int, CostRouter]:
    """Of every layer that was measured. inputs: see `inputs_of`. share: None for those that learn nothing."""
    nats = measured.nats if share is None else moderated(measured.nats, share)
    ridges = () if share is None else RIDGES  # none is tried: nothing is learned
    places = enumerate(measured.layers)
    return {layer: fit_router(inputs[place], nats[:, place], ridges) for place, layer in places}


def best(model: Any, samples: Sequence[Mapping[str, Any]], measured: Measured, found: Sequence[Choice]) -> Choice:
    """The choice that is nearest to the dense model and loses least of the answers: by the sum of KL and added loss.

    Says what each has. model: as `measure` leaves it.
    """
    if len(found) == 1:
        return found[0]
    number = len(measured.sample)
    compared = min(max(number // 4, _FEWEST_COMPARED), _MOST_COMPARED, number)
    rows = torch.linspace(0, number - 1, compared).round().long()
    asked = max((1.0 - choice.kept) * len(choice.layers) for choice in found)
    skips = [choice.skips(measured, rows) for choice in found] + [_own_cheapest(measured, rows, found, asked)]
    together = lost(model, [samples[i] for i in measured.sample[rows].tolist()], skips)
    print(f"nats per token, all of it skipped, on {len(rows)} requests, behind patches fitted on dense activations:")
    skipped = [float((skip.sum(1) * together.tokens).sum() / together.tokens.sum()) for skip in skips]
    for place, name in enumerate([*map(str, found), "each request's own cheapest, known with hindsight"]):
        print(f"  {_against_first(together, place, skipped[place])} {name}")
    eligible = [place for place in range(len(found)) if skipped[place] >= _NEAR * asked]
    taken = _taken(eligible or range(len(found)), found, together)
    print(f"chosen: {found[taken]}")
    return found[taken]


def _taken(eligible: Sequence[int], found: Sequence[Choice], together: Lost) -> int:
    """The one that costs least; of routers those that follow least of what a request's layers have in common, and cost
    no more than a standard error above it: they skip fewer combinations of layers, which patches make up for better."""
    costs = [together.nats[place] + together.loss[place] for place in range(len(found))]
    least = min(eligible, key=lambda place: float(costs[place].sum()))
    if found[least].share is None:
        return least
    for place in eligible:
        above, error = mean_per_token(costs[place] - costs[least], together.tokens)
        if found[place].share is not None and above <= error:
            return place
    return least


def _own_cheapest(measured: Measured, rows: Tensor, found: Sequence[Choice], number: float) -> Tensor:
    """bool `[rows, layers measured]`: what no router knows, as many of the routed layers for each request."""
    routed = torch.tensor([any(layer in choice.layers for choice in found) for layer in measured.layers])
    order = measured.nats[rows].masked_fill(~routed, float("inf")).argsort(1)
    return torch.zeros(order.shape, dtype=torch.bool).scatter_(1, order[:, : max(round(number), 1)], True)


def _against_first(together: Lost, place: int, skipped: float) -> str:
    """What a choice loses, and by how much that is more than the first one's."""
    nats, loss = together.mean("nats", place), together.mean("loss", place)
    if place == 0:
        return f"{nats:.4f} ({skipped:.2f} layers skipped; loss {loss:+.4f})"
    above, loss_above = ("{:+.4f} ± {:.4f}".format(*together.above_first(name, place)) for name in ("nats", "loss"))
    return f"{nats:.4f} ({skipped:.2f} layers skipped; {above}; loss {loss:+.4f}, {loss_above})"
