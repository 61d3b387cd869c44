"""Sublayers that may be skipped: generated subclasses of whatever attention and MLP a model has.

PyTorch's `fully_shard` swaps `module.__class__` the same way: parameters, names and hooks stay, and no model code
is copied. Each subclass asks the shared `ModelRouting` and hands the rest to the stock forward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from vllm_mod.granularity import Policy

from .routing import Decision, ModelRouting


def mixed(output: Tensor, decision: Decision, stand_in: Tensor | None) -> Tensor:
    """`gate * F(x)` of the paper's eq. 4, and what stands in for `F(x)` where it is skipped (None: 0).

    output, stand_in: `[B, T, hidden]`. Selects where no gradient of the gate is wanted. In training it multiplies,
    because the estimator's gradient needs what the sublayer *would* have added; values that are not finite are taken
    out first where skipped (0 * nan is nan).
    """
    keep = decision.keeps_token()
    nothing = torch.zeros((), dtype=output.dtype, device=output.device)
    instead = nothing if stand_in is None else stand_in.to(output.dtype)
    if not decision.applied.requires_grad:
        return torch.where(keep, output, instead)
    output = output.masked_fill(~keep & ~output.isfinite(), 0.0)
    gate = decision.token_gate().to(output.dtype)
    return output * gate if stand_in is None else output * gate + instead * (1 - gate)


def skipped(x: Tensor, stand_in: Tensor | None) -> Tensor:
    """The output of a sublayer that no token runs. x: `[B, T, hidden]`."""
    return torch.zeros_like(x) if stand_in is None else stand_in


def hide_skipped_keys(mask: Tensor | None, keep: Tensor, dtype: torch.dtype) -> Tensor:
    """The attention mask without the keys of skipped tokens.

    mask: what the model would use: None (plain causal), bool (True = visible) or additive float `[B or 1, 1, T, T]`.
    keep: bool `[B, T]`. Returns the same kind, `[B, 1, T, T]`. Every query still sees itself, so no row is empty: a
    skipped token's output is never used, and its estimator's gradient is that of keeping this one token.
    """
    length = keep.shape[1]
    itself = torch.eye(length, dtype=torch.bool, device=keep.device)
    visible = keep[:, None, None, :] | itself
    if mask is None:
        return visible & torch.ones_like(itself).tril()
    if mask.shape[-2:] != (length, length):
        raise NotImplementedError(f"token-level routing needs a square mask, not {tuple(mask.shape)} (no KV cache)")
    if mask.dtype == torch.bool:
        return (mask & visible) | itself
    hidden = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=mask.device)
    return torch.where(visible, mask, hidden).masked_fill(itself, 0.0)


class RoutedAttention(nn.Module):
    """Mixin in front of a model's attention class. For `block` it also takes the decision that the MLP uses."""

    _mod_layer: int
    _mod_routing: ModelRouting

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        """hidden_states: `[B, T, hidden]`, after the input norm. Returns (output `[B, T, hidden]`, weights)."""
        routing = self._mod_routing
        if kwargs.get("past_key_values") is not None and not routing.decided:
            raise NotImplementedError("the routed HF model has no KV cache; call it with use_cache=False")
        layer, stand_in = self._mod_layer, routing.stand_in(self._mod_layer, hidden_states)
        if routing.config.is_static:
            return routing.joined(layer, hidden_states, partial(skipped, stand_in=stand_in)), None
        decision = routing.decide(layer, hidden_states)
        if routing.config.policy.by_token:
            # At sequence level nothing that is kept could see a skipped key: it is in another row, or before it (the
            # window's tokens).
            mask = hide_skipped_keys(kwargs.get("attention_mask"), decision.keep, hidden_states.dtype)
            kwargs["attention_mask"] = mask
        output, weights = super().forward(hidden_states, *args, **kwargs)
        return routing.joined(layer, output, partial(mixed, decision=decision, stand_in=stand_in)), weights


class RoutedMLP(nn.Module):
    """Mixin in front of a model's MLP class, with a decision of its own (`mlp_*`)."""

    _mod_layer: int
    _mod_routing: ModelRouting

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states: `[B, T, hidden]`, after the MLP's norm."""
        routing, layer = self._mod_routing, self._mod_layer
        stand_in = routing.stand_in(layer, hidden_states)
        if routing.config.is_static:
            return routing.joined(layer, hidden_states, partial(skipped, stand_in=stand_in))
        decision = routing.decide(layer, hidden_states)
        output = super().forward(hidden_states)
        return routing.joined(layer, output, partial(mixed, decision=decision, stand_in=stand_in))


class FollowingMLP(RoutedMLP):
    """Mixin for `block_*`: the MLP follows the decision that this layer's attention took, where the patch is, too."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        routing, layer = self._mod_routing, self._mod_layer
        if routing.config.is_static:
            return routing.joined(layer, hidden_states, partial(skipped, stand_in=None))
        output = super(RoutedMLP, self).forward(hidden_states)
        return routing.joined(layer, output, partial(mixed, decision=routing.decisions[layer], stand_in=None))


class PostNorm(nn.Module):
    """Mixin in front of a norm between a routed sublayer and the residual stream."""

    _mod_layer: int
    _mod_routing: ModelRouting

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self._mod_routing.waiting.pop(self._mod_layer)(super().forward(hidden_states))


def mixins_of(policy: Policy) -> dict[str, type[nn.Module]]:
    """Which sublayer gets which mixin; experts are below a sublayer, see `experts`."""
    if policy.by_experts:
        return {}
    mixins = {"self_attn": RoutedAttention, "mlp": FollowingMLP if policy.whole_block else RoutedMLP}
    return {name: mixins[name] for name in policy.sublayers}


@cache
def _routed_class(mixin: Any, stock: Any) -> Any:
    return type(f"{mixin.__name__}Of{stock.__name__}", (mixin, stock), {"__module__": stock.__module__})


def make_skippable(module: nn.Module, mixin: Any, layer: int, routing: ModelRouting) -> None:
    """Turn a stock sublayer into its skippable version, in place."""
    stock: Any = type(module)
    module.__class__ = _routed_class(mixin, stock)
    module._mod_layer = layer  # type: ignore[assignment]
    module._mod_routing = routing  # type: ignore[assignment]


@contextlib.contextmanager
def nothing_skipped(model: nn.Module) -> Iterator[None]:
    """While it lasts, the model is its base: no decision, no patch. Not for experts."""
    with contextlib.ExitStack() as stack:
        for module in [*model.modules()]:
            if isinstance(module, (RoutedAttention, RoutedMLP, PostNorm)):
                stack.enter_context(stock(module))
        yield


@contextlib.contextmanager
def stock(module: nn.Module) -> Iterator[None]:
    """While it lasts, a skippable sublayer is the stock one again, which every token runs."""
    skippable: Any = type(module)
    module.__class__ = skippable.__bases__[1]
    try:
        yield
    finally:
        module.__class__ = skippable
