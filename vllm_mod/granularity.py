"""What each granularity means: which sublayers one decision skips, and whether it is taken per token, per request, or
once for all. Everything else asks a policy; nothing else reads the parts of a granularity's name.

Shared by training and serving, so it imports neither vLLM nor torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Granularity = Literal[
    "attn_token",
    "attn_sequence",
    "mlp_token",
    "mlp_sequence",
    "block_token",
    "block_sequence",
    "expert_token",
    "attn_static",
    "mlp_static",
    "block_static",
]
GRANULARITIES: tuple[Granularity, ...] = get_args(Granularity)


@dataclass(frozen=True)
class Policy:
    #: `attn`, `mlp`, `block` or `expert`: the name's first half, to make other names of
    target: str
    #: what one decision skips of a decoder layer: `self_attn`, `mlp`, or both
    sublayers: tuple[str, ...]
    #: the same in words
    words: str
    by_token: bool
    by_request: bool
    #: always skipped, there are no routers
    is_static: bool
    #: a decision for each expert of an MLP, not for the MLP
    by_experts: bool

    @property
    def whole_block(self) -> bool:
        """One decision for a layer's attention and MLP."""
        return len(self.sublayers) == 2

    @property
    def skips_attention(self) -> bool:
        return "self_attn" in self.sublayers

    @property
    def skips_mlp(self) -> bool:
        """Or some of its experts."""
        return "mlp" in self.sublayers

    @property
    def packs_kv(self) -> bool:
        """Kept tokens of a request lie densely in its blocks of a routed layer."""
        return self.by_token and self.skips_attention

    @property
    def keeps_state(self) -> bool:
        """A worker remembers something of a running request: its decisions, or how much packed KV it has."""
        return self.by_request or self.packs_kv

    def router_rows(self, num_experts: int | None) -> int:
        """Rows of a router's weight: the scores that one input gets."""
        if self.is_static:
            return 0
        return (num_experts or 0) if self.by_experts else 1


_SUBLAYERS = {"attn": ("self_attn",), "mlp": ("mlp",), "block": ("self_attn", "mlp"), "expert": ("mlp",)}
_WORDS = {"attn": "self-attention", "mlp": "MLP", "block": "attention and MLP", "expert": "routed experts"}


def _policy(granularity: Granularity) -> Policy:
    target, level = granularity.split("_")
    return Policy(
        target,
        _SUBLAYERS[target],
        _WORDS[target],
        by_token=level == "token",
        by_request=level == "sequence",
        is_static=level == "static",
        by_experts=target == "expert",
    )


POLICIES: dict[str, Policy] = {granularity: _policy(granularity) for granularity in GRANULARITIES}
