"""A project that can be set up, in a path with a space."""

import contextlib
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.setup import FAKE, FAKE_VENV, ROOT, Project


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
