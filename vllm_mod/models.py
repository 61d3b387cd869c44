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

from .backend import stepping_backend
from .compat import forget_layer, layers_by_name, leave_out_of_lora, stock_model_class
from .config import ARCHITECTURES, ConfigError, ModConfig
from .engine import experts_without_adapters
from .experts import kernels_without_adapters, route_experts
from .kv.attention import track_requests
from .loading import RoutedWeights
from .patch import Patch
from .plan import Plan, plan_of
from .routing import Routing
from .step import Route, Router
from .sublayers import Skipped, route_attention, route_mlp

_SUBLAYERS = {"attn": ("self_attn",), "mlp": ("mlp",), "block": ("self_attn", "mlp"), "expert": ("mlp",)}


class MoDModel(RoutedWeights, nn.Module):
    """Mixin before a stock `…ForCausalLM` whose `model.layers` have `self_attn` and `mlp` sub-modules."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        with kernels_without_adapters(vllm_config):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._adapters_on_experts = not experts_without_adapters(vllm_config)
        plan = plan_of(vllm_config)
        self.mod_config = plan.config
        layers = self._layers_to_change()
        for layer in layers.values():
            layer.router = _router(plan, vllm_config.model_config.dtype)
        self.expect_weights(vllm_config, plan)
        if self.mod_config.is_static:
            for layer in layers.values():
                _drop(layer, self.mod_config, vllm_config)
            if hasattr(self, "set_moe_parameters"):  # it listed the MoE layers before some were dropped
                self.set_moe_parameters()  # type: ignore[operator]
            return
        self.routing = Routing(self.mod_config)
        lora = vllm_config.lora_config
        self.routing.whole_batch_linears = lora is not None
        _install(layers, self.routing, vllm_config, shares_rows=lora is not None and lora.fully_sharded_loras)
        if self.mod_config.keeps_state:
            kv_layers = {route.column: route.kv_layer for route in self.routing.routes}
            routed = [kv_layers.get(column) for column in range(len(self.mod_config.layers))]
            by_request = self.mod_config.level == "sequence"
            per_layer = by_request and self.mod_config.target != "mlp" and plan.knobs.kv_reclaim
            self.routing.layout = track_requests(self, vllm_config, routed if by_request else [], per_layer)
        self.routing.static_decode = vllm_config.compilation_config.cudagraph_mode.has_full_cudagraphs()
        for module in self.modules():
            if isinstance(module, Attention):
                module.attn_backend = stepping_backend(module.attn_backend)
                module.mod_routing, module.mod_mailbox = self.routing, self.routing.mailbox

    @property
    def lora_manager(self) -> Any:
        """vLLM's, which it sets here once it has wrapped the model's linears."""
        return self._lora_manager

    @lora_manager.setter
    def lora_manager(self, manager: Any) -> None:
        self._lora_manager = manager
        if not self._adapters_on_experts:  # or an adapter's weights for them would be left out in silence
            leave_out_of_lora(manager, "experts")

    def _layers_to_change(self) -> dict[int, nn.Module]:
        """Routed layers that live on this pipeline rank; ConfigError if the architecture is of another kind."""
        layers: Any = getattr(getattr(self, "model", None), "layers", None)
        if layers is None:
            raise ConfigError(f"{type(self).__name__}: there are no decoder layers at model.layers")
        mine = {i: layers[i] for i in self.mod_config.layers if not isinstance(layers[i], PPMissingLayer)}
        for layer in mine.values():
            for name in ("self_attn", "mlp"):
                if not isinstance(getattr(layer, name, None), nn.Module):
                    raise ConfigError(
                        f"{type(self).__name__}: decoder layer {type(layer).__name__} has no sub-module '{name}'"
                    )
        return mine

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.mod_config.is_static:
            return super().forward(*args, **kwargs)
        with self.routing.forward():
            return super().forward(*args, **kwargs)

    def _is_dropped(self, name: str) -> bool:
        match = re.match(r"model\.layers\.(\d+)\.(\w+)\.", name)
        config = self.mod_config
        return (
            config.is_static
            and match is not None
            and int(match[1]) in config.layers
            and match[2] in _SUBLAYERS[config.target]
        )


def _router(plan: Plan, dtype: torch.dtype) -> Router:
    """Of one layer, to be loaded."""
    config, hidden = plan.config, plan.shape.hidden_size
    rows = 0 if config.is_static else (plan.shape.num_experts or 0) if config.target == "expert" else 1
    return Router(hidden, rows, Patch(hidden, config.patch.rank, dtype) if config.patch is not None else None)


def _install(layers: dict[int, nn.Module], routing: Routing, vllm_config: VllmConfig, shares_rows: bool) -> None:
    config, by_name = routing.config, layers_by_name(vllm_config)
    for column, (index, cutoff) in enumerate(zip(config.layers, config.cutoffs, strict=True)):
        if index not in layers:
            continue
        layer: Any = layers[index]
        route = Route(index, column, layer.router, cutoff, shares_rows=shares_rows)
        routing.routes.append(route)
        for name in _SUBLAYERS[config.target]:
            turn = route_attention if name == "self_attn" else route_experts if config.target == "expert" else route_mlp
            turn(getattr(layer, name), f"model.layers.{index}.{name}", route, routing, by_name)


def _drop(layer: nn.Module, config: ModConfig, vllm_config: VllmConfig) -> None:
    for name in _SUBLAYERS[config.target]:
        for module in getattr(layer, name).modules():
            if isinstance(module, Attention | MoERunner):
                forget_layer(vllm_config, module.layer_name, isinstance(module, MoERunner))
        patch: Any = layer.router.patch if name == _SUBLAYERS[config.target][0] else None  # type: ignore[union-attr]
        setattr(layer, name, Skipped(patch))


def __getattr__(name: str) -> type:
    """`LlamaMoDForCausalLM` and the like, made when vLLM imports them: a row of `ARCHITECTURES` is all they need."""
    base = next((base for base, routed in ARCHITECTURES.items() if routed == name), None)
    if base is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    stock = stock_model_class(base)
    globals()[name] = type(name, (MoDModel, stock), {"__module__": __name__})
    return globals()[name]
