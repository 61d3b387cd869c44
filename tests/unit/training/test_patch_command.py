"""`router-tuning patch` and `export --drop-attention N --patch-rank R`: what is written, and what is refused."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from router_tuning import ridge
from router_tuning.cli import main
from router_tuning.model import load_reference, patch_weights, reference_logits, router_weights
from tests.support.models import edit_json, random_routers, routed_checkpoint, tiny_model
from tests.unit.training.test_trainer import one_error
from vllm_mod.architectures import BaseShape
from vllm_mod.calibration import read_calibration
from vllm_mod.checkpoint import read_mod_config, read_patches, write_checkpoint, write_routers
from vllm_mod.config import ModConfig
from vllm_mod.files import read_json

GRANULARITIES = ["attn_sequence", "mlp_sequence", "block_sequence", "attn_token", "mlp_token", "block_token"]
STATIC = ["attn_static", "mlp_static", "block_static"]
EVALUATION = '{"command": "", "tasks": {}, "recovery": null, "static_recovery": null, "kept_ratio": null}'
LAYERS = (1, 2, 3)
PROMPT = [0, 11, 21, 31, 12, 5, 40, 41]


def patch(checkpoint: Path, data: Path, *more: str, rank: int = 3) -> int:
    flags = ["--data", str(data), "--rank", str(rank), "--max-samples", "30", "--max-length", "32", *more]
    return main(["patch", str(checkpoint), *flags])


def content(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture
def routed(base_dir, tmp_path):
    def make(granularity: str, **config) -> Path:
        return routed_checkpoint(base_dir, tmp_path / "c", granularity, LAYERS, seed=3, **config)

    return make


@pytest.fixture
def checkpoint(routed) -> Path:
    return routed("attn_sequence", base_model="some/base")


@pytest.mark.parametrize("granularity", GRANULARITIES + STATIC)
def test_in_place(routed, base_dir, data_file, capsys, granularity):
    checkpoint, base = routed(granularity), content(base_dir)
    before = read_mod_config(checkpoint)
    routers = router_weights(load_reference(checkpoint))
    assert patch(checkpoint, data_file) == 0
    config = read_mod_config(checkpoint)
    assert config.to_dict() == before.to_dict() | {"version": 2, "patch": {"rank": 3}}
    model = load_reference(checkpoint)
    assert all(torch.equal(w, routers[i]) for i, w in router_weights(model).items())
    assert {layer: tuple(p.down.shape) for layer, p in patch_weights(model).items()} == dict.fromkeys(LAYERS, (3, 32))
    index = read_json(checkpoint / "model.safetensors.index.json")
    names = {name for name, file in index["weight_map"].items() if file == "routers.safetensors"}
    assert names == set(load_file(checkpoint / "routers.safetensors"))
    sizes = [(checkpoint / name).stat().st_size for name in set(index["weight_map"].values())]
    assert index["metadata"]["total_size"] == sum(sizes)
    without = load_reference(checkpoint, config=before)
    assert not torch.allclose(reference_logits(model, PROMPT, 5), reference_logits(without, PROMPT, 5), atol=1e-2)
    assert content(base_dir) == base
    record, printed = read_json(checkpoint / "patches.json"), capsys.readouterr().out
    assert (record["samples"], record["rank"], set(record["layers"])) == (30, 3, {"1", "2", "3"})
    assert (nearer := record["distilled"])["samples"] == 30 and 0 < nearer["after"] <= nearer["before"]
    assert f"{nearer['before']:.4f} as fitted, {nearer['after']:.4f} distilled" in printed
    assert all(layer["ridge"] in ridge.RIDGES and layer["explained"] < 1 for layer in record["layers"].values())
    assert "layer   2:" in printed and f"written: {checkpoint}" in printed
    assert "## Patches\n\nOf rank 3, fitted" in (card := (checkpoint / "README.md").read_text())
    assert "Then distilled on 30 of them" in card
    assert oct((checkpoint / "routers.safetensors").stat().st_mode & 0o777) == "0o644"


@pytest.mark.parametrize("granularity", ["attn_sequence", "block_static"])
@pytest.mark.parametrize("alone", [False, True])
def test_into_another_one(checkpoint, routed, base_dir, data_file, tmp_path, granularity, alone):
    if alone:
        config = ModConfig(version=1, granularity=granularity, layers=LAYERS, base_model=str(base_dir))
        checkpoint = write_routers(tmp_path / "routers", config, random_routers(config, 32))
    elif granularity == "block_static":
        shutil.rmtree(checkpoint)
        checkpoint = routed(granularity)
    (checkpoint / "train_command.txt").write_text("router-tuning train")
    (checkpoint / "evaluation.json").write_text(EVALUATION)
    before = content(checkpoint)
    assert patch(checkpoint, data_file, "--output", str(tmp_path / "out")) == 0
    assert content(checkpoint) == before
    assert patch(checkpoint, data_file) == 0  # the same, in place
    other, own = content(tmp_path / "out"), content(checkpoint)
    for name in ("README.md", "patches.json"):  # which name what was typed
        assert other.pop(name).replace(f" --output {tmp_path}/out".encode(), b"") == own.pop(name)
    assert own.pop("evaluation.before_patch.json") == EVALUATION.encode()
    assert other == own and other["train_command.txt"] == b"router-tuning train"


def test_router_only_and_full_give_the_same(checkpoint, base_dir, data_file, tmp_path):
    stored = read_mod_config(checkpoint)
    alone = write_routers(tmp_path / "routers", stored, router_weights(load_reference(checkpoint)))
    assert patch(checkpoint, data_file) == 0
    assert patch(alone, data_file, "--model", str(base_dir)) == 0
    full = tmp_path / "full"
    assert main(["export", "--model", str(base_dir), "--routers", str(alone), "--output", str(full)]) == 0
    assert (full / "routers.safetensors").read_bytes() == (checkpoint / "routers.safetensors").read_bytes()
    assert read_json(full / "patches.json")["layers"] == read_json(checkpoint / "patches.json")["layers"]
    assert "## Patches" in (full / "README.md").read_text()
    assert torch.equal(
        reference_logits(load_reference(full), PROMPT, 5), reference_logits(load_reference(checkpoint), PROMPT, 5)
    )


def test_a_refit_of_another_rank(checkpoint, data_file, tmp_path):
    assert patch(checkpoint, data_file, rank=5) == 0 and patch(checkpoint, data_file, rank=0) == 0
    zero = load_file(checkpoint / "routers.safetensors")
    assert read_mod_config(checkpoint).patch.rank == 0 and not [name for name in zero if "down" in name]
    assert patch(checkpoint, data_file, rank=5) == 0
    again = load_file(checkpoint / "routers.safetensors")
    assert patch(checkpoint, data_file, "--output", str(tmp_path / "o"), rank=5) == 0
    assert all(torch.equal(again[n], t) for n, t in load_file(tmp_path / "o/routers.safetensors").items())


def test_calibration_stays_and_is_questioned_where_it_may_have_moved(base_dir, data_file, tmp_path, caplog):
    for window in (None, 4):
        more = {} if window is None else {"version": 2, "window": window}
        checkpoint = routed_checkpoint(base_dir, tmp_path / f"{window}", "attn_sequence", LAYERS, seed=3, **more)
        assert main(["calibrate", str(checkpoint), "--data", str(data_file), "--target-capacity", "0.5"]) == 0
        before, limits = (checkpoint / "calibration.json").read_bytes(), read_mod_config(checkpoint).limits
        caplog.clear()
        assert patch(checkpoint, data_file) == 0
        assert (checkpoint / "calibration.json").read_bytes() == before
        config = read_mod_config(checkpoint)
        assert config.limits == limits and config.window == window and read_calibration(checkpoint, config)
        assert ("run router-tuning calibrate again" in caplog.text) == (window is None)
    assert main(["calibrate", str(checkpoint), "--data", str(data_file), "--target-capacity", "0.3"]) == 0
    assert read_mod_config(checkpoint).patch.rank == 3  # and calibration keeps the patches
    assert "## Patches" in (checkpoint / "README.md").read_text()


def test_a_static_drop_with_patches(base_dir, data_file, tmp_path, capsys):
    words = ["export", "--model", str(base_dir), "--data", str(data_file), "--max-samples", "20"]
    assert main([*words, "--drop-attention", "2", "--output", str(tmp_path / "plain")]) == 0
    assert main([*words, "--drop-attention", "2", "--patch-rank", "4", "--output", str(tmp_path / "c")]) == 0
    plain, config = read_mod_config(tmp_path / "plain"), read_mod_config(tmp_path / "c")
    assert config.to_dict() == plain.to_dict() | {"version": 2, "patch": {"rank": 4}}
    assert "of its output's variance on held-out tokens" in capsys.readouterr().out
    assert "--patch-rank 4" in read_json(tmp_path / "c/patches.json")["command"]
    assert "## Patches" in (tmp_path / "c/README.md").read_text()
    flags = ["--max-samples", "20", "--max-length", "1024", "--eval-fraction", "0"]
    assert patch(tmp_path / "plain", data_file, *flags, rank=4) == 0  # the two ways are one
    found = [load_file(tmp_path / name / "routers.safetensors") for name in ("plain", "c")]
    assert all(torch.equal(found[0][name], tensor) for name, tensor in found[1].items())
    for more, message in (
        (["--drop-attention", "2", "--patch-rank", "33"], "--patch-rank 33: the model's hidden size is 32"),
        (["--drop-attention", "2", "--patch-rank", "-1"], "--patch-rank -1: 0 or more is needed"),
        (["--granularity", "attn_static", "--patch-rank", "2"], "--patch-rank says nothing here: it needs --drop-att"),
        (["--granularity", "attn_static", "--bf16", "false"], "--bf16 says nothing here: it needs --drop-attention"),
        (
            ["--drop-attention", "2", "--distilled-passes", "1"],
            "--distilled-passes says nothing here: it needs --patch",
        ),
    ):
        capsys.readouterr()
        given = words if "--drop-attention" in more else words[:3]
        assert main([*given, *more, "--output", str(tmp_path / "no")]) == 2
        assert message in one_error(capsys) and not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rank", "33"], "--rank 33: the model's hidden size is 32, so no patch has a higher rank"),
        (["--rank", "-1"], "--rank -1: 0 or more is needed"),
        (["--max-samples", "9"], "chat.jsonl: 9 usable samples; patches need 10, one of them held out"),
        (["--max-length", "2"], "chat.jsonl: no usable calibration sample (0 of 141 rows"),
        (["--max-samples", "0"], "--max-samples 0: 1 or more is needed"),
        (["--eval-fraction", "1"], "--eval-fraction 1: a number from 0 to below 1 is needed"),
        (["--output", "."], ".: exists already; choose another output or remove it"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl: no such file or directory"),
    ],
)
def test_bad_flags_are_one_line(checkpoint, data_file, capsys, flags, message):
    before = content(checkpoint)
    assert patch(checkpoint, data_file, *flags) == 2
    assert message in one_error(capsys)
    assert content(checkpoint) == before


def test_checkpoints_that_cannot_be_patched(checkpoint, base_dir, data_file, tmp_path, capsys):
    def refused(directory: Path, message: str, *flags: str) -> None:
        before = content(directory) if directory.is_dir() else None
        capsys.readouterr()
        assert patch(directory, data_file, *flags) == 2
        assert message in one_error(capsys)
        assert before is None or content(directory) == before

    refused(tmp_path / "nowhere", "nowhere: no such checkpoint directory")
    refused(base_dir, "key 'mod_config' is missing: this model routes nothing")
    olmoe = tiny_model(tmp_path / "olmoe", "olmoe", num_hidden_layers=2, num_experts=4, num_experts_per_tok=2)
    experts = routed_checkpoint(olmoe, tmp_path / "e", "expert_token", [1])
    refused(experts, "--rank: expert_token has no patches; attn_*, mlp_* and block_* may have them", "--rank", "0")
    config = ModConfig(version=1, granularity="attn_sequence", layers=LAYERS)
    alone = write_routers(tmp_path / "alone", config, random_routers(config, 32))
    refused(alone, "alone: names no base model; pass it with --model")
    other = write_routers(tmp_path / "other", config, random_routers(config, 16))
    refused(other, "has shape [1, 16], this model needs [1, 32]", "--model", str(base_dir))
    tensors = load_file(checkpoint / "model.safetensors") | load_file(checkpoint / "routers.safetensors")
    (checkpoint / "model.safetensors").unlink()  # it is the base's
    (checkpoint / "routers.safetensors").unlink()
    (checkpoint / "model.safetensors.index.json").unlink()
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    refused(checkpoint, "holds routers among the base's weights; export the checkpoint from its base again")


def test_too_few_tokens_behind_a_window(routed, data_file, capsys):
    checkpoint = routed("attn_sequence", version=2, window=10**6)
    before = content(checkpoint)
    assert patch(checkpoint, data_file, "--max-samples", "10", rank=32) == 2
    assert "tokens behind the window of 1000000 tokens to fit patches of rank 32 on; give more" in one_error(capsys)
    assert content(checkpoint) == before
    assert patch(checkpoint, data_file, "--max-samples", "10", rank=2) == 0


def test_a_base_that_overflows_is_named(checkpoint, data_file, capsys):
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"].fill_(torch.finfo(torch.float32).max)
    (checkpoint / "model.safetensors").unlink()
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    before = content(checkpoint)
    assert patch(checkpoint, data_file) == 2
    assert "layer 1: activations are not finite; the base model overflows on these samples" in one_error(capsys)
    assert content(checkpoint) == before


@pytest.mark.parametrize("command", ["patch", "calibrate", "export"])
def test_tokens_that_the_model_lacks(checkpoint, base_dir, data_file, tmp_path, capsys, command):
    """A tokenizer of another model; an embedding that is not there would be a traceback."""
    where = checkpoint
    if command == "export":
        where = tmp_path / "base"
        shutil.copytree(base_dir, where)
    tensors = {n: t[:20] if t.shape[0] == 128 else t for n, t in load_file(where / "model.safetensors").items()}
    (where / "model.safetensors").unlink()
    save_file({n: t.contiguous() for n, t in tensors.items()}, where / "model.safetensors", metadata={"format": "pt"})
    edit_json(where / "config.json", vocab_size=20)
    words = {
        "patch": ["patch", str(where), "--rank", "2"],
        "calibrate": ["calibrate", str(where), "--target-capacity", "0.5"],
        "export": ["export", "--model", str(where), "--drop-attention", "1", "--output", str(tmp_path / "out")],
    }[command]
    assert main([*words, "--data", str(data_file)]) == 2
    assert "its tokenizer gives token" in one_error(capsys) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("output", [False, True])
@pytest.mark.parametrize(
    "moment", ["router_tuning.patches.fit", "vllm_mod.checkpoint._save_tensors", "router_tuning.card.write"]
)
def test_an_interrupt_leaves_all_or_nothing(checkpoint, data_file, tmp_path, monkeypatch, capsys, moment, output):
    package, name = moment.rsplit(".", 1)
    module = __import__(package, fromlist=[name])
    inner = getattr(module, name)

    def pressed(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        return inner(*args, **kwargs)

    before, more = content(checkpoint), ["--output", str(tmp_path / "out")] if output else []
    monkeypatch.setattr(module, name, pressed)
    assert patch(checkpoint, data_file, *more) == 130
    monkeypatch.undo()
    assert "interrupted" in capsys.readouterr().err
    written = tmp_path / "out" if output else checkpoint
    if name == "fit":
        assert not (tmp_path / "out").exists()
    else:  # what was begun is ended
        assert len(patch_weights(load_reference(written))) == 3 and (written / "patches.json").is_file()
    assert (output is False and name != "fit") or content(checkpoint) == before
    assert {path.name for path in tmp_path.iterdir()} <= {"c", "out"}
    assert not list(checkpoint.rglob(".*"))


def test_a_full_disk_leaves_the_checkpoint_as_it_was(checkpoint, data_file, monkeypatch, capsys):
    before = content(checkpoint)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vllm_mod.checkpoint.save_file", full)
    assert patch(checkpoint, data_file) == 2
    assert "cannot be written" in one_error(capsys)
    assert content(checkpoint) == before


def test_the_reference_is_what_is_written(base_dir, data_file, tmp_path):
    """Tensors written by hand from what is in the file give the same answers: nothing is lost on the way."""
    checkpoint = routed_checkpoint(base_dir, tmp_path / "c", "block_sequence", LAYERS, seed=3, version=2, window=3)
    assert patch(checkpoint, data_file) == 0
    config, shape = read_mod_config(checkpoint), BaseShape.of(read_json(base_dir / "config.json"), "")
    patches = read_patches(checkpoint, config, shape)
    model = load_reference(checkpoint)
    again = write_checkpoint(base_dir, tmp_path / "again", config, router_weights(model), patches=patches)
    assert torch.equal(reference_logits(load_reference(again), PROMPT, 5), reference_logits(model, PROMPT, 5))


def test_help_teaches(capsys):
    with pytest.raises(SystemExit):
        main(["patch", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "usage: router-tuning patch CHECKPOINT --data DATA [flags]" in text
    assert "stand in for a sublayer where it is skipped" in text and "0: the bias alone" in text
    with pytest.raises(SystemExit):
        main(["patch", "--data", "x"])
    assert "the checkpoint comes first: router-tuning patch CHECKPOINT --data DATA" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["calibration.json", "evaluation.json", "trainer_log.json"])
def test_a_record_that_cannot_be_read(checkpoint, data_file, capsys, name):
    (checkpoint / name).write_text("{")
    before = content(checkpoint)
    assert patch(checkpoint, data_file) == 2
    assert f"{name}: cannot be read" in one_error(capsys)
    assert content(checkpoint) == before
