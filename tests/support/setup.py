"""Set-ups by `requirements/install.py` on a pip, uv and venv that only write down what they are asked for."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PYTHON = os.path.realpath(sys.executable)  # starts faster than that of an environment with many packages
TORCH = "2.13.0+cpu"
CALLS = 4  # of pip, in a set-up from the lock


def make(*words: str, root: Path = ROOT, **env: str) -> list[str]:
    """What `make` prints, as from a shell: a `make test VLLM=...` that runs us hands its own variables down."""
    outer = {"MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES", "MAKELEVEL", "VLLM", "ARGS", "VENV", "PYTHON"}
    inherited = {name: value for name, value in os.environ.items() if name not in outer}
    command = ["make", "--no-print-directory", *words]
    done = subprocess.run(command, cwd=root, env=inherited | env, check=True, capture_output=True, text=True)
    return [line.rstrip() for line in done.stdout.splitlines()]


#: Stands for pip and uv. `faults` says what it lacks and at which of its calls something happens to the set-up.
FAKE = """
import json, os, re, signal, sys, tomllib
from pathlib import Path

prefix, faults = Path(sys.executable).parents[1], json.loads(os.environ["FAULTS"])
log = Path(os.environ["CALLS"])
words = [w for w in sys.argv[1:] if w != "--quiet"]
with log.open("a") as file:
    file.write(json.dumps([TOOL, *words]) + "\\n")
call = len(log.read_text().splitlines())
if call == faults.get("kill"):
    os.kill(os.getppid(), signal.SIGKILL)
if call == faults.get("block"):
    print("blocked", flush=True)
    open(os.environ["FIFO"]).read()
if call == faults.get("fail"):
    sys.exit("there is no more room on this disk")
store = prefix / "installed.json"
installed = json.loads(store.read_text()) if store.exists() else {}
if words[0] == "uninstall":
    installed.pop(words[-1])
    words = []
if TOOL == "uv":
    if "uv" not in installed:
        sys.exit("No module named uv")
    words = words[words.index("--torch-backend=cpu"):]
specs = [w for w in words[1:] if not w.startswith("-") and Path(w).name != "lock.txt"]
if "-r" in words:
    specs += Path(words[words.index("-r") + 1]).read_text().split()
for spec in specs:
    if f"{TOOL} {spec}" in faults.get("lacks", []):
        sys.exit(f"no matching distribution for {spec}")
    if Path(spec).is_dir():
        project = tomllib.loads((Path(spec) / "pyproject.toml").read_text())["project"]
        spec = "==".join((project["name"], project["version"]))
    name, _, version = spec.partition("==")
    installed[name.partition("[")[0].rpartition("/")[2]] = version
    if name == "torch" and "+" not in version and "--no-deps" not in words:
        installed["cuda-libraries"] = ""
store.with_suffix(".new").write_text(json.dumps(installed))
store.with_suffix(".new").replace(store)  # as pip: never into a file that is there
"""
FAKE_VENV = """
import json, os, sys
from pathlib import Path

if json.loads(os.environ["FAULTS"]).get("fail") == 0:
    sys.exit("there is no more room on this disk")

binaries = Path(sys.argv[-1]) / "bin"
binaries.mkdir()
(binaries / "python").symlink_to(sys.executable)
"""


@dataclass(frozen=True)
class Project:
    """A copy of what a set-up reads, in a path with a space."""

    root: Path
    tmp: Path
    started: list["subprocess.Popen[str]"] = field(default_factory=list)

    @property
    def venv(self) -> Path:
        return self.root / ".venv"

    def start(self, *arguments: str, venv: str = ".venv", **faults: Any) -> "subprocess.Popen[str]":
        env = {
            "PYTHONPATH": str(self.tmp / "fakes"),
            "CALLS": str(self.tmp / "calls"),
            "FIFO": str(self.tmp / "fifo"),
            "FAULTS": json.dumps(faults),
        }
        process = subprocess.Popen(
            [PYTHON, "requirements/install.py", "--venv", venv, *arguments],
            cwd=self.root, env=os.environ | env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in a shell's background job
        )  # fmt: skip
        self.started.append(process)
        return process

    def setup(self, *arguments: str, venv: str = ".venv", **faults: Any) -> tuple[int, str, str]:
        """Status, stdout and stderr of one set-up."""
        (self.tmp / "calls").unlink(missing_ok=True)
        process = self.start(*arguments, venv=venv, **faults)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def calls(self) -> list[list[str]]:
        log = self.tmp / "calls"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    def installed(self, venv: str = ".venv") -> dict[str, str]:
        return json.loads((self.root / venv / "installed.json").read_text())

    def state(self) -> dict[str, str]:
        """All of the environment, and whatever lies beside it: path -> content."""
        found = (path for path in self.root.rglob("*") if path.is_file())
        return {str(path.relative_to(self.root)): path.read_text() for path in found if path.name != "python"}


def pins_of(name: str) -> dict[str, str]:
    """Of a file in `requirements`."""
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def lock() -> dict[str, str]:
    return pins_of("cpu.txt")
