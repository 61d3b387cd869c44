"""A tiny shape of each architecture, beside what `tiny_model` sets: fields of its config, by `model_type`."""

from typing import Any

#: Shorter than the prompts of the parity tests.
WINDOW = 24
_WIDE: dict[str, Any] = {"hidden_size": 128, "head_dim": None}
_GEMMA: dict[str, Any] = {
    "sliding_window": WINDOW,  # in every other layer
    "query_pre_attn_scalar": 32,
    "tie_word_embeddings": True,
    "initializer_range": 0.1,  # its embeddings are multiplied by 8, so that a token would choose itself
}
#: GQA ratios 4, 2 and 1; heads of their own size where the architecture has them.
DENSE: dict[str, dict[str, Any]] = {
    "qwen2": _WIDE | {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "qwen3": {"num_key_value_heads": 4, "head_dim": 64, "tie_word_embeddings": True},
    "mistral": {"sliding_window": WINDOW},
    "phi3": _WIDE | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "granite": {
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.4,
        "logits_scaling": 0.5,
    },
    "gemma2": _GEMMA | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 10.0},
    "gemma3_text": _GEMMA | {"sliding_window_pattern": 2},
}
#: 8 experts, 2 or 3 of which are selected; layer 0 is dense where the architecture has such layers.
EXPERTS: dict[str, dict[str, Any]] = {
    "olmoe": _WIDE | {"num_key_value_heads": 4, "intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2},
    "deepseek": _WIDE
    | {
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 64,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "num_experts_per_tok": 3,
    },
    "qwen3_moe": {
        "mlp_only_layers": [0],
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
        "num_experts": 8,
        "num_experts_per_tok": 2,
    },
    "mixtral": {"intermediate_size": 64, "num_local_experts": 8, "num_experts_per_tok": 2},
}
