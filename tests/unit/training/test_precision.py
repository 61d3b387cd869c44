"""What stands between loss and backward (loss scaling, accumulation, checkpoints, autocast) must not reach the
controller; what is not finite ends a run before it is saved; and in what patches are fitted and written."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from router_tuning.cli import main
from router_tuning.model import load_base, load_reference, patch_weights, routing_of
from router_tuning.trainer import RouterTrainer
from tests.support.models import routed_checkpoint, tiny_model
from tests.unit.training.test_patch_command import LAYERS, patch
from tests.unit.training.test_trainer import one_error, routers_of, train
from vllm_mod.checkpoint import read_mod_config


def steps_of(checkpoint: Path) -> list[dict]:
    return json.loads((checkpoint / "trainer_log.json").read_text())["steps"]


@pytest.fixture
def loss_scale(monkeypatch):
    """`loss_scale(x)`: gradients are scaled as `--fp16` does on a GPU, all the rest stays float32."""
    create = RouterTrainer.create_accelerator_and_postprocess

    def scale_by(factor: float, **more: float) -> None:
        def scaled(self):
            create(self)
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=factor, growth_interval=10**6, **more)

        monkeypatch.setattr(RouterTrainer, "create_accelerator_and_postprocess", scaled)

    return scale_by


def test_the_controller_sees_the_gradient_of_the_loss_not_of_the_scaled_loss(
    base_dir, data_file, tmp_path, loss_scale
):  # fmt: skip
    flags = ["--gradient-accumulation-steps", "2", "--per-device-train-batch-size", "4"]
    assert train(base_dir, data_file, tmp_path / "plain", *flags) == 0
    loss_scale(65536.0)
    assert train(base_dir, data_file, tmp_path / "scaled", *flags) == 0
    for plain, scaled in zip(steps_of(tmp_path / "plain"), steps_of(tmp_path / "scaled"), strict=True):
        assert scaled["scale"] == pytest.approx(plain["scale"], rel=1e-4)
        assert scaled["lambda"] == pytest.approx(plain["lambda"], rel=1e-4, abs=1e-4)
    for name, weight in routers_of(tmp_path / "plain").items():
        torch.testing.assert_close(weight, routers_of(tmp_path / "scaled")[name], atol=1e-5, rtol=1e-4)


def test_the_controller_sees_it_whoever_divides_by_the_micro_batches(base_dir, data_file, tmp_path, monkeypatch):
    """The model's own loss where it takes the number of tokens, Trainer where it does not."""
    flags = ["--gradient-accumulation-steps", "4", "--per-device-train-batch-size", "4", "--max-steps", "1"]
    assert train(base_dir, data_file, tmp_path / "model", *flags) == 0
    create = RouterTrainer.create_optimizer

    def by_trainer(self, *args):
        self.model_accepts_loss_kwargs = False
        return create(self, *args)

    monkeypatch.setattr(RouterTrainer, "create_optimizer", by_trainer)
    assert train(base_dir, data_file, tmp_path / "trainer", *flags) == 0
    (model,), (trainer,) = steps_of(tmp_path / "model"), steps_of(tmp_path / "trainer")
    assert trainer["scale"] == pytest.approx(model["scale"], rel=0.05)
    assert trainer["loss"] == pytest.approx(model["loss"], rel=0.05)


def test_a_step_that_overflows_is_left_out_of_everything(base_dir, data_file, tmp_path, loss_scale):
    loss_scale(2.0**127, backoff_factor=2.0**-10)
    assert train(base_dir, data_file, tmp_path / "out", "--window", "none") == 0
    steps = steps_of(tmp_path / "out")
    assert steps[0]["scale"] == steps[0]["lambda"] == 0.0  # nothing was learnt from it
    assert all(math.isfinite(s["scale"]) and math.isfinite(s["lambda"]) for s in steps) and steps[-1]["scale"] > 0
    assert all(w.isfinite().all() and w.abs().sum() > 0 for w in routers_of(tmp_path / "out").values())


def test_overflows_without_end_stop_the_run(base_dir, data_file, tmp_path, loss_scale, capsys):
    loss_scale(math.inf)
    assert train(base_dir, data_file, tmp_path / "out", "--per-device-train-batch-size", "2") == 2
    line = one_error(capsys)
    assert "step 20: 20 steps in a row overflowed in fp16" in line and not (tmp_path / "out").exists()


@pytest.mark.parametrize("granularity", ["attn_sequence", "mlp_token"])
def test_checkpoints_and_autocast_leave_what_is_measured(base_dir, data_file, tmp_path, granularity):
    flags = ["--granularity", granularity, "--max-steps", "3"]
    assert train(base_dir, data_file, tmp_path / "plain", *flags) == 0
    assert train(base_dir, data_file, tmp_path / "checkpoints", *flags, "--gradient-checkpointing") == 0
    assert train(base_dir, data_file, tmp_path / "bf16", *flags, "--bf16", "true") == 0
    plain = steps_of(tmp_path / "plain")
    for step, other in zip(plain, steps_of(tmp_path / "checkpoints"), strict=True):
        assert other["scale"] == pytest.approx(step["scale"], rel=1e-4) and other["kept"] == step["kept"]
    first = steps_of(tmp_path / "bf16")[0]
    assert first["scale"] == pytest.approx(plain[0]["scale"], rel=0.05) and first["kept"] == plain[0]["kept"]


# ---------------------------------------------------------------- not finite


def poison(monkeypatch, after: int, spoil) -> None:
    """Call `spoil(model)` when that many steps were taken."""
    after_step = RouterTrainer.after_step

    def spoiled(self):
        after_step(self)
        if self.state.global_step == after:
            spoil(self.model)

    monkeypatch.setattr(RouterTrainer, "after_step", spoiled)


def spoil_loss(model):
    model.model.norm.weight.data.fill_(math.nan)


def spoil_gradient(model):
    next(iter(routing_of(model).routers.values())).weight.register_hook(lambda g: g * math.inf)


@pytest.mark.parametrize(("spoil", "fault"), [(spoil_loss, "the loss is nan"), (spoil_gradient, "a gradient is not")])
def test_the_first_value_that_is_not_finite_ends_the_run(
    base_dir, data_file, tmp_path, monkeypatch, capsys, spoil, fault
):  # fmt: skip
    run = tmp_path / "out.run"
    poison(monkeypatch, 4, spoil)
    flags = ["--save-steps", "3"]
    assert train(base_dir, data_file, tmp_path / "out", *flags) == 2
    line = one_error(capsys)
    assert f"step 5: {fault}" in line and "--learning-rate below 0.0078125" in line
    assert f"the last good state is {run}/checkpoint-3" in line
    assert [path.name for path in run.iterdir()] == ["checkpoint-3"] and not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert train(base_dir, data_file, tmp_path / "out", *flags, "--resume") == 0
    assert train(base_dir, data_file, tmp_path / "whole", *flags) == 0
    whole, out = routers_of(tmp_path / "whole"), routers_of(tmp_path / "out")
    assert all(torch.equal(whole[name], out[name]) for name in whole)


def test_a_learning_rate_out_of_all_bounds(base_dir, data_file, tmp_path, capsys):
    flags = ["--learning-rate", "1e38", "--save-steps", "1", "--save-total-limit", "20"]
    assert train(base_dir, data_file, tmp_path / "out", *flags) == 2
    assert "so training was stopped; try a --learning-rate below 1e+38" in one_error(capsys)
    states = list((tmp_path / "out.run").glob("checkpoint-*"))
    assert states
    for state in states:
        assert all(w.isfinite().all() for w in load_file(state / "routers.safetensors").values())


def test_a_base_that_computes_nan_is_told_at_once(base_dir, data_file, tmp_path, capsys):
    broken = tmp_path / "broken"
    model = load_base(base_dir, torch.float32)
    spoil_loss(model)
    model.save_pretrained(broken)
    for file in [*base_dir.glob("token*"), *base_dir.glob("*.jinja")]:
        (broken / file.name).write_bytes(file.read_bytes())
    assert train(broken, data_file, tmp_path / "out") == 2
    line = one_error(capsys)
    assert "step 1: the loss is nan" in line and "nothing was trained yet, so look at the base model's weights" in line
    assert "no state had been written" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_patches_are_written_as_they_are_served(data_file, tmp_path, dtype):
    """In the base's precision, whichever they are fitted in; routers in float32 whatever that is."""
    base = tiny_model(tmp_path / "base", "llama", dtype=dtype)
    checkpoint = routed_checkpoint(base, tmp_path / "c", "attn_sequence", LAYERS, seed=3, version=2, window=3)
    assert patch(checkpoint, data_file, "--bf16", "false") == 0
    words = ["export", "--model", str(base), "--data", str(data_file), "--max-samples", "20", "--bf16", "true"]
    assert main([*words, "--drop-attention", "2", "--patch-rank", "2", "--output", str(tmp_path / "static")]) == 0
    for directory in (checkpoint, tmp_path / "static"):
        found = load_file(directory / "routers.safetensors")
        assert {tensor.dtype for name, tensor in found.items() if "patch" in name} == {dtype}
        assert {tensor.dtype for name, tensor in found.items() if "patch" not in name} <= {torch.float32}
        assert len(patch_weights(load_reference(directory))) == len(read_mod_config(directory).layers)


def test_patches_are_fitted_in_the_precision_that_was_asked_for(base_dir, data_file, tmp_path):
    """The same patches but for what bf16 rounds; by default a float32 base is fitted in float32."""
    checkpoint = routed_checkpoint(base_dir, tmp_path / "c", "attn_sequence", LAYERS, seed=3, version=2, window=3)
    found = {}
    for name, flags in {"default": [], "false": ["--bf16", "false"], "true": ["--bf16", "true"]}.items():
        assert patch(checkpoint, data_file, "--output", str(tmp_path / name), *flags) == 0
        found[name] = torch.stack([p.bias for p in patch_weights(load_reference(tmp_path / name)).values()])
    assert torch.equal(found["default"], found["false"]) and not torch.equal(found["true"], found["false"])
    assert (found["true"] - found["false"]).norm() < 0.1 * found["false"].norm()
