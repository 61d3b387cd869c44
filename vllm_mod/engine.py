"""What the engine must be set to for a routed checkpoint, and what is refused (design section 2)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

from .checkpoint import read_routers
from .compilation import set_compilation
from .config import ConfigError, ModConfig
from .expert_adapters import experts_without_adapters, leave_out_experts
from .hooks import ChainedHook, refuse_other_formats
from .interfaces import check_vllm
from .plan import plan_of, shape_of
from .request_check import check_requests

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger("vllm." + __name__)  # only loggers below "vllm" are shown

CONNECTOR = "MoDConnector"
#: Load formats that do not read a checkpoint's own files: no weights at all, or a state of vLLM's, routers included.
OWN_FILES = ("dummy", "sharded_state", "runai_streamer_sharded", "tensorizer")
#: Attention metadata that can be rebuilt for a subset of the rows; FlashInfer plans its kernels on the host.
CUDA_BACKENDS = ("FLASH_ATTN", "TRITON_ATTN")


class MoDEngineConfig(ChainedHook):
    """Runs early in `VllmConfig.__post_init__`, before anything is derived from the settings made here."""

    @classmethod
    def verify_and_update_config(cls, vllm_config: VllmConfig) -> None:
        super().verify_and_update_config(vllm_config)
        check_vllm(bool(shape_of(vllm_config).num_experts))
        refuse_other_formats(vllm_config)
        plan = plan_of(vllm_config)
        config = plan.config
        check_routers(vllm_config, config)
        leave_out_experts(vllm_config)
        if not config.is_static:
            refuse_what_cannot_work(vllm_config, config)
            make_settings(vllm_config, config)
        # Neither pooling models nor speculative decoding take custom logits processors; none of them has a dial.
        if vllm_config.model_config.runner_type == "generate" and vllm_config.speculative_config is None:
            check_requests(vllm_config.model_config, plan)
        log_routing(vllm_config, config)
        warn_of_long_factors(vllm_config.model_config)


def check_routers(vllm_config: VllmConfig, config: ModConfig) -> None:
    """Fail before any process is started if the router tensors are not what `mod_config` says."""
    directory = Path(vllm_config.model_config.model)
    if vllm_config.load_config.load_format in OWN_FILES or not directory.is_dir():
        return  # a hub checkpoint is checked while it is loaded
    read_routers(directory, config, shape_of(vllm_config))


def refuse_what_cannot_work(vllm_config: VllmConfig, config: ModConfig) -> None:
    granularity = config.granularity
    parallel = vllm_config.parallel_config
    if config.policy.keeps_state and vllm_config.speculative_config is not None:
        raise ConfigError(
            f"{granularity} routing cannot be served with speculative decoding: rejected draft tokens would have to "
            "be taken back from the routing state; drop --speculative-config"
        )
    offloads = vllm_config.cache_config.kv_offloading_size is not None
    others = vllm_config.kv_transfer_config is not None and not _is_channel(vllm_config)
    if config.policy.keeps_state and (others or offloads):
        raise ConfigError(
            f"{granularity} routing cannot be served with a KV connector or KV offloading: "
            "its KV cache has no entry for what was skipped; drop --kv-transfer-config / --kv-offloading-size"
        )
    if config.policy.keeps_state and parallel.decode_context_parallel_size * parallel.prefill_context_parallel_size > 1:
        raise ConfigError(f"{granularity} routing cannot be served with context parallelism; drop the -dcp/-pcp flags")
    if parallel.enable_dbo:
        raise ConfigError("routed models cannot be served with dual batch overlap; drop --enable-dbo")
    if vllm_config.cache_config.kv_sharing_fast_prefill:
        raise ConfigError(
            "routed models cannot be served with a prefill that leaves out layers which share a KV cache; "
            "drop --kv-sharing-fast-prefill"
        )
    if shape_of(vllm_config).num_experts and config.policy.skips_mlp:
        _refuse_for_experts(vllm_config, config)
    window, max_len = vllm_config.model_config.get_sliding_window(), vllm_config.model_config.max_model_len
    if config.policy.packs_kv and window and window < max_len and (sliding := _sliding_layers(vllm_config, config)):
        raise ConfigError(
            f"{granularity} routing packs the KV of kept tokens, and a sliding window counts true positions: layers "
            f"{sliding} have a window of {window} tokens, less than max_model_len {max_len}; "
            f"pass --max-model-len {window}, or route per sequence"
        )
    backend = vllm_config.attention_config.backend
    if backend is not None and backend.name == "FLASHINFER":
        raise ConfigError(
            f"routed models need an attention backend out of {', '.join(CUDA_BACKENDS)}; drop --attention-backend"
        )


def _refuse_for_experts(vllm_config: VllmConfig, config: ModConfig) -> None:
    parallel = vllm_config.parallel_config
    if parallel.data_parallel_size > 1:
        raise ConfigError(
            f"{config.granularity} routing of a model with experts cannot be served data-parallel: the ranks meet in "
            "every MoE layer, and would wait for one that skips it; start one server per device"
        )
    if config.policy.by_experts and parallel.enable_eplb:
        raise ConfigError("expert_token routing cannot be served with experts that move; drop --enable-eplb")


def _sliding_layers(vllm_config: VllmConfig, config: ModConfig) -> list[int]:
    """Routed layers with a sliding window, of a model that has one."""
    types = getattr(vllm_config.model_config.hf_text_config, "layer_types", None) or ()
    if "sliding_attention" not in types:  # vLLM applies it to all layers
        return list(config.layers)
    return [i for i in config.layers if types[i] == "sliding_attention"]


def make_settings(vllm_config: VllmConfig, config: ModConfig) -> None:
    """Set what the granularity needs, one log line for each change."""
    from vllm.platforms import current_platform

    cache, scheduler = vllm_config.cache_config, vllm_config.scheduler_config
    max_len = vllm_config.model_config.max_model_len
    windowed = config.window is not None  # its decisions are a function of the prefix, see the design, section 2
    if config.policy.keeps_state and not windowed and cache.enable_prefix_caching:
        why = "a decision needs its whole prompt" if config.policy.by_request else "packed KV cannot be shared"
        logger.info("%s: prefix caching off (%s)", config.granularity, why)
        cache.enable_prefix_caching = False
    if config.policy.by_request and not windowed:
        if scheduler.enable_chunked_prefill:
            logger.info("%s: chunked prefill off (a decision needs its whole prompt)", config.granularity)
        scheduler.enable_chunked_prefill = False
        scheduler.long_prefill_token_threshold = 0
        if scheduler.max_num_batched_tokens < max_len:
            logger.info(
                "%s: max_num_batched_tokens %d (a prompt is prefilled in one step)", config.granularity, max_len
            )
            scheduler.max_num_batched_tokens = max_len
        if scheduler.max_num_scheduled_tokens is not None and scheduler.max_num_scheduled_tokens < max_len:
            # A longer prompt would wait for ever, and all behind it.
            logger.info(
                "%s: max_num_scheduled_tokens %d (a prompt is prefilled in one step)", config.granularity, max_len
            )
            scheduler.max_num_scheduled_tokens = max_len
    if config.policy.keeps_state:
        # One KV-cache group, so that the first entry of a row is its request's slot for as long as it runs.
        scheduler.disable_hybrid_kv_cache_manager = True
    if vllm_config.lora_config is not None:
        logger.info(
            "%s: with LoRA, linears run on the whole batch (skipped rows save attention and KV only)",
            config.granularity,
        )
        if config.policy.by_experts and not experts_without_adapters(vllm_config):
            logger.info(
                "expert_token: where adapters change routed experts, skipped pairs are computed and weigh 0; "
                "--lora-target-modules without experts saves them"
            )
    capability = current_platform.get_device_capability() if current_platform.is_cuda() else None
    if capability is not None and capability.major >= 10 and vllm_config.attention_config.backend is None:
        from vllm.v1.attention.backends.registry import AttentionBackendEnum

        logger.info("%s: attention backend TRITON_ATTN (vLLM prefers FlashInfer on this GPU)", config.granularity)
        vllm_config.attention_config.backend = AttentionBackendEnum.TRITON_ATTN
    kernels = vllm_config.kernel_config
    if config.policy.by_experts and kernels.moe_backend == "auto" and not current_platform.is_cpu():
        logger.info("expert_token: MoE backend triton (experts are chosen outside its kernel)")
        kernels.moe_backend = "triton"
    if vllm_config.kv_transfer_config is None:
        vllm_config.kv_transfer_config = _channel()
    set_compilation(vllm_config)


def _channel() -> Any:
    """The connector that carries decisions between worker and scheduler; it moves no KV."""
    from vllm.config import KVTransferConfig

    return KVTransferConfig(
        kv_connector=CONNECTOR, kv_connector_module_path="vllm_mod.kv.connector", kv_role="kv_producer"
    )


def _is_channel(vllm_config: VllmConfig) -> bool:
    transfer = vllm_config.kv_transfer_config
    return transfer is not None and transfer.kv_connector == CONNECTOR


def log_routing(vllm_config: VllmConfig, config: ModConfig) -> None:
    total = vllm_config.model_config.hf_text_config.num_hidden_layers
    layers = ", ".join(map(str, config.layers))
    logger.info("%s: %d of %d layers routed: %s", config.granularity, len(config.layers), total, layers)
    if not config.is_static:
        score = "sigmoid(w . x)" if config.criterion == "threshold" else "w . x"
        one = len(set(config.limits)) == 1
        text = str(config.limits[0]) if one else ", ".join(f"{limit:g}" for limit in config.limits)
        logger.info("%s: kept where %s >= %s", config.granularity, score, text)


def warn_of_long_factors(model: Any) -> None:
    """Of longrope: vLLM takes them wherever long requests are admitted, transformers where this one is long."""
    rope = getattr(model.hf_text_config, "rope_parameters", None) or {}
    length = getattr(model.hf_text_config, "original_max_position_embeddings", None)
    length = rope.get("original_max_position_embeddings", length)
    if rope.get("rope_type") == "longrope" and length and model.max_model_len > length:
        logger.warning(
            "max_model_len %d: vLLM takes the rotary factors for more than %d tokens for short requests, too; routers "
            "trained on shorter samples have seen the others: --max-model-len %d serves what was trained",
            model.max_model_len,
            length,
            length,
        )
