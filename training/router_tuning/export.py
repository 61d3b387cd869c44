"""Base model + routers -> full checkpoint, and where models come from: a directory or the hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vllm_mod.checkpoint import BaseShape, read_json, read_mod_config, read_routers, write_checkpoint
from vllm_mod.config import ConfigError, ModConfig, mod_architecture

from . import card, real_model
from .arguments import ExportArguments, check_output, make_mod_config
from .lora import ADAPTER_DIR

_WANTED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.md", "LICENSE*"]


def local_model(name: str) -> Path:
    """The directory of a model: `name` itself, one of `real_model.MODELS`, or a snapshot from the hub (safetensors)."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if name in real_model.MODELS:
        return real_model.fetch(name)
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
    config, routers, folders = _parts(args, base, shape)
    output = write_checkpoint(base, args.output, config, routers, records, folders)
    card.write(output)
    return output


def _parts(
    args: ExportArguments, base: Path, shape: BaseShape
) -> tuple[ModConfig, dict[int, Tensor], dict[str, Path]]:  # fmt: skip
    """What is routed, by which weights (none for a static granularity), and the adapter they were trained with."""
    if args.routers is None or args.drop_attention is not None:
        return _static_config(args, base, shape), {}, {}
    directory = local_model(args.routers)
    config = _router_config(directory, args, shape)
    adapter = {ADAPTER_DIR: directory / ADAPTER_DIR} if (directory / ADAPTER_DIR).is_dir() else {}
    return config, read_routers(directory, config, shape), adapter


def _static_config(args: ExportArguments, base: Path, shape: BaseShape) -> ModConfig:
    """What is dropped for good: chosen on data, listed by the base itself, or named by the flags."""
    if args.drop_attention is not None:
        return drop_config(args, base, shape)
    if args.granularity is None and (skipped := skip_lists(read_json(base / "config.json"), str(base))):
        return ModConfig.parse({"version": 1, "base_model": args.model, **skipped}, "per_layer_config")
    if args.granularity is None or not args.granularity.endswith("_static"):
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
    """What the router directory says; the flags only where it says nothing (the authors' own router files)."""
    if any((directory / name).is_file() for name in ("mod_config.json", "config.json")):
        if args.granularity is not None or args.layers is not None:
            raise ConfigError(f"{directory}: says itself what it routes; drop --granularity and --layers")
        return read_mod_config(directory)
    if args.granularity is None:
        raise ConfigError(f"{directory}: no mod_config.json; say what the routers are for with --granularity, --layers")
    return make_mod_config(args, shape, base_model=args.model)


def drop_config(args: ExportArguments, base: Path, shape: BaseShape) -> ModConfig:
    """`--drop-attention N`: the N layers are chosen on calibration data."""
    if args.routers is not None or args.layers is not None or args.granularity not in (None, "attn_static"):
        raise ConfigError("--drop-attention chooses the layers itself; drop --routers, --layers and --granularity")
    if not args.data:
        raise ConfigError("--drop-attention needs calibration data; pass --data")
    assert args.drop_attention is not None
    if not 0 < args.drop_attention < shape.num_layers:
        raise ConfigError(
            f"--drop-attention: 1 to {shape.num_layers - 1} of the {shape.num_layers} layers can be dropped"
        )
    import torch
    from transformers import AutoTokenizer

    from .data import read_sources, split_tail, tokenize
    from .drop import attention_similarity, most_similar
    from .model import load_base

    rows, _ = split_tail(read_sources(args.data), 0.0)
    samples, counts = tokenize(rows, AutoTokenizer.from_pretrained(base), args.max_length, args.max_samples)
    if not counts.used:
        raise ConfigError(f"{', '.join(args.data)}: no usable calibration sample")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_base(base, torch.bfloat16 if device == "cuda" else torch.float32).to(device).eval()
    similarity = attention_similarity(model, samples["input_ids"])
    layers = most_similar(similarity, args.drop_attention)
    for i, value in enumerate(similarity):
        print(f"layer {i:3}: similarity {value:.4f}{'  dropped' if i in layers else ''}")
    config = {"version": 1, "granularity": "attn_static", "layers": layers, "base_model": args.model}
    return ModConfig.parse(config, "--drop-attention")
