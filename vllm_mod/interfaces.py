"""What the plugin relies on in vLLM without a promise, checked before an engine starts.

A changed interface would otherwise end in a traceback in some worker or, where an override is no longer called, in
wrong tokens. Checked are names, parameters and fields, not behaviour: the parity tests check that.
"""

from __future__ import annotations

import importlib
import inspect
import os
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from .config import ConfigError

#: Releases that the tests run with.
TESTED = SpecifierSet(">=0.31,<0.34", prereleases=True)
ALLOW_UNTESTED = "VLLM_MOD_ALLOW_UNTESTED"


@dataclass(frozen=True)
class Interface:
    """`path` is there below `module`, and has these parameters (of a function) or attributes (of a class)."""

    module: str
    path: str
    names: tuple[str, ...] = ()
    only_for: str = ""  #: `experts`: models without any need not have it imported


_CORE = "vllm.v1.core."
_CONNECTOR = "vllm.distributed.kv_transfer.kv_connector.v1."
INTERFACES = (
    # Configuration
    Interface("vllm.model_executor.models.config", "MODELS_CONFIG_MAP"),
    Interface("vllm.model_executor.models.config", "VerifyAndUpdateConfig.verify_and_update_config", ("vllm_config",)),
    Interface("vllm.config.compilation", "CompilationConfig", ("_attention_ops", "splitting_ops", "cudagraph_mode")),
    Interface("vllm.config.compilation", "CompilationConfig", ("static_forward_context", "static_all_moe_layers")),
    Interface("vllm.v1.sample.logits_processor.interface", "LogitsProcessor.validate_params", ("sampling_params",)),
    # Models
    Interface("vllm.model_executor.layers.attention", "Attention.get_kv_cache_spec", ("vllm_config",)),
    Interface("vllm.model_executor.layers.attention", "Attention.forward", ("query", "key", "value", "output_shape")),
    Interface(
        "vllm.model_executor.layers.attention.attention", "unified_attention_with_output",
        ("query", "key", "value", "output", "layer_name"),
    ),
    Interface(
        "vllm.model_executor.layers.attention.attention", "unified_kv_cache_update", ("key", "value", "layer_name"),
    ),
    Interface("vllm.model_executor.custom_op", "CustomOp.dispatch_forward", ("compile_native",)),
    Interface("vllm.model_executor.layers.linear", "RowParallelLinear"),
    Interface("vllm.utils.torch_utils", "_encode_layer_name"),
    Interface("vllm.utils.torch_utils", "_resolve_layer_name"),
    Interface("vllm.utils.torch_utils", "direct_register_custom_op", ("op_name", "op_func", "mutates_args")),
    Interface(
        "vllm.model_executor.layers.fused_moe.routed_experts", "RoutedExperts.forward_modular",
        ("x", "topk_weights", "topk_ids", "shared_experts", "shared_experts_input"), only_for="experts",
    ),
    Interface("vllm.model_executor.layers.fused_moe.runner.moe_runner", "MoERunner", only_for="experts"),
    # Weights that change
    Interface("vllm.model_executor.model_loader.default_loader", "DefaultModelLoader.get_all_weights"),
    Interface("vllm.model_executor.model_loader.reload", "finalize_layerwise_reload"),
    Interface("vllm.model_executor.model_loader.reload.layerwise", "get_layerwise_info", ("layer",)),
    Interface(
        "vllm.model_executor.model_loader.reload.types", "LayerReloadingInfo",
        ("load_numel", "loaded_weights", "can_load"),
    ),
    Interface("vllm.transformers_utils.repo_utils", "get_hf_file_to_dict", ("file_name", "model", "revision")),
    # A forward
    Interface("vllm.forward_context", "ForwardContext", ("attn_metadata", "slot_mapping", "no_compile_layers")),
    Interface(
        "vllm.v1.attention.backend", "CommonAttentionMetadata",
        ("query_start_loc", "query_start_loc_cpu", "seq_lens", "num_reqs", "num_actual_tokens", "max_query_len",
         "max_seq_len", "block_table_tensor", "slot_mapping", "positions", "is_prefilling", "req_idx",
         "seq_lens_cpu_upper_bound", "_num_computed_tokens_cache", "_token_to_req_indices_cache"),
    ),
    Interface(
        "vllm.v1.attention.backend", "AttentionMetadataBuilder.build",
        ("common_prefix_len", "common_attn_metadata", "fast_build"),
    ),
    Interface("vllm.v1.attention.backend", "subclass_attention_backend"),
    Interface("vllm.v1.worker.gpu.model_states.default", "DefaultModelState.prepare_attn", ("input_batch",)),
    Interface("vllm.v1.worker.gpu.input_batch", "InputBatch", ("req_ids",)),
    # KV cache
    Interface(
        _CORE + "single_type_kv_cache_manager", "FullAttentionManager",
        ("get_num_blocks_to_allocate", "add_local_computed_blocks", "allocate_new_blocks", "cache_blocks",
         "pop_blocks_for_free", "free", "find_longest_cache_hit", "_get_num_evictable_blocks"),
    ),
    Interface(
        _CORE + "single_type_kv_cache_manager", "FullAttentionManager.get_num_blocks_to_allocate",
        ("request_id", "num_tokens", "new_computed_blocks"),
    ),
    Interface(
        _CORE + "single_type_kv_cache_manager", "FullAttentionManager.allocate_new_blocks",
        ("request_id", "num_tokens", "num_tokens_main_model"),
    ),
    Interface(
        _CORE + "single_type_kv_cache_manager", "FullAttentionManager.find_longest_cache_hit",
        ("block_hashes", "max_length"),
    ),
    Interface(
        _CORE + "block_pool", "BlockPool",
        ("touch", "get_num_free_blocks", "get_usage", "get_cached_block",
         "cache_full_blocks", "evict_blocks", "reset_prefix_cache", "_maybe_evict_cached_block"),
    ),
    Interface(
        _CORE + "kv_cache_utils", "FreeKVCacheBlockQueue",
        ("popleft_n", "popleft", "remove", "append", "append_n", "prepend_n", "get_all_free_blocks"),
    ),
    Interface(
        _CORE + "block_pool", "BlockPool.cache_full_blocks",
        ("request", "blocks", "num_cached_blocks", "num_full_blocks", "block_size", "kv_cache_group_id"),
    ),
    Interface(
        _CORE + "kv_cache_utils", "KVCacheBlock",
        ("block_id", "ref_cnt", "is_null", "block_hash", "set_block_hash", "reset_hash"),
    ),
    Interface("vllm.v1.kv_cache_spec_registry", "KVCacheSpecRegistry._ensure_registered"),
    Interface("vllm.v1.kv_cache_spec_registry", "register_kv_cache_spec"),
    Interface(
        "vllm.v1.kv_cache_interface", "AttentionSpec",
        ("num_kv_heads", "head_size", "head_size_v", "dtype", "kv_quant_mode", "max_num_blocks_per_req",
         "max_memory_usage_bytes", "is_uniform_with_collection"),
    ),
    # The channel
    Interface(
        _CONNECTOR + "base", "KVConnectorBase_V1",
        ("bind_kv_cache_manager", "bind_connector_metadata", "on_new_request", "build_connector_meta",
         "build_connector_worker_meta", "update_connector_output", "get_num_new_matched_tokens", "requires_kv_delivery",
         "requires_piecewise_for_cudagraph", "build_prom_metrics", "get_kv_connector_stats"),
    ),
    Interface(_CONNECTOR + "base", "SupportsHMA.request_finished_all_groups", ("request", "block_ids")),
    Interface("vllm.v1.request", "Request", ("update_block_hashes", "num_tokens")),
)  # fmt: skip


def check_vllm(experts: bool) -> None:
    """Before any process is started; experts: the model has some. Raises ConfigError that names what has changed."""
    import vllm

    if broken := "; ".join(broken_interfaces(experts)):
        raise ConfigError(
            f"vllm-mod relies on interfaces that vLLM {vllm.__version__} has changed: {broken}; tested is {TESTED}"
        )
    if Version(vllm.__version__) not in TESTED and not os.environ.get(ALLOW_UNTESTED):
        raise ConfigError(
            f"vllm-mod is tested with vLLM {TESTED}, and {vllm.__version__} is installed; install a tested one, or set "
            f"{ALLOW_UNTESTED}=1 to try it (its interfaces are as expected)"
        )


def broken_interfaces(experts: bool = True) -> list[str]:
    """One phrase for each interface that is not as it is relied on."""
    wanted = (i for i in INTERFACES if experts or i.only_for != "experts")
    return [phrase for interface in wanted if (phrase := _broken(interface))]


def _broken(interface: Interface) -> str:
    try:
        found: Any = importlib.import_module(interface.module)
    except ImportError:
        return f"there is no {interface.module}"
    for name in interface.path.split("."):
        if not hasattr(found, name):
            return f"{interface.module} has no {interface.path}"
        found = getattr(found, name)
    known = _names_of(found)
    if known is None:
        return ""
    missing = [name for name in interface.names if name not in known]
    return f"{interface.module}.{interface.path} lacks {', '.join(missing)}" if missing else ""


def _names_of(found: Any) -> set[str] | None:
    """Attributes of a class, parameters of a function; None where anything is accepted."""
    if inspect.isclass(found):
        names = set(dir(found)) | set(getattr(found, "__annotations__", ()))
        return names | {f.name for f in fields(found)} if is_dataclass(found) else names
    if not callable(found):
        return None
    parameters = inspect.signature(found).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return {p.name for p in parameters}
