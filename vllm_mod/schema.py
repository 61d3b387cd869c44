"""Strict JSON objects, and the one kind of error a user sees."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

if TYPE_CHECKING:
    from typing_extensions import Self  # typing has it from Python 3.11 on


class ConfigError(ValueError):
    """A setting or file the user can mend; the message is one line and says how."""


class Strict(BaseModel):
    """An object whose unknown keys and wrong types are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @classmethod
    def parse(cls, data: Any, where: str) -> Self:
        """Validate `data`; raises ConfigError that names the key and what is allowed."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            allowed = ", ".join(cls.model_fields)
            raise ConfigError(f"{_one_line(error, where)}. Known keys: {allowed}.") from None


def _one_line(error: ValidationError, where: str) -> str:
    problems = []
    for e in error.errors():
        key = ".".join(str(k) for k in e["loc"])
        if not key:
            problems.append(e["msg"].removeprefix("Value error, "))
        elif e["type"] == "extra_forbidden":
            problems.append(f"unknown key '{key}'")
        elif e["type"] == "missing":
            problems.append(f"key '{key}' is required")
        else:
            problems.append(f"key '{key}': {e['msg'].removeprefix('Value error, ')} (got {e['input']!r})")
    return f"{where}: " + "; ".join(problems)
