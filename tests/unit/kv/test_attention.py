"""Which models share pages, and which fall back to vLLM's own allocation, with one warning that says why."""

import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from vllm.model_executor.layers.attention import Attention
from vllm.v1.kv_cache_interface import FullAttentionSpec

from vllm_mod.kv.attention import PagedAttention, WholeRowAttention, allocate_whole_rows, logger, share_pages
from vllm_mod.kv.pages import PageSpec


class OtherAttention(Attention):
    pass


def attention(name: str, kind: type[Attention] = Attention, **changes: Any) -> Attention:
    """What is read of an attention layer, without the backend that vLLM would build for it."""
    layer = kind.__new__(kind)
    nn.Module.__init__(layer)
    settings: dict[str, Any] = {
        "layer_name": name,
        "num_kv_heads": 2,
        "head_size": 32,
        "head_size_v": 32,
        "kv_cache_torch_dtype": torch.bfloat16,
        "kv_cache_dtype": "auto",
        "kv_sharing_target_layer_name": None,
        "query_quant": None,
        "sliding_window": None,
    }
    for key, value in (settings | changes).items():
        setattr(layer, key, value)
    return layer


def config(stages: int = 1) -> Any:
    parallel = SimpleNamespace(pipeline_parallel_size=stages)
    return SimpleNamespace(parallel_config=parallel, cache_config=SimpleNamespace(block_size=16))


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    found: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    yield found
    logger.removeHandler(handler)


def test_layers_alias_the_first(warnings: list[str]) -> None:
    layers = [attention(f"layer.{i}") for i in range(3)]
    assert share_pages(nn.ModuleList(layers), config()) == ["layer.0", "layer.1", "layer.2"]
    assert [layer.kv_sharing_target_layer_name for layer in layers] == [None, "layer.0", "layer.0"]
    spec = layers[0].get_kv_cache_spec(config())
    assert isinstance(layers[0], PagedAttention) and isinstance(spec, PageSpec)
    assert (spec.num_layers, spec.block_size) == (3, 16)
    assert spec.page_size_bytes == 2 * 16 * 2 * 32 * 2  # K and V, tokens, heads, head size, bfloat16: one layer's
    assert not warnings


@pytest.mark.parametrize(
    ("changes", "stages", "why"),
    [
        ({}, 2, "pipeline parallel"),
        ({"num_kv_heads": 1}, 1, "KV shapes differ"),
        ({"head_size_v": 16}, 1, "KV shapes differ"),
        ({"kv_cache_torch_dtype": torch.uint8}, 1, "KV shapes differ"),
        ({"kv_sharing_target_layer_name": "layer.0"}, 1, "a kind of its own"),
        ({"query_quant": object()}, 1, "a kind of its own"),
        ({"kind": OtherAttention}, 1, "a kind of its own"),
    ],
)
def test_fallback(changes: dict[str, Any], stages: int, why: str, warnings: list[str]) -> None:
    layers = [attention("layer.0"), attention("layer.1", **changes)]
    targets = [layer.kv_sharing_target_layer_name for layer in layers]
    assert share_pages(nn.ModuleList(layers), config(stages)) is None
    assert [layer.kv_sharing_target_layer_name for layer in layers] == targets
    assert not any(isinstance(layer, PagedAttention) for layer in layers)
    [warning] = warnings
    assert "kv_reclaim" in warning and why in warning


def test_a_model_without_such_layers_falls_back(warnings: list[str]) -> None:
    assert share_pages(nn.ModuleList([nn.Linear(1, 1)]), config()) is None
    assert "no plain attention layer" in warnings[0]


def test_only_sliding_windows_need_whole_rows() -> None:
    layers = [attention("a"), attention("b", sliding_window=64)]
    allocate_whole_rows(nn.ModuleList(layers))
    assert [type(layer) for layer in layers] == [Attention, WholeRowAttention]
    spec = layers[1].get_kv_cache_spec(config())
    assert type(spec) is FullAttentionSpec and spec.sliding_window is None
