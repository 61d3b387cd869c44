"""Model shapes to measure with dummy weights, and the four systems that are compared at one shape."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_mod.granularity import POLICIES

from .common import SMALL_LLAMA, llama_config, routed_config

_LLAMA3 = {"vocab_size": 128256, "max_position_embeddings": 131072, "rope_theta": 500000.0, "torch_dtype": "bfloat16"}
SHAPES: dict[str, dict[str, Any]] = {
    # hidden 512: attention is most of a step at a context of 2,048
    "cpu-attention": {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 16, "num_attention_heads": 8,
                      "num_key_value_heads": 8, "head_dim": 64},
    "llama3-8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
                  "num_key_value_heads": 8, "head_dim": 128, **_LLAMA3},
    "llama3.2-3b": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
                    "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True, **_LLAMA3},
    "llama3.2-1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
                    "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True, **_LLAMA3},
    "mistral-7b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
                   "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 32768, "max_position_embeddings": 32768,
                   "torch_dtype": "bfloat16", "architectures": ["MistralForCausalLM"], "model_type": "mistral"},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8},
}  # fmt: skip

#: stock: the plain architecture. keep: routed, `force: keep`. mod: routed. static: as many layers dropped for good.
#: patched: mod with patches, where these are asked for.
SYSTEMS = ("stock", "keep", "mod", "static", "patched")


def positions(shape: str) -> int:
    """Tokens of the longest context."""
    return (SMALL_LLAMA | SHAPES[shape])["max_position_embeddings"]


def settle_routed(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """`args.routed`: half of the layers of `args.shape` by default. Ends the program if there are not so many."""
    total = SHAPES[args.shape]["num_hidden_layers"]
    args.routed = total // 2 if args.routed is None else args.routed
    if not 0 < args.routed < total:
        parser.error(f"--routed: 1 to {total - 1} of this shape's {total} layers")


def routed_layers(total: int, routed: int) -> list[int]:
    """`routed` layers spread over the depth, layer 0 left out."""
    return sorted({total - 1 - round(i * total / routed) for i in range(routed)} - {0})[-routed:]


def skipped_layers(routed: Sequence[int], kept: float) -> list[int]:
    """Those of the routed layers that are skipped at this kept ratio, so that kept and skipped ones alternate."""
    number = round(len(routed) * (1 - kept))
    return sorted(routed[i * len(routed) // number] for i in range(number)) if number else []


def four_systems(
    directory: Path,
    shape: dict[str, Any],
    granularity: str,
    routed: Sequence[int],
    kept: float,
    mixed: bool,
    window: int | None = None,
    patch_rank: int | None = None,
) -> dict[str, tuple[Path, dict[str, Any] | None]]:
    """System -> (checkpoint without weights, engine knobs). `mixed`: thresholds are left for `Engine.thresholds`."""
    base = llama_config(directory / "base", **shape)
    skipped = skipped_layers(routed, kept)
    threshold = 0.5 if mixed else [1.0 if i in skipped else 0.0 for i in routed]
    mod = routed_config(directory / "mod", base, granularity, routed, threshold, window)
    systems: dict[str, tuple[Path, dict[str, Any] | None]] = {
        "stock": (base, None), "keep": (mod, {"force": "keep"}), "mod": (mod, {}),
    }  # fmt: skip
    if skipped:
        static = POLICIES[granularity].target + "_static"
        systems["static"] = routed_config(directory / "static", base, static, skipped), None
    if patch_rank is not None:
        patched = routed_config(directory / "patched", base, granularity, routed, threshold, window, patch_rank)
        systems["patched"] = patched, {}
    return systems
