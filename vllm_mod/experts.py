"""Gates of single experts (`expert_token`): a (token, expert) pair that skips is not computed and adds nothing.

The model's own top-k selection is unchanged, the other weights are not renormalised, and shared experts always run.

No fused kernel has a value for "no expert" that works everywhere (on the CPU, id -1 crashes and an id past the last
expert reads other memory). So the kept pairs become rows of their own, each with one expert, and go through the same
kernel; a token's rows are added up afterwards. This path is not CUDA specific; it has not been run on CUDA yet.

LoRA kernels know a row's adapter by its place in the batch. Where adapters may change the routed experts themselves,
all pairs stay in their places, and the skipped ones weigh 0. Elsewhere (attention, shared experts, the dense MLP, the
model's own gate) nothing is taken out of the batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.runner.shared_experts import SharedExpertsOrder

from .config import ConfigError
from .decode import DecodeStep
from .gate import keeps, pair_scores
from .routing import Routing
from .stats import RoutingCounts
from .step import Route, Step
from .sublayers import route_mlp, swap_class


def kept_pairs(route: Route, step: Step, counts: RoutingCounts, x: Tensor, experts: Tensor) -> Tensor | None:
    """Which (token, expert) pairs of one layer are kept; None means all.

    x: `[>= N, hidden]`, the MoE layer's normed input. experts: int `[>= N, K]`, as selected. Returns bool `[>= N, K]`,
    on the host, False at padding.
    """
    total = step.rows.num_tokens
    pairs = total * experts.shape[1]
    if route.cutoff == float("-inf"):
        counts.add(route.column, pairs, pairs)
        return None
    keep = torch.zeros(experts.shape, dtype=torch.bool)
    if route.cutoff != float("inf"):
        # On the host, because the number of rows to compute must be known there: the one wait of this layer.
        keep[:total] = keeps(pair_scores(x[:total], route.router.weight, experts[:total]), route.cutoff).cpu()
    number = int(keep.sum())
    counts.add(route.column, number, pairs)
    return None if number == pairs else keep


def _kept_in_decode(route: Route, step: DecodeStep, x: Tensor, experts: Tensor) -> Tensor:
    """As `kept_pairs`, without waiting for the device."""
    keep = keeps(pair_scores(x, route.router.weight, experts), route.cutoff)
    step.count_pairs(route, keep[: step.rows])
    return keep


class _GatedExperts:
    """Mixin before a stock `RoutedExperts`. It is called inside the opaque op of its MoE layer."""

    Stock: type[RoutedExperts]
    route: Route
    routing: Routing
    lora_base_layer_prefix: str

    def forward_modular(
        self,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any = None,
        shared_experts_input: Tensor | None = None,
    ) -> Any:
        """x: `[tokens, hidden]`. topk_weights, topk_ids: `[tokens, K]`. Returns `[tokens, hidden]`."""
        shared, step = (shared_experts, shared_experts_input), self.routing.step
        if step is not None and step.decode is not None:
            # Static shapes: a skipped pair is computed and weighs 0.
            topk_weights = topk_weights * _kept_in_decode(self.route, step.decode, x, topk_ids)
            return self.Stock.forward_modular(self, x, topk_weights, topk_ids, *shared)
        keep = None if step is None else kept_pairs(self.route, step, self.routing.counts_of(step), x, topk_ids)
        if step is None or keep is None:
            return self.Stock.forward_modular(self, x, topk_weights, topk_ids, *shared)
        if self.lora_base_layer_prefix:  # set by vLLM where it gives the experts adapters
            return self.Stock.forward_modular(self, x, topk_weights * step.rows.upload(keep), topk_ids, *shared)
        output = x.new_zeros(*topk_ids.shape, x.shape[-1])
        tokens, places = (step.rows.upload(i) for i in keep.nonzero(as_tuple=True))
        if len(tokens):
            pair = (tokens, places, None)
            output[tokens, places] = self.Stock.forward_modular(
                self, x[tokens], topk_weights[pair], topk_ids[pair], *shared
            )  # fmt: skip
        elif shared_experts is not None:  # some kernels run them; otherwise this does nothing
            shared_experts(shared_experts_input, SharedExpertsOrder.MK_INTERNAL_OVERLAPPED)
        return output.sum(1)

    def forward_monolithic(self, *args: Any, **kwargs: Any) -> Any:
        raise ConfigError(
            "expert_token routing needs an MoE kernel that is told which experts to run, and this one selects them "
            "itself; pass --moe-backend triton"
        )


def route_experts(
    module: nn.Module, name: str, route: Route, routing: Routing, forward_context: dict[str, Any]
) -> None:
    """Gate the routed experts of an MoE layer; raises ConfigError if it has none."""
    experts = [m for m in module.modules() if isinstance(m, RoutedExperts)]
    if len(experts) != 1:
        raise ConfigError(f"{name}: {type(module).__name__} has no routed experts, it is a dense MLP")
    route_mlp(module, name, route, routing, forward_context)
    swap_class(experts[0], _GatedExperts)
    experts[0].route, experts[0].routing = route, routing
