"""Which attentions to drop for good: the criterion of LLM-Drop (arXiv 2406.15786, section 3).

    importance_l = 1 - mean over tokens of cos(x, x + Attention(Norm(x)))      x: the residual stream before layer l

A sublayer that hardly turns its input is dropped first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .model import decoder_layers


@torch.no_grad()
def attention_similarity(model: Any, samples: Sequence[Sequence[int]]) -> list[float]:
    """Mean cosine similarity of each layer's attention input and output, residual included. samples: token ids."""
    layers = decoder_layers(model)
    sums, tokens = torch.zeros(len(layers), dtype=torch.float64), 0
    before: dict[int, Tensor] = {}
    hooks = []
    for index, layer in enumerate(layers):

        def note_input(_: nn.Module, args: Any, kwargs: dict[str, Any], index: int = index) -> None:
            before[index] = (args[0] if args else kwargs["hidden_states"]).float()

        def compare(_: nn.Module, args: Any, output: Any, index: int = index) -> None:
            x = before.pop(index)
            y = x + (output[0] if isinstance(output, tuple) else output).float()
            sums[index] += torch.cosine_similarity(x, y, dim=-1).double().sum().cpu()

        hooks += [layer.register_forward_pre_hook(note_input, with_kwargs=True)]
        attention: Any = layer.self_attn
        hooks += [attention.register_forward_hook(compare)]
    try:
        for sample in tqdm(samples, desc="attention similarity", unit="sample"):
            model(input_ids=torch.tensor([list(sample)], device=model.device), use_cache=False)
            tokens += len(sample)
    finally:
        for hook in hooks:
            hook.remove()
    return (sums / tokens).tolist()


def most_similar(similarity: Sequence[float], number: int) -> list[int]:
    """The `number` layers that change their input least, ascending; the earlier one first where two are equal."""
    return sorted(sorted(range(len(similarity)), key=lambda i: -similarity[i])[:number])
