"""Local data files -> their rows: JSON, JSON lines, CSV, Parquet, Arrow, and what `save_to_disk` writes."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import logging
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vllm_mod.config import ConfigError

from .values import first_line, without_nulls

log = logging.getLogger(__name__)

Rows = list[dict[str, Any]]

_OPENERS: dict[str, Callable[..., Any]] = {"": open, ".gz": gzip.open, ".xz": lzma.open}
_TEXTS = (".json", ".jsonl", ".csv", ".tsv")
SUFFIXES = (*(kind + packed for kind in _TEXTS for packed in _OPENERS), ".parquet", ".arrow")
#: Written beside the data by `datasets` and the hub, for themselves.
_METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


def read_directory(directory: Path) -> dict[str, Rows]:
    """Every data file below it, by path. A data set of `save_to_disk` is one; hidden files and metadata are none.

    Raises ConfigError that names a file that cannot be read, or where there is none.
    """
    passed_over: list[str] = []
    try:
        found = list(_walk(directory, passed_over))
    except OSError as error:
        raise ConfigError(f"{directory}: cannot be read: {error}") from None
    tables = {str(path): read_saved(path) if path.is_dir() else read_file(path) for path in found}
    if passed_over:
        log.info("%s: not data, not read: %s", directory, ", ".join(passed_over))
    if not tables:
        raise ConfigError(f"{directory}: no {', '.join(SUFFIXES)} file in this directory")
    return tables


def _walk(directory: Path, passed_over: list[str]) -> Iterator[Path]:
    """Data files and saved data sets. Directories that are links are not followed: they may lead back."""
    names = {path.name for path in directory.iterdir()}
    if "dataset_dict.json" in names or {"state.json", "dataset_info.json"} <= names:
        yield directory
        return
    for path in sorted(directory.iterdir()):
        if path.is_dir() and not path.is_symlink() and not path.name.startswith("."):
            yield from _walk(path, passed_over)
        elif path.name.endswith(SUFFIXES) and path.name not in _METADATA and not path.name.startswith("."):
            yield path
        elif path.name not in (".git", ".cache"):
            passed_over.append(path.name)


def read_saved(directory: Path) -> Rows:
    """What `datasets.save_to_disk` has written; of several splits `train`, as on the hub."""
    from datasets import DatasetDict, load_from_disk

    try:
        found = load_from_disk(str(directory))
        if isinstance(found, DatasetDict):
            if "train" not in found:
                raise ConfigError(f"{directory}: has the splits {', '.join(found)}; give the folder of one")
            if others := [name for name in found if name != "train"]:
                log.info("%s: not read: split %s", directory, ", ".join(others))
            found = found["train"]
        return arrow_rows(found)
    except ConfigError:
        raise
    except Exception as error:  # files that are not there, or of another version
        raise ConfigError(f"{directory}: cannot be read: {first_line(error)}") from None


def arrow_rows(dataset: Any) -> Rows:
    return [without_nulls(row) for row in dataset]


def read_file(path: Path) -> Rows:
    """The rows of one file, in its order. Raises ConfigError."""
    kind, packed = (Path(path.stem).suffix, path.suffix) if path.suffix in _OPENERS else (path.suffix, "")
    if kind in (".parquet", ".arrow"):
        return _read_arrow(path)
    text = _text_of(path, _OPENERS[packed])
    if kind in (".csv", ".tsv"):
        return _read_csv(text, path, "," if kind == ".csv" else "\t")
    rows = None
    if kind == ".json":
        try:
            rows = json.loads(text) if text.strip() else []
        except (ValueError, RecursionError):
            rows = None  # many a .json file holds one object per line
    if rows is None:
        rows = _read_lines(text, path)
    if not isinstance(rows, list) or any(not isinstance(row, dict) for row in rows):
        raise ConfigError(f"{path}: a list of JSON objects is needed")
    return rows


def _text_of(path: Path, opener: Callable[..., Any]) -> str:
    """Of UTF-8, with or without a byte-order mark."""
    try:
        with opener(path, "rb") as file:
            data: bytes = file.read()
        if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in data[:4]:
            raise ConfigError(f"{path}: cannot be read: it is UTF-16; save it as UTF-8")
        return data.decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError, zlib.error) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None


def _read_lines(text: str, path: Path) -> list[Any]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.lstrip("\ufeff")  # of files put together
        if line.strip():
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                reason = getattr(error, "msg", None) or first_line(error)
                raise ConfigError(f"{path}: line {number} is not JSON: {reason}") from None
    return rows


def _read_csv(text: str, path: Path, delimiter: str) -> Rows:
    """By its first line's names; every value is text."""
    csv.field_size_limit(2**31 - 1)
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    for number, row in enumerate(rows, start=1):
        if None in row:
            raise ConfigError(f"{path}: row {number} has more values than the first line has names")
    return [dict(row) for row in rows]


def _read_arrow(path: Path) -> Rows:
    import pyarrow.parquet
    from datasets import Dataset

    try:
        if path.suffix == ".arrow":
            return arrow_rows(Dataset.from_file(str(path)))
        return arrow_rows(Dataset(pyarrow.parquet.read_table(path, partitioning=None)))
    except Exception as error:  # not what its name says, or of another version
        raise ConfigError(f"{path}: cannot be read: {first_line(error)}") from None
