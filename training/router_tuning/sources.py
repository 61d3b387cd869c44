"""Where rows come from: local files, directories of them, data sets on the hub."""

from __future__ import annotations

import gzip
import json
import logging
import lzma
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vllm_mod.config import ConfigError

from .converters import CONVERTERS

log = logging.getLogger(__name__)

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".json.xz", ".jsonl.xz")
RECIPE_SUFFIXES = (".yaml", ".yml")


class Table(list[dict[str, Any]]):
    """Rows of one file or hub data set, in its order, and how much of them is taken (see `data.split_tail`)."""

    #: how often every row is taken; a fraction of the rows below 1
    portion: float = 1.0
    #: or how many rows
    samples: int | None = None


def read_source(name: str, converter: str = "auto", file: str | None = None) -> dict[str, Table]:
    """Table name -> rows in our own forms. file: of a hub data set that has several.

    Raises ConfigError that names what cannot be read, converted, or is empty.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.name.endswith(SUFFIXES) and f.is_file())
        if not files:
            raise ConfigError(f"{path}: no {', '.join(SUFFIXES)} file in this directory")
        tables = {str(f): _read_file(f) for f in files}
    elif path.exists():
        tables = {str(path): _read_file(path)}
    elif looks_local(name):
        raise ConfigError(f"{path}: no such file or directory")
    else:
        tables = {f"{name}: {file}" if file else name: _read_hub(name, file)}
    for table, rows in tables.items():
        if not rows:
            raise ConfigError(f"{table}: no rows in it")
    return {table: _converted(rows, table, converter) for table, rows in tables.items()}


def looks_local(source: str) -> bool:
    """A hub name is `name` or `owner/name`; anything else was meant as a path."""
    return source.endswith(SUFFIXES + RECIPE_SUFFIXES) or source.startswith((".", "/", "~")) or source.count("/") > 1


def _converted(rows: list[dict[str, Any]], name: str, converter: str) -> Table:
    bar = tqdm(rows, desc=Path(name).name, unit="row", leave=False, disable=len(rows) < 20_000)
    converted = [_convert(row, converter, name) for row in bar]
    if converted.count(None) == len(rows):
        keys = ", ".join(map(str, rows[0]))
        raise ConfigError(
            f"{name}: no row has what converter {converter!r} reads; its first row has the keys: {keys or 'none'}; "
            f"converters: {', '.join(CONVERTERS)}"
        )
    if unread := converted.count(None):
        log.warning("%s: %d of %d rows have not what converter %r reads", name, unread, len(rows), converter)
    return Table(row or {"messages": []} for row in converted)  # counted as a row without an answer


def _convert(row: dict[str, Any], converter: str, name: str) -> dict[str, Any] | None:
    try:
        return CONVERTERS[converter](row)
    except ValueError as error:
        raise ConfigError(f"{name}: a row {error}; say which in a recipe, with `converter`") from None
    except (KeyError, TypeError, AttributeError):
        return None


def _read_hub(name: str, file: str | None) -> list[dict[str, Any]]:
    from datasets import load_dataset

    try:
        return list(load_dataset(name, data_files=file, split="train"))
    except Exception as error:  # anything from the network to a broken script
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{name}: neither a local file nor a readable dataset on the hub: {reason}") from None


def _read_file(path: Path) -> list[dict[str, Any]]:
    opener: Any = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            text = file.read()
    except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    if path.name.removesuffix(path.suffix if path.suffix in (".gz", ".xz") else "").endswith(".json"):
        try:
            rows = json.loads(text) if text.strip() else []
        except json.JSONDecodeError:
            rows = _read_lines(text, path)  # many a .json file holds one object per line
    else:
        rows = _read_lines(text, path)
    if not isinstance(rows, list) or any(not isinstance(row, dict) for row in rows):
        raise ConfigError(f"{path}: a list of JSON objects is needed")
    return rows


def _read_lines(text: str, path: Path) -> list[Any]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ConfigError(f"{path}: line {number} is not JSON: {error.msg}") from None
    return rows
