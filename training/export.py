"""Base model + routers -> full checkpoint, and where models come from: a directory or the hub."""

from __future__ import annotations

from pathlib import Path

from vllm_mod.checkpoint import BaseShape, read_json, read_mod_config, read_routers, write_checkpoint
from vllm_mod.config import ConfigError, ModConfig, mod_architecture

from .arguments import ExportArguments, check_output, make_mod_config

_WANTED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.md", "LICENSE*"]


def local_model(name: str) -> Path:
    """The directory of a model: `name` itself, or a snapshot from the hub (safetensors only)."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or path.exists():
        raise ConfigError(f"{name}: no such directory")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_WANTED))
    except Exception as error:  # no network, no such repository, no access: all the same to the user
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"{name}: neither a local directory nor a model the hub gives: {reason}") from None


def base_shape(directory: Path) -> BaseShape:
    """The base model's shape; raises ConfigError if it is not supported or routed already."""
    path = directory / "config.json"
    data = read_json(path)
    shape = BaseShape.of(data, str(path))
    mod_architecture(shape.architecture)
    if "mod_config" in data:
        raise ConfigError(f"{path}: this is a routed checkpoint; give its base model")
    return shape


def export(args: ExportArguments, records: dict[str, str] | None = None) -> Path:
    """`router-tuning export`: writes `args.output`, whole or not at all."""
    check_output(args.output)
    base = local_model(args.model)
    shape = base_shape(base)
    if args.routers is None:
        if args.granularity is None or not args.granularity.endswith("_static"):
            raise ConfigError("--routers is missing; only *_static granularities have none")
        config = make_mod_config(args, shape.num_layers, base_model=args.model)
        return write_checkpoint(base, args.output, config, {}, records)
    directory = local_model(args.routers)
    config = _router_config(directory, args, shape)
    return write_checkpoint(base, args.output, config, read_routers(directory, config, shape), records)


def _router_config(directory: Path, args: ExportArguments, shape: BaseShape) -> ModConfig:
    """What the router directory says; the flags only where it says nothing (the authors' own router files)."""
    if any((directory / name).is_file() for name in ("mod_config.json", "config.json")):
        if args.granularity is not None or args.layers is not None:
            raise ConfigError(f"{directory}: says itself what it routes; drop --granularity and --layers")
        return read_mod_config(directory)
    if args.granularity is None:
        raise ConfigError(f"{directory}: no mod_config.json; say what the routers are for with --granularity, --layers")
    return make_mod_config(args, shape.num_layers, base_model=args.model)
