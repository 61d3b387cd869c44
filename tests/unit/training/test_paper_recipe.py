"""The recipe of the paper (arXiv 2410.13184) by flags: its numbers stay what they are."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

from router_tuning.cli import main
from vllm_mod.checkpoint import read_mod_config

PAPER = [
    "--patch",
    "none",
    "--window",
    "none",
    "--layers",
    "1-2",
    "--capacity-loss",
    "paper",
    "--target-capacity",
    "0.5",
]
SMALL = [
    "--max-train-samples",
    "64",
    "--max-length",
    "32",
    "--per-device-train-batch-size",
    "8",
    "--learning-rate",
    "0.002",
    "--use-cpu",
    "true",
]
#: Of each step: of answer tokens, and of the sublayers of 8 samples in 2 layers.
LOSS = [6.692, 6.7696, 6.7981, 6.9517, 6.6997, 6.3966, 6.7594, 6.74]
KEPT = [1.0, 1.0, 0.0, 0.0, 0.0625, 0.125, 0.375, 0.5]


def test_its_numbers(base_dir, data_file, tmp_path):
    """Eight steps of LM loss through the straight-through gate + a fixed weight on the excess over the target."""
    flags = ["--model", str(base_dir), "--data", str(data_file), "--output", str(tmp_path / "out")]
    assert main(["train", *flags, *PAPER, *SMALL, "--lambda", "0.1", "--disable-tqdm", "true", "--seed", "3"]) == 0
    config = read_mod_config(tmp_path / "out")
    assert (config.version, config.layers, config.window, config.patch) == (1, (1, 2), None, None)
    log = json.loads((tmp_path / "out/trainer_log.json").read_text())
    steps = log["steps"]
    assert {step["lambda"] for step in steps} == {0.1}
    routers = load_file(tmp_path / "out/routers.safetensors")
    assert [step["loss"] for step in steps] == pytest.approx(LOSS, rel=2e-3)
    assert [step["kept"] for step in steps] == pytest.approx(KEPT, abs=0.07)  # of 16: one sample at the threshold
    assert [float(weight.norm()) for weight in routers.values()] == pytest.approx([0.0176, 0.0335], rel=0.02)
