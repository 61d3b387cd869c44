"""Files about the project say what the project does: hooks and workflows call what the Makefile has."""

import re
from pathlib import Path
from typing import Any

import pytest
import tomllib
import yaml

from tests.conftest import LONG
from tests.support.setup import make

ROOT = Path(__file__).parents[2]


def commands(target: str) -> list[str]:
    """What `make target` runs after the set-up."""
    lines = make("--dry-run", "PYTHON=python3", *target.split())
    return [line for line in lines if "requirements/install.py" not in line]


def test_hooks_are_what_make_lint_runs():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook["entry"] for repo in config["repos"] for hook in repo["hooks"]]
    assert hooks == [line.removesuffix(" .") for line in commands("lint")]


def workflow() -> dict[str, Any]:
    return yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]


def make_targets() -> set[str]:
    """Of the workflow, the matrix put in."""
    found = set()
    for job in workflow().values():
        rows = job.get("strategy", {}).get("matrix", {}).get("include", [{}])
        for step in job["steps"]:
            if "run" in step:
                for row in rows:
                    found.add(re.sub(r"\$\{\{ matrix\.(\w+) }}", lambda m, row=row: row[m[1]], step["run"]))
    return found


@pytest.mark.parametrize("command", sorted(make_targets()))
def test_the_workflow_calls_make_targets_that_exist(command):
    make, target = command.split(maxsplit=1)
    assert make == "make"
    assert commands(target)


def test_the_workflow_runs_all_that_the_merge_gate_runs():
    *gate, oldest = [line for line in (ROOT / ".ci/run").read_text().splitlines() if line.startswith("make ")]
    assert gate == ["make lint", "make test", "make test-slow"]
    target, _, tests = oldest.partition(" ARGS=")
    assert {*gate, target} <= {target.removesuffix(" PYTHON=python") for target in make_targets()}
    assert all((ROOT / path).exists() for path in tests.strip("'").split())  # a part of what runs each night


def test_modules_that_start_first_exist():
    assert [name for name in LONG if not (ROOT / "tests" / name).is_file()] == []


def test_the_newest_vllm_alone_may_fail():
    rows = workflow()["nightly"]["strategy"]["matrix"]["include"]
    assert [row["target"] for row in rows if row.get("may-fail")] == ["test VLLM=newest"]


def test_the_changelog_begins_with_this_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    first = re.search(r"^## (\S+?)(,.*)?$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert first is not None
    assert first[1] == version.partition(".dev")[0]
    assert (first[2] == ", not released yet") == (".dev" in version)


FOLDERS = (".", "docs", "examples", "demo", "benchmarks", "benchmarks/results/*")
DOCUMENTS = [path for folder in FOLDERS for path in ROOT.glob(f"{folder}/*.md")]


def anchors(document: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_documents_link_to_what_exists(document):
    for target, anchor in re.findall(r"]\(([^)#\s]*)#?([^)\s]*)\)", document.read_text()):
        if "://" not in target:
            path = document.parent / target if target else document
            assert path.exists(), target
            assert not anchor or anchor in anchors(path), f"{target}#{anchor}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_documents_name_tests_that_exist(document):
    """`tests/x.py::test_a`, `::test_b`: the second is of the file before it."""
    file = ""
    for path, name in re.findall(r"`(tests/[\w/]+\.py)?(?:::(\w[\w:]*))?`", document.read_text()):
        file = path or file
        if path or name:
            code = (ROOT / file).read_text()
            for part in filter(None, name.split("::")):
                assert re.search(rf"^ *((async )?def|class) {part}\b|^{part} = ", code, re.MULTILINE), f"{file}::{name}"
