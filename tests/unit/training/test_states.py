"""States: whole or not at all, whatever happens while they are written, and never taken for whole when they are not."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path

import pytest
import torch

from router_tuning import states
from router_tuning.trainer import RouterTrainer
from tests.unit.training.test_trainer import interrupt_after_step, one_error, routers_of, train
from vllm_mod.config import ConfigError


def write_state(run_dir: Path, step: int, processes: int = 1) -> Path:
    temporary = run_dir / states.TEMPORARY / f"checkpoint-{step}"
    (temporary / "deep").mkdir(parents=True)
    (temporary / "a.pt").write_text(f"a{step}")
    (temporary / "deep/b.json").write_text("[]")
    states.publish(temporary, states.path_of(run_dir, step), processes)
    return states.path_of(run_dir, step)


def test_the_newest_whole_state_is_found(tmp_path):
    assert states.newest_whole(tmp_path / "none") == (None, [])
    three, ten = write_state(tmp_path, 3), write_state(tmp_path, 10)
    (tmp_path / "checkpoint-x").mkdir()
    (tmp_path / "checkpoint-99").write_text("no directory")
    assert states.newest_whole(tmp_path) == (ten, []) and states.processes_of(ten) == 1
    (tmp_path / "checkpoint-12").mkdir()
    state, left_out = states.newest_whole(tmp_path)
    assert state == ten and left_out == [f"{tmp_path}/checkpoint-12: not a whole state (state.json is missing)"]
    for damage, fault in (
        (lambda: (ten / "a.pt").write_text("a1"), "a.pt is not what was written"),
        (lambda: (ten / "a.pt").write_text("b10"), "a.pt is not what was written"),  # as long as before
        (lambda: (ten / "deep/b.json").write_text(""), "deep/b.json is not what was written"),
        (lambda: (ten / "a.pt").unlink(), "a.pt is missing"),
        (lambda: (ten / "state.json").write_text(""), "state.json cannot be read"),
        (lambda: (ten / "state.json").write_text("[1]"), "state.json cannot be read"),
        (lambda: (ten / "state.json").write_text('{"files": {"a.pt": 3}}'), "a.pt is not what was written"),
    ):
        damage()
        state, left_out = states.newest_whole(tmp_path)
        assert state == three and fault in left_out[1], fault
        shutil.rmtree(ten)
        write_state(tmp_path, 10)


def test_a_state_of_that_step_is_replaced(tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3/torn").write_text("")
    assert sorted(p.name for p in write_state(tmp_path, 3).iterdir()) == ["a.pt", "deep", "state.json"]


@pytest.mark.parametrize(("limit", "left"), [(1, [7]), (2, [6, 7]), (0, [2, 4, 6, 7]), (None, [2, 4, 6, 7])])
def test_old_states_go_and_those_of_a_future_that_was_abandoned(tmp_path, limit, left):
    for step in (2, 4, 6, 7, 9):
        write_state(tmp_path, step)
    states.prune(tmp_path, 7, limit)
    assert [states.step_of(state) for state in states.found_in(tmp_path)] == left


def test_a_setting_that_only_one_of_two_runs_has_is_a_difference():
    assert states.differences({"a": 1, "b": [2]}, {"a": 1, "b": [2]}) == []
    found = states.differences({"a": 1, "b": 2}, {"a": 3, "c_d": 4})
    assert found == ["--a was 1, is 3", "--b was 2, is None", "--c-d was None, is 4"]


def test_what_is_not_ours_stays_when_a_run_is_over(tmp_path):
    write_state(tmp_path, 2)
    (tmp_path / "runs").mkdir()
    states.clear(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    (tmp_path / "runs").rmdir()
    states.clear(tmp_path)
    assert not tmp_path.exists()


# ---------------------------------------------------------------- in a run


@pytest.fixture(scope="module")
def whole(base_dir, data_file, tmp_path_factory) -> Path:
    """A run that nothing happened to."""
    output = tmp_path_factory.mktemp("whole") / "out"
    assert train(base_dir, data_file, output) == 0
    return output


def same(checkpoint: Path, other: Path) -> bool:
    routers, others = routers_of(checkpoint), routers_of(other)
    return all(torch.equal(routers[name], others[name]) for name in routers)


@pytest.fixture
def full_disk(monkeypatch):
    """`full_disk(step, name)`: while the state of that step is written, files stay below 100 bytes from `name` on."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(step: int, method: str) -> None:
        write = getattr(RouterTrainer, method)

        def on_a_full_disk(self, *args, **kwargs):
            if self.state.global_step == step:
                resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
            try:
                return write(self, *args, **kwargs)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)

        monkeypatch.setattr(RouterTrainer, method, on_a_full_disk)

    yield fill
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("method", ["_save", "_save_optimizer_and_scheduler", "_save_checkpoint"])
def test_a_full_disk_costs_one_line_and_no_state(
    base_dir, data_file, tmp_path, capsys, full_disk, monkeypatch, whole, method
):
    run_dir = tmp_path / "out.run"
    full_disk(6, method)
    assert train(base_dir, data_file, tmp_path / "out", "--save-steps", "2") == 2
    line = one_error(capsys)
    assert f"{run_dir}/checkpoint-6: cannot be written: " in line and "states before it are as they were" in line
    assert sorted(path.name for path in run_dir.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    monkeypatch.undo()
    assert train(base_dir, data_file, tmp_path / "out", "--save-steps", "2", "--resume") == 0
    assert same(tmp_path / "out", whole)


@pytest.mark.parametrize("damage", ["empty", "torn", "cut"])
def test_a_run_goes_on_from_the_newest_whole_state(base_dir, data_file, tmp_path, monkeypatch, caplog, whole, damage):
    run_dir = tmp_path / "out.run"
    interrupt_after_step(5, monkeypatch)
    flags = ["--save-steps", "2", "--save-total-limit", "1" if damage == "empty" else "3"]
    assert train(base_dir, data_file, tmp_path / "out", *flags) == 130
    monkeypatch.undo()
    newest = states.found_in(run_dir)[-1]
    begun = run_dir / states.TEMPORARY / "checkpoint-6/torn"  # by a run that was killed
    begun.parent.mkdir(parents=True)
    begun.touch()
    if damage == "empty":
        newest = run_dir / "checkpoint-7"  # of a run that was killed
        newest.mkdir()
    elif damage == "torn":
        (newest / "optimizer.pt").unlink()
    else:
        (newest / "optimizer.pt").write_bytes((newest / "optimizer.pt").read_bytes()[:-1])
    assert train(base_dir, data_file, tmp_path / "out", *flags, "--resume", "--run-dir", str(run_dir)) == 0
    assert f"{newest}: not a whole state" in caplog.text and "going on from" in caplog.text
    left = {path.name for path in run_dir.iterdir()}
    assert left == {"final", "checkpoint-8"} | ({"checkpoint-4", "checkpoint-6"} if damage != "empty" else set())
    assert not any((run_dir / name / "torn").exists() for name in left)
    assert same(tmp_path / "out", whole)


def test_without_a_whole_state_a_run_begins_anew(base_dir, data_file, tmp_path, capsys):
    run_dir = tmp_path / "out.run"
    (run_dir / "checkpoint-7").mkdir(parents=True)
    assert train(base_dir, data_file, tmp_path / "out", "--resume") == 2
    assert f"{run_dir}: no whole state to resume from; start without --resume" in one_error(capsys)
    assert train(base_dir, data_file, tmp_path / "out") == 0
    assert not run_dir.exists()


def test_a_run_whose_end_failed_resumes_at_its_end(base_dir, data_file, tmp_path, monkeypatch, capsys):
    """The last step is not taken twice, and its routers are those of the average."""
    flags = ["--max-steps", "5"]

    def fail(*_, **__):
        raise ConfigError("no room")

    monkeypatch.setattr("router_tuning.run.write_checkpoint", fail)
    assert train(base_dir, data_file, tmp_path / "out", *flags) == 2
    monkeypatch.undo()
    assert train(base_dir, data_file, tmp_path / "out", *flags, "--resume") == 0
    assert train(base_dir, data_file, tmp_path / "whole", *flags) == 0
    logs = [json.loads((tmp_path / n / "trainer_log.json").read_text()) for n in ("whole", "out")]
    assert len(logs[1]["steps"]) == 5 and logs[0]["steps"] == logs[1]["steps"]
    assert logs[0]["held_out"] == logs[1]["held_out"] and same(tmp_path / "out", tmp_path / "whole")


def test_a_run_goes_on_as_it_began(base_dir, data_file, tmp_path, monkeypatch, capsys):
    """Optimizer and schedule come from the state: another learning rate would have no effect."""
    interrupt_after_step(3, monkeypatch)
    assert train(base_dir, data_file, tmp_path / "out") == 130
    monkeypatch.undo()
    capsys.readouterr()
    other = tmp_path / "other.jsonl"
    other.write_text("".join(data_file.read_text().splitlines(keepends=True)[::-1]))
    for data, argv, change in (
        (data_file, ["--learning-rate", "0.5"], "--learning-rate was 0.0078125, is 0.5"),
        (data_file, ["--seed", "1"], "--seed was 42, is 1"),
        (data_file, ["--target-capacity", "0.7"], "--target-capacity was 0.5, is 0.7"),
        (data_file, ["--layers", "1-3"], "--layers was [1, 2], is [1, 2, 3]"),
        (data_file, ["--per-device-train-batch-size", "4"], "--per-device-train-batch-size was 8, is 4"),
        (data_file, ["--lora-r", "2"], "--lora-r was 0, is 2"),
        (other, [], "--data was 64 samples, checksum"),
    ):
        assert train(base_dir, data, tmp_path / "out", *argv, "--resume") == 2
        line = one_error(capsys)
        assert ": a run goes on as it began: " in line and change in line
    free = [
        "--logging-steps",
        "1",
        "--save-total-limit",
        "1",
        "--per-device-eval-batch-size",
        "2",
        "--ignore-data-skip",
    ]
    assert train(base_dir, data_file, tmp_path / "out", *free, "--resume") == 0
    steps = json.loads((tmp_path / "out/trainer_log.json").read_text())["steps"]
    assert [s["step"] for s in steps] == list(range(1, 9))


def test_transformers_calls_what_is_overridden():
    """Private methods of Trainer that states depend on; without them it would write states in place."""
    from transformers import Trainer

    for name in ("_save_checkpoint", "_get_output_dir", "_save", "_load_from_checkpoint", "_run_epoch"):
        assert callable(getattr(Trainer, name)) and name in vars(RouterTrainer)
