"""LoRA on the CPU for a model with routed experts: vLLM has no kernel that would give these an adapter.

So adapters may change all linears but theirs, stock MoE layers choose their kernel as if there was no LoRA, and an
adapter that names experts is refused. All of it goes with this file once vLLM has that kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

from .compat import leave_out_of_lora
from .config import ConfigError
from .plan import shape_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger("vllm." + __name__)  # only loggers below "vllm" are shown

#: What adapters may change: all linears but those of routed experts.
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "gate")


def experts_without_adapters(vllm_config: VllmConfig) -> bool:
    """LoRA is on, the model has routed experts, and this is a CPU."""
    from vllm.platforms import current_platform

    experts = shape_of(vllm_config).num_experts
    return bool(experts) and vllm_config.lora_config is not None and current_platform.is_cpu()


def leave_out_experts(vllm_config: VllmConfig) -> None:
    """Of what adapters may change, where that is needed; ConfigError where they were asked for."""
    if not experts_without_adapters(vllm_config):
        return
    lora = vllm_config.lora_config
    assert lora is not None
    if lora.target_modules is None:
        logger.info("LoRA: adapters may change %s (no CPU kernel for those of routed experts)", ", ".join(LINEARS))
        lora.target_modules = list(LINEARS)
    elif any(name.split(".")[0] == "experts" for name in lora.target_modules):
        raise ConfigError(
            "on the CPU vLLM has no kernel for LoRA adapters on routed experts; "
            f"pass --lora-target-modules {' '.join(LINEARS)}, or a part of these"
        )


class AdaptersBesideExperts:
    """Mixin of a model that may be built and given adapters under such a configuration."""

    _adapters_on_experts = True

    @contextmanager
    def _building(self, vllm_config: VllmConfig) -> Iterator[None]:
        """Stock MoE layers choose a kernel for adapters, which the CPU has not, as LoRA is on."""
        lora = vllm_config.lora_config
        without = experts_without_adapters(vllm_config)
        if without:
            vllm_config.lora_config = None
        try:
            yield
        finally:
            vllm_config.lora_config = lora
        self._adapters_on_experts = not without

    @property
    def lora_manager(self) -> Any:
        """vLLM's, which it sets here once it has wrapped the model's linears."""
        return self._lora_manager

    @lora_manager.setter
    def lora_manager(self, manager: Any) -> None:
        self._lora_manager = manager
        if not self._adapters_on_experts:  # or an adapter's weights for them would be left out in silence
            leave_out_of_lora(manager, "experts")
