"""`--data recipe.yaml`: several sources, how each is read, and how much of it is taken.

sources:
  - data: Open-Orca/SlimOrca      # a hub name, or a file or directory (relative to the recipe)
    converter: slim_orca          # default: known by its keys
    portion: 0.1                  # times its rows, above 1 repeats some; or `samples: 5000`
"""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, field_validator, model_validator

from vllm_mod.config import ConfigError, Strict

from .converters import NAMES
from .sources import Table, looks_local, read_source

#: More often than that, a source would be trained on by heart.
MAX_PORTION = 10.0


class Source(Strict):
    """One entry of `sources`."""

    data: str = Field(min_length=1, description="hub name, or file or directory relative to the recipe")
    converter: str = Field("auto", description="how its rows are read")
    portion: float = Field(1.0, gt=0, le=MAX_PORTION, description="how often each row is taken")
    samples: int | None = Field(None, ge=1, description="or how many rows")
    file: str | None = Field(None, description="one file of a hub data set, or of the directory")

    @field_validator("converter")
    @classmethod
    def _known(cls, converter: str) -> str:
        if converter not in NAMES:
            raise ValueError(f"one of {', '.join(NAMES)} is needed")
        return converter

    @model_validator(mode="after")
    def _one_amount(self) -> Source:
        if self.samples is not None and "portion" in self.model_fields_set:
            raise ValueError("'portion' and 'samples' exclude each other")
        return self


class Recipe(Strict):
    """The file."""

    sources: list[dict[str, Any]] = Field(min_length=1)


def read_recipe(path: Path) -> dict[str, Table]:
    """The tables of all its sources, with their amounts. Everything is checked before anything is read."""
    sources = parse_recipe(path)
    tables: dict[str, Table] = {}
    for source in sources:
        found = read_source(source.data, source.converter, source.file)
        if twice := next((name for name in found if name in tables), None):
            raise ConfigError(f"{path}: {twice} is listed twice")
        _set_amount(source, found, path)
        tables |= found
    return tables


def parse_recipe(path: Path) -> list[Source]:
    """The sources of a recipe, local ones as paths that exist. Raises ConfigError that names file and key."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    sources = []
    for number, entry in enumerate(Recipe.parse(data, str(path)).sources):
        where = f"{path}: sources[{number}]"
        source: Source = Source.parse(entry, where)
        local = path.parent / Path(source.data).expanduser()
        if local.exists():
            local = local / source.file if source.file else local
            if not local.exists():
                raise ConfigError(f"{where}: key 'file': {local}: no such file or directory")
            source = source.model_copy(update={"data": str(local), "file": None})
        elif looks_local(source.data):
            raise ConfigError(f"{where}: key 'data': {local}: no such file or directory")
        sources.append(source)
    return sources


def _set_amount(source: Source, tables: dict[str, Table], path: Path) -> None:
    sizes = [len(rows) for rows in tables.values()]
    if source.samples is None:
        for rows in tables.values():
            rows.portion = source.portion
        return
    if source.samples > sum(sizes):
        raise ConfigError(
            f"{path}: key 'samples': {source.data} has {sum(sizes)} rows, {source.samples} are asked for; "
            "use a `portion` above 1 to repeat rows"
        )
    ends = [round(source.samples * end / sum(sizes)) for end in accumulate(sizes)]
    for rows, end, start in zip(tables.values(), ends, [0, *ends], strict=False):
        rows.samples = end - start
