"""Base model + routers -> full checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from vllm_mod.architectures import BaseShape
from vllm_mod.calibration import CALIBRATION_FILE, read_calibration
from vllm_mod.checkpoint import (
    base_weight_map,
    is_router_only,
    read_mod_config,
    read_patches,
    read_routers,
    write_checkpoint,
    write_routers,
)
from vllm_mod.config import ConfigError, ModConfig
from vllm_mod.files import ADAPTER_FILES, CONFIG_FILE, read_json
from vllm_mod.granularity import POLICIES
from vllm_mod.tensors import Patch

from . import card
from .arguments import ExportArguments, check_output, make_mod_config
from .hub import local_model, warn_of_strangers
from .interrupt import deferred
from .lora import ADAPTER_DIR
from .patch_record import PATCHES_FILE
from .records import ARGUMENTS_FILE, ROUTER_RECORDS
from .unfinished import Unfinished


def base_shape(directory: Path) -> BaseShape:
    """The base model's shape; raises ConfigError if it is not supported, routed already, or not whole."""
    shape = shape_of(directory)
    if "mod_config" in read_json(directory / CONFIG_FILE):
        raise ConfigError(f"{directory / CONFIG_FILE}: this is a routed checkpoint; give its base model")
    return shape


def shape_of(directory: Path) -> BaseShape:
    """That of a base model or a full checkpoint; raises ConfigError if it is not supported or not whole."""
    path = directory / CONFIG_FILE
    shape = BaseShape.of(read_json(path), str(path))
    base_weight_map(directory)
    return shape


def export(args: ExportArguments, records: dict[str, str] | None = None) -> Path:
    """`router-tuning export`: writes `args.output`, whole or not at all."""
    check_output(args.output)
    base = local_model(args.model)
    shape = base_shape(base)
    warn_of_strangers(base)
    records = records or {}
    parts = _parts(args, base, shape, next(iter(records.get("train_command.txt", "").splitlines()), ""))
    records = {**records, **parts.records}
    if args.without_base:
        output = write_routers(args.output, parts.config, parts.routers, parts.patches, records, parts.folders)
    else:
        output = write_checkpoint(base, args.output, parts.config, parts.routers, records, parts.folders, parts.patches)
    with deferred():
        card.write(output)
        if parts.unfinished is not None:
            parts.unfinished.remove()
    return output


@dataclass(frozen=True)
class Parts:
    """What a checkpoint has beside its base: see `write_checkpoint`."""

    config: ModConfig
    patches: Mapping[int, Patch] = field(default_factory=dict)
    records: Mapping[str, str] = field(default_factory=dict)
    routers: Mapping[int, Tensor] = field(default_factory=dict)
    folders: Mapping[str, Path] = field(default_factory=dict)
    #: has the patches until the checkpoint has
    unfinished: Unfinished | None = None


def _parts(args: ExportArguments, base: Path, shape: BaseShape, command: str) -> Parts:
    """What is routed, by which tensors, and what belongs to them: the adapter they were trained with, their records.

    command: what was typed."""
    if args.routers is None or args.drop_attention is not None:
        if args.window != "none":
            raise ConfigError("--window is for routers that decide per sequence; pass --routers, or drop it")
        if args.drop_attention is not None:
            from .drop import dropped

            config, patches, made, file = dropped(args, base, shape, command)
            return Parts(config, patches, made, unfinished=file)
        return Parts(_static_config(args, base, shape))
    directory = local_model(args.routers, routers=True)
    config = _router_config(directory, args, shape)
    adapter = directory / ADAPTER_DIR
    if adapter.is_dir() and (missing := [name for name in ADAPTER_FILES if not (adapter / name).is_file()]):
        raise ConfigError(f"{adapter}: {missing[0]} is missing; the routers were trained with this adapter")
    read_calibration(directory, config)  # refuses another's
    # Without the base nothing new is made: the command that made them is not this one. What they were trained on must
    # not be held out, whatever they are joined with.
    names = (CALIBRATION_FILE, PATCHES_FILE, *(ROUTER_RECORDS if args.without_base else (ARGUMENTS_FILE,)))
    return Parts(
        config,
        read_patches(directory, config, shape),
        routers=read_routers(directory, config, shape),
        folders={ADAPTER_DIR: adapter} if adapter.is_dir() else {},
        records={n: (directory / n).read_text(encoding="utf-8") for n in names if (directory / n).is_file()},
    )


def _static_config(args: ExportArguments, base: Path, shape: BaseShape) -> ModConfig:
    """What is dropped for good: listed by the base itself, or named by the flags."""
    if args.granularity is None and (skipped := skip_lists(read_json(base / CONFIG_FILE), str(base))):
        return ModConfig.parse({"version": 1, "base_model": args.model, **skipped}, "per_layer_config")
    if args.granularity is None or not POLICIES[args.granularity].is_static:
        raise ConfigError("--routers is missing; only *_static granularities have none")
    return make_mod_config(args, shape, base_model=args.model)


_SUBLAYERS = {"attention": "attn", "self_attn": "attn", "mlp": "mlp", "feed_forward": "mlp"}


def skip_lists(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What transformers' `per_layer_config: {layer: {"skip": [...]}}` drops, as granularity and layers; or nothing.

    transformers 5.19 defines the key but not the names in it: a decoder layer's sub-modules are meant.
    """
    found: dict[int, frozenset[str]] = {}
    for layer, overrides in (config.get("per_layer_config") or {}).items():
        names = overrides.get("skip") or ()
        if unknown := [name for name in names if name not in _SUBLAYERS]:
            raise ConfigError(f"{where}: per_layer_config skips {unknown[0]!r}; known: {', '.join(_SUBLAYERS)}")
        if names:
            found[int(layer)] = frozenset(_SUBLAYERS[name] for name in names)
    if not found:
        return {}
    if len(kinds := set(found.values())) > 1:
        raise ConfigError(
            f"{where}: per_layer_config skips different sublayers in different layers; one kind is served"
        )
    (kind,) = kinds
    target = "block" if len(kind) == 2 else next(iter(kind))
    return {"granularity": f"{target}_static", "layers": sorted(found)}


def _router_config(directory: Path, args: ExportArguments, shape: BaseShape) -> ModConfig:
    """What the router directory says; the flags only where it says nothing (the authors' own router files, which may
    have a `config.json` beside them)."""
    config = directory / CONFIG_FILE
    if is_router_only(directory) or (config.is_file() and "mod_config" in read_json(config)):
        if args.granularity is not None or args.layers is not None or args.window != "none":
            raise ConfigError(f"{directory}: says itself what it routes; drop --granularity, --layers and --window")
        return read_mod_config(directory)
    if args.granularity is None:
        raise ConfigError(f"{directory}: no mod_config; say what the routers are for with --granularity, --layers")
    return make_mod_config(args, shape, base_model=args.model)
