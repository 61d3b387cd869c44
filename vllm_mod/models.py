"""The architectures: a stock vLLM model whose routed layers are made skippable after it was built."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.model_executor.models.utils import PPMissingLayer

from .architectures import ARCHITECTURES, Architecture, architecture_of
from .backend import stepping_backend
from .compat import forget_layer, layers_by_name, stock_model_class
from .config import ConfigError, ModConfig
from .expert_adapters import AdaptersBesideExperts
from .experts import route_experts
from .kv.attention import track_requests
from .loading import RoutedWeights
from .names import model_state_class
from .patch import Patch
from .plan import Plan, plan_of
from .routing import Routing
from .step import Route, Router
from .sublayers import Skipped, norm_inside, route_attention, route_mlp


class MoDModel(AdaptersBesideExperts, RoutedWeights, nn.Module):
    """Mixin before a stock `…ForCausalLM` whose `model.layers` have `self_attn` and an MLP (see `architectures`)."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        with self._building(vllm_config):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
        plan = plan_of(vllm_config)
        self.mod_config, self.mod_shape = plan.config, plan.shape
        self.mod_row = architecture_of(plan.shape.architecture)
        layers = self._layers_to_change()
        for layer in layers.values():
            layer.router = _router(plan, vllm_config.model_config.dtype)
        self.expect_weights(vllm_config, plan)
        if self.mod_config.is_static:
            for layer in layers.values():
                _drop(layer, self.mod_config, self.mod_row, vllm_config)
            self._forget_dropped_experts()
            return
        self.routing = Routing(self.mod_config)
        lora = vllm_config.lora_config
        self.routing.whole_batch_linears = lora is not None
        _install(
            layers, self.routing, self.mod_row, vllm_config, shares_rows=lora is not None and lora.fully_sharded_loras
        )
        policy = self.mod_config.policy
        if policy.keeps_state:
            kv_layers = {route.column: route.kv_layer for route in self.routing.routes}
            routed = [kv_layers.get(column) for column in range(len(self.mod_config.layers))]
            per_layer = policy.by_request and policy.skips_attention and plan.knobs.kv_reclaim
            self.routing.layout = track_requests(self, vllm_config, routed if policy.by_request else [], per_layer)
        self.routing.static_decode = vllm_config.compilation_config.cudagraph_mode.has_full_cudagraphs()
        for module in self.modules():
            if isinstance(module, Attention):
                module.attn_backend = stepping_backend(module.attn_backend)
                module.mod_routing, module.mod_mailbox = self.routing, self.routing.mailbox

    def get_model_state_cls(self) -> type:
        """Asked for by vLLM's Model Runner V2."""
        return model_state_class()

    def _layers_to_change(self) -> dict[int, nn.Module]:
        """Routed layers that live on this pipeline rank; ConfigError if the architecture is of another kind."""
        layers: Any = getattr(getattr(self, "model", None), "layers", None)
        if layers is None:
            raise ConfigError(f"{type(self).__name__}: there are no decoder layers at model.layers")
        mine = {i: layers[i] for i in self.mod_config.layers if not isinstance(layers[i], PPMissingLayer)}
        for layer in mine.values():
            for name in ("self_attn", self.mod_row.vllm_mlp):
                if not isinstance(getattr(layer, name, None), nn.Module):
                    raise ConfigError(
                        f"{type(self).__name__}: decoder layer {type(layer).__name__} has no sub-module '{name}'"
                    )
        return mine

    def _forget_dropped_experts(self) -> None:
        """The stock model listed its MoE layers before some were dropped, and would keep their weights."""
        mine = set(self.modules())
        for name in ("moe_layers", "moe_mlp_layers"):
            if hasattr(self, name):
                setattr(self, name, [module for module in getattr(self, name) if module in mine])
        if hasattr(self, "num_moe_layers"):
            self.num_moe_layers = len(self.moe_layers)  # type: ignore[arg-type]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.mod_config.is_static:
            return super().forward(*args, **kwargs)
        with self.routing.forward():
            return super().forward(*args, **kwargs)

    def _is_dropped(self, name: str) -> bool:
        return self.mod_config.is_static and _is_dropped(name, self.mod_config, self.mod_row)


def _router(plan: Plan, dtype: torch.dtype) -> Router:
    """Of one layer, to be loaded."""
    config, shape = plan.config, plan.shape
    rows = config.policy.router_rows(shape.num_experts)
    if config.patch is None:
        return Router(shape.hidden_size, rows, None)
    # The decoder layer multiplies what it is given; the patch itself is to be added.
    patch = Patch(shape.hidden_size, config.patch.rank, dtype, scale=1 / shape.residual_multiplier)
    return Router(shape.hidden_size, rows, patch)


def _parts(config: ModConfig, row: Architecture) -> list[tuple[str, str]]:
    """(`self_attn` or `mlp`, its name in a decoder layer of vLLM's) of each sublayer that is routed."""
    return [(part, row.vllm_mlp if part == "mlp" else part) for part in config.policy.sublayers]


def _install(
    layers: dict[int, nn.Module], routing: Routing, row: Architecture, vllm_config: VllmConfig, shares_rows: bool
) -> None:
    config, by_name = routing.config, layers_by_name(vllm_config)
    for column, (index, cutoff) in enumerate(zip(config.layers, config.cutoffs, strict=True)):
        if index not in layers:
            continue
        layer: Any = layers[index]
        route = Route(index, column, layer.router, cutoff, shares_rows=shares_rows)
        routing.routes.append(route)
        for part, name in _parts(config, row):
            turn = route_attention if part == "self_attn" else route_experts if config.policy.by_experts else route_mlp
            sublayer = getattr(layer, name)
            routing.weights += sum(weight.numel() for weight in sublayer.parameters())
            turn(sublayer, f"model.layers.{index}.{name}", route, routing, by_name)
            if sublayer.patch is not None and part in row.post_norms:
                norm_inside(sublayer, getattr(layer, row.post_norms[part]))


def _drop(layer: nn.Module, config: ModConfig, row: Architecture, vllm_config: VllmConfig) -> None:
    router: Any = layer.router
    for number, (part, name) in enumerate(_parts(config, row)):
        for module in getattr(layer, name).modules():
            if isinstance(module, Attention | MoERunner):
                forget_layer(vllm_config, module.layer_name, isinstance(module, MoERunner))
        setattr(layer, name, Skipped(router.patch if number == 0 else None))
        if part in row.post_norms:
            setattr(layer, row.post_norms[part], nn.Identity())


def _is_dropped(weight: str, config: ModConfig, row: Architecture) -> bool:
    match = re.match(r"model\.layers\.(\d+)\.(\w+)\.", weight)
    dropped = {name for part, own in _parts(config, row) for name in (own, row.post_norms.get(part))}
    return match is not None and int(match[1]) in config.layers and match[2] in dropped


def __getattr__(name: str) -> type:
    """`LlamaMoDForCausalLM` and the like, made when vLLM imports them: a row of `ARCHITECTURES` is all they need."""
    row = next((row for row in ARCHITECTURES.values() if row.routed == name), None)
    if row is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    stock = stock_model_class(row.base)
    globals()[name] = type(name, (MoDModel, stock), {"__module__": __name__})
    return globals()[name]
