"""The architectures that can be routed, one row each. Serving and training read it: neither vLLM nor torch in here.

A row says in what an architecture differs from Llama, whose decoder layers have `self_attn` and `mlp`, norm the input
of each, and add what each gives to the residual stream.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .schema import ConfigError

Config = Mapping[str, Any]  #: `config.json`, or what a loaded config's `to_dict()` gives


def _dense_by_frequency(config: Config, layer: int) -> bool:
    return layer < (config.get("first_k_dense_replace") or 0) or layer % (config.get("moe_layer_freq") or 1) != 0


def _dense_by_list(config: Config, layer: int) -> bool:
    step = config.get("decoder_sparse_step") or 1
    return layer in (config.get("mlp_only_layers") or ()) or (layer + 1) % step != 0


@dataclass(frozen=True)
class Architecture:
    base: str  #: of a base model, as `config.json: architectures` names it
    #: the MLP's name in a decoder layer of vLLM's, and in weight files; transformers calls it `mlp` in every model
    vllm_mlp: str = "mlp"
    #: the norm of the MLP's input; its own input is the residual stream between attention and MLP
    mlp_norm: str = "post_attention_layernorm"
    #: sublayer (`self_attn`, `mlp`) -> the norm that its output goes through before it is added to the residual stream
    post_norms: Mapping[str, str] = field(default_factory=dict)
    #: key of the number that a sublayer's output is multiplied by before it is added
    residual_multiplier: str | None = None
    #: keys of the number of routed experts in an MoE layer; files and loaded configs may name it differently
    experts: tuple[str, ...] = ()
    #: has this layer one dense MLP, in a model with experts in others?
    is_dense: Callable[[Config, int], bool] = lambda config, layer: False
    #: what transformers must compute attention with to compute all of it; None: its default
    attention: str | None = None
    #: linear modules of attention and MLP, which adapters change
    attention_linears: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    mlp_linears: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")

    @property
    def routed(self) -> str:
        """Of a routed checkpoint: vLLM without the plugin refuses to load it."""
        return self.base.replace("ForCausalLM", "MoDForCausalLM")

    def num_experts(self, config: Config) -> int | None:
        """Routed experts per MoE layer; None of a dense model. Raises KeyError where `config` says nothing of them."""
        if not self.experts:
            return None
        return config[next((key for key in self.experts if key in config), self.experts[0])] or None

    def dense_layers(self, config: Config) -> tuple[int, ...]:
        """Layers that have one dense MLP, of a model with experts in the others."""
        if not self.num_experts(config):
            return ()
        return tuple(layer for layer in range(config["num_hidden_layers"]) if self.is_dense(config, layer))

    def multiplier(self, config: Config) -> float:
        """What a sublayer's output is multiplied by before it is added to the residual stream."""
        return float(config.get(self.residual_multiplier, 1.0)) if self.residual_multiplier else 1.0


_GEMMA: dict[str, Any] = {
    "mlp_norm": "pre_feedforward_layernorm",
    "post_norms": {"self_attn": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"},
}
#: By base name.
ARCHITECTURES: dict[str, Architecture] = {
    row.base: row
    for row in (
        Architecture("LlamaForCausalLM"),
        Architecture("MistralForCausalLM"),
        Architecture("Qwen2ForCausalLM"),
        Architecture("Qwen3ForCausalLM"),
        Architecture(
            "Phi3ForCausalLM", attention_linears=("qkv_proj", "o_proj"), mlp_linears=("gate_up_proj", "down_proj")
        ),
        Architecture("GraniteForCausalLM", residual_multiplier="residual_multiplier"),
        Architecture("Gemma2ForCausalLM", **_GEMMA, attention="eager"),  # sdpa leaves the soft cap out
        Architecture("Gemma3ForCausalLM", **_GEMMA),
        Architecture("OlmoeForCausalLM", experts=("num_experts",)),
        Architecture("MixtralForCausalLM", vllm_mlp="block_sparse_moe", experts=("num_local_experts",)),
        Architecture("Qwen3MoeForCausalLM", experts=("num_experts", "num_local_experts"), is_dense=_dense_by_list),
        Architecture("DeepseekForCausalLM", experts=("n_routed_experts",), is_dense=_dense_by_frequency),
    )
}
_BY_NAME = ARCHITECTURES | {row.routed: row for row in ARCHITECTURES.values()}


def architecture_of(name: str) -> Architecture:
    """The row of a base architecture or of its routed counterpart; raises ConfigError listing what is supported."""
    if name not in _BY_NAME:
        raise ConfigError(f"architecture {name!r} is not supported; supported: {', '.join(ARCHITECTURES)}")
    return _BY_NAME[name]


@dataclass(frozen=True)
class BaseShape:
    """What of a base model's `config.json` routers depend on."""

    architecture: str
    num_layers: int
    hidden_size: int
    num_experts: int | None
    #: layers that have one dense MLP, of a model with experts in the others
    dense_layers: tuple[int, ...] = ()
    #: a sublayer's output is multiplied by it before it is added to the residual stream
    residual_multiplier: float = 1.0

    @classmethod
    def of(cls, config: Mapping[str, Any], where: str, architecture: str | None = None) -> BaseShape:
        """config: a file's, or a loaded config's `to_dict()`. architecture: where `config` may not name it.

        Raises ConfigError, on an architecture that is not supported, too.
        """
        name = architecture or (config.get("architectures") or ["?"])[0]
        try:
            row = architecture_of(name)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
        try:
            return cls(
                architecture=name,
                num_layers=config["num_hidden_layers"],
                hidden_size=config["hidden_size"],
                num_experts=row.num_experts(config),
                dense_layers=row.dense_layers(config),
                residual_multiplier=row.multiplier(config),
            )
        except KeyError as key:
            raise ConfigError(f"{where}: key {key} is missing; is this a decoder-only model?") from None
