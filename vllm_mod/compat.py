"""Every private interface of vLLM that the plugin touches, as a function with a name and a reason.

`interfaces` lists what else is relied on (classes that are subclassed, fields that are read) and checks all of it when
an engine starts. What is not here or there is documented for plugins, or exported.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor, nn

# ---------------------------------------------------------------- configuration


def config_hook(architecture: str) -> Any:
    """The hook that vLLM calls while an engine for `architecture` is configured, or None."""
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    return MODELS_CONFIG_MAP.get(architecture)


def set_config_hook(architecture: str, hook: Any) -> None:
    """There is no registration call; the map is what vLLM's own models use."""
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    MODELS_CONFIG_MAP[architecture] = hook


def stock_model_class(architecture: str) -> Any:
    """The class of a model that vLLM has, to be subclassed; the registry itself only hands out its name."""
    from vllm import ModelRegistry

    return ModelRegistry.models[architecture].load_model_cls()


def attention_ops(compilation: Any) -> list[str]:
    """Operators that vLLM splits graphs at by default; a list given by us would not be extended by these."""
    return [*compilation._attention_ops, "vllm::unified_kv_cache_update", "vllm::unified_mla_kv_cache_update"]


# ---------------------------------------------------------------- models


def layers_by_name(vllm_config: Any) -> dict[str, Any]:
    """Modules that opaque operators find by their names; an attention layer in it gets a KV cache."""
    return vllm_config.compilation_config.static_forward_context


def forget_layer(vllm_config: Any, name: str, is_moe: bool) -> None:
    """A layer was taken out of the model: no KV cache is made for it, and its experts are not kept."""
    del layers_by_name(vllm_config)[name]
    if is_moe:
        vllm_config.compilation_config.static_all_moe_layers.remove(name)


def with_own_kernel(operator: Any) -> Any:
    """A copy of a `CustomOp` that runs its own kernel, where vLLM leaves plain operators to the compiler to fuse."""
    operator = copy.copy(operator)
    # Both would have one dictionary: what reloading puts in place of a tensor would hit the other, too.
    operator._parameters, operator._buffers = operator._parameters.copy(), operator._buffers.copy()
    operator._enforce_enable = True
    operator._forward_method = operator.dispatch_forward(compile_native=False)
    return operator


def layer_name_encoder() -> Callable[[str], Any]:
    """What an opaque operator is given as a layer's name. Fetched once: it is called for every layer of every step."""
    from vllm.utils.torch_utils import _encode_layer_name

    return _encode_layer_name


def module_finder() -> Callable[[Any], Any]:
    """The inverse, up to the module that an opaque operator runs, of the forward under way."""
    from vllm.forward_context import get_forward_context
    from vllm.utils.torch_utils import _resolve_layer_name

    return lambda encoded: get_forward_context().no_compile_layers[_resolve_layer_name(encoded)]


def leave_out_of_lora(manager: Any, module: str) -> None:
    """Adapters that name this module are refused, instead of being applied to all but it in silence."""
    manager.supported_lora_modules.remove(module)


def leave_out_final_all_reduce(runner: Any) -> None:
    """Of an MoE layer: it is done later, on all rows."""
    runner.moe_config.skip_final_all_reduce = True


# ---------------------------------------------------------------- weights that change


def reads_model_path(weights: Any) -> bool:
    """Whether vLLM's own loader reads these from `model_config.model`, and not a trainer from its memory."""
    return isinstance(weights, types.GeneratorType) and weights.gi_code.co_name == "get_all_weights"


def leaves_out_nan() -> bool:
    """Within a sparse weight patch, whose `copy_` leaves as it is what the patch marks with NaN."""
    return isinstance(Tensor.copy_, types.FunctionType)


def drop_loaders_of_ended_reloads(model: nn.Module) -> None:
    """vLLM leaves them on biases of modules that a reload had nothing for; they would load nothing, in silence."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    for module in model.modules():
        bias: Any = module._parameters.get("bias")
        loader = getattr(bias, "weight_loader", None)
        if getattr(loader, "__name__", "") == "online_process_loader" and not get_layerwise_info(module).can_load():
            bias.weight_loader = loader.__wrapped__  # type: ignore[union-attr]


def abandon_reload(model: nn.Module, model_config: Any) -> None:
    """Go on with the weights there were, but for layers that were complete; vLLM would leave the model without any."""
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    under_way = [info for module in model.modules() if (info := get_layerwise_info(module)).can_load()]
    for info in under_way:
        info.load_numel, info.loaded_weights = 0, []
    if under_way:
        finalize_layerwise_reload(model, model_config)


# ---------------------------------------------------------------- a forward


@contextmanager
def attention_views(context: Any, metadata: dict[str, Any], slots: dict[str, Any]) -> Iterator[None]:
    """Meanwhile attention layers find these in vLLM's forward context: metadata and slots by layer name."""
    before = context.attn_metadata, context.slot_mapping
    context.attn_metadata, context.slot_mapping = metadata, slots
    try:
        yield
    finally:
        context.attn_metadata, context.slot_mapping = before


def changed(metadata: Any, **attributes: Any) -> Any:
    """A copy with other attributes. This runs for every layer of every step: `copy.copy` takes four times as long,
    `dataclasses.replace` ten."""
    kind: Any = type(metadata)
    other = kind.__new__(kind)
    vars(other).update(vars(metadata), **attributes)
    return other


def replaced(common_metadata: Any, **changes: Any) -> Any:
    """`CommonAttentionMetadata` with other fields, and without what it has cached of the whole batch."""
    assert changes.keys() <= vars(common_metadata).keys()
    return changed(common_metadata, **changes, _num_computed_tokens_cache=None, _token_to_req_indices_cache=None)


# ---------------------------------------------------------------- KV cache and statistics


def fill_spec_registry() -> None:
    """vLLM registers its KV-cache specs only while there are none: a first one of ours would hide all of them."""
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    KVCacheSpecRegistry._ensure_registered()


def replace_free_queue(pool: Any, queue: Callable[[Any, Any], Any]) -> Any:
    """Give a pool, as it was made, another queue of its free blocks; the null block was taken from it already."""
    free = [block.block_id for block in pool.free_block_queue.get_all_free_blocks()]
    assert len(free) == pool.free_block_queue.num_free_blocks == pool.num_gpu_blocks - 1
    pool.free_block_queue = queue(pool.blocks, np.array(free, np.int64))
    return pool.free_block_queue


def forget_cached(pool: Any, block: Any) -> None:
    """A free block is handed out: if it has a hash, nobody finds it any more, as in `get_new_blocks`."""
    if block._block_hash is not None:
        pool._maybe_evict_cached_block(block)


def hand_out(pool: Any, blocks: list[Any]) -> None:
    """Free blocks are one request's now, as `get_new_blocks` makes them."""
    for block in blocks:
        block.ref_cnt = 1
        if pool.metrics_collector:
            pool.metrics_collector.on_block_allocated(block)


def manager_of(kv_cache_manager: Any) -> Any:
    """The manager of the first KV-cache group; vLLM hands connectors the whole, whose parts have no public name."""
    return kv_cache_manager.coordinator.single_type_managers[0]


def metric_types(prom_metrics: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(counter class, gauge class) that a connector's metrics are to be made of."""
    return prom_metrics._counter_cls, prom_metrics._gauge_cls
