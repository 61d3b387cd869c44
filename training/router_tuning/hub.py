"""Where models come from: a directory, or the hub."""

from __future__ import annotations

import functools
import glob
import logging
from pathlib import Path

from vllm_mod.calibration import CALIBRATION_FILE
from vllm_mod.checkpoint import ROUTER_CONFIG_FILE, ROUTERS_FILE, router_files
from vllm_mod.config import ConfigError
from vllm_mod.files import (
    ADAPTER_FILES,
    CONFIG_FILE,
    INDEX_FILE,
    SIDE_FILES,
    TEKKEN_FILE,
    WEIGHTS_FILE,
    needs_tekken,
    strangers,
    weight_map,
)

from . import real_model
from .lora import ADAPTER_DIR
from .patch_record import PATCHES_FILE
from .records import ROUTER_RECORDS

log = logging.getLogger(__name__)


def local_model(name: str, routers: bool = False) -> Path:
    """The directory of a model: `name` itself, one of `real_model.MODELS`, or a snapshot from the hub.

    A snapshot holds the model's files alone: config and index are fetched first, then what the index
    names. routers: no more than these, their adapter and records.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if name in real_model.MODELS and not routers:
        return real_model.fetch(name)
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or path.exists():
        raise ConfigError(f"{name}: no such directory")
    adapter = [f"{ADAPTER_DIR}/{file}" for file in ADAPTER_FILES]
    records = [CALIBRATION_FILE, PATCHES_FILE, *ROUTER_RECORDS]
    small = [CONFIG_FILE, ROUTER_CONFIG_FILE, *records, *adapter] if routers else list(SIDE_FILES)
    snapshot = _fetch(name, [*small, INDEX_FILE])
    if not (snapshot / INDEX_FILE).is_file():
        weights = [WEIGHTS_FILE, *[ROUTERS_FILE] * routers]
    elif routers:
        weights = router_files(snapshot)
    else:
        weights = sorted(set(weight_map(snapshot, complete=False).values()))
    tekken = [TEKKEN_FILE] if not routers and needs_tekken(snapshot) else []
    return _fetch(name, [*map(glob.escape, weights), *tekken], snapshot.name)


def _fetch(name: str, patterns: list[str], revision: str | None = None) -> Path:
    """A snapshot of a hub model that holds what matches, of the commit `revision` (None: the newest)."""
    from huggingface_hub import snapshot_download

    try:
        # `*` of a pattern matches folders, too: `original/tokenizer.model` belongs to another format
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*.model"]))
    except Exception as error:  # no network, no such repository, no access: all the same to the user
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"{name}: neither a local directory nor a model the hub gives: {reason}") from None


@functools.cache
def warn_of_strangers(directory: Path) -> None:
    """Say once what lies in a model's directory and is left out, since somebody would make another model of it."""
    for name, why in strangers(directory).items():
        log.warning("%s is left out: %s", directory / name, why)
