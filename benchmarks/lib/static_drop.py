"""Which layers a static drop drops, chosen in more than one way: a comparison is worth what its baseline is.

  criterion   LLM-Drop's: the sublayers that turn their input least (training/router_tuning/drop.py)
  greedy      one by one, each time the layer without which the answers of calibration data are lost least

Both among all layers, and among those only that a router decides about. An order is a list of layers; the static drop
of k sublayers drops its first k.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from router_tuning.drop import sublayer_similarity
from router_tuning.model import attach_routers, load_base, routing_of
from vllm_mod.config import ModConfig

from .perplexity import answer_losses

Samples = Sequence[dict[str, Any]]


class Switches:
    """A base model whose sublayers of one kind (`attn`, `mlp`, `block`) are switched off by hand."""

    def __init__(self, base: Path, target: str) -> None:
        self.target = target
        self.model = load_base(base, torch.float32).eval()
        layers = list(range(self.model.config.num_hidden_layers))
        config = {"version": 1, "granularity": f"{target}_sequence", "layers": layers}
        attach_routers(self.model, ModConfig.parse(config, "switches"))
        self.layers = layers

    def drop(self, layers: Iterable[int]) -> None:
        """Until the next call exactly these are dropped."""
        off = set(layers)
        routers: dict[int, Any] = {i: _constant(-1.0 if i in off else 1.0) for i in self.layers}
        routing_of(self.model).routers = routers

    def losses(self, layers: Iterable[int], samples: Iterable[dict[str, Any]]) -> Tensor:
        """Loss per sample (nats), float64 `[N]`, with these layers dropped."""
        self.drop(layers)
        return answer_losses(self.model, samples)[0]


def _constant(score: float) -> Callable[[Tensor], Tensor]:
    """Stands in for a router: the same score for every token of x `[B, T, hidden]`."""
    return lambda x: x.new_full(x.shape[:2], score)


def orders(switches: Switches, samples: Samples, routed: Sequence[int], depth: int) -> dict[str, list[int]]:
    """How to choose -> layers in the order in which they are dropped, `depth` of them; samples: calibration data."""
    switches.drop([])
    similarity = sublayer_similarity(switches.model, [s["input_ids"] for s in samples], switches.target)
    known: dict[frozenset[int], float] = {}

    def cost(layers: Iterable[int]) -> float:
        key = frozenset(layers)
        if key not in known:
            known[key] = float(switches.losses(key, samples).sum())
        return known[key]

    found = {}
    for suffix, layers in (("", switches.layers), (", routed layers", routed)):
        found[f"criterion{suffix}"] = sorted(layers, key=lambda i: -similarity[i])[:depth]
        found[f"greedy{suffix}"] = greedy_order(cost, layers, depth)
    return found


def greedy_order(cost: Callable[[Iterable[int]], float], layers: Sequence[int], depth: int) -> list[int]:
    """One by one the layer that costs least; only those are tried that are among the better half when dropped alone."""
    costs = {i: cost([i]) for i in tqdm(layers, desc=f"greedy static drop among {len(layers)} layers")}
    candidates = sorted(layers, key=lambda i: costs[i])[: max(depth, len(layers) // 2)]
    dropped = candidates[:1]
    while len(dropped) < min(depth, len(layers)):
        dropped.append(min((i for i in candidates if i not in dropped), key=lambda i: cost([*dropped, i])))
    return dropped


def losses_at(order: Sequence[int], number: float, losses: Callable[[tuple[int, ...]], Tensor]) -> Tensor:
    """Losses of dropping the first `number` of `order`; between two whole numbers, their weighted mean.

    That is what serving either drop to a matching share of the requests gives, so the kept ratios are equal exactly.
    """
    low = math.floor(number)
    share = number - low
    first = losses(tuple(order[:low]))
    return first if share < 1e-9 else (1 - share) * first + share * losses(tuple(order[: low + 1]))
