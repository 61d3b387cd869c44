"""Every file of examples/ does what it says, in the order in which a newcomer would run them."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tasks import task_data
from vllm_mod.calibration import read_calibration
from vllm_mod.checkpoint import read_mod_config

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
SETTINGS = {
    "MODEL": str(ROOT / "demo/model"),
    "DATA": str(ROOT / "demo/data.jsonl.gz"),
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
}
#: Seconds instead of minutes.
SHORT = ["--max-train-samples", "128", "--max-length", "64"]


def run(*command: str | Path, directory: Path, **env: str) -> str:
    """stdout of an example, run in `directory` on the checkpoint there."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [str(word) for word in command],
        cwd=directory,
        env=os.environ | SETTINGS | {"PATH": path, "CKPT": str(directory / "checkpoint")} | env,
        text=True, capture_output=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("examples")
    assert "attn_sequence" in run(EXAMPLES / "train.sh", *SHORT, directory=directory)
    return directory


@pytest.fixture
def directory(trained: Path, tmp_path: Path) -> Path:
    """With a checkpoint of its own: calibrate rewrites it."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_calibrate(directory):
    said = run(EXAMPLES / "calibrate.sh", "--max-length", "64", directory=directory)
    assert "0.6" in said
    record = read_calibration(directory / "checkpoint", read_mod_config(directory / "checkpoint"))
    assert record is not None and record.target_capacity == 0.6 and record.kept == pytest.approx(0.6, abs=0.1)


def test_export(directory):
    run(EXAMPLES / "export.sh", "--max-samples", "8", "--max-length", "64", directory=directory)
    assert read_mod_config(directory / "checkpoint-joined") == read_mod_config(directory / "checkpoint")
    static = read_mod_config(directory / "checkpoint-static")
    assert (static.granularity, len(static.layers)) == ("attn_static", 2)


def test_serve(directory):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    said = run(EXAMPLES / "serve.sh", "--enforce-eager", directory=directory, PORT=port)
    answer = next(line for line in said.splitlines() if line.startswith("{"))
    answer, _ = json.JSONDecoder().raw_decode(answer)  # /metrics begins on the same line
    assert answer["choices"][0]["message"]["content"]
    assert "vllm:mod_routed_total" in said
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", int(port))) != 0  # it is stopped


def test_generate(directory):
    said = run(sys.executable, EXAMPLES / "generate.py", directory / "checkpoint", directory=directory)
    assert "'Once upon a time' -> '" in said
    assert sum(line.startswith("vllm:mod_routed layer") for line in said.splitlines()) == 4


def test_lm_eval(directory):
    """Inside a directory that holds the task's data where the hub would."""
    data = task_data(directory / "data")
    said = run(EXAMPLES / "lm_eval.sh", "--limit", "4", directory=data, CKPT=str(directory / "checkpoint"))
    assert "|boolq" in said.replace(" ", "")


def test_vllm_serves_the_checkpoint_of_a_dry_run(directory):
    model, data = SETTINGS["MODEL"], SETTINGS["DATA"]
    run("router-tuning", "train", "--model", model, "--data", data, "--output", "new", *SHORT, "--dry-run",
        directory=directory)  # fmt: skip
    said = run(sys.executable, EXAMPLES / "generate.py", directory / "new.dry-run", directory=directory)
    counts = [line.split() for line in said.splitlines() if line.startswith("vllm:mod_")]
    kept, routed = ({c[2]: float(c[3]) for c in counts if c[0] == f"vllm:mod_{what}"} for what in ("kept", "routed"))
    assert kept == routed and len(kept) == 4 and all(kept.values())


def test_all_of_them_are_run_and_short():
    here = Path(__file__).read_text()
    for path in EXAMPLES.iterdir():
        if path.name != "README.md":
            assert f'"{path.name}"' in here
            assert f"[{path.name}]" in (EXAMPLES / "README.md").read_text()
            assert len(path.read_text().splitlines()) <= 15
