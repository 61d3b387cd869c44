"""A checkpoint or router-only directory with its base, loaded to be measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vllm_mod.architectures import BaseShape
from vllm_mod.checkpoint import is_router_only, read_mod_config, read_patches, read_routers
from vllm_mod.config import ConfigError, ModConfig
from vllm_mod.files import CONFIG_FILE, read_json

from .hub import local_model
from .lora import ADAPTER_DIR, load_adapter
from .model import attach_routers, load_base, load_reference


def checkpoint_config(checkpoint: str, model: str | None) -> tuple[Path, ModConfig]:
    """The directory that was named, and what it routes. model: `--model`, for a router-only directory."""
    directory = Path(checkpoint)
    if not directory.is_dir():
        raise ConfigError(f"{directory}: no such checkpoint directory")
    config = read_mod_config(directory)
    if is_router_only(directory) and not (model or config.base_model):
        raise ConfigError(f"{directory}: names no base model; pass it with --model")
    return directory, config


def base_of(directory: Path, config: ModConfig, model: str | None) -> Path:
    """Where a checkpoint's weights are: in itself, unless it is router-only."""
    return local_model(model or config.base_model or "") if is_router_only(directory) else directory


def on_best_device(model: Any) -> Any:
    return model.to("cuda") if torch.cuda.is_available() else model


def measuring_dtype() -> torch.dtype:
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def stored_dtype(base: Path) -> torch.dtype:
    """That of patches, which are served in the base's precision, so that more of theirs would be lost."""
    config = read_json(base / CONFIG_FILE)
    in_bf16 = config.get("dtype", config.get("torch_dtype")) == "bfloat16"
    return torch.bfloat16 if in_bf16 else torch.float32


def fitting_dtype(base: Path, bf16: bool | None) -> torch.dtype:
    """What `--bf16` says; where it says nothing bf16 on a GPU, and on a CPU that multiplies in it (twice as fast as in
    float32) for a base whose weights have no more.
    """
    if bf16 is None:
        cpu: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        native = any(cpu.get(name) for name in ("avx512_bf16", "amx_bf16"))
        bf16 = torch.cuda.is_available() or (native and stored_dtype(base) == torch.bfloat16)
    return torch.bfloat16 if bf16 else torch.float32


def load_routed(directory: Path, base: Path, config: ModConfig | None = None, dtype: torch.dtype | None = None) -> Any:
    """The routed model of a directory (`base_of` gives `base`), in eval mode, on the GPU where there is one.

    config: in place of the stored one, as for `load_reference`. dtype: `measuring_dtype` by default. An adapter is part
    of it: routers were trained with it.
    """
    dtype = dtype or measuring_dtype()
    if base == directory:
        return on_best_device(load_reference(directory, dtype, config))
    stored = read_mod_config(directory)
    shape = BaseShape.of(read_json(base / CONFIG_FILE), str(base / CONFIG_FILE))
    config = config or stored
    routers, patches = read_routers(directory, stored, shape), read_patches(directory, stored, shape)
    model = load_base(base, dtype).eval()
    attach_routers(model, config, routers, patches if config.patch is not None else {})
    if (directory / ADAPTER_DIR).is_dir():
        load_adapter(model, directory / ADAPTER_DIR)
        model.eval()
    return on_best_device(model)
