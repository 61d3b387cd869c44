"""vLLM's per-architecture hooks, one over another; those of stock architectures refuse routed checkpoints.

vLLM chooses a model's format by what lies beside `config.json`: with `params.json` and `consolidated*.safetensors` it
reads Mistral's own format, which names a stock architecture. A routed checkpoint would be served dense, without a word.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.model_executor.models.config import VerifyAndUpdateConfig

from .architectures import ARCHITECTURES
from .config import ConfigError
from .files import HF_FORMAT_FLAGS, refuse_mistral_files

if TYPE_CHECKING:
    from vllm.config import VllmConfig

#: Architectures that a routed checkpoint may be taken for: its base's; what vLLM's parser makes of Mistral's format;
#: and vLLM's wrappers of transformers models.
STOCK_ARCHITECTURES = (
    *ARCHITECTURES,
    "MistralLarge3ForCausalLM",
    "PixtralForConditionalGeneration",
    "TransformersForCausalLM",
    "TransformersMoEForCausalLM",
)


class ChainedHook(VerifyAndUpdateConfig):
    """Does what the hook `base` of the same architecture does."""

    base: type[VerifyAndUpdateConfig] = VerifyAndUpdateConfig

    @classmethod
    def over(cls, base: type[VerifyAndUpdateConfig] | None) -> type[ChainedHook]:
        """This hook for an architecture that has the hook `base`, which may be such a hook already."""
        stock: Any = base or VerifyAndUpdateConfig
        return cls._over(stock.base if issubclass(stock, ChainedHook) else stock)

    @classmethod
    @functools.cache
    def _over(cls, base: Any) -> type[ChainedHook]:
        return type(cls.__name__, (cls,), {"base": base, "__module__": cls.__module__})

    @classmethod
    def verify_and_update_model_config(cls, model_config: Any) -> None:
        cls.base.verify_and_update_model_config(model_config)

    @classmethod
    def verify_and_update_config(cls, vllm_config: VllmConfig) -> None:
        cls.base.verify_and_update_config(vllm_config)


class StockHook(ChainedHook):
    """Over the hook of a stock architecture, which knows nothing of routers."""

    @classmethod
    def verify_and_update_model_config(cls, model_config: Any) -> None:
        super().verify_and_update_model_config(model_config)
        if getattr(model_config.hf_config, "mod_config", None) is not None:
            raise ConfigError(
                f"{model_config.model}: a routed checkpoint, and vLLM would serve it as {model_config.architecture}, "
                "without its routers. If params.json and consolidated*.safetensors (Mistral's own format) lie in it, "
                f"remove them, or pass {HF_FORMAT_FLAGS}; else drop --hf-overrides and --model-impl"
            )


def refuse_other_formats(vllm_config: VllmConfig) -> None:
    """A checkpoint whose config is read, and whose weights or tokenizer would be taken from Mistral's own files."""
    config = vllm_config.model_config
    chosen = vllm_config.load_config.load_format not in ("auto", "mistral") and config.tokenizer_mode != "auto"
    if Path(config.model).is_dir() and not chosen:
        refuse_mistral_files(Path(config.model))
