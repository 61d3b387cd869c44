"""Which sublayers to drop for good: the criterion of LLM-Drop (arXiv 2406.15786, section 3).

    importance_l = 1 - mean over tokens of cos(x, y)      x, y: the residual stream before and after sublayer F

A sublayer that hardly turns its input is dropped first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .model import architecture_of_model, decoder_layers

#: Target -> where the residual stream is read before and after it.
_ENDS = {"attn": ("before", "between"), "mlp": ("between", "after"), "block": ("before", "after")}


def attention_similarity(model: Any, samples: Sequence[Sequence[int]]) -> list[float]:
    """Mean cosine similarity of each layer's attention input and output, residual included. samples: token ids."""
    return sublayer_similarity(model, samples, "attn")


@torch.no_grad()
def sublayer_similarity(model: Any, samples: Sequence[Sequence[int]], target: str) -> list[float]:
    """The same for `attn`, `mlp` or `block`, a whole layer.

    The residual stream itself is compared, as it enters a layer, between attention and MLP (where the MLP's norm reads
    it) and as it leaves: whatever a model does to a sublayer's output before it adds it is part of F.
    """
    norm = architecture_of_model(model).mlp_norm
    layers = decoder_layers(model)
    sums, tokens = torch.zeros(len(layers), dtype=torch.float64), 0
    stream: dict[str, Tensor] = {}
    hooks = []
    for index, layer in enumerate(layers):

        def enters(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            stream["before"] = (args[0] if args else kwargs["hidden_states"]).float()

        def between(_: nn.Module, args: Any) -> None:
            stream["between"] = args[0].float()

        def leaves(_: nn.Module, args: Any, output: Any, index: int = index) -> None:
            stream["after"] = (output[0] if isinstance(output, tuple) else output).float()
            x, y = (stream[name] for name in _ENDS[target])
            sums[index] += torch.cosine_similarity(x, y, dim=-1).double().sum().cpu()

        hooks += [
            layer.register_forward_pre_hook(enters, with_kwargs=True),
            getattr(layer, norm).register_forward_pre_hook(between),
            layer.register_forward_hook(leaves),
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
