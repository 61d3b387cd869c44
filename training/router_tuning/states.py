"""States of a run, `checkpoint-N` in the run directory: each is there whole or not at all.

A state is written under a temporary name. When every process has written its part, `state.json` is added, which lists
the files with their sizes and checksums, and the directory gets its name. Before a run goes on from a state, it is
checked against that list: one that was copied in part, or emptied by a power cut, is never taken for whole.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_mod.config import ConfigError

#: Where states are written until they are whole, in the run directory.
TEMPORARY = ".writing"
LIST_FILE = "state.json"
#: What the checkpoint is made of, at the end.
FINAL = "final"
_NAME = re.compile(r"checkpoint-(\d+)")  # transformers' name


def path_of(run_dir: str | Path, step: int) -> Path:
    return Path(run_dir) / f"checkpoint-{step}"


def is_ours(name: str) -> bool:
    """Whether a run directory may have something of that name."""
    return name in (TEMPORARY, FINAL) or _NAME.fullmatch(name) is not None


def step_of(state: Path) -> int:
    found = _NAME.fullmatch(state.name)
    assert found
    return int(found[1])


def found_in(run_dir: Path) -> list[Path]:
    """What is named like a state, whole or not, the newest last. Raises ConfigError where that cannot be read."""
    try:
        there = [path for path in run_dir.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigError(f"{run_dir}: cannot be read: {error.strerror}; choose another --run-dir") from None
    return sorted(there, key=step_of)


def newest_whole(run_dir: Path) -> tuple[Path | None, list[str]]:
    """(the newest whole state, a line about each newer one that is not)."""
    left_out: list[str] = []
    for state in reversed(found_in(run_dir)):
        fault = fault_of(state)
        if fault is None:
            return state, left_out
        left_out.append(f"{state}: not a whole state ({fault})")
    return None, left_out


def fault_of(state: Path) -> str | None:
    """What is wrong with a state; None: it is whole."""
    try:
        files = json.loads((state / LIST_FILE).read_text(encoding="utf-8"))["files"]
        for name, listed in files.items():
            if [(state / name).stat().st_size, _checksum(state / name)] != listed:
                return f"{name} is not what was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        return f"{LIST_FILE} cannot be read: {error}"
    return None


def processes_of(state: Path) -> int:
    """How many processes wrote it."""
    return int(json.loads((state / LIST_FILE).read_text(encoding="utf-8"))["processes"])


def publish(temporary: Path, state: Path, processes: int) -> None:
    """Give a state that all processes have written its list and its name, in place of one that has it already."""
    files = sorted(path for path in temporary.rglob("*") if path.is_file())
    listed = {str(f.relative_to(temporary)): [f.stat().st_size, _checksum(f)] for f in files}
    text = json.dumps({"processes": processes, "files": listed}, indent=2) + "\n"
    (temporary / LIST_FILE).write_text(text, encoding="utf-8")
    if state.exists():
        os.replace(state, temporary.with_name(f"{state.name}.old"))  # goes with the temporary directory
    os.replace(temporary, state)


def prune(run_dir: Path, newest: int, limit: int | None) -> None:
    """After state `newest` was written: keep `limit` states (None, 0: all), and none of a later step.

    A later one was not whole when this run began, or it would have begun from there.
    """
    there = found_in(run_dir)
    kept = [state for state in there if step_of(state) <= newest]
    for state in there:
        if state not in kept or (limit and state not in kept[-limit:]):
            shutil.rmtree(state, ignore_errors=True)


def clear(run_dir: Path) -> None:
    """Remove the states of a run that has ended well, and the directory if nothing else is in it."""
    for path in [*found_in(run_dir), run_dir / TEMPORARY, run_dir / FINAL]:
        shutil.rmtree(path, ignore_errors=True)
    remove_if_empty(run_dir)


def remove_if_empty(directory: Path) -> None:
    try:
        directory.rmdir()
    except OSError:
        return  # a report's logs are there, or it never was


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Settings that a state was written with and that are others now, as `--flag was 1, is 2`."""
    return [
        f"--{name.replace('_', '-')} was {before.get(name)}, is {now.get(name)}"
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    ]


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            value = zlib.crc32(part, value)
    return value
