"""Read, check and write checkpoint directories (safetensors only; no vLLM, no transformers import).

A *full checkpoint* is a base model's files (see `files`) plus `mod_config` in `config.json` and `routers.safetensors`,
which holds routers and patches (see `tensors`). A *router-only* directory is `mod_config.json` +
`routers.safetensors`. Routers that lie among a model's weights, and the reference implementation's router-only
`model.safetensors` (same tensor names), are read as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .architectures import BaseShape, architecture_of
from .config import ConfigError, ModConfig
from .files import (
    ADAPTER_FILES,
    CONFIG_FILE,
    INDEX_FILE,
    WEIGHTS_FILE,
    atomic_directory,
    link_or_copy,
    open_weights,
    read_json,
    replace_json,
    replacing,
    side_files,
    weight_map,
    write_json,
)
from .tensors import Patch, check_routers, is_router_name, named_tensors, patches_of
from .tensors import router_name as router_name

ROUTERS_FILE = "routers.safetensors"
ROUTER_CONFIG_FILE = "mod_config.json"
#: Keys of a base's config that name files which a checkpoint does not hold: code, and weights beside the index.
_NOT_CARRIED = ("auto_map", "transformers_weights")


def is_router_only(directory: Path) -> bool:
    """Whether `mod_config.json` says what a directory routes, and not its `config.json`. ConfigError where both do."""
    if not (directory / ROUTER_CONFIG_FILE).is_file():
        return False
    if (directory / CONFIG_FILE).is_file() and "mod_config" in read_json(directory / CONFIG_FILE):
        raise ConfigError(
            f"{directory}: {CONFIG_FILE} and {ROUTER_CONFIG_FILE} both say what is routed; remove {ROUTER_CONFIG_FILE} "
            "(vLLM reads the other)"
        )
    return True


def read_mod_config(directory: str | Path) -> ModConfig:
    """`mod_config` of a full checkpoint or a router-only directory."""
    directory = Path(directory)
    if is_router_only(directory):
        path = directory / ROUTER_CONFIG_FILE
        return ModConfig.parse(read_json(path), str(path))
    path = directory / CONFIG_FILE
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
    """The file that holds a directory's routers (the directory, if several do), and its router tensors, unchecked."""
    directory = Path(directory)
    tensors: dict[str, Tensor] = {}
    sources: dict[str, Path] = {}
    files = _files_with_tensors(directory)
    for path in files:
        with open_weights(path) as file:
            for name in file.keys():  # noqa: SIM118
                if path.name != ROUTERS_FILE and not is_router_name(name):
                    continue
                if name in tensors:
                    raise ConfigError(
                        f"{directory}: {name} lies in {sources[name].name} and in {path.name}; "
                        "remove one of them, or export again from the base model"
                    )
                tensors[name], sources[name] = file.get_tensor(name), path
    places = set(sources.values()) or {path for path in files if path.name == ROUTERS_FILE}
    return places.pop() if len(places) == 1 else directory, tensors


def router_files(directory: Path) -> list[str]:
    """The files that hold routers by the index of a model, all its files where the index names no router."""
    names = weight_map(directory, complete=False)
    return sorted({file for name, file in names.items() if is_router_name(name)} or set(names.values()))


def _files_with_tensors(directory: Path) -> list[Path]:
    """Where routers may be: the files that vLLM reads of a full checkpoint, or the one of routers alone."""
    routers, index = directory / ROUTERS_FILE, directory / INDEX_FILE
    if routers.is_file() and is_router_only(directory):
        return [routers]
    if not index.is_file():
        return [path for path in (directory / WEIGHTS_FILE, routers) if path.is_file()]
    names = set(weight_map(directory, complete=False).values())
    if routers.is_file() and ROUTERS_FILE not in names:
        raise ConfigError(
            f"{index}: does not list {ROUTERS_FILE}, so vLLM would not read it; export the checkpoint again"
        )
    return [directory / name for name in sorted(names) if (directory / name).is_file()]


def write_routers(
    output: str | Path,
    config: ModConfig,
    routers: Mapping[int, Tensor],
    patches: Mapping[int, Patch] | None = None,
    records: Mapping[str, str] | None = None,
    folders: Mapping[str, Path] | None = None,
) -> Path:
    """Write a router-only directory; it appears whole or not at all. records, folders: see `write_checkpoint`."""
    with atomic_directory(Path(output)) as directory:
        write_json(directory / ROUTER_CONFIG_FILE, config.to_dict())
        _save_tensors(directory / ROUTERS_FILE, named_tensors(routers, patches))
        _write_beside(directory, records, folders)
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

    The weight files that the index names are hard-linked where the file system can, copied elsewhere; of the base's
    other files those of `files.SIDE_FILES` are carried along. `records` (file name -> text) and adapters (`folders`:
    name -> directory) are written beside them. Raises ConfigError on a base model that is not supported or does not
    fit, or when the disk is full.
    """
    base, output = Path(base), Path(output)
    base_config = read_json(base / CONFIG_FILE)
    shape = BaseShape.of(base_config, str(base / CONFIG_FILE))
    architecture = architecture_of(shape.architecture).routed
    tensors = named_tensors(routers, patches)
    check_routers(tensors, config, shape, "routers")
    weights = base_weight_map(base)
    with atomic_directory(output) as directory:
        for name in side_files(base):
            if name != CONFIG_FILE:
                link_or_copy(base / name, directory / name)
        for name in sorted(set(weights.values())):
            _place_weights(base / name, directory / name)
        kept = {key: value for key, value in base_config.items() if key not in _NOT_CARRIED}
        write_json(directory / CONFIG_FILE, kept | {"architectures": [architecture], "mod_config": config.to_dict()})
        if tensors:
            _save_tensors(directory / ROUTERS_FILE, tensors)
            weights |= dict.fromkeys(tensors, ROUTERS_FILE)
        total = sum((directory / name).stat().st_size for name in set(weights.values()))
        write_json(directory / INDEX_FILE, _index(weights, total))
        _write_beside(directory, records, folders)
    return output


def _write_beside(directory: Path, records: Mapping[str, str] | None, folders: Mapping[str, Path] | None) -> None:
    for name, text in (records or {}).items():
        (directory / name).unlink(missing_ok=True)  # it may be a hard link to the base's
        (directory / name).write_text(text, encoding="utf-8")
    for name, folder in (folders or {}).items():
        for part in ADAPTER_FILES:
            link_or_copy(folder / part, directory / name / part)


def base_weight_map(base: Path) -> dict[str, str]:
    """Tensor name -> file of the base's weights, routers of an earlier export left out.

    Raises ConfigError where there are none, or in a file whose name stands for something else in a checkpoint.
    """
    names = {name: file for name, file in weight_map(base).items() if not is_router_name(name)}
    if not names:
        raise ConfigError(f"{base}: holds no weights of a base model")
    for name in sorted(set(names.values())):
        if name == ROUTERS_FILE or name.startswith("consolidated"):
            use = "routers" if name == ROUTERS_FILE else "weights in Mistral's own format"
            raise ConfigError(f"{base / name}: a file of this name is for {use}; rename it, in the index, too")
    return names


def _place_weights(source: Path, target: Path) -> None:
    """Link or copy a weight file of the base; write it anew where routers of an earlier training lie in it, since vLLM
    would read them."""
    with open_weights(source) as file:
        names, metadata = list(file.keys()), file.metadata()
        own = [name for name in names if not is_router_name(name)]
        tensors = {name: file.get_tensor(name) for name in own} if len(own) < len(names) else None
    if tensors is None:
        link_or_copy(source, target)
    else:
        save_file(tensors, target, metadata=metadata)
        target.chmod(0o644)


def _save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    # Copies, because layers may share a tensor or be views of one, which safetensors refuses.
    tensors = {n: t.detach().cpu().clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors leaves 0600: nobody else could serve the checkpoint


def check_replaceable(directory: Path) -> None:
    """Raise ConfigError where `replace_routers` could not: routers lie among the weights of a full checkpoint."""
    path, tensors = load_router_tensors(directory)
    if tensors and path != directory / ROUTERS_FILE and not is_router_only(directory):
        raise ConfigError(f"{path}: holds routers among the base's weights; export the checkpoint from its base again")


def replace_routers(
    directory: str | Path, config: ModConfig, routers: Mapping[int, Tensor], patches: Mapping[int, Patch]
) -> None:
    """Give a full checkpoint or a router-only directory other routers and patches, and a config that has them.

    All is written first, then renamed. Raises ConfigError, with the directory as it was, if they do not fit or the disk
    is full. Call `check_replaceable` before.
    """
    directory, tensors = Path(directory), named_tensors(routers, patches)
    paths = [directory / ROUTERS_FILE]
    if is_router_only(directory):
        with replacing(*paths, directory / ROUTER_CONFIG_FILE) as (weights, settings):
            _save_tensors(weights, tensors)
            write_json(settings, config.to_dict())
        return
    base_config = read_json(directory / CONFIG_FILE)
    check_routers(tensors, config, BaseShape.of(base_config, str(directory / CONFIG_FILE)), "routers")
    names = base_weight_map(directory) | dict.fromkeys(tensors, ROUTERS_FILE)
    with replacing(*paths, directory / INDEX_FILE, directory / CONFIG_FILE) as (weights, index, settings):
        _save_tensors(weights, tensors)
        others = set(names.values()) - {ROUTERS_FILE}
        total = weights.stat().st_size + sum((directory / name).stat().st_size for name in others)
        write_json(index, _index(names, total))
        write_json(settings, base_config | {"mod_config": config.to_dict()})


def _index(names: Mapping[str, str], total_size: int) -> dict[str, Any]:
    """names: tensor -> file."""
    return {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(names.items()))}


def write_mod_config(directory: str | Path, config: ModConfig) -> None:
    """Replace what a full checkpoint or a router-only directory says of its routing; never half-written."""
    directory = Path(directory)
    if is_router_only(directory):
        replace_json(directory / ROUTER_CONFIG_FILE, config.to_dict())
    else:
        path = directory / CONFIG_FILE
        replace_json(path, read_json(path) | {"mod_config": config.to_dict()})
