"""The command line: what is said of an unknown flag, of a value that cannot work, and --help."""

from __future__ import annotations

import re

import pytest

from router_tuning.arguments import CalibrateArguments, ExportArguments, RouterArguments, RouterTrainingArguments
from router_tuning.cli import main
from router_tuning.parser import nearest, parse
from router_tuning.trainer_flags import REFUSED
from tests.unit.training.test_trainer import one_error
from vllm_mod.config import ConfigError

TRAIN = ["--model", "m", "--data", "d", "--output", "o"]


def parsed(*argv: str):
    return parse([RouterArguments, RouterTrainingArguments], "router-tuning train", [*TRAIN, *argv])


def refusal(capsys, *argv: str) -> str:
    """The line that `router-tuning argv` ends with."""
    try:
        code = main(argv)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    return one_error(capsys)


# ---------------------------------------------------------------- unknown flags, --help


@pytest.mark.parametrize(
    ("argv", "meant"),
    [
        (["--max-samples", "5"], "--max-train-samples or --max-eval-samples"),
        (["--max_samples=5"], "--max-train-samples"),
        (["--target-capacty", "0.5"], "--target-capacity"),
        (["--lr", "1"], "--learning-rate"),
        (["--batch-size", "1"], "--per-device-train-batch-size"),
        (["--epochs", "1"], "--num-train-epochs"),
        (["--group-by-length"], "--train-sampling-strategy"),
    ],
)
def test_an_unknown_flag_is_answered_with_the_nearest(capsys, argv, meant):
    line = refusal(capsys, "train", *argv)  # before what is missing
    assert f"unknown flag {argv[0].split('=')[0].replace('_', '-')}: did you mean {meant}" in line


def test_the_nearest_are_of_the_same_command_and_not_refused_themselves(capsys):
    line = refusal(capsys, "calibrate", "ckpt", "--data", "d", "--target-capacity", "1", "--max-train-samples", "5")
    assert "did you mean --max-samples?" in line
    assert "did you mean --routers?" in refusal(capsys, "export", "--model", "m", "--output", "o", "--router", "r")
    assert "did you mean" not in refusal(capsys, "train", *TRAIN, "--frobnicate", "1")
    assert "at-end" not in refusal(capsys, "train", *TRAIN, "--load-best-model", "1")
    assert nearest("--save-limit", ["--save-total-limit", "--seed"]) == ["--save-total-limit"]


@pytest.mark.parametrize("command", ["train", "export", "calibrate"])
def test_help_shows_each_flag_once_with_dashes(capsys, command):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    shown = re.findall(r"^  (--\S+)", text, re.MULTILINE)
    assert len(shown) == len(set(shown)) > 3
    assert not re.search(r"^  .*--\w+_\w+", "\n".join(x for x in text.splitlines() if x.startswith("  --")))
    if command == "train":
        assert "--max-train-samples" in shown and "--gradient-accumulation-steps" in shown
        assert not {f"--{name.replace('_', '-')}" for name in REFUSED} & set(shown)
        assert not [flag for flag in shown if flag.startswith("--no-")]


def test_underscores_are_understood():
    args, training_args = parsed(
        "--target_capacity", "0.25", "--max_steps=3", "--run-dir", "a_b", "--no_dataloader_in_order"
    )
    assert (args.target_capacity, training_args.max_steps, args.run_dir) == (0.25, 3, "a_b")
    assert training_args.dataloader_in_order is False  # not in --help, as `--dataloader-in-order false` is the same


def test_defaults_have_words(capsys):
    (args, _) = parsed("--layers", "auto", "--patch", "auto", "--window", "auto")
    assert args == parsed()[0] and args.layers is None and (args.window, args.patch_rank) == ("64", "auto")
    assert parsed("--patch", "8")[0].patch_rank == "8"
    assert parsed("--granularity", "attn_token")[0].window == "none"
    needed = ["--model", "m", "--data", "d", "--drop-attention", "1", "--output", "o"]
    assert parse([ExportArguments], "x", [*needed, "--patch", "none"])[0].patch_rank is None
    assert "--patch-rank/--patch: a number, or `none`, is needed (got 'some')" in refusal(
        capsys, "export", *needed, "--patch-rank", "some"
    )
    assert "--patch-rank -1: 0 or more is needed" in refusal(capsys, "export", *needed, "--patch-rank", "-1")


def test_a_words_place_does_not_matter_but_for_the_checkpoint(capsys):
    assert parse([CalibrateArguments], "x", ["c", "--target-capacity", "1", "--data", "d"])[0].checkpoint == "c"
    line = refusal(capsys, "calibrate", "--target-capacity", "1", "--data", "d", "c")
    assert "the checkpoint comes first: router-tuning calibrate CHECKPOINT --data DATA" in line
    assert "unrecognized arguments: stray" in refusal(capsys, "train", *TRAIN, "--seed", "1", "stray")


def test_no_args_file_is_read(tmp_path, monkeypatch):
    """HfArgumentParser would take flags from a file named like the program."""
    (tmp_path / "tune.args").write_text("--seed 7")
    monkeypatch.setattr("sys.argv", [str(tmp_path / "tune.py")])
    assert parsed()[1].seed == 42


# ---------------------------------------------------------------- values


@pytest.mark.parametrize(
    "argv",
    [
        ["--max-length", "1"],
        ["--max-train-samples", "-1"],
        ["--max-eval-samples", "-1"],
        ["--capacity-lambda", "nan"],
        ["--per-device-train-batch-size", "0"],
        ["--per-device-eval-batch-size", "0"],
        ["--gradient-accumulation-steps", "0"],
        ["--num-train-epochs", "0"],
        ["--max-steps", "0"],
        ["--learning-rate", "0"],
        ["--learning-rate", "nan"],
        ["--learning-rate", "inf"],
        ["--warmup-steps", "-1"],
        ["--weight-decay", "-0.1"],
        ["--adam-beta1", "1"],
        ["--adam-epsilon", "0"],
        ["--max-grad-norm", "-1"],
        ["--logging-steps", "0"],
        ["--save-steps", "-5"],
        ["--eval-strategy", "steps", "--eval-steps", "0"],
        ["--seed", "-1"],
        ["--data-seed", str(1 << 32)],
        ["--dataloader-num-workers", "-1"],
        ["--lr-scheduler-kwargs", "{a"],
        ["--gradient-checkpointing", "--gradient-checkpointing-kwargs", "[1]"],
    ],
)
def test_a_value_that_cannot_work_is_refused_by_name(argv):
    with pytest.raises(ConfigError, match=f"^{argv[-2]} .*needed") as error:
        parsed(*argv)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("types", "argv"),
    [
        (CalibrateArguments, ["c", "--data", "d", "--target-capacity", "1", "--max-length", "-5"]),
        (CalibrateArguments, ["c", "--data", "d", "--target-capacity", "1", "--batch-size", "0"]),
        (ExportArguments, ["--model", "m", "--output", "o", "--max-samples", "0"]),
        (ExportArguments, ["--model", "m", "--output", "o", "--max-length", "0"]),
    ],
)
def test_values_of_the_other_commands(types, argv):
    with pytest.raises(ConfigError, match=f"^{argv[-2]} {argv[-1]}: "):
        parse([types], "router-tuning", argv)


@pytest.mark.parametrize("flag", ["data", "max-samples", "max-length"])
def test_flags_of_a_choice_by_data_need_that_choice(capsys, flag):
    line = refusal(capsys, "export", "--model", "m", "--output", "o", f"--{flag}", "7")
    assert f"--{flag} says nothing here: it needs --drop-attention" in line


def test_re_entrant_checkpoints_are_refused_and_other_settings_kept():
    on = ["--gradient-checkpointing", "--gradient-checkpointing-kwargs"]
    with pytest.raises(ConfigError, match="use_reentrant"):
        parsed(*on, '{"use_reentrant": true}')
    assert parsed(*on, '{"every_n_layers": 2}')[1].gradient_checkpointing_kwargs == {
        "every_n_layers": 2, "use_reentrant": False,
    }  # fmt: skip
    assert parsed("--gradient-checkpointing")[1].gradient_checkpointing_kwargs == {"use_reentrant": False}


def test_fp16_turns_the_bf16_that_is_the_default_off(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: True)
    assert RouterTrainingArguments(fp16=True, use_cpu=True, dataloader_pin_memory=False).bf16 is False
