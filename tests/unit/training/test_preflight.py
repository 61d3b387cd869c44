"""What is found before a model is loaded."""

from __future__ import annotations

import json
import os
import shutil
import sys
from types import SimpleNamespace

import pytest

from router_tuning import preflight
from router_tuning.arguments import RouterTrainingArguments
from tests.unit.training.test_trainer import one_error, train
from vllm_mod.config import ConfigError


@pytest.fixture(autouse=True)
def no_model(monkeypatch):
    monkeypatch.setattr("router_tuning.run.load_base", lambda *_: pytest.fail("the model was loaded"))


def left(tmp_path) -> list[str]:
    return sorted(path.name for path in tmp_path.iterdir())


def test_a_place_that_cannot_be_written(base_dir, data_file, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    cases = [
        (tmp_path / "file/out", [], "file/out: cannot be written"),
        (tmp_path / ("n" * 300) / "out", [], "out: cannot be written"),
        ("/proc/out", [], "/proc/out: cannot be written"),
        (tmp_path / "out", ["--run-dir", str(tmp_path / "file")], "file: exists, and is no directory"),
        (tmp_path / "out", ["--run-dir", str(tmp_path / "file/run")], "file/run: cannot be written"),
        (tmp_path / "out", ["--run-dir", "/proc/run"], "/proc/run: cannot be written"),
        (tmp_path / "out", ["--run-dir", str(tmp_path / "out")], "--output"),
        (tmp_path / "out", ["--run-dir", str(tmp_path / "out/run")], "choose another"),
        (tmp_path / "run/final", ["--run-dir", str(tmp_path / "run")], "choose another"),
        (tmp_path / "run/checkpoint-7", ["--run-dir", str(tmp_path / "run")], "choose another"),
    ]
    for output, more, message in cases:
        assert train(base_dir, data_file, output, *more) == 2, message
        assert message in one_error(capsys)
    assert left(tmp_path) == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_directory_without_permission(base_dir, data_file, tmp_path, capsys):
    (tmp_path / "closed").mkdir(mode=0o555)
    assert train(base_dir, data_file, tmp_path / "closed/out") == 2
    assert "closed/out: cannot be written" in one_error(capsys)


def test_a_checkpoint_may_lie_beside_its_states(tmp_path):
    preflight.check_directories(str(tmp_path / "run/out"), tmp_path / "run")
    preflight.check_directories(str(tmp_path / "out"), tmp_path / "out.run")
    assert left(tmp_path) == []


def test_a_disk_that_refuses_is_named(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.mkdtemp", full)
    with pytest.raises(ConfigError, match=r"out: cannot be written: .*Read-only file system"):
        preflight.check_directories(str(tmp_path / "out"), tmp_path / "out.run")


def test_reports_that_cannot_be_sent(base_dir, data_file, tmp_path, capsys, monkeypatch):
    for module in ("wandb", "tensorboard", "tensorboardX"):
        monkeypatch.setitem(sys.modules, module, None)
    for name, message in (("wandb", "wandb"), ("tensorboard", "tensorboard"), ("nobody", "nobody is not supported")):
        assert train(base_dir, data_file, tmp_path / "out", "--report-to", name) == 2
        line = one_error(capsys)
        assert f"--report-to {name}: " in line and message in line
    assert left(tmp_path) == []


def test_data_that_is_too_small(base_dir, data_file, tmp_path, capsys):
    one = tmp_path / "one.jsonl"
    one.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    cases = [
        (one, [], "one.jsonl: no usable held-out sample (too few rows"),
        (data_file, ["--eval-fraction", "0"], "--eval-fraction 0: a number above 0 and below 1 is needed"),
        (data_file, ["--eval-fraction", "1"], "--eval-fraction 1: a number above 0 and below 1"),
        (data_file, ["--eval-fraction", "nan"], "--eval-fraction nan: "),
        (data_file, ["--dataloader-drop-last", "--max-train-samples", "7"], "7 samples do not fill one batch"),
    ]
    for data, more, message in cases:
        assert train(base_dir, data, tmp_path / "out", *more) == 2, message
        assert message in one_error(capsys)


def test_a_tokenizer_of_another_model(base_dir, data_file, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(base_dir, other)
    settings = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(settings | {"vocab_size": 20}))
    assert train(other, data_file, tmp_path / "out") == 2
    assert "other: its tokenizer gives token 36, and the model has 20 (vocab_size)" in one_error(capsys)


def test_a_package_that_is_missing(base_dir, data_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert train(base_dir, data_file, tmp_path / "out", "--lora-r", "2") == 2
    line = one_error(capsys)
    assert "peft" in line and 'pip install "vllm-mod[train]"' in line


def test_a_schedule_that_its_flags_do_not_fit(base_dir, data_file, tmp_path, capsys):
    for argv, message in (
        (["--lr-scheduler-type", "warmup_stable_decay"], "--lr-scheduler-type warmup_stable_decay: "),
        (["--lr-scheduler-kwargs", '{"power": 2}'], "--lr-scheduler-type cosine: "),
        (["--lr-scheduler-type", "cosine_with_min_lr"], "--lr-scheduler-type cosine_with_min_lr: "),
        (["--lr-scheduler-type", "step"], "step"),
        (["--lr-scheduler-type", "reduce_lr_on_plateau"], "requires an eval strategy"),
    ):
        assert train(base_dir, data_file, tmp_path / "out", *argv) == 2
        assert message in one_error(capsys)


def test_several_gpus_without_a_launcher_are_refused_with_the_launch_line(base_dir, data_file, tmp_path, capsys):
    """nn.DataParallel would share one routing state among its threads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RouterTrainingArguments, "n_gpu", property(lambda self: 4))
        assert train(base_dir, data_file, tmp_path / "out") == 2
    line = one_error(capsys)
    assert "4 GPUs and one process" in line and "CUDA_VISIBLE_DEVICES=0" in line
    launch = f"accelerate launch --num_processes 4 -m router_tuning train --model {base_dir} --data {data_file} "
    assert launch in line


def test_fp16_on_a_cpu_is_refused(base_dir, data_file, tmp_path, capsys, monkeypatch):
    """accelerate would train in float32 without a word."""
    assert train(base_dir, data_file, tmp_path / "out", "--fp16") == 2
    assert "--fp16 needs a GPU" in one_error(capsys)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert train(base_dir, data_file, tmp_path / "out") == 2
    assert "--fp16 needs a GPU" in one_error(capsys)


def test_one_gpu_or_none_is_fine():
    for number in (0, 1):
        machine = SimpleNamespace(n_gpu=number, mixed_precision="no")
        preflight.check_machine(machine, "router-tuning train")
