"""What vLLM is told about: the architectures, and the hook that sets the engine up for them.

Nothing here touches a device, and calling it twice changes nothing.
"""

from __future__ import annotations

from .architectures import ARCHITECTURES


def register_models() -> None:
    from vllm import ModelRegistry

    from .compat import config_hook, set_config_hook
    from .deepseek import register_config
    from .engine import MoDEngineConfig
    from .hooks import STOCK_ARCHITECTURES, StockHook

    register_config()
    for base, row in ARCHITECTURES.items():
        ModelRegistry.register_model(row.routed, f"vllm_mod.models:{row.routed}")
        set_config_hook(row.routed, MoDEngineConfig.over(config_hook(base)))
    for name in STOCK_ARCHITECTURES:
        set_config_hook(name, StockHook.over(config_hook(name)))
