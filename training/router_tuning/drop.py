"""Which sublayers to drop for good: the criterion of LLM-Drop (arXiv 2406.15786, section 3).

    importance_l = 1 - mean over tokens of cos(x, y)      y = x + F(Norm(x)), x: the residual stream before sublayer F

A sublayer that hardly turns its input is dropped first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .model import decoder_layers


def attention_similarity(model: Any, samples: Sequence[Sequence[int]]) -> list[float]:
    """Mean cosine similarity of each layer's attention input and output, residual included. samples: token ids."""
    return sublayer_similarity(model, samples, "attn")


@torch.no_grad()
def sublayer_similarity(model: Any, samples: Sequence[Sequence[int]], target: str) -> list[float]:
    """The same for `attn`, `mlp` (behind `post_attention_layernorm`) or `block`, a whole layer."""
    layers = decoder_layers(model)
    sums, tokens = torch.zeros(len(layers), dtype=torch.float64), 0
    before: dict[int, Tensor] = {}
    hooks = []
    for index, layer in enumerate(layers):
        entry: Any = layer.post_attention_layernorm if target == "mlp" else layer
        sublayer: Any = {"attn": layer.self_attn, "mlp": layer.mlp, "block": layer}[target]

        def note_input(_: nn.Module, args: Any, kwargs: dict[str, Any], index: int = index) -> None:
            before[index] = (args[0] if args else kwargs["hidden_states"]).float()

        def compare(_: nn.Module, args: Any, output: Any, index: int = index) -> None:
            x = before.pop(index)
            y = (output[0] if isinstance(output, tuple) else output).float() + (0 if target == "block" else x)
            sums[index] += torch.cosine_similarity(x, y, dim=-1).double().sum().cpu()

        hooks += [
            entry.register_forward_pre_hook(note_input, with_kwargs=True),
            sublayer.register_forward_hook(compare),
        ]
    try:
        for sample in tqdm(samples, desc=f"{target} similarity", unit="sample"):
            model(input_ids=torch.tensor([list(sample)], device=model.device), use_cache=False)
            tokens += len(sample)
    finally:
        for hook in hooks:
            hook.remove()
    return (sums / tokens).tolist()


def most_similar(similarity: Sequence[float], number: int) -> list[int]:
    """The `number` layers that change their input least, ascending; the earlier one first where two are equal."""
    return sorted(sorted(range(len(similarity)), key=lambda i: -similarity[i])[:number])
