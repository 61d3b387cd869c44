"""`router-tuning train --patch-rank R`: patches for routers that were just trained."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from router_tuning import preflight, ridge
from router_tuning.arguments import RouterArguments, RouterTrainingArguments
from router_tuning.model import load_reference, patch_weights, routing_of
from router_tuning.trainer import RouterTrainer
from tests.support.models import tiny_model
from tests.unit.training.test_trainer import one_error, routers_of, train
from vllm_mod.checkpoint import read_mod_config
from vllm_mod.files import read_json


@pytest.mark.parametrize("granularity", ["attn_sequence", "mlp_token"])
def test_training_with_patches(base_dir, data_file, tmp_path, granularity):
    """Routers are trained with them, they are fitted anew once the routers are there, and measured with them."""
    flags = ["--granularity", granularity]
    assert train(base_dir, data_file, tmp_path / "plain", *flags, "--patch", "none") == 0
    assert train(base_dir, data_file, tmp_path / "c", *flags, "--patch-rank", "2") == 0
    plain, config = read_mod_config(tmp_path / "plain"), read_mod_config(tmp_path / "c")
    assert config.to_dict() == plain.to_dict() | {"version": 2, "patch": {"rank": 2}}
    patched = routers_of(tmp_path / "c")
    assert patched.keys() > routers_of(tmp_path / "plain").keys()
    assert not any("patch" in name for name in routers_of(tmp_path / "plain"))
    assert patch_weights(load_reference(tmp_path / "c"))[1].bias.abs().max() > 0
    held_out = [read_json(tmp_path / name / "trainer_log.json")["held_out"] for name in ("plain", "c")]
    assert held_out[0]["dense_loss"] == pytest.approx(held_out[1]["dense_loss"])
    assert held_out[0]["loss"] != held_out[1]["loss"]
    record = read_json(tmp_path / "c/patches.json")
    assert (record["samples"], record["rank"]) == (64, 2) and "--patch-rank 2" in record["command"]
    assert "## Patches" in (tmp_path / "c/README.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"plain", "c"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--patch-rank", "33"], "--patch-rank 33: the model's hidden size is 32"),
        (["--patch-rank", "-1"], "--patch-rank: a number, 0 or more, `auto` or `none` is needed (got '-1')"),
        (
            ["--patch-rank", "2", "--max-train-samples", "9"],
            "9 usable samples; patches need 10, one of them held out; or leave patches out with --patch none",
        ),
        (["--max-train-samples", "9"], "patches need 10, one of them held out; or leave patches out with --patch none"),
        (["--patch-rank", "32", "--max-train-samples", "10", "--window", "500"], "to fit patches of rank 32 on; give"),
    ],
)
def test_training_refuses_before_the_work(base_dir, data_file, tmp_path, capsys, monkeypatch, flags, message):
    monkeypatch.setattr("router_tuning.run.load_base", lambda *_: pytest.fail("the model was loaded"))
    assert train(base_dir, data_file, tmp_path / "out", *flags) == 2
    assert message in one_error(capsys) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("word", ["some", "-1", "33"])
def test_a_rank_that_is_none_is_refused_before_the_data_is_read(
    base_dir, data_file, tmp_path, capsys, monkeypatch, word
):
    monkeypatch.setattr("router_tuning.run.read_sources", lambda *_: pytest.fail("the data was read"))
    assert train(base_dir, data_file, tmp_path / "out", "--patch-rank", word) == 2
    assert "--patch-rank" in one_error(capsys)


def test_several_processes_are_told_the_other_way(base_dir, data_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("router_tuning.arguments.RouterTrainingArguments.world_size", 2)
    assert train(base_dir, data_file, tmp_path / "out", "--patch-rank", "2") == 2
    assert "patches are fitted by one process, and this run has 2; leave it out, and run `router-tuning patch`" in (
        one_error(capsys)
    )


def behind_training(monkeypatch, instead):
    """In place of each of the second fits: the first two are of patches that routers are trained with."""
    calls, inner = [], ridge.fit

    def fit(*args):
        calls.append(args)
        return inner(*args) if len(calls) <= 2 else instead()

    monkeypatch.setattr("router_tuning.patches.fit", fit)


def test_routers_are_trained_with_patches_in_place(base_dir, data_file, tmp_path, monkeypatch):
    """A step's forward adds what stands in: fitted before, to inputs behind layers that skip by chance."""
    seen, inner = [], RouterTrainer.training_step

    def step(self, *args, **kwargs):
        state = routing_of(self.model)
        seen.append({layer: patch.bias.clone() for layer, patch in state.patches.items()})
        return inner(self, *args, **kwargs)

    monkeypatch.setattr(RouterTrainer, "training_step", step)
    assert train(base_dir, data_file, tmp_path / "c", "--max-steps", "3") == 0
    assert [set(biases) for biases in seen] == [{1, 2}] * 3 and all(bias.any() for bias in seen[0].values())
    assert all(torch.equal(seen[0][layer], seen[2][layer]) for layer in (1, 2))  # nothing trains them
    written = patch_weights(load_reference(tmp_path / "c"))
    assert not torch.equal(written[2].bias, seen[0][2])  # but they are fitted anew to the routers
    plain = train(base_dir, data_file, tmp_path / "plain", "--max-steps", "3", "--patch", "none")
    assert plain == 0 and seen[3:] == [{}] * 3
    log, without = (read_json(tmp_path / name / "trainer_log.json")["steps"] for name in ("c", "plain"))
    assert log[0]["loss"] == pytest.approx(without[0]["loss"])  # routers of zeros keep
    assert log[2]["loss"] != without[2]["loss"]


def test_patches_are_written_as_they_are_served(data_file, tmp_path):
    base = tiny_model(tmp_path / "base", "llama", dtype=torch.bfloat16)
    assert train(base, data_file, tmp_path / "c", "--patch-rank", "2", "--max-steps", "1") == 0
    assert {t.dtype for name, t in routers_of(tmp_path / "c").items() if "patch" in name} == {torch.bfloat16}


def test_training_interrupted_while_it_fits_goes_on(base_dir, data_file, tmp_path, monkeypatch, capsys):
    flags = ["--patch-rank", "2", "--max-steps", "2"]
    assert train(base_dir, data_file, tmp_path / "whole", *flags) == 0

    def pressed(*_, **__):
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        behind_training(patched, pressed)
        assert train(base_dir, data_file, tmp_path / "out", *flags) == 130
    assert "--resume" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert train(base_dir, data_file, tmp_path / "out", *flags, "--resume") == 0
    whole = routers_of(tmp_path / "whole")
    assert all(torch.equal(whole[name], tensor) for name, tensor in routers_of(tmp_path / "out").items())


def test_routers_are_not_lost_where_patches_cannot_be_fitted(base_dir, data_file, tmp_path, monkeypatch, capsys):
    def too_low(*_, **__):
        raise ridge.TooLowRank("7 tokens differ in 1 directions")

    with monkeypatch.context() as patched:
        behind_training(patched, too_low)
        assert train(base_dir, data_file, tmp_path / "out", "--patch-rank", "2") == 2
    assert "layer 1: 7 tokens differ in 1 directions, which does not do for a patch of rank 2" in (
        error := one_error(capsys)
    )
    assert error.endswith("go on with --resume and a lower --patch-rank") and not (tmp_path / "out").exists()
    assert train(base_dir, data_file, tmp_path / "out", "--resume", "--patch-rank", "1") == 0
    patch = read_mod_config(tmp_path / "out").patch
    assert patch is not None and patch.rank == 1


def test_what_cannot_be_fitted_is_said_before_the_training(base_dir, data_file, tmp_path, monkeypatch, capsys):
    def too_low(*_, **__):
        raise ridge.TooLowRank("7 tokens differ in 1 directions")

    monkeypatch.setattr("router_tuning.patches.fit", too_low)
    monkeypatch.setattr(RouterTrainer, "training_step", lambda *_, **__: pytest.fail("a step was taken"))
    assert train(base_dir, data_file, tmp_path / "out") == 2
    assert one_error(capsys).endswith("or leave patches out with --patch none") and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "window", "rank"),
    [
        ([], 64, 4),
        (["--granularity", "block_sequence"], 64, 4),
        (["--granularity", "mlp_sequence", "--window", "8", "--patch", "2"], 8, 2),
        (["--window", "none"], None, None),  # decisions would depend on patches
        (["--patch", "none"], 64, None),
        (["--granularity", "attn_token"], None, None),
        (["--granularity", "mlp_token", "--patch-rank", "0"], None, 0),
    ],
)
def test_what_is_not_named(base_dir, data_file, tmp_path, flags, window, rank):
    assert train(base_dir, data_file, tmp_path / "c", *flags, "--max-steps", "1") == 0
    config = read_mod_config(tmp_path / "c")
    assert (config.window, config.patch and config.patch.rank) == (window, rank)
    assert config.version == (1 if (window, rank) == (None, None) else 2)


def test_several_processes_leave_out_what_was_not_asked_for(monkeypatch, caplog):
    monkeypatch.setattr("router_tuning.arguments.RouterTrainingArguments.world_size", 2)
    for more, left_out in (({}, True), ({"window": "none"}, False), ({"granularity": "attn_token"}, False)):
        caplog.clear()
        args = RouterArguments(model="m", data=["d"], output="o", **more)
        preflight.check_patches(args, RouterTrainingArguments(use_cpu=True))
        assert args.patch_rank == "none" and ("run `router-tuning patch` on the checkpoint" in caplog.text) is left_out
