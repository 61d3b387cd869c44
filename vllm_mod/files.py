"""Which files of a directory are its model, and how files are written. No vLLM, no transformers import.

Other files may lie beside a model: its weights in Mistral's own format, an adapter, weights that the index does not
name, code. vLLM and transformers act on such files by their names, each on others, so that one directory would be
several models. What is copied, linked, loaded and fetched is therefore what is listed here, and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from .config import ConfigError

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TEKKEN_FILE = "tekken.json"
ADAPTER_CONFIG_FILE = "adapter_config.json"
#: All of a LoRA adapter's directory, as peft and vLLM read it.
ADAPTER_FILES = (ADAPTER_CONFIG_FILE, "adapter_model.safetensors")
#: What of a model's directory is carried along beside its weights: glob patterns below it.
SIDE_FILES = (
    CONFIG_FILE,
    "generation_config.json",
    # the tokenizer, of any kind
    "tokenizer.json",
    "tokenizer.*.json",  # of single transformers versions, named by the tokenizer's config
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    # quantisation settings that are not in config.json
    "quantize_config.json",
    "quant_config.json",
    "quantization_config.json",
    "hf_quant_config.json",
    # the licence: the card takes its name from one of these
    "README.md",
    "LICENSE*",
    "License*",
    "license*",
    "LICENCE*",
    "NOTICE*",
    "Notice*",
    "USE_POLICY*",
)
#: What makes vLLM read a directory in which Mistral's own format lies, too, as other readers do.
HF_FORMAT_FLAGS = "--config-format hf --load-format hf --tokenizer-mode hf"
#: A checkpoint CKPT asked for an answer in transformers, with its routers.
REFERENCE_COMMAND = (
    'python -c "from transformers import AutoTokenizer; from router_tuning.model import greedy, load_reference; '
    "t = AutoTokenizer.from_pretrained('CKPT'); "
    "print(t.decode(greedy(load_reference('CKPT'), t('The capital of France is').input_ids, 8)[0]))\""
)


# ---------------------------------------------------------------- which files


def side_files(directory: Path) -> list[str]:
    """Config, tokenizer, quantisation settings and licence of a model: names below `directory`, sorted."""
    found = {path for pattern in SIDE_FILES for path in directory.glob(pattern) if path.is_file()}
    names = {path.relative_to(directory).as_posix() for path in found}
    if needs_tekken(directory) and (directory / TEKKEN_FILE).is_file():
        names.add(TEKKEN_FILE)
    return sorted(names)


def needs_tekken(directory: Path) -> bool:
    """Mistral's own tokenizer file is the tokenizer only where there is no other: beside one, transformers prefers it
    and vLLM does not."""
    return not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def weight_map(directory: Path, complete: bool = True) -> dict[str, str]:
    """Tensor name -> file of a model's weights, by the index or else of `model.safetensors`.

    Every name is that of a safetensors file in `directory` itself; raises ConfigError, naming the entry, where it is
    not. complete: every file must be there.
    """
    path = directory / INDEX_FILE
    if not path.is_file():
        if not (directory / WEIGHTS_FILE).is_file():
            raise ConfigError(f"{directory}: no {WEIGHTS_FILE} or {INDEX_FILE}; only safetensors weights are read")
        with open_weights(directory / WEIGHTS_FILE) as file:
            return dict.fromkeys(file.keys(), WEIGHTS_FILE)
    names = read_json(path).get("weight_map")
    if not isinstance(names, dict):
        raise ConfigError(f"{path}: key 'weight_map' is missing")
    for tensor, name in names.items():
        if not _is_shard_name(name):
            raise ConfigError(
                f"{path}: weight_map has {name!r} for {tensor!r}; only the plain name of a safetensors file "
                "in the same directory is followed"
            )
    for name in sorted(set(names.values())):
        _refuse_way_out(directory / name)
        if complete and not (directory / name).is_file():
            raise ConfigError(f"{path}: {name} is listed, and is not in {directory}")
    return names


def _is_shard_name(name: Any) -> bool:
    plain = isinstance(name, str) and name.isprintable() and Path(name).name == name and "\\" not in name
    return plain and name.endswith(".safetensors") and len(name.encode()) < 256


def model_files(directory: Path) -> list[str]:
    """All files of a model: side files, index, and exactly the weight files that the index names."""
    index = [INDEX_FILE] if (directory / INDEX_FILE).is_file() else []
    return sorted({*side_files(directory), *index, *weight_map(directory).values()})


def mistral_files(directory: Path) -> list[str]:
    """Weights in Mistral's own format, in `directory` or below it: vLLM prefers them to those that the index names."""
    found = (path for path in directory.rglob("consolidated*.safetensors") if path.is_file())
    return sorted(path.relative_to(directory).as_posix() for path in found)


def refuse_mistral_files(directory: Path) -> None:
    """Raise ConfigError where vLLM would not read the checkpoint in `directory`, but what lies beside it."""
    if found := mistral_files(directory):
        raise ConfigError(
            f"{directory / found[0]}: vLLM would read this file, in Mistral's own format, instead of the checkpoint; "
            f"remove it and params.json, or serve with {HF_FORMAT_FLAGS}"
        )


def strangers(directory: Path) -> dict[str, str]:
    """Files beside a model that are no part of it, and of which somebody would make another model -> who, and how."""
    found = dict.fromkeys(mistral_files(directory), "vLLM would read it as a model in Mistral's own format")
    if (directory / ADAPTER_CONFIG_FILE).is_file():
        found[ADAPTER_CONFIG_FILE] = "transformers would attach this adapter, vLLM would not"
    if (directory / WEIGHTS_FILE).is_file() and WEIGHTS_FILE not in weight_map(directory, complete=False).values():
        found[WEIGHTS_FILE] = "transformers would read it, vLLM the files that the index names"
    if (directory / TEKKEN_FILE).is_file() and not needs_tekken(directory):
        found[TEKKEN_FILE] = "transformers would take it for the tokenizer, vLLM would not"
    return found


@contextlib.contextmanager
def without_strangers(directory: Path) -> Iterator[Path]:
    """A directory of links to the files of a model, for a reader that would act on others beside them."""
    with tempfile.TemporaryDirectory(prefix="vllm-mod-") as view:
        for name in model_files(directory):
            target = Path(view, name)
            target.parent.mkdir(exist_ok=True)
            if name == INDEX_FILE:
                write_json(target, {"metadata": {}} | read_json(directory / name))  # transformers asks for that key
            else:
                target.symlink_to((directory / name).resolve())
        yield Path(view)


# ---------------------------------------------------------------- reading


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


@contextlib.contextmanager
def open_weights(path: Path) -> Iterator[Any]:
    """safetensors' lazy reader of a file. Raises ConfigError if it is none, or a link out of a hub cache."""
    _refuse_way_out(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path}: not a readable safetensors file: {error}") from None


def _refuse_way_out(path: Path) -> None:
    """Files of a hub snapshot (`models--…/snapshots/COMMIT`) are links to the blobs of the same model, or no links."""
    snapshots = path.parent.resolve().parent
    blobs = snapshots.parent / "blobs"
    if snapshots.name != "snapshots" or not blobs.is_dir() or not path.is_symlink():
        return
    if blobs.resolve() not in path.resolve().parents:
        raise ConfigError(f"{path}: a link out of the hub's cache, to {path.resolve()}; fetch the model again")


# ---------------------------------------------------------------- writing


def link_or_copy(source: Path, target: Path) -> None:
    """Large files are linked where the file system can."""
    real = source.resolve()  # hub caches keep symbolic links to blobs
    target.parent.mkdir(exist_ok=True)
    if real.suffix == ".safetensors" or real.stat().st_size > 1 << 20:
        with contextlib.suppress(OSError):
            os.link(real, target)
            return
    shutil.copyfile(real, target)


def replace_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON file in one step. An old file of that name keeps its content where it is linked elsewhere."""
    with replacing(path) as (temporary,):
        write_json(temporary, data)


@contextlib.contextmanager
def replacing(*paths: Path) -> Iterator[list[Path]]:
    """Files to write to that take the names of `paths`, one right after the other, when the block ends well.

    Raises ConfigError, with all as it was, where they cannot be written.
    """
    temporaries = [path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in paths]
    try:
        yield temporaries
        for temporary in temporaries:
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        for temporary, path in zip(temporaries, paths, strict=True):
            os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        where = paths[0] if len(paths) == 1 else paths[0].parent
        raise ConfigError(f"{where}: cannot be written: {error}; it is as it was") from error
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def atomic_directory(output: Path) -> Iterator[Path]:
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
