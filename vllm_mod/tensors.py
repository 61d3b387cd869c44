"""The tensors that a routed checkpoint has beside its base model's: routers and patches, by name and shape."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .architectures import BaseShape
from .config import ConfigError, ModConfig

_ROUTER_NAME = re.compile(r"model\.layers\.\d+\.router\..+")


@dataclass(frozen=True)
class Patch:
    """What a skipped sublayer adds to the residual: `up (down x) + bias`, see `gate.apply_patch`."""

    #: `[hidden]`
    bias: Tensor
    #: `[rank, hidden]`, and `[hidden, rank]`; None where the rank is 0.
    down: Tensor | None = None
    up: Tensor | None = None


def router_name(layer: int) -> str:
    return f"model.layers.{layer}.router.weight"


def patch_name(layer: int, part: str) -> str:
    """part: `bias`, `down.weight` or `up.weight`."""
    return f"model.layers.{layer}.router.patch.{part}"


def is_router_name(name: str) -> bool:
    """Whether a tensor of this name is one that a routed checkpoint has beside its base model's."""
    return _ROUTER_NAME.fullmatch(name) is not None


def expected_tensors(config: ModConfig, shape: BaseShape) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that `config` asks for; layer by layer, none of them optional."""
    rows = config.policy.router_rows(shape.num_experts)
    expected: dict[str, tuple[int, ...]] = {}
    for layer in config.layers:
        if not config.is_static:
            expected[router_name(layer)] = (rows, shape.hidden_size)
        if config.patch is not None:
            expected[patch_name(layer, "bias")] = (shape.hidden_size,)
            if rank := config.patch.rank:
                expected[patch_name(layer, "down.weight")] = (rank, shape.hidden_size)
                expected[patch_name(layer, "up.weight")] = (shape.hidden_size, rank)
    return expected


def check_routers(tensors: Mapping[str, Tensor], config: ModConfig, shape: BaseShape, where: str) -> dict[int, Tensor]:
    """The router weights per layer (see `patches_of` for the rest).

    Raises ConfigError, naming the tensor, unless `tensors` are exactly the routers and patches that `config` asks for.
    """
    config.check_fits(shape.num_layers, shape.num_experts, shape.dense_layers)
    expected = expected_tensors(config, shape)
    if missing := [name for name in expected if name not in tensors]:
        raise ConfigError(f"{where}: router tensor {missing[0]} is missing ({len(missing)} in all)")
    if surplus := sorted(set(tensors) - set(expected)):
        raise ConfigError(f"{where}: {surplus[0]} {_why_surplus(surplus[0], config)}")
    for name in expected:
        check_tensor(name, tensors[name], config, shape, where)
    return {} if config.is_static else {layer: tensors[router_name(layer)] for layer in config.layers}


def check_tensor(name: str, tensor: Tensor, config: ModConfig, shape: BaseShape, where: str) -> None:
    """Raise ConfigError unless `tensor`, which goes by the name of a router or patch, is one that `config` asks for."""
    wanted = expected_tensors(config, shape).get(name)
    if wanted is None:
        raise ConfigError(f"{where}: {name} {_why_surplus(name, config)}")
    if tuple(tensor.shape) != wanted:
        raise ConfigError(
            f"{where}: {name} has shape {list(tensor.shape)}, this model needs {list(wanted)}"
            + _why_misshapen(tensor, wanted, config, shape)
        )
    if not tensor.is_floating_point():
        raise ConfigError(f"{where}: {name} is {tensor.dtype}, a float type is needed")
    if not torch.isfinite(tensor.float()).all():
        raise ConfigError(f"{where}: {name} has values that are not finite")


def _why_surplus(name: str, config: ModConfig) -> str:
    patched = [layer for layer in config.layers if name.startswith(patch_name(layer, ""))]
    if not patched:
        return f"belongs to no routed layer; 'layers' is {list(config.layers)}"
    if config.patch is None:
        return "is part of a patch, and mod_config has no key 'patch'"
    return f"is no part of a patch of rank {config.patch.rank} (key 'patch')"


def _why_misshapen(tensor: Tensor, wanted: tuple[int, ...], config: ModConfig, shape: BaseShape) -> str:
    reason = f", a gate for each of its {wanted[0]} experts" if config.policy.by_experts else ""
    if shape.hidden_size not in tensor.shape:
        return f"{reason}; the routers belong to another base model"
    if config.patch is not None and tensor.dim() == len(wanted) == 2 and config.patch.rank in wanted:
        return f"{reason}; key 'patch' says rank {config.patch.rank}"
    return reason


def patches_of(tensors: Mapping[str, Tensor], config: ModConfig) -> dict[int, Patch]:
    """The patches in tensors that went through `check_routers`, per layer; none where `config` has none."""
    if config.patch is None:
        return {}
    return {
        layer: Patch(
            tensors[patch_name(layer, "bias")],
            tensors.get(patch_name(layer, "down.weight")),
            tensors.get(patch_name(layer, "up.weight")),
        )
        for layer in config.layers
    }


def named_tensors(routers: Mapping[int, Tensor], patches: Mapping[int, Patch] | None = None) -> dict[str, Tensor]:
    """The inverse of `check_routers` and `patches_of`: what a file holds."""
    tensors = {router_name(layer): weight for layer, weight in routers.items()}
    for layer, patch in (patches or {}).items():
        parts = {"bias": patch.bias, "down.weight": patch.down, "up.weight": patch.up}
        tensors |= {patch_name(layer, part): tensor for part, tensor in parts.items() if tensor is not None}
    return tensors
