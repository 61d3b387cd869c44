"""transformers' training flags: none is accepted without its effect."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import pytest
import torch
from transformers import SchedulerType, TrainingArguments
from transformers.utils import logging

from router_tuning import cli
from router_tuning.arguments import RouterTrainingArguments
from router_tuning.cli import main
from router_tuning.preflight import check_schedule
from router_tuning.trainer_flags import NEEDS, OPTIMIZERS, REFUSED
from tests.unit.training.test_parser import TRAIN, parsed, refusal
from tests.unit.training.test_trainer import train

#: Field -> a value that is not its default. One run gets them all; what each must do is asserted below or elsewhere.
TOGETHER: dict[str, list[str]] = {
    "adam_beta1": ["0.8"], "adam_beta2": ["0.98"], "adam_epsilon": ["1e-7"], "average_tokens_across_devices": ["false"],
    "data_seed": ["3"], "dataloader_drop_last": [], "dataloader_in_order": ["false"], "dataloader_num_workers": ["1"],
    "dataloader_multiprocessing_context": ["fork"], "dataloader_persistent_workers": [],
    "dataloader_pin_memory": ["false"],
    "dataloader_prefetch_factor": ["3"], "debug": ["underflow_overflow"], "ddp_broadcast_buffers": ["false"],
    "ddp_bucket_cap_mb": ["10"], "ddp_find_unused_parameters": ["true"], "ddp_static_graph": ["true"],
    "ddp_timeout": ["99"], "disable_tqdm": ["true"], "do_eval": [], "do_train": [], "eval_delay": ["1"],
    "eval_on_start": [],
    "eval_steps": ["3"], "eval_strategy": ["steps"], "gradient_accumulation_steps": ["2"], "gradient_checkpointing": [],
    "gradient_checkpointing_kwargs": ['{"every_n_layers": 2}'], "include_num_input_tokens_seen": [],
    "learning_rate": ["0.01"], "log_level": ["error"], "log_level_replica": ["error"], "log_on_each_node": ["false"],
    "logging_first_step": [], "logging_nan_inf_filter": ["false"], "logging_steps": ["2"], "max_grad_norm": ["1"],
    "max_steps": ["5"], "neftune_noise_alpha": ["5"], "num_train_epochs": ["9"], "optim": ["adamw_torch"],
    "per_device_eval_batch_size": ["3"], "per_device_train_batch_size": ["5"], "save_on_each_node": [],
    "save_steps": ["2"], "save_total_limit": ["3"], "seed": ["7"], "skip_memory_metrics": ["false"],
    "torch_empty_cache_steps": ["2"], "train_sampling_strategy": ["group_by_length"], "use_cpu": [],
    "warmup_steps": ["2"], "weight_decay": ["0.1"],
}  # fmt: skip

#: Field -> where it is tried, or why nothing here can go wrong with it.
ELSEWHERE = {
    "bf16": "test_precision.py",
    "ddp_backend": "test_processes.py runs with gloo; the launcher's choice",
    "fp16": "test_precision.py",
    "full_determinism": "test_full_determinism",
    "ignore_data_skip": "test_states.py",
    "local_rank": "set by old launchers; read by nobody",
    "logging_strategy": "test_strategies_by_epoch",
    "lr_scheduler_kwargs": "test_every_schedule…",
    "lr_scheduler_type": "test_every_schedule…",
    "optim_args": "test_optimizers_other_than_adamw",
    "report_to": "test_preflight.py",
    "run_name": "passed to what --report-to names",
    "save_strategy": "test_strategies_by_epoch",
    "tf32": "a switch of torch, on GPUs alone",
    **dict.fromkeys(
        ("hub_private_repo", "project", "trackio_bucket_id", "trackio_space_id", "trackio_static_space_id"),
        "passed to trackio",
    ),
}


def test_every_flag_of_transformers_is_tried_refused_or_explained():
    """A flag of a new version belongs into one of the three."""
    known = [*TOGETHER, *ELSEWHERE, *REFUSED]
    assert len(known) == len(set(known))
    assert sorted(known) == sorted(f.name for f in fields(TrainingArguments))
    assert set(NEEDS) <= {*TOGETHER, *ELSEWHERE, "resume"}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_refused_flag_names_the_reason_before_any_work(capsys, name):
    value = OTHER.get(name, "true")
    line = refusal(capsys, "train", *TRAIN, f"--{name.replace('_', '-')}", value)
    assert f"--{name.replace('_', '-')} is not for routers: {REFUSED[name]}" in line


#: Where `true` is no value of the flag, or its default.
OTHER = {
    "accelerator_config": "{}",
    "eval_accumulation_steps": "2",
    "eval_do_concat_batches": "false",
    "hub_strategy": "end",
    "include_for_metrics": "loss",
    "label_smoothing_factor": "0.1",
    "liger_kernel_config": "{}",
    "parallelism_config": "x",
}


def test_a_default_may_be_said():
    said = ["--load-best-model-at-end", "false", "--fsdp-config", "x"][:2]
    assert parsed(*said, "--push-to-hub", "false", "--remove-unused-columns", "false")
    assert parsed("--eval-steps=5", "--eval-strategy=steps")[1].eval_steps == 5


@pytest.mark.parametrize("name", sorted(NEEDS))
def test_a_flag_that_would_say_nothing_alone_is_refused(capsys, name):
    values = {
        "ignore_data_skip": "true", "dataloader_persistent_workers": "true",
        "dataloader_multiprocessing_context": "spawn", "gradient_checkpointing_kwargs": "{}",
        "lr_scheduler_kwargs": "{}", "hub_private_repo": "true",
    }  # fmt: skip
    more = {
        "save_steps": ["--save-strategy", "epoch"],
        "logging_steps": ["--logging-strategy", "epoch"],
        "lr_scheduler_kwargs": ["--lr-scheduler-type", "constant"],
    }
    flag = f"--{name.replace('_', '-')}"
    line = refusal(capsys, "train", *TRAIN, flag, values.get(name, "5"), *more.get(name, []))
    assert f"{flag} says nothing here: it needs {NEEDS[name][1]}" in line


@pytest.fixture
def verbosity():
    before = logging.get_verbosity()
    yield
    logging.set_verbosity(before)


@pytest.mark.usefixtures("verbosity")
def test_all_that_is_accepted_works_together(base_dir, data_file, tmp_path):
    argv = [word for name, value in TOGETHER.items() for word in (f"--{name.replace('_', '-')}", *value)]
    run = tmp_path / "run"
    assert train(base_dir, data_file, tmp_path / "out", *argv, "--run-dir", str(run)) == 0
    settings = json.loads((tmp_path / "out/training_args.json").read_text())
    defaults = json.loads(RouterTrainingArguments(use_cpu=False).to_json_string())
    silent = {"dataloader_pin_memory", "disable_tqdm"}  # without a GPU; by the log level
    assert {name for name in TOGETHER if name in settings and settings[name] == defaults[name]} <= silent
    log = json.loads((tmp_path / "out/trainer_log.json").read_text())
    assert [s["step"] for s in log["steps"]] == [1, 2, 3, 4, 5]  # max_steps, not num_train_epochs
    entries = log["log"]
    assert [e["step"] for e in entries if "eval_loss" in e] == [0, 3, 5]  # eval_on_start, eval_steps, the end
    assert [e["step"] for e in entries if "kept" in e] == [1, 2, 4]  # logging_first_step, logging_steps
    rates = {e["step"]: e["learning_rate"] for e in entries if "learning_rate" in e}
    assert rates[1] == 0.0 and rates[2] == 0.005  # warmup_steps, learning_rate
    assert any("train_mem_cpu_alloc_delta" in e for e in entries)  # skip_memory_metrics
    assert all(e["num_input_tokens_seen"] > 0 for e in entries if "kept" in e)
    states = sorted(path.name for path in run.glob("checkpoint-*"))
    assert states == ["checkpoint-2", "checkpoint-4", "checkpoint-5"]  # save_steps and the end, save_total_limit


def test_neftune_is_noise_in_training_and_none_in_evaluation(base_dir, data_file, tmp_path):
    losses = []
    for alpha in ("0.001", "100"):
        out = tmp_path / alpha
        assert train(base_dir, data_file, out, "--max-steps", "1", "--neftune-noise-alpha", alpha) == 0
        log = json.loads((out / "trainer_log.json").read_text())
        losses.append((log["steps"][0]["loss"], log["held_out"]["dense_loss"]))
    assert losses[0][0] != pytest.approx(losses[1][0], rel=1e-3) and losses[0][1] == losses[1][1]


def test_full_determinism(base_dir, data_file, tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # it sets some of the environment: put back afterwards
    for name in (
        "ASCEND_LAUNCH_BLOCKING",
        "HCCL_DETERMINISTIC",
        "FLASH_ATTENTION_DETERMINISTIC",
        "CUDA_LAUNCH_BLOCKING",
    ):
        monkeypatch.setenv(name, "")
    try:
        assert train(base_dir, data_file, tmp_path / "out", "--full-determinism", "--max-steps", "2") == 0
    finally:
        torch.use_deterministic_algorithms(False)


def test_strategies_by_epoch(base_dir, data_file, tmp_path):
    by_epoch = [w for f in ("save", "eval", "logging") for w in (f"--{f}-strategy", "epoch")]
    flags = [*by_epoch, "--num-train-epochs", "2", "--run-dir", str(tmp_path / "run")]
    out = tmp_path / "out"
    config = [*flags, "--max-train-samples", "16"]
    assert train_without_logging_steps(base_dir, data_file, out, *config) == 0
    entries = json.loads((out / "trainer_log.json").read_text())["log"]
    assert [e["step"] for e in entries if "eval_loss" in e] == [2, 4] == [e["step"] for e in entries if "kept" in e]
    assert sorted(p.name for p in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert train_without_logging_steps(base_dir, data_file, tmp_path / "none", "--save-strategy", "no") == 0


def train_without_logging_steps(base, data, output, *more: str) -> int:
    argv = ["--model", str(base), "--data", str(data), "--output", str(output), "--max-length", "32", "--layers", "1-2"]
    return main(["train", *argv, "--per-device-train-batch-size", "8", "--use-cpu", "true", *more])


SCHEDULES: list[tuple[str, dict[str, float] | None]] = [
    ("linear", None),
    ("cosine_with_restarts", {"num_cycles": 2}),
    ("polynomial", {"power": 2.0}),
    ("constant", None),
    ("constant_with_warmup", None),
    ("inverse_sqrt", None),
    ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
    ("cosine_warmup_with_min_lr", {"min_lr_rate": 0.1}),
    ("warmup_stable_decay", {"num_decay_steps": 2}),
    ("reduce_lr_on_plateau", {"patience": 1}),
    ("greedy", None),
]
#: The others are functions of the step, as the default is.
OF_ANOTHER_KIND = ("constant", "reduce_lr_on_plateau", "greedy")


def schedule(kind: str, more: dict[str, float] | None) -> list[str]:
    flags = ["--lr-scheduler-type", kind, *(["--lr-scheduler-kwargs", json.dumps(more)] if more else [])]
    return [*flags, "--eval-strategy", "steps"] if kind in ("reduce_lr_on_plateau", "greedy") else flags


@pytest.mark.parametrize(("kind", "more"), SCHEDULES)
def test_every_schedule_is_one_that_its_flags_fit(kind, more):
    check_schedule(parsed(*schedule(kind, more))[1])


@pytest.mark.parametrize(("kind", "more"), [s for s in SCHEDULES if s[0] in OF_ANOTHER_KIND])
def test_the_controller_follows_schedules_of_another_kind(base_dir, data_file, tmp_path, kind, more):
    assert train(base_dir, data_file, tmp_path / "out", *schedule(kind, more), "--max-steps", "3") == 0
    steps = json.loads((tmp_path / "out/trainer_log.json").read_text())["steps"]
    assert len(steps) == 3 and all(abs(s["lambda"]) < 1e3 for s in steps)


def test_the_schedules_above_are_all():
    assert {kind for kind, _ in SCHEDULES} | {"cosine"} == {kind.value for kind in SchedulerType}


def test_other_orders_of_the_samples(base_dir, data_file, tmp_path):
    first = {}
    for order in ("random", "sequential", "batch_rebalance"):
        assert train(base_dir, data_file, tmp_path / order, "--train-sampling-strategy", order, "--max-steps", "1") == 0
        first[order] = json.loads((tmp_path / order / "trainer_log.json").read_text())["steps"][0]["loss"]
    assert first["sequential"] != first["random"]  # one process without accumulation has nothing to balance


@pytest.mark.parametrize("optim", [o for o in OPTIMIZERS if not o.startswith("adamw")])
def test_optimizers_other_than_adamw(base_dir, data_file, tmp_path, capsys, optim):
    assert "pass one with --learning-rate" in refusal(capsys, "train", *TRAIN, "--optim", optim)
    more = ["--optim-args", "momentum=0.9"] if optim == "sgd" else []
    flags = ["--optim", optim, "--learning-rate", "0.01", "--max-steps", "3", *more]
    assert train(base_dir, data_file, tmp_path / "out", *flags) == 0


def test_an_optimizer_that_was_not_tried_is_refused(capsys):
    for optim in ("adamw_bnb_8bit", "galore_adamw", "lomo", "schedule_free_adamw"):
        line = refusal(capsys, "train", *TRAIN, "--optim", optim)
        assert f"argument --optim: invalid choice: '{optim}' (choose from" in line and "rmsprop" in line
    assert "--save-strategy best is not for routers" in refusal(capsys, "train", *TRAIN, "--save-strategy", "best")


def test_a_full_device_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever the command: what torch raises when a GPU's memory is used up."""

    def full(argv: Any) -> int:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …")

    monkeypatch.setitem(cli.COMMANDS, "patch", full)
    assert cli.main(["patch"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("router-tuning: error: out of memory: CUDA out of memory;") and "--max-length" in error

    def another(argv: Any) -> int:
        raise RuntimeError("shapes do not match")

    monkeypatch.setitem(cli.COMMANDS, "patch", another)
    with pytest.raises(RuntimeError, match="shapes"):
        cli.main(["patch"])
