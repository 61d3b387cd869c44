"""`model_type: "deepseek"` (DeepSeek-MoE v1), which neither transformers 5 nor vLLM 0.32 knows.

vLLM has the model (`DeepseekForCausalLM`) and lacks the config; `router_tuning.deepseek` has a model for transformers.
"""

from __future__ import annotations

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, LlamaConfig


@strict
class DeepseekConfig(LlamaConfig):
    """A Llama whose MLPs are, from layer `first_k_dense_replace` on, mixtures of experts."""

    model_type = "deepseek"

    first_k_dense_replace: int = 0
    moe_layer_freq: int = 1
    n_routed_experts: int | None = None
    n_shared_experts: int | None = None
    num_experts_per_tok: int | None = None
    moe_intermediate_size: int = 1407
    norm_topk_prob: bool = False
    scoring_func: str = "softmax"


def register_config() -> None:
    """Let `AutoConfig`, and so vLLM, know `model_type: "deepseek"`."""
    AutoConfig.register(DeepseekConfig.model_type, DeepseekConfig, exist_ok=True)
