"""The tokenizer that serving uses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm_mod.config import ConfigError

from .values import first_line


def load_tokenizer(directory: str | Path) -> Any:
    """That of a model directory. Raises ConfigError where it cannot be read or cannot do what is needed.

    Mistral's own `tekken.json` beside the files of Hugging Face is passed over, as vLLM does with a checkpoint of
    this project: what transformers reads it with takes no chat template.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, mistral_format=False, trust_remote_code=False)
    except Exception as error:  # of any kind: files that are not there, not JSON, or of a library that is not there
        raise ConfigError(f"{directory}: its tokenizer cannot be read: {first_line(error)}") from None
    if not hasattr(tokenizer, "is_fast"):  # MistralCommonBackend
        raise ConfigError(f"{directory}: needs a tokenizer.json; {type(tokenizer).__name__} takes no chat template")
    return tokenizer
