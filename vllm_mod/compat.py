"""Every private interface of vLLM that the plugin touches."""

from __future__ import annotations

from typing import Any


def fill_spec_registry() -> None:
    """vLLM registers its KV-cache specs only while there are none: a first one of ours would hide all of them."""
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    KVCacheSpecRegistry._ensure_registered()


def encode_layer_name(name: str) -> Any:
    """What an opaque operator is given as a layer's name."""
    from vllm.utils.torch_utils import _encode_layer_name

    return _encode_layer_name(name)


def resolve_layer_name(encoded: Any) -> str:
    """The inverse."""
    from vllm.utils.torch_utils import _resolve_layer_name

    return _resolve_layer_name(encoded)
