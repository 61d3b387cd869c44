"""Read, check and write checkpoint directories (safetensors only; no vLLM, no transformers import).

A *full checkpoint* is a base model's directory plus `mod_config` in `config.json` and `routers.safetensors`, which
holds routers and patches (see `tensors`). A *router-only* directory is `mod_config.json` + `routers.safetensors`. The
reference implementation's router-only `model.safetensors` (same tensor names) is read as well.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .config import ConfigError, ModConfig, mod_architecture
from .tensors import Patch, check_routers, named_tensors, patches_of
from .tensors import router_name as router_name

ROUTERS_FILE = "routers.safetensors"
ROUTER_CONFIG_FILE = "mod_config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_ROUTER_NAME = re.compile(r"model\.layers\.\d+\.router\..+")
#: Files of a base model that a checkpoint has no use for.
_NOT_COPIED = (".bin", ".pt", ".pth", ".gguf", ".onnx", ".msgpack", ".h5")


@dataclass(frozen=True)
class BaseShape:
    """What of a base model's `config.json` routers depend on."""

    architecture: str
    num_layers: int
    hidden_size: int
    num_experts: int | None
    #: layers that have one dense MLP, of a model with experts in the others
    dense_layers: tuple[int, ...] = ()

    @classmethod
    def of(cls, config: Mapping[str, Any], where: str) -> BaseShape:
        try:
            num_layers, num_experts = config["num_hidden_layers"], num_experts_of(config)
            dense_first, every = config.get("first_k_dense_replace") or 0, config.get("moe_layer_freq") or 1
            return cls(
                architecture=(config.get("architectures") or ["?"])[0],
                num_layers=num_layers,
                hidden_size=config["hidden_size"],
                num_experts=num_experts,
                dense_layers=tuple(i for i in range(num_layers) if num_experts and (i < dense_first or i % every)),
            )
        except KeyError as key:
            raise ConfigError(f"{where}: key {key} is missing; is this a decoder-only model?") from None


def num_experts_of(config: Mapping[str, Any]) -> int | None:
    """Routed experts per MoE layer as `config.json` says; None of a dense model."""
    return config.get("num_experts") or config.get("n_routed_experts")


def read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:  # not UTF-8, not JSON, numbers or nesting without end
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: a JSON object is needed")
    return data


def read_mod_config(directory: str | Path) -> ModConfig:
    """`mod_config` of a full checkpoint or a router-only directory."""
    directory = Path(directory)
    if (directory / ROUTER_CONFIG_FILE).is_file():
        path = directory / ROUTER_CONFIG_FILE
        return ModConfig.parse(read_json(path), str(path))
    path = directory / "config.json"
    data = read_json(path)
    if "mod_config" not in data:
        raise ConfigError(
            f"{path}: key 'mod_config' is missing: this model routes nothing. "
            "Train routers with `router-tuning train`, or add some with `router-tuning export`."
        )
    return ModConfig.parse(data["mod_config"], f"{path}: mod_config")


def read_routers(directory: str | Path, config: ModConfig, shape: BaseShape) -> dict[int, Tensor]:
    """Router weights per routed layer; all tensors are checked against the config and the base model's shape."""
    path, tensors = load_router_tensors(directory)
    return check_routers(tensors, config, shape, str(path))


def read_patches(directory: str | Path, config: ModConfig, shape: BaseShape) -> dict[int, Patch]:
    """Patches per routed layer, checked likewise; none where the config has none."""
    path, tensors = load_router_tensors(directory)
    check_routers(tensors, config, shape, str(path))
    return patches_of(tensors, config)


def load_router_tensors(directory: str | Path) -> tuple[Path, dict[str, Tensor]]:
    """The file that holds a directory's routers, and its router tensors, unchecked."""
    directory = Path(directory)
    path = directory / ROUTERS_FILE
    if not path.is_file():
        path = directory / WEIGHTS_FILE
        if not path.is_file():
            return directory, {}
    try:
        with safe_open(path, framework="pt") as file:
            names = [n for n in file.keys() if path.name == ROUTERS_FILE or _ROUTER_NAME.fullmatch(n)]  # noqa: SIM118
            return path, {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path}: not a readable safetensors file: {error}") from None


def write_routers(
    output: str | Path, config: ModConfig, routers: Mapping[int, Tensor], patches: Mapping[int, Patch] | None = None
) -> Path:
    """Write a router-only directory; it appears whole or not at all."""
    with _atomic_directory(Path(output)) as directory:
        _write_json(directory / ROUTER_CONFIG_FILE, config.to_dict())
        _save_tensors(directory, named_tensors(routers, patches))
    return Path(output)


def write_checkpoint(
    base: str | Path,
    output: str | Path,
    config: ModConfig,
    routers: Mapping[int, Tensor],
    records: Mapping[str, str] | None = None,
    folders: Mapping[str, Path] | None = None,
    patches: Mapping[int, Patch] | None = None,
) -> Path:
    """Write base model + routers (+ patches) as a full checkpoint; it appears whole or not at all.

    Weight files are hard-linked where the file system can, copied elsewhere. `records` (file name -> text) are
    written beside them, and `folders` (name -> directory) copied. Raises ConfigError on a base model that is not
    supported or does not fit, or when the disk is full.
    """
    base, output = Path(base), Path(output)
    base_config = read_json(base / "config.json")
    shape = BaseShape.of(base_config, str(base / "config.json"))
    architecture = mod_architecture(shape.architecture)
    tensors = named_tensors(routers, patches)
    check_routers(tensors, config, shape, "routers")
    weight_map = base_weight_map(base)
    with _atomic_directory(output) as directory:
        for source in sorted(base.iterdir()):
            if source.is_file() and not _is_replaced(source):
                link_or_copy(source, directory / source.name)
        _write_json(
            directory / "config.json",
            base_config | {"architectures": [architecture], "mod_config": config.to_dict()},
        )
        if tensors:
            _save_tensors(directory, tensors)
            weight_map |= dict.fromkeys(tensors, ROUTERS_FILE)
        total = sum((directory / name).stat().st_size for name in set(weight_map.values()))
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(directory / INDEX_FILE, index)
        for name, text in (records or {}).items():
            (directory / name).unlink(missing_ok=True)  # it may be a hard link to the base's
            (directory / name).write_text(text, encoding="utf-8")
        for name, folder in (folders or {}).items():
            shutil.copytree(folder, directory / name)
    return output


def _is_replaced(path: Path) -> bool:
    """Files this module writes itself, and formats it never ships."""
    return path.name in ("config.json", INDEX_FILE, ROUTERS_FILE, ROUTER_CONFIG_FILE) or path.suffix in _NOT_COPIED


def base_weight_map(base: Path) -> dict[str, str]:
    """Tensor name -> file of the base's weights, routers of an earlier export left out."""
    if (base / INDEX_FILE).is_file():
        names = _read_weight_map(base)
    elif (base / WEIGHTS_FILE).is_file():
        try:
            with safe_open(base / WEIGHTS_FILE, framework="pt") as file:
                names = dict.fromkeys(file.keys(), WEIGHTS_FILE)
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{base / WEIGHTS_FILE}: not a readable safetensors file: {error}") from None
    else:
        raise ConfigError(f"{base}: no {WEIGHTS_FILE} or {INDEX_FILE}; only safetensors weights are read")
    return {name: file for name, file in names.items() if not _ROUTER_NAME.fullmatch(name)}


def _read_weight_map(base: Path) -> dict[str, str]:
    """`weight_map` of a sharded model's index, every file of it there."""
    path = base / INDEX_FILE
    names = read_json(path).get("weight_map")
    if not isinstance(names, dict):
        raise ConfigError(f"{path}: key 'weight_map' is missing")
    for name in sorted(set(names.values())):
        if not (base / name).is_file():
            raise ConfigError(f"{path}: {name} is listed, and is not in {base}")
    return names


def link_or_copy(source: Path, target: Path) -> None:
    """Large files are linked where the file system can."""
    real = source.resolve()  # hub caches keep symbolic links to blobs
    if real.suffix == ".safetensors" or real.stat().st_size > 1 << 20:
        with contextlib.suppress(OSError):
            os.link(real, target)
            return
    shutil.copyfile(real, target)


def _save_tensors(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    # Copies, because layers may share a tensor or be views of one, which safetensors refuses.
    tensors = {n: t.detach().cpu().clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}
    save_file(tensors, directory / ROUTERS_FILE, metadata={"format": "pt"})
    (directory / ROUTERS_FILE).chmod(0o644)  # safetensors leaves 0600: nobody else could serve the checkpoint


def write_mod_config(directory: str | Path, config: ModConfig) -> None:
    """Replace what a full checkpoint or a router-only directory says of its routing; never half-written."""
    directory = Path(directory)
    alone = directory / ROUTER_CONFIG_FILE
    if alone.is_file():
        replace_json(alone, config.to_dict())
    else:
        path = directory / "config.json"
        replace_json(path, read_json(path) | {"mod_config": config.to_dict()})


def replace_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON file in one step. An old file of that name keeps its content where it is linked elsewhere."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        _write_json(temporary, data)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error}; it is as it was") from error
    finally:
        temporary.unlink(missing_ok=True)


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _atomic_directory(output: Path) -> Iterator[Path]:
    """A temporary directory beside `output` that takes its name when the block ends well, and vanishes otherwise."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"{output}: exists already; choose another output or remove it")
    temporary = None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".tmp", dir=output.parent))
        temporary.chmod(0o755)
        yield temporary
        os.replace(temporary, output)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{output}: cannot be written: {error}; nothing was left behind") from error
    finally:
        if temporary:
            shutil.rmtree(temporary, ignore_errors=True)
