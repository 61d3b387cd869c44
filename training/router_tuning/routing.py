"""What routed layers decide and what they report: the state that a model's routed sublayers share.

Kept apart from the modules themselves, so that nothing but `layer.router` shows up in parameters or state dicts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vllm_mod.config import ModConfig
from vllm_mod.gate import apply_patch, decision_lengths, keeps, segment_means, token_scores
from vllm_mod.tensors import Patch


class Router(nn.Module):
    """`w` of the paper's eq. 2, no bias, float32. Zero at the start: the model begins dense."""

    def __init__(self, hidden_size: int, device: torch.device | None = None, rows: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(rows, hidden_size, dtype=torch.float32, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """x: `[B, T, hidden]` -> scores `w . x`, float32 `[B, T]`; frozen, it gives x no gradient either."""
        # A decision that stands is not to be moved through what comes before it.
        return token_scores(x if self.weight.requires_grad else x.detach(), self.weight)


class LinearPatch(nn.Module):
    """What a skipped sublayer adds, float32. It adds 0 at the start, and every part but `down` has a gradient there."""

    def __init__(self, hidden_size: int, rank: int, device: torch.device | None = None) -> None:
        super().__init__()
        options: Any = {"dtype": torch.float32, "device": device}
        self.bias = nn.Parameter(torch.zeros(hidden_size, **options))
        self.down = nn.Linear(hidden_size, rank, bias=False, **options) if rank else None
        self.up = nn.Linear(rank, hidden_size, bias=False, **options) if rank else None
        if self.down is not None and self.up is not None:
            nn.init.normal_(self.down.weight, std=hidden_size**-0.5)
            nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x: `[B, T, hidden]` -> the same shape and dtype."""
        return apply_patch(x, *self.parts())

    def parts(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """bias, down, up"""
        if self.down is None or self.up is None:
            return self.bias, None, None
        return self.bias, self.down.weight, self.up.weight

    def tensors(self, dtype: torch.dtype = torch.float32) -> Patch:
        """Detached copies on the CPU."""
        bias, *maps = (None if part is None else part.detach().cpu().to(dtype, copy=True) for part in self.parts())
        assert bias is not None
        return Patch(bias, *maps)


@dataclass
class Decision:
    """One routed layer's answer in one forward.

    Shapes: `[B, T]` at token level, `[B]` at sequence level, `[B, T, K]` for the experts that a token selected.
    """

    #: `w . x` (float32), or its mean over the tokens that decide (float64).
    score: Tensor
    #: bool: does the sublayer count?
    keep: Tensor
    #: float32, forward value exactly 0 or 1, gradient that of `sigmoid(score)` (straight-through estimator).
    gate: Tensor
    #: The same, as the sublayer's output is multiplied by it: the task's gradient is seen here, apart from the price.
    applied: Tensor
    #: Which experts the last axis stands for, int `[B, T, K]`; None where whole sublayers are routed.
    experts: Tensor | None = None
    #: bool `[B, T]`: the tokens of the decision window, which run the sublayer whatever is decided; None without one.
    window: Tensor | None = None

    def keeps_token(self) -> Tensor:
        """bool `[B, 1 or T, 1]`, ready to meet hidden states: for which tokens does the sublayer count?"""
        keep = _broadcast(self.keep)
        return keep if self.window is None else keep | _broadcast(self.window)

    def token_gate(self) -> Tensor:
        """`applied` likewise; a constant 1 in the window."""
        gate = _broadcast(self.applied)
        return gate if self.window is None else torch.where(_broadcast(self.window), 1.0, gate)


def _broadcast(per_row_or_token: Tensor) -> Tensor:
    """`[B]` or `[B, T]` -> `[B, 1 or T, 1]`."""
    return per_row_or_token.view(per_row_or_token.shape[0], -1, 1)


@dataclass
class ModelRouting:
    """Everything the routed sublayers of one model share. One per model, see `routing_of`."""

    config: ModConfig
    routers: dict[int, Router] = field(default_factory=dict)
    #: Per routed layer, where the config has patches; also of static granularities, which have no routers.
    patches: dict[int, LinearPatch] = field(default_factory=dict)
    #: A sublayer's output is multiplied by it before it is added to the residual stream.
    residual_multiplier: float = 1.0
    #: Sublayers' outputs go through a norm before they are added to the residual stream. That norm, which comes next,
    #: then calls what lies here for its layer: `mixed` with the sublayer's decision.
    has_post_norms: bool = False
    waiting: dict[int, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    #: Per routed layer, in place of the config's; None: those.
    cutoffs: tuple[float, ...] | None = None
    #: bool `[B, T]`: which tokens are the prompt; None means all of them.
    prompt_mask: Tensor | None = None
    #: float64 `[B, routed layers]`, of decisions per request: scores in place of the routers' own; NaN: these.
    scores: Tensor | None = None
    #: bool `[B, T]`: False at padding; noted from the forward's own `attention_mask`.
    valid: Tensor | None = None
    #: Per routed layer, of the last forward.
    decisions: dict[int, Decision] = field(default_factory=dict)
    #: Per routed layer, of the last backward: root mean square of what the loss gains (nats) by keeping one more
    #: sample or token, times their number; the scale on which a price per kept ratio matters.
    effects: dict[int, Tensor] = field(default_factory=dict)

    def cutoff(self, layer: int) -> float:
        return (self.cutoffs or self.config.cutoffs)[self.config.layers.index(layer)]

    def decide(self, layer: int, x: Tensor) -> Decision:
        """x: `[B, T, hidden]`, the sublayer's normed input. Scores it, decides, and remembers the decision."""
        score = self.routers[layer](x)
        if self.config.policy.by_token:
            return self.decide_on(layer, score)
        deciding = self.deciding(score.shape, score.device)
        if self.valid is not None and self.valid.shape[1] > score.shape[1] and not self.decided:
            raise NotImplementedError("the tokens that decide came in an earlier forward; decisions must be given")
        mean = segment_means(score[deciding], deciding.sum(1))
        if self.scores is not None:
            given = self.scores[:, self.config.layers.index(layer)]
            mean = torch.where(given.isnan(), mean, given)
        decision = self.decide_on(layer, mean)
        if self.config.window is not None:
            decision.window = deciding
        return decision

    def stand_in(self, layer: int, x: Tensor) -> Tensor | None:
        """What a skipped sublayer gives in place of `F(x)`: `[B, T, hidden]`, or None for zero.

        Divided by what the model multiplies it by, so that the patch itself is added to the residual.
        """
        return self.patches[layer](x) / self.residual_multiplier if layer in self.patches else None

    def joined(self, layer: int, output: Tensor, join: Callable[[Tensor], Tensor]) -> Tensor:
        """What a sublayer returns: `join(output)`; `output` where a norm comes between it and the residual stream.

        There `join` is called on what the norm gives. Skipping means that nothing (or the patch) is added to the
        residual stream; and a gate before the norm would have no gradient, as the norm undoes every factor but zero.
        """
        if not self.has_post_norms:
            return join(output)
        self.waiting[layer] = join
        return output

    @property
    def decided(self) -> bool:
        """Are all decisions given, so that the tokens they are taken from need not be seen?"""
        return self.scores is not None and not bool(self.scores.isnan().any())

    def decide_on(self, layer: int, score: Tensor) -> Decision:
        """score: of any shape a decision may have."""
        keep = keeps(score, self.cutoff(layer))
        soft = torch.sigmoid(score).float()
        gate = keep.float() + (soft - soft.detach())  # s - s is exactly 0: the forward value stays 0 or 1
        applied = gate.view_as(gate)
        if applied.requires_grad:
            applied.register_hook(lambda gradient: self._note_effect(layer, gradient))
        self.decisions[layer] = Decision(score, keep, gate, applied)
        return self.decisions[layer]

    def _note_effect(self, layer: int, gradient: Tensor) -> None:
        effect = self._counted(gradient.detach())
        self.effects[layer] = effect.numel() * effect.square().mean().sqrt()

    def may_skip(self, shape: torch.Size, device: torch.device) -> Tensor:
        """bool `[B, T]` of shape: the tokens that can do without a routed sublayer; not padding, nor the window's."""
        valid = self._valid(shape, device)[:, -shape[1] :]
        return valid if self.config.window is None else valid & ~self.deciding(shape, device)

    def _valid(self, shape: torch.Size, device: torch.device) -> Tensor:
        """Longer than shape by the tokens of earlier forwards."""
        return torch.ones(shape, dtype=torch.bool, device=device) if self.valid is None else self.valid

    def deciding(self, shape: torch.Size, device: torch.device) -> Tensor:
        """bool `[B, T]` of shape: each row's prompt, or its first `window` tokens. Generated tokens never count."""
        valid = self._valid(shape, device)
        length = valid.shape[1]
        prompt = valid
        if self.prompt_mask is not None:
            # The mask may be shorter than the sequence: what follows it was generated.
            prompt = nn.functional.pad(self.prompt_mask.bool(), (0, length - self.prompt_mask.shape[1])) & valid
            prompt = torch.where(prompt.any(1, keepdim=True), prompt, valid)
        lengths = decision_lengths(prompt.sum(1), self.config.window)
        return (prompt & (prompt.cumsum(1) <= lengths[:, None]))[:, -shape[1] :]

    def kept(self) -> dict[int, Tensor]:
        """Kept ratio per routed layer, differentiable (through the gates), float32 scalars.

        The mean over valid tokens at token level, over samples at sequence level.
        """
        return {layer: self._counted(decision.gate).mean() for layer, decision in self.decisions.items()}

    def counts(self) -> dict[int, tuple[float, float]]:
        """(kept, routed) pairs per layer of the last forward: what to add up over batches."""
        keeps = {layer: self._counted(decision.keep) for layer, decision in self.decisions.items()}
        return {layer: (float(keep.sum()), float(keep.numel())) for layer, keep in keeps.items()}

    def expert_counts(self) -> dict[int, Tensor]:
        """Float64 `[2, num_experts]` per layer of the last forward: how often each was kept, and selected at all."""
        found = {}
        for layer, decision in self.decisions.items():
            if decision.experts is not None:
                number = len(self.routers[layer].weight)
                experts, keep = self._counted(decision.experts).flatten(), self._counted(decision.keep).flatten()
                kept = torch.bincount(experts[keep], minlength=number)
                found[layer] = torch.stack([kept, torch.bincount(experts, minlength=number)]).double()
        return found

    def _counted(self, values: Tensor) -> Tensor:
        """Leaves padding out: `[B, T, ...]` -> `[tokens, ...]`; `[B]` as it is."""
        return values if self.valid is None or values.dim() == 1 else values[self.valid]


def routing_of(model: nn.Module) -> ModelRouting:
    """The state that `attach_routers` gave to `model`; unwraps DDP and the like through `.module`."""
    while not hasattr(model, "_mod_routing") and hasattr(model, "module"):
        model = model.module  # type: ignore[assignment]
    state = getattr(model, "_mod_routing", None)
    if not isinstance(state, ModelRouting):
        raise ValueError(f"{type(model).__name__} has no routers; call attach_routers(model, config) first")
    return state
