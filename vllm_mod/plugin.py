"""What vLLM is told about: the architectures, and the hook that sets the engine up for them.

Nothing here touches a device, and calling it twice changes nothing.
"""

from __future__ import annotations

from .config import ARCHITECTURES


def register_models() -> None:
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from .deepseek import register_config
    from .engine import MoDEngineConfig
    from .hooks import STOCK_ARCHITECTURES, StockHook

    register_config()
    # No registration call exists for these hooks in vLLM 0.32; the map is what vLLM's own models use.
    for base, routed in ARCHITECTURES.items():
        ModelRegistry.register_model(routed, f"vllm_mod.models:{routed}")
        MODELS_CONFIG_MAP[routed] = MoDEngineConfig.over(MODELS_CONFIG_MAP.get(base))
    for name in STOCK_ARCHITECTURES:
        MODELS_CONFIG_MAP[name] = StockHook.over(MODELS_CONFIG_MAP.get(name))
