"""DeepSeek-MoE v1 for transformers: a Llama with mixtures of experts, and the checkpoint's own tensor names.

Small and plain: it is trained around (frozen) and serves as the reference; vLLM runs its own, fused.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from vllm_mod.architectures import ARCHITECTURES
from vllm_mod.config import ConfigError
from vllm_mod.deepseek import DeepseekConfig, register_config


def _mlp(config: DeepseekConfig, intermediate_size: int) -> LlamaMLP:
    config = copy.copy(config)
    config.intermediate_size = intermediate_size
    return LlamaMLP(config)


class DeepseekExperts(nn.ModuleList):
    """The routed experts: `mlp.experts.{i}.gate_proj.weight` and so on."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states: `[N, hidden]`. top_k_index, top_k_weights: `[N, K]`. Returns `[N, hidden]`."""
        output = torch.zeros_like(hidden_states)
        for number, expert in enumerate(self):
            tokens, places = (top_k_index == number).nonzero(as_tuple=True)
            if tokens.numel():
                weighted = expert(hidden_states[tokens]) * top_k_weights[tokens, places, None]
                output = output.index_add(0, tokens, weighted.to(output.dtype))
        return output


class DeepseekMoE(nn.Module):
    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__()
        if config.scoring_func != "softmax":
            raise ConfigError(f"config.json: key 'scoring_func': 'softmax' is needed (got {config.scoring_func!r})")
        assert config.n_routed_experts is not None
        size = config.moe_intermediate_size
        self.top_k, self.normalise = config.num_experts_per_tok, config.norm_topk_prob
        self.gate = nn.Linear(config.hidden_size, config.n_routed_experts, bias=False)
        self.experts = DeepseekExperts(_mlp(config, size) for _ in range(config.n_routed_experts))
        self.shared_experts = _mlp(config, size * config.n_shared_experts) if config.n_shared_experts else None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[B, T, hidden]` -> the same."""
        x = hidden_states.flatten(0, 1)
        weights, index = self.gate(x).softmax(-1, dtype=torch.float32).topk(self.top_k, dim=-1)
        if self.normalise:
            weights = weights / weights.sum(-1, keepdim=True)
        output = self.experts(x, index, weights.to(x.dtype)).view_as(hidden_states)
        return output if self.shared_experts is None else output + self.shared_experts(hidden_states)


class DeepseekForCausalLM(LlamaForCausalLM):
    config: DeepseekConfig
    config_class = DeepseekConfig

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__(config)
        row, settings = ARCHITECTURES["DeepseekForCausalLM"], config.to_dict()
        for index, layer in enumerate(self.model.layers):
            if row.num_experts(settings) and index not in row.dense_layers(settings):
                layer.mlp = DeepseekMoE(config)
        self.post_init()


def register() -> None:
    """Let transformers' Auto classes know `model_type: "deepseek"`."""
    register_config()
    AutoModelForCausalLM.register(DeepseekConfig, DeepseekForCausalLM, exist_ok=True)
