"""Where rows come from: local files, directories of them, data sets on the hub; and their way into our own forms."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tqdm import tqdm

from vllm_mod.config import ConfigError

from .converters import NAMES, converter_of
from .files import SUFFIXES, arrow_rows, read_directory, read_file
from .values import Unusable, first_line

log = logging.getLogger(__name__)

RECIPE_SUFFIXES = (".yaml", ".yml")


class Table(list[dict[str, Any]]):
    """Rows of one file or hub data set, in its order, and how much of them is taken (see `data.split_tail`)."""

    #: how often every row is taken; a fraction of the rows below 1
    portion: float = 1.0
    #: or how many rows
    samples: int | None = None
    #: fields that say something and are not read -> number of rows
    not_read: Mapping[str, int] = MappingProxyType({})


def read_source(name: str, converter: str = "auto", file: str | None = None) -> dict[str, Table]:
    """Table name -> rows in our own forms. file: of a hub data set that has several.

    Raises ConfigError that names what cannot be read, converted, or is empty.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        tables = read_directory(path)
    elif path.exists():
        tables = {str(path): read_file(path)}
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
    not_read: Counter[str] = Counter()
    table = Table(_convert(row, converter, name, not_read) for row in bar)
    table.not_read = not_read
    unread = [row["unusable"][1] for row in table if row.get("unusable", [""])[0] == "unreadable"]
    if len(unread) == len(rows):
        keys = ", ".join(map(str, rows[0]))
        raise ConfigError(
            f"{name}: no row has what converter {converter!r} reads ({unread[0]}); its first row has the keys: "
            f"{keys or 'none'}; converters: {', '.join(NAMES)}"
        )
    if unread:
        log.warning("%s: %d of %d rows lack what converter %r reads", name, len(unread), len(rows), converter)
    if not_read:
        fields = ", ".join(f"{field} ({number})" for field, number in not_read.items())
        log.warning("%s: fields that are not read (rows that have them): %s", name, fields)
    return table


def _convert(row: dict[str, Any], converter: str, name: str, not_read: Counter[str]) -> dict[str, Any]:
    """A row that cannot be converted stays, as `{"unusable": [kind, reason]}`, and is counted where rows are taken."""
    try:
        how = converter_of(row, converter)
        converted = how.convert(row)
        not_read.update(how.not_read(row))
        return converted
    except Unusable as reason:
        return {"unusable": [reason.kind, reason.reason]}
    except ValueError as error:
        raise ConfigError(f"{name}: a row {error}; say which in a recipe, with `converter`") from None
    except (KeyError, TypeError, AttributeError) as error:
        return {"unusable": ["unreadable", f"no {error}" if isinstance(error, KeyError) else "another structure"]}


def _read_hub(name: str, file: str | None) -> list[dict[str, Any]]:
    from datasets import load_dataset

    try:
        return arrow_rows(load_dataset(name, data_files=file, split="train"))
    except Exception as error:  # anything from the network to a broken script
        raise ConfigError(
            f"{name}: neither a local file nor a readable dataset on the hub: {first_line(error)}"
        ) from None
