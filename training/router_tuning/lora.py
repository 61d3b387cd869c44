"""LoRA beside the routers: an adapter (peft) that learns to make up for what is skipped.

By default it sits in the layers from the first routed one on. Skipping changes nothing below that layer, so there is
nothing to make up for, and the frozen trunk stays out of autograd: gradients reach the adapter as they reach the
routers, and a step costs little more. Layers named by `--lora-layers` below it work too, at the price of
back-propagating through them.
"""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vllm_mod.architectures import BaseShape, architecture_of
from vllm_mod.checkpoint import base_weight_map
from vllm_mod.config import ConfigError, ModConfig
from vllm_mod.files import ADAPTER_CONFIG_FILE, link_or_copy, model_files, open_weights

from .arguments import RouterArguments
from .flag_words import parse_layers

#: Directory of an unmerged adapter inside a checkpoint: what `--lora-modules name=CKPT/adapter` takes.
ADAPTER_DIR = "adapter"
ADAPTER_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."  # peft's, in files


# ---------------------------------------------------------------- what is adapted


def adapter_config(args: RouterArguments, config: ModConfig, base: Path, shape: BaseShape) -> Any:
    """The flags as a peft LoraConfig that fits the base model, or None. Writes the defaults that it chose into `args`.

    Reads no more of the weights than their names and types. Raises ConfigError.
    """
    _check_flags(args, config)
    if not args.lora_r:
        return None
    from peft import LoraConfig

    # The experts of a mixture are many, small, and not linear modules in every model.
    row = architecture_of(shape.architecture)
    usual = [*row.attention_linears, *(() if shape.num_experts else row.mlp_linears)]
    targets = args.lora_target_modules or usual
    layers = parse_layers(args.lora_layers or [f"{config.layers[0]}-{shape.num_layers - 1}"], shape.num_layers)
    if not layers or layers[-1] >= shape.num_layers:
        raise ConfigError(f"--lora-layers: the model has layers 0 to {shape.num_layers - 1}")
    _check_targets(base, targets, layers, args.lora_output)
    args.lora_target_modules, args.lora_layers = list(targets), [str(i) for i in layers]
    args.lora_alpha = args.lora_alpha or 2 * args.lora_r
    return LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=config.base_model,
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=list(targets),
        layers_to_transform=layers,
        layers_pattern="layers",  # not the number of an expert, which comes later in a name
    )


def _check_flags(args: RouterArguments, config: ModConfig) -> None:
    if args.lora_r < 0:
        raise ConfigError(f"--lora-r {args.lora_r}: a rank of 1 or more is needed (0: no adapter)")
    if not args.lora_r:
        given = [
            ("alpha", args.lora_alpha),
            ("dropout", args.lora_dropout),
            ("target-modules", args.lora_target_modules),
            ("layers", args.lora_layers),
            ("output adapter", args.lora_output == "adapter"),
        ]
        if flag := next((name for name, value in given if value), None):
            raise ConfigError(f"--lora-{flag} says nothing without an adapter; give its rank with --lora-r")
        return
    if args.lora_alpha is not None and args.lora_alpha < 1:
        raise ConfigError(f"--lora-alpha {args.lora_alpha}: a positive number is needed")
    if not 0 <= args.lora_dropout < 1:
        raise ConfigError(f"--lora-dropout {args.lora_dropout}: a number from 0 to below 1 is needed")
    if not 0 < args.lora_learning_rate < math.inf:
        raise ConfigError(f"--lora-learning-rate {args.lora_learning_rate}: a positive number is needed")
    if args.lora_output == "adapter" and config.policy.by_experts:
        raise ConfigError(f"--lora-output adapter: no adapter is served with {config.granularity}; use merged")


def _check_targets(base: Path, targets: list[str], layers: list[int], output: str) -> None:
    """Every target must be a matrix of floats in the base's files, in one of the layers at least."""
    files = base_weight_map(base)
    for target in targets:
        found = [n for n in files if n.endswith(f".{target}.weight") and any(f".layers.{i}." in n for i in layers)]
        if not found:
            raise ConfigError(f"--lora-target-modules: {base} has no {target!r} in layers {layers[0]} to {layers[-1]}")
        if output == "adapter" and any(".experts." in name for name in found):
            raise ConfigError(f"--lora-target-modules: adapters on experts ({target!r}) are not served; use merged")
        with open_weights(base / files[found[0]]) as file:
            part = file.get_slice(found[0])
            kind, size = part.get_dtype(), part.get_shape()
        if kind not in ("F32", "F16", "BF16", "F64") or len(size) != 2:
            raise ConfigError(f"--lora-target-modules: {found[0]} is {kind} {size}; a matrix of floats is needed")


# ---------------------------------------------------------------- in a model


def attach_adapter(model: nn.Module, settings: Any) -> list[nn.Parameter]:
    """Inject the adapter beside what is trained already, in place; returns its parameters (float32).

    No wrapper: names, class and routed sublayers of `model` stay. B is zero, so the model computes what it did.
    """
    from peft import inject_adapter_in_model

    trained = [p for p in model.parameters() if p.requires_grad]
    targets = sorted(settings.target_modules)  # peft makes other entries of experts that are one tensor
    try:
        inject_adapter_in_model(settings, model)
    except ValueError as error:
        raise ConfigError(f"--lora-target-modules: {' '.join(str(error).split())}") from None
    adapter = {name: p for name, p in model.named_parameters() if is_adapter(name)}
    for target in targets:
        if not any(f".{target}.lora_A." in name for name in adapter):
            raise ConfigError(f"--lora-target-modules: {target!r} is no linear module of {type(model).__name__}")
    for parameter in adapter.values():
        parameter.data = parameter.data.float()
    for parameter in [*trained, *adapter.values()]:  # peft froze all but its own
        parameter.requires_grad_(True)
    return list(adapter.values())


def is_adapter(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def adapter_tensors(model: nn.Module, gathered: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """peft's file name -> float32 copy on the CPU; `gathered` has the whole tensors where parameters are sharded."""
    whole = {name.removeprefix("module."): value for name, value in (gathered or {}).items()}
    return {
        _PREFIX + name.replace(".default.", "."): whole.get(name, p).detach().float().cpu().contiguous()
        for name, p in model.named_parameters()
        if is_adapter(name)
    }


def load_adapter_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """The inverse; KeyError where one is missing, ValueError where one has another shape."""
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            tensor = tensors[_PREFIX + name.replace(".default.", ".")]
            if tensor.shape != parameter.shape:
                raise ValueError(f"{name} has shape {list(tensor.shape)}, this model needs {list(parameter.shape)}")
            parameter.data.copy_(tensor)


@contextlib.contextmanager
def without_adapter(model: nn.Module) -> Iterator[None]:
    """While it lasts, `model` computes what its base does."""
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "lora_A")]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def own_group(optimizer: torch.optim.Optimizer, model: nn.Module, learning_rate: float, weight_decay: float) -> None:
    """Move the adapter's parameters into a group with a learning rate of their own, the last one."""
    adapter = {id(p): p for name, p in model.named_parameters() if is_adapter(name)}
    there = [p for group in optimizer.param_groups for p in group["params"] if id(p) in adapter]
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in adapter]
    optimizer.add_param_group({"params": there, "lr": learning_rate, "weight_decay": weight_decay})


# ---------------------------------------------------------------- in files


def write_adapter(directory: Path, settings: Any, tensors: Mapping[str, Tensor]) -> Path:
    """A peft directory, as `PeftModel.from_pretrained` and vLLM's `--lora-modules` read it."""
    directory.mkdir(parents=True, exist_ok=True)
    directory.chmod(0o755)
    data = settings.to_dict() | {"inference_mode": True, "target_modules": sorted(settings.target_modules)}
    (directory / ADAPTER_CONFIG_FILE).write_text(json.dumps(data, indent=2, default=_plain) + "\n", encoding="utf-8")
    save_file(dict(tensors), directory / ADAPTER_FILE, metadata={"format": "pt"})
    (directory / ADAPTER_FILE).chmod(0o644)
    return directory


def _plain(value: Any) -> Any:
    """peft makes sets of some lists, of experts for one, and reads lists alone."""
    return sorted(value) if isinstance(value, set) else str(value)


def load_adapter(model: nn.Module, directory: Path) -> None:
    """Give a (routed) model the adapter of a peft directory, in place. Raises ConfigError if it does not fit."""
    from peft import LoraConfig

    try:
        attach_adapter(model, LoraConfig.from_pretrained(str(directory)))
        load_adapter_tensors(model, load_file(directory / ADAPTER_FILE))
    except (OSError, KeyError, RuntimeError, ValueError, SafetensorError) as error:
        raise ConfigError(f"{directory}: not an adapter of this model: {error}") from None


@contextlib.contextmanager
def placed(base: Path, final: Path, settings: Any, output: str) -> Iterator[tuple[Path, dict[str, Path]]]:
    """(base directory, folders) to write a checkpoint of, with the adapter of a finished run: `final` holds its file.

    What has to be written for that is beside it, and gone afterwards. settings: None where there is no adapter.
    """
    if settings is None:
        yield base, {}
        return
    tensors = load_file(final / ADAPTER_FILE)
    with tempfile.TemporaryDirectory(dir=final) as directory:
        if output == "adapter":
            yield base, {ADAPTER_DIR: write_adapter(Path(directory), settings, tensors)}
        else:
            yield merge_into_base(base, Path(directory), tensors, settings.lora_alpha / settings.r), {}


def merge_into_base(base: Path, output: Path, tensors: Mapping[str, Tensor], scale: float) -> Path:
    """The base's files in `output`: those with adapted weights anew, `W + scale * B A`, the others linked.

    Files that are no part of the model stay behind. What is written anew is never written through a link.
    """
    files = base_weight_map(base)
    changed: dict[str, dict[str, Tensor]] = {}
    for name, a in tensors.items():
        if name.endswith(".lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            weight = module.removeprefix(_PREFIX) + ".weight"
            changed.setdefault(files[weight], {})[weight] = scale * tensors[f"{module}.lora_B.weight"] @ a
    output.mkdir(parents=True, exist_ok=True)
    for name in model_files(base):
        if name not in changed:
            link_or_copy(base / name, output / name)
    for file, deltas in changed.items():
        weights = load_file(base / file)
        for name, delta in deltas.items():
            weights[name] = (weights[name].float() + delta).to(weights[name].dtype)
        (output / file).unlink(missing_ok=True)
        save_file(weights, output / file, metadata={"format": "pt"})
        (output / file).chmod(0o644)
    return output
