"""`--window` of `train` and `export`, and what `export` takes along from a version 2 router directory."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from router_tuning.cli import main
from router_tuning.model import load_reference, reference_decisions, reference_logits
from tests.support.models import random_routers
from tests.unit.training.test_trainer import one_error, routers_of, train
from vllm_mod.architectures import BaseShape
from vllm_mod.calibration import Calibration, OperatingPoint, read_calibration, write_calibration
from vllm_mod.checkpoint import read_json, read_mod_config, read_patches, router_name, write_routers
from vllm_mod.config import ModConfig
from vllm_mod.tensors import Patch


@pytest.mark.parametrize("granularity", ["attn_sequence", "block_sequence"])
def test_a_run_with_a_window(base_dir, data_file, tmp_path, granularity):
    flags = ("--granularity", granularity, "--window", "3")
    assert train(base_dir, data_file, tmp_path / "out", *flags, "--gradient-checkpointing", "true") == 0
    config = read_mod_config(tmp_path / "out")
    assert (config.version, config.window, config.layers) == (2, 3, (1, 2))
    assert all(weight.abs().sum() > 0 for weight in routers_of(tmp_path / "out").values())
    arguments = json.loads((tmp_path / "out/training_args.json").read_text())
    assert arguments["window"] == "3"
    assert "over the first 3 tokens of its prompt" in (tmp_path / "out/README.md").read_text()
    model = load_reference(tmp_path / "out")
    long, short = list(range(5, 25)), list(range(5, 10))
    torch.testing.assert_close(
        reference_logits(model, short, 4), reference_logits(model, long, 10)[:5], atol=1e-4, rtol=1e-4
    )


def test_training_answers_to_the_window(base_dir, data_file, tmp_path):
    """Other tokens decide, so other routers come out; the answer's tokens follow, so the target is still met."""
    for name, window in (("none", "none"), ("one", "1"), ("all", "1000")):
        assert train(base_dir, data_file, tmp_path / name, "--window", window) == 0
    weights = [routers_of(tmp_path / name)[router_name(1)] for name in ("none", "one", "all")]
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])
    assert read_mod_config(tmp_path / "none").to_dict() == {
        "version": 1, "granularity": "attn_sequence", "layers": [1, 2], "threshold": 0.5, "target_capacity": 0.5,
        "base_model": str(base_dir),
    }  # fmt: skip


@pytest.mark.parametrize("word", ["0", "-3", "4.5", "all", "", "None", "9" * 5000, "٣"])
def test_bad_windows_are_one_line_before_the_work(base_dir, data_file, tmp_path, capsys, word):
    assert train(base_dir, data_file, tmp_path / "out", f"--window={word}") == 2
    assert "--window: a number of tokens, 1 or more, or `none` is needed" in one_error(capsys)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.run").exists()


@pytest.mark.parametrize("granularity", ["attn_token", "mlp_token", "expert_token"])
def test_a_window_needs_sequence_decisions(base_dir, data_file, tmp_path, capsys, granularity):
    assert train(base_dir, data_file, tmp_path / "out", "--window", "4", "--granularity", granularity) == 2
    assert f"key 'window' needs a granularity *_sequence (got '{granularity}')" in one_error(capsys)


def export(base_dir, output, *flags: str) -> int:
    return main(["export", "--model", str(base_dir), "--output", str(output), *flags])


@pytest.mark.parametrize("granularity", ["attn_sequence", "mlp_static"])
def test_export_takes_patches_and_the_table_along(base_dir, tmp_path, granularity):
    settings = {"version": 2, "granularity": granularity, "layers": [1, 2], "patch": {"rank": 2}}
    if granularity == "attn_sequence":
        settings |= {"window": 5, "cutoff": [40.25, -3.0]}
    config = ModConfig.parse(settings, "test")
    patches = {i: Patch(torch.ones(32) * i, torch.rand(2, 32), torch.rand(32, 2)) for i in (1, 2)}
    directory = write_routers(tmp_path / "routers", config, random_routers(config, 32), patches)
    table = Calibration(operating_points=[OperatingPoint(target=0.5, kept=0.5, cutoff=40.0)])
    if not config.is_static:
        write_calibration(directory, table)
    assert export(base_dir, tmp_path / "out", "--routers", str(directory)) == 0
    assert read_mod_config(tmp_path / "out") == config
    shape = BaseShape.of(read_json(tmp_path / "out/config.json"), "test")
    found = read_patches(tmp_path / "out", config, shape)
    assert all(torch.equal(found[i].up, patches[i].up) for i in (1, 2))
    assert read_calibration(tmp_path / "out", config) == (None if config.is_static else table)
    logits = reference_logits(load_reference(tmp_path / "out"), list(range(5, 25)), 10)
    assert logits.isfinite().all()


def test_routers_that_say_nothing_may_get_a_window(base_dir, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    save_file({router_name(i): torch.randn(1, 32) for i in (1, 2)}, bare / "model.safetensors")
    flags = ("--routers", str(bare), "--granularity", "attn_sequence", "--layers", "1-2")
    assert export(base_dir, tmp_path / "a", *flags, "--window", "6") == 0
    assert (read_mod_config(tmp_path / "a").version, read_mod_config(tmp_path / "a").window) == (2, 6)
    assert export(base_dir, tmp_path / "b", *flags) == 0
    assert (read_mod_config(tmp_path / "b").version, read_mod_config(tmp_path / "b").window) == (1, None)
    model = load_reference(tmp_path / "a")
    reference_logits(model, list(range(5, 25)), 10)
    assert len(reference_decisions(model)) == 2


def test_windows_that_say_nothing_are_refused(base_dir, data_file, tmp_path, capsys):
    config = ModConfig.parse({"version": 1, "granularity": "attn_sequence", "layers": [1]}, "test")
    own = str(write_routers(tmp_path / "own", config, random_routers(config, 32)))
    broken = write_routers(tmp_path / "broken", config, random_routers(config, 32))
    (broken / "calibration.json").write_text('{"operating_pionts": []}')
    static = ("--granularity", "attn_static", "--layers", "1")
    for flags, said in [
        (("--routers", own, "--window", "4"), "says itself what it routes; drop --granularity, --layers and --window"),
        ((*static, "--window", "4"), "--window is for routers that decide per sequence"),
        (("--drop-attention", "1", "--data", str(data_file), "--window", "4"), "--window is for routers"),
        (("--routers", str(broken)), "calibration.json: unknown key 'operating_pionts'"),
    ]:
        assert export(base_dir, tmp_path / "out", *flags) == 2
        assert said in one_error(capsys)
        assert not (tmp_path / "out").exists()
