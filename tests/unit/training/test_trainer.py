"""Training runs of seconds: what is learnt, saved, resumed, and what errors look like."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from router_tuning.cli import main
from router_tuning.data import Collator, read_sources, split_tail, tokenize
from router_tuning.model import (
    attach_routers,
    freeze_base,
    load_base,
    load_reference,
    reference_decisions,
    reference_logits,
)
from router_tuning.trainer import RouterTrainer
from vllm_mod.checkpoint import read_mod_config, write_routers
from vllm_mod.config import ModConfig

FAST = ["--max-train-samples", "64", "--max-length", "32", "--layers", "1-2", "--per-device-train-batch-size", "8"]
FAST += ["--disable-tqdm", "true", "--use-cpu", "true", "--logging-steps", "2"]


def train(base: Path, data: Path, output: Path, *more: str) -> int:
    return main(["train", "--model", str(base), "--data", str(data), "--output", str(output), *FAST, *more])


def routers_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "routers.safetensors")


def test_a_run_writes_a_full_checkpoint_with_its_record(base_dir, data_file, tmp_path, capsys):
    assert train(base_dir, data_file, tmp_path / "out") == 0
    out = tmp_path / "out"
    config = read_mod_config(out)
    assert (config.granularity, config.layers, config.target_capacity) == ("attn_sequence", (1, 2), 0.5)
    assert config.window == 64 and config.patch is not None and config.patch.rank == 4  # an eighth of 32
    assert json.loads((out / "config.json").read_text())["architectures"] == ["LlamaMoDForCausalLM"]
    routers = routers_of(out)
    parts = ("weight", "patch.bias", "patch.down.weight", "patch.up.weight")
    assert set(routers) == {f"model.layers.{layer}.router.{part}" for layer in (1, 2) for part in parts}
    assert all(w.dtype == torch.float32 and w.abs().sum() > 0 for w in routers.values())
    base, written = load_file(base_dir / "model.safetensors"), load_file(out / "model.safetensors")
    assert all(torch.equal(base[name], written[name]) for name in base)
    log = json.loads((out / "trainer_log.json").read_text())
    assert set(log["held_out"]["kept_per_layer"]) == {"1", "2"}
    assert [s["step"] for s in log["steps"]] == list(range(1, 9)) and {"lambda", "kept"} <= set(log["steps"][0])
    assert log["data"]["training"]["used"] == 64
    assert all(0 < s["loss"] < 20 for s in log["steps"])
    assert any("kept" in entry and "lambda" in entry for entry in log["log"])
    assert "router-tuning train" in (out / "train_command.txt").read_text()
    arguments = json.loads((out / "training_args.json").read_text())
    assert arguments["seed"] == 42 and not any("dir" in key for key in arguments if key != "run_dir")
    assert os.uname().nodename not in "".join(f.read_text() for f in out.glob("*.json") if "train" in f.name)
    assert not (tmp_path / "out.run").exists()
    assert "kept on held-out data" in capsys.readouterr().out
    assert reference_logits(load_reference(out), [3, 4, 5], 2).isfinite().all()


@pytest.mark.parametrize("granularity", ["attn_token", "block_sequence", "mlp_token"])
def test_same_seed_same_routers(base_dir, data_file, tmp_path, granularity):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert train(base_dir, data_file, tmp_path / name, "--granularity", granularity, "--seed", seed) == 0
    a, b, c = (routers_of(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not all(torch.equal(a[k], c[k]) for k in a)


def interrupt_after_step(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by Ctrl-C."""
    after_step = RouterTrainer.after_step

    def interrupt(self):
        after_step(self)
        if self.state.global_step == number:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(RouterTrainer, "after_step", interrupt)


def test_an_interrupted_run_resumes_to_the_same_routers(base_dir, data_file, tmp_path, monkeypatch, capsys):
    assert train(base_dir, data_file, tmp_path / "whole") == 0
    interrupt_after_step(3, monkeypatch)
    assert train(base_dir, data_file, tmp_path / "parts") == 130
    monkeypatch.undo()
    assert "--resume" in capsys.readouterr().err
    assert not (tmp_path / "parts").exists()
    states = list((tmp_path / "parts.run").glob("checkpoint-*"))
    assert not any((state / "model.safetensors").exists() for state in states)  # routers only
    assert train(base_dir, data_file, tmp_path / "parts") == 2
    assert "--resume" in capsys.readouterr().err
    assert train(base_dir, data_file, tmp_path / "parts", "--resume", "true") == 0
    whole, parts = routers_of(tmp_path / "whole"), routers_of(tmp_path / "parts")
    assert all(torch.equal(whole[k], parts[k]) for k in whole)
    logs = [json.loads((tmp_path / n / "trainer_log.json").read_text())["steps"] for n in ("whole", "parts")]
    assert logs[0] == logs[1]


def test_accumulated_micro_batches_equal_one_batch(base_dir, data_file, tmp_path):
    assert train(base_dir, data_file, tmp_path / "one", "--max-steps", "1", "--capacity-loss", "paper") == 0
    more = ("--per-device-train-batch-size", "4", "--gradient-accumulation-steps", "2")
    assert train(base_dir, data_file, tmp_path / "two", "--max-steps", "1", "--capacity-loss", "paper", *more) == 0
    one, two = (json.loads((tmp_path / n / "trainer_log.json").read_text()) for n in ("one", "two"))
    assert one["steps"][0]["kept"] == two["steps"][0]["kept"]
    # Each micro-batch's part is weighed with its share of all supervised tokens.
    assert one["steps"][0]["loss"] == pytest.approx(two["steps"][0]["loss"], rel=1e-5)
    assert one["steps"][0]["scale"] == pytest.approx(two["steps"][0]["scale"], rel=0.2)  # a mean of roots of means
    for name, weight in routers_of(tmp_path / "one").items():
        torch.testing.assert_close(weight, routers_of(tmp_path / "two")[name], atol=1e-5, rtol=1e-3)


def test_held_out_measures_are_those_of_a_plain_loop(base_dir, data_file, tmp_path, tokenizer):
    from router_tuning.arguments import RouterTrainingArguments
    from router_tuning.loss import CapacityLoss

    _, rows = split_tail(read_sources([str(data_file)]), 0.1)
    dataset, _ = tokenize(rows, tokenizer, 32)
    model = load_base(base_dir, torch.float32)
    config = ModConfig.parse({"version": 1, "granularity": "attn_token", "layers": [1, 2]}, "test")
    attach_routers(model, config, {i: torch.randn(1, 32, generator=torch.Generator().manual_seed(i)) for i in (1, 2)})
    freeze_base(model)
    arguments = RouterTrainingArguments(
        output_dir=str(tmp_path), per_device_eval_batch_size=4, use_cpu=True, dataloader_drop_last=True
    )  # of training batches
    assert len(dataset) % 4
    trainer = RouterTrainer(
        model=model, args=arguments, eval_dataset=dataset, data_collator=Collator(2),
        capacity=CapacityLoss("controller", 0.5),
    )  # fmt: skip
    result = trainer.measure()
    losses, keeps = [], {1: [], 2: []}
    for sample in dataset:
        logits = reference_logits(model.eval(), sample["input_ids"], sample["prompt_len"])
        for t, label in enumerate(sample["labels"]):
            if label >= 0 and t:
                losses.append(-float(logits[t - 1].log_softmax(-1)[label]))
        for layer, keep in reference_decisions(model).items():
            keeps[layer] += keep.flatten().tolist()
    assert result.loss == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert result.kept == pytest.approx({layer: sum(k) / len(k) for layer, k in keeps.items()})
    assert trainer.measure(threshold=0.0).mean_kept == 1.0
    assert model._mod_routing.config == config


def test_export(base_dir, tmp_path, capsys):
    config = ModConfig.parse({"version": 1, "granularity": "mlp_token", "layers": [0, 3]}, "test")
    write_routers(tmp_path / "routers", config, {i: torch.ones(1, 32) for i in (0, 3)})
    common = ["export", "--model", str(base_dir)]
    assert main([*common, "--routers", str(tmp_path / "routers"), "--output", str(tmp_path / "a")]) == 0
    assert read_mod_config(tmp_path / "a") == config and len(routers_of(tmp_path / "a")) == 2
    static = ["--granularity", "attn_static", "--layers", "1", "2", "--output", str(tmp_path / "b")]
    assert main([*common, *static]) == 0
    assert read_mod_config(tmp_path / "b").layers == (1, 2) and not (tmp_path / "b/routers.safetensors").exists()
    assert not hasattr(load_reference(tmp_path / "b").model.layers[1], "router")
    assert main([*common, "--output", str(tmp_path / "c")]) == 2
    assert "--routers is missing" in capsys.readouterr().err


def one_error(capsys) -> str:
    lines = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in lines if "error:" in line]
    assert len(errors) == 1 and "Traceback" not in "".join(lines), lines
    return errors[0]


def test_errors_are_one_line_and_nothing_is_left_behind(base_dir, data_file, tmp_path, capsys):
    out = tmp_path / "out"
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "empty.jsonl").write_text("")
    (bad / "silent.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n' * 60)
    unsupported = tmp_path / "unsupported"
    unsupported.mkdir()
    settings = json.loads((base_dir / "config.json").read_text())
    (unsupported / "config.json").write_text(json.dumps(settings | {"architectures": ["GPT2LMHeadModel"]}))
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").write_text("mine")

    cases = [
        ((base_dir, bad / "absent.jsonl", out), "absent.jsonl: no such file"),
        ((base_dir, bad / "empty.jsonl", out), "empty.jsonl: no rows"),
        ((base_dir, bad / "silent.jsonl", out), "silent.jsonl: no usable training sample"),
        ((tmp_path / "no" / "model", data_file, out), "model: no such directory"),
        ((unsupported, data_file, out), "'GPT2LMHeadModel' is not supported; supported: "),
        ((base_dir, data_file, taken), "taken: exists already"),
        ((base_dir, data_file, out, "--layers", "2-4"), "layer 4 is out of range"),
        ((base_dir, data_file, out, "--layers", "two"), "'two' is neither"),
        ((base_dir, data_file, out, "--target-capacity", "1.5"), "target_capacity"),
        ((base_dir, data_file, out, "--granularity", "attn_static"), "router-tuning export"),
        ((base_dir, data_file, out, "--resume", "true"), "no state to resume from"),
    ]
    for arguments, message in cases:
        assert train(*arguments) == 2, message
        assert message in one_error(capsys)
    for arguments, message in [
        (["--no-such-flag", "1"], "--no-such-flag"),
        (["--granularity", "attn"], "invalid choice"),
        (["--max-steps", "x"], "--max-steps"),
    ]:
        try:
            code = train(base_dir, data_file, out, *arguments)
        except SystemExit as stop:
            code = stop.code
        assert code == 2
        assert message in one_error(capsys)
    assert main(["tune"]) == 2
    assert "no command 'tune'" in one_error(capsys)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad", "taken", "unsupported"]
    assert [p.name for p in taken.iterdir()] == ["file"]


def test_training_never_imports_vllm():
    import subprocess
    import sys

    code = (
        "import sys, importlib.abc\n"
        "class No(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, *a):\n"
        "        if name.split('.')[0] == 'vllm': raise ImportError('vllm was asked for')\n"
        "sys.meta_path.insert(0, No())\n"
        "import router_tuning.cli, router_tuning.run, router_tuning.export, router_tuning.model\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])
