"""How the KV of models whose requests have state is laid out, and when pages hold all layers, with one warning."""

import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from vllm.model_executor.layers.attention import Attention

from vllm_mod.config import ConfigError
from vllm_mod.kv.attention import PagedAttention, TrackedAttention, logger, track_requests
from vllm_mod.kv.spec import PageSpec


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


def test_pages_per_layer(warnings: list[str]) -> None:
    layers = [attention(f"layer.{i}", sliding_window=8 if i else None) for i in range(3)]
    layout = track_requests(nn.ModuleList(layers), config(), ["layer.1", None], per_layer=True)
    assert (layout.names, layout.columns, layout.width) == (["layer.0", "layer.1", "layer.2"], [0, 1, 2], 3)
    assert [layer.kv_sharing_target_layer_name for layer in layers] == [None, "layer.0", "layer.0"]
    assert all(type(layer) is PagedAttention for layer in layers)
    spec = layers[0].get_kv_cache_spec(config())
    assert isinstance(spec, PageSpec)
    assert (spec.columns, spec.routed, spec.block_size) == (3, (1, -1), 16)
    assert all(layer.get_kv_cache_spec(config()) == spec for layer in layers)  # a window makes no difference
    assert not warnings


def test_pages_that_hold_all_layers(warnings: list[str]) -> None:
    layers = [attention(f"layer.{i}") for i in range(3)]
    layout = track_requests(nn.ModuleList(layers), config(), ["layer.1"], per_layer=False)
    assert (layout.columns, layout.width) == ([0, 0, 0], 1)
    assert all(type(layer) is TrackedAttention and layer.kv_sharing_target_layer_name is None for layer in layers)
    spec = layers[2].get_kv_cache_spec(config())
    assert isinstance(spec, PageSpec) and (spec.columns, spec.routed) == (1, (-1,))
    assert not warnings


@pytest.mark.parametrize(
    ("stages", "changes", "why"),
    [
        (2, {}, "pipeline parallel"),
        (1, {"kv_sharing_target_layer_name": "layer.0"}, "shares its KV"),
        (1, {"query_quant": object()}, "quantises queries"),
    ],
)
def test_where_pages_per_layer_cannot_work(
    warnings: list[str], stages: int, changes: dict[str, Any], why: str
) -> None:  # fmt: skip
    layers = [attention("layer.0"), attention("layer.1", **changes)]
    assert track_requests(nn.ModuleList(layers), config(stages), ["layer.1"], per_layer=True).width == 1
    assert len(warnings) == 1 and why in warnings[0] and warnings[0].startswith("kv_reclaim: off")


@pytest.mark.parametrize(
    "layers",
    [
        [],
        [attention("a"), attention("b", head_size=64)],
        [attention("a"), attention("b", OtherAttention)],
    ],
)
def test_what_cannot_be_tracked_at_all(layers: list[Attention]) -> None:
    with pytest.raises(ConfigError, match="needs plain attention layers whose KV has one shape"):
        track_requests(nn.ModuleList(layers), config(), [], per_layer=True)
