"""Ctrl-C at any moment leaves nothing broken, and a way to go on where there was something to lose."""

from __future__ import annotations

import multiprocessing
import os
import pkgutil
import signal
from pathlib import Path

import pytest
import torch
from transformers import TrainerControl

from router_tuning import card, interrupt, states
from router_tuning.model import load_reference
from router_tuning.trainer import RouterTrainer
from tests.unit.training.test_trainer import routers_of, train


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_a_second_one_stops_at_once_but_not_the_launchers_copy_of_the_first(monkeypatch, capfd):
    clock = [100.0]
    monkeypatch.setattr(interrupt.time, "monotonic", lambda: clock[0])
    stop = interrupt.StopOnInterrupt()
    before = signal.getsignal(signal.SIGINT)
    with stop.installed():
        for moment in (100.0, 100.2, 100.9):
            clock[0] = moment
            ctrl_c()
        assert stop.interrupted
        clock[0] = 101.5
        with pytest.raises(KeyboardInterrupt):
            ctrl_c()
    assert signal.getsignal(signal.SIGINT) is before
    assert capfd.readouterr().err.count("Ctrl-C once more") == 1


def test_it_asks_the_trainer_to_save_and_stop():
    stop, control = interrupt.StopOnInterrupt(), TrainerControl()
    arguments = type("Arguments", (), {"device": torch.device("cpu")})
    stop.on_step_end(arguments, None, control)
    assert not control.should_save
    stop.interrupted = True
    stop.on_step_end(arguments, None, control)
    assert control.should_save and control.should_training_stop


def test_what_belongs_together_is_written_before_it_takes_effect():
    done = []

    def write():
        with interrupt.deferred():
            ctrl_c()
            done.append(True)
        done.append(False)

    with pytest.raises(KeyboardInterrupt):
        write()
    with interrupt.ignored():
        ctrl_c()
    assert done == [True]


def before(name: str):
    """A patch that presses Ctrl-C when something is called, first."""

    def pressed(inner):
        def call(*args, **kwargs):
            ctrl_c()
            return inner(*args, **kwargs)

        return call

    return name, pressed


def after(name: str):
    def pressed(inner):
        def call(*args, **kwargs):
            result = inner(*args, **kwargs)
            ctrl_c()
            return result

        return call

    return name, pressed


MOMENTS = {
    "reading": before("router_tuning.run.read_sources"),
    "tokenizing": after("router_tuning.run.tokenize"),
    "loading": before("router_tuning.run.load_base"),
    "set-up": after("router_tuning.trainer.TailAverage"),
    "evaluation": before("router_tuning.trainer.RouterTrainer.measure"),
    "gathering": after("router_tuning.trainer.RouterTrainer.final_routers"),
    "writing": after("vllm_mod.checkpoint._save_tensors"),
    "drawing": before("router_tuning.run.plot_training"),
    "card": before("router_tuning.card.render"),
    "clearing up": before("router_tuning.states.clear"),
}
DONE = ("drawing", "card", "clearing up")


@pytest.fixture(scope="module")
def whole(base_dir, data_file, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "out"
    assert train(base_dir, data_file, output, "--max-steps", "2") == 0
    return output


@pytest.mark.parametrize("moment", MOMENTS)
def test_at_any_moment(base_dir, data_file, tmp_path, monkeypatch, capsys, whole, moment):
    target, pressed = MOMENTS[moment]
    monkeypatch.setattr(target, pressed(pkgutil.resolve_name(target)))
    out, flags = tmp_path / "out", ["--max-steps", "2"]
    code = train(base_dir, data_file, out, *flags)
    monkeypatch.undo()
    error = capsys.readouterr().err
    left = {path.name for path in tmp_path.iterdir()}
    if moment in DONE:
        assert code == 0 and "out" in left
    else:
        assert code == 130 and left <= {"out.run"} and "Traceback" not in error and "interrupted" in error
        assert ("--resume" in error) == ("out.run" in left) == (moment in ("evaluation", "gathering", "writing"))
        more = ["--resume"] if "out.run" in left else []
        assert train(base_dir, data_file, out, *flags, *more) == 0
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert all(torch.equal(w, routers_of(out)[name]) for name, w in routers_of(whole).items())
    assert (out / card.CARD_FILE).is_file() and load_reference(out)


def test_while_a_state_is_written(base_dir, data_file, tmp_path, monkeypatch, whole):
    """The second one, which stops at once: what was begun is gone, the state before is whole."""
    monkeypatch.setattr(interrupt, "SAME_SECONDS", -1.0)
    save = RouterTrainer._save_rng_state

    def twice(self, directory):
        if self.state.global_step == 2:
            ctrl_c()
            ctrl_c()
        save(self, directory)

    monkeypatch.setattr(RouterTrainer, "_save_rng_state", twice)
    assert train(base_dir, data_file, tmp_path / "out", "--max-steps", "2") == 130
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "out.run").iterdir()] == ["checkpoint-1"]
    assert train(base_dir, data_file, tmp_path / "out", "--max-steps", "2", "--resume") == 0
    assert all(torch.equal(w, routers_of(tmp_path / "out")[name]) for name, w in routers_of(whole).items())


def test_data_loading_processes_leave_it_to_the_one_in_charge(base_dir, data_file, tmp_path, monkeypatch):
    """A terminal sends Ctrl-C to all of them; one that dies would take the run with it."""
    after_step = RouterTrainer.after_step

    def interrupt_all(self):
        after_step(self)
        if self.state.global_step == 1:
            workers = multiprocessing.active_children()
            assert workers
            for process in workers:
                os.kill(process.pid, signal.SIGINT)
            ctrl_c()

    monkeypatch.setattr(RouterTrainer, "after_step", interrupt_all)
    flags = ["--dataloader-num-workers", "1", "--dataloader-multiprocessing-context", "spawn"]
    assert train(base_dir, data_file, tmp_path / "out", *flags) == 130
    assert states.newest_whole(tmp_path / "out.run")[0] == tmp_path / "out.run/checkpoint-2"
