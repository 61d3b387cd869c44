"""Gates of single experts (`expert_token`): a (token, expert) pair that skips adds nothing.

The model's own top-k selection is unchanged, the other experts' weights are not renormalised, and shared experts
always run.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vllm_mod.config import ConfigError
from vllm_mod.gate import pair_scores

from .routing import ModelRouting
from .sublayers import make_skippable


class GatedExperts(nn.Module):
    """Mixin in front of a model's module of routed experts."""

    _mod_layer: int
    _mod_routing: ModelRouting
    _mod_batch: int  #: rows of the batch; the block flattens them

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *args: Any) -> Tensor:
        """hidden_states: `[B * T, hidden]`. top_k_index, top_k_weights: `[B * T, K]`. Returns `[B * T, hidden]`."""
        routing, places = self._mod_routing, top_k_index.shape[-1]
        scores = pair_scores(hidden_states, routing.routers[self._mod_layer].weight, top_k_index)
        decision = routing.decide_on(self._mod_layer, scores.view(self._mod_batch, -1, places))
        decision.experts = top_k_index.view_as(decision.keep)
        gates = decision.applied.view_as(top_k_weights).to(top_k_weights.dtype)
        return super().forward(hidden_states, top_k_index, top_k_weights * gates, *args)


def gate_experts(block: Any, layer: int, routing: ModelRouting) -> None:
    """Gate the routed experts of an MoE block, in place; raises ConfigError if it is not one that is known."""
    if not isinstance(getattr(block, "experts", None), nn.Module):
        raise ConfigError(f"layer {layer}: {type(block).__name__} has no sub-module 'experts', its MLP is dense")
    experts: Any = block.experts
    make_skippable(experts, GatedExperts, layer, routing)

    def note_batch(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        experts._mod_batch = len(args[0])

    block.register_forward_pre_hook(note_batch)
