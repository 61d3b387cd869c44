"""Calibration: the kept ratio that is asked for, at every granularity, and nothing else of the checkpoint touched."""

from __future__ import annotations

import json
import os
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file, save_file

from router_tuning.cli import main
from router_tuning.data import read_sources, tokenize
from router_tuning.fitting import measure
from router_tuning.model import load_base, load_reference, reference_decisions, reference_logits
from tests.support.models import random_routers, routed_checkpoint, tiny_model
from vllm_mod.calibration import read_calibration
from vllm_mod.checkpoint import read_mod_config, write_checkpoint, write_routers
from vllm_mod.config import ModConfig
from vllm_mod.dial import requested_cutoffs
from vllm_mod.tensors import Patch


def calibrate(checkpoint: Path, data: Path, *more: str, target: str = "0.5") -> int:
    flags = ["--data", str(data), "--target-capacity", target, "--max-length", "64", *more]
    return main(["calibrate", str(checkpoint), *flags])


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """Questions that share no beginning, so that no two scores are equal."""
    path, random = tmp_path_factory.mktemp("texts") / "texts.jsonl", Random(0)
    rows = []
    for _ in range(60):
        words = ["".join(random.choices("abcdefghijklmnopqrstuvwxyz ", k=random.randint(8, 24))) for _ in range(2)]
        rows.append({"prompt": words[0], "completion": words[1]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def routed(base_dir, tmp_path):
    def make(granularity: str, layers: tuple[int, ...] = (1, 2, 3)) -> Path:
        return routed_checkpoint(base_dir, tmp_path / granularity, granularity, layers, seed=3)

    return make


def record_of(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "calibration.json").read_text())


def served_kept(checkpoint: Path, data: Path) -> dict[int, float]:
    """Kept ratio per layer, one sequence at a time by the reference."""
    return kept_by_layer(load_reference(checkpoint), read_mod_config(checkpoint), data, checkpoint)


def kept_by(model, config: ModConfig, data: Path, checkpoint: Path) -> float:
    found = kept_by_layer(model, config, data, checkpoint)
    return sum(found.values()) / len(found)


def kept_by_layer(model, config: ModConfig, data: Path, checkpoint: Path) -> dict[int, float]:
    from transformers import AutoTokenizer

    samples, _ = tokenize(read_sources([str(data)])[str(data)], AutoTokenizer.from_pretrained(checkpoint), 64)
    keep: dict[int, list[bool]] = {layer: [] for layer in config.layers}
    for sample in samples:
        ids = sample["input_ids"][: sample["prompt_len"]] if config.policy.by_request else sample["input_ids"]
        reference_logits(model, ids, sample["prompt_len"])
        for layer, decision in reference_decisions(model).items():
            keep[layer] += decision.flatten().tolist()
    return {layer: sum(k) / len(k) for layer, k in keep.items()}


@pytest.mark.parametrize(
    ("granularity", "per_layer"), [("attn_sequence", False), ("mlp_sequence", True), ("block_token", True)]
)
def test_the_kept_ratio_is_the_one_asked_for(routed, texts, granularity, per_layer, capsys):
    checkpoint = routed(granularity)
    more = ("--per-layer", "true") if per_layer else ()
    assert calibrate(checkpoint, texts, "--operating-points", "0.25", "0.7", *more, target="0.3") == 0
    found = served_kept(checkpoint, texts)
    mean = sum(found.values()) / 3
    record = record_of(checkpoint)
    for kept in found.values() if per_layer else [mean]:
        assert kept == pytest.approx(0.3, abs=0.005)
    assert record["kept"] == pytest.approx(mean, abs=1e-3)
    assert record["kept_per_layer"] == pytest.approx({str(k): v for k, v in found.items()}, abs=1e-3)
    threshold = read_mod_config(checkpoint).threshold
    assert record["threshold"] == (list(threshold) if per_layer else threshold)
    assert (record["samples"], record["per_layer"], record["target_capacity"]) == (60, per_layer, 0.3)
    assert [p["target"] for p in record["operating_points"]] == [0.7, 0.25]
    for point in record["operating_points"]:
        assert point["kept"] == pytest.approx(point["target"], abs=0.005 if granularity != "attn_sequence" else 0.01)
    lines = [line for line in capsys.readouterr().out.splitlines() if "--additional-config" in line]
    knobs = [json.loads(line.split("--additional-config ")[1].strip("'")) for line in lines]
    assert [k["mod"]["threshold"] for k in knobs] == [p["threshold"] for p in record["operating_points"]]


def large_scores(base_dir: Path, output: Path, **config) -> Path:
    """Scores of several hundred: a sigmoid is 1.0 for all of them."""
    settings = {"version": 1, "granularity": "attn_sequence", "layers": [1, 2, 3], **config}
    mod = ModConfig.parse(settings, "test")
    weights = {i: 400 * w for i, w in random_routers(mod, 32, seed=3).items()}
    return write_checkpoint(base_dir, output, mod, weights)


def test_scores_that_no_threshold_can_tell_apart_make_a_version_2_checkpoint(base_dir, texts, tmp_path, caplog):
    checkpoint = large_scores(base_dir, tmp_path / "c", threshold=0.0)
    assert calibrate(checkpoint, texts, "--operating-points", "0.9", "0.1", target="0.3") == 0
    config, record = read_mod_config(checkpoint), record_of(checkpoint)
    assert (config.version, config.criterion, config.threshold) == (2, "cutoff", None)
    assert record["cutoff"] == config.cutoff and "threshold" not in record
    assert [m for m in caplog.messages if "no threshold tells these scores apart; written as version 2" in m]
    found = served_kept(checkpoint, texts)
    assert sum(found.values()) / 3 == pytest.approx(0.3, abs=0.005) == record["kept"]
    assert any("threshold" not in point for point in record["operating_points"])
    assert "| cutoff |" in (checkpoint / "README.md").read_text()


def test_thresholds_stay_where_they_can_say_it(routed, texts, caplog):
    checkpoint = routed("attn_sequence")
    assert calibrate(checkpoint, texts, "--operating-points", "0.6") == 0
    config, (point,) = read_mod_config(checkpoint), record_of(checkpoint)["operating_points"]
    assert (config.version, config.criterion) == (1, "threshold")
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    assert point.keys() == {"target", "kept", "threshold", "cutoff"}


@pytest.mark.parametrize("per_layer", [False, True])
def test_version_2_gets_cutoffs(base_dir, texts, tmp_path, per_layer):
    checkpoint = large_scores(base_dir, tmp_path / "c", version=2)
    more = ("--per-layer", "true") if per_layer else ()
    assert calibrate(checkpoint, texts, "--operating-points", "0.7", *more, target="0.4") == 0
    config, found = read_mod_config(checkpoint), served_kept(checkpoint, texts)
    assert isinstance(config.cutoff, tuple if per_layer else float)
    for kept in found.values() if per_layer else [sum(found.values()) / 3]:
        assert kept == pytest.approx(0.4, abs=0.01)
    assert calibrate(checkpoint, texts, "--operating-points", "0.7", target="0") == 0  # the ends stay exact
    assert read_mod_config(checkpoint).threshold == 1.0 and set(served_kept(checkpoint, texts).values()) == {0.0}


def test_cutoffs_per_layer_move_together(base_dir, texts, tmp_path):
    prior = [-300.0, 0.0, 250.0]
    checkpoint = large_scores(base_dir, tmp_path / "c", version=2, cutoff=prior)
    assert calibrate(checkpoint, texts, "--operating-points", "0.7", "0.2", target="0.5") == 0
    record = record_of(checkpoint)
    for cutoffs in [read_mod_config(checkpoint).cutoff, *(p["cutoff"] for p in record["operating_points"])]:
        moved = [c - p for c, p in zip(cutoffs, prior, strict=True)]
        assert moved == pytest.approx([moved[0]] * 3)
    found = served_kept(checkpoint, texts)
    assert sum(found.values()) / 3 == pytest.approx(0.5, abs=0.01) == record["kept"]


@pytest.mark.parametrize("window", [3, 10**6])
def test_with_a_window_one_pass_answers_for_all_ratios(base_dir, texts, tmp_path, window, monkeypatch, capsys):
    config = {"version": 2, "granularity": "block_sequence", "layers": [1, 2, 3], "window": window}
    mod = ModConfig.parse(config | {"patch": {"rank": 2}}, "test")
    patch = Patch(torch.ones(32), torch.ones(2, 32), torch.ones(32, 2))
    checkpoint = write_checkpoint(
        base_dir, tmp_path / "c", mod, random_routers(mod, 32, seed=3), patches=dict.fromkeys((1, 2, 3), patch)
    )
    lengths = []
    monkeypatch.setattr("router_tuning.fitting.measure", lambda *a: lengths.append(1) or measure(*a))
    assert calibrate(checkpoint, texts, "--operating-points", "0.75", "0.25", target="0.5") == 0
    assert len(lengths) == 1
    found, record = served_kept(checkpoint, texts), record_of(checkpoint)
    assert sum(found.values()) / 3 == pytest.approx(record["kept"], abs=1e-6) == pytest.approx(0.5, abs=0.01)
    said = capsys.readouterr().out
    assert '"vllm_xargs": {"mod_kept": 0.75}' in said and '{"mod": {"threshold": ' in said
    # A ratio that was not calibrated: the dial's cutoffs keep about as much.
    config, table = read_mod_config(checkpoint), read_calibration(checkpoint, read_mod_config(checkpoint))
    for kept in (0.6, 0.4, 0.9):
        cutoffs = requested_cutoffs({"mod_kept": kept}, config, table)
        dialled = load_reference(checkpoint, config=config.with_cutoff(cutoffs))
        assert kept_by(dialled, config, texts, checkpoint) == pytest.approx(kept, abs=0.12)


def test_experts(data_file, tmp_path):
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 3, "head_dim": None}
    base = tiny_model(tmp_path / "base", "olmoe", **experts)
    checkpoint = routed_checkpoint(base, tmp_path / "mod", "expert_token", (1, 2))
    assert calibrate(checkpoint, data_file, "--operating-points", "0.8", "--max-samples", "40", target="0.6") == 0
    assert record_of(checkpoint)["kept"] == pytest.approx(0.6, abs=0.005)


def test_only_the_threshold_and_the_record_change(routed, base_dir, data_file):
    checkpoint = routed("attn_sequence")
    linked = checkpoint.parent / "linked.json"
    os.link(checkpoint / "config.json", linked)
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    config = json.loads(before["config.json"])
    assert calibrate(checkpoint, data_file, "--operating-points", "0.5") == 0
    after = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed - {"README.md"} == {"config.json", "calibration.json"}
    assert linked.read_bytes() == before["config.json"]
    config["mod_config"]["threshold"] = record_of(checkpoint)["threshold"]
    assert json.loads(after["config.json"]) == config
    assert load_file(checkpoint / "model.safetensors").keys() == load_file(base_dir / "model.safetensors").keys()


def test_the_ends_keep_and_skip_everything(routed, data_file):
    checkpoint = routed("attn_token")
    for target, threshold in (("0", 1.0), ("1", 0.0)):
        assert calibrate(checkpoint, data_file, "--max-samples", "20", "--operating-points", "0.5", target=target) == 0
        assert read_mod_config(checkpoint).threshold == threshold
        assert record_of(checkpoint)["kept"] == float(target)


def test_routers_alone(base_dir, data_file, tmp_path, capsys):
    config = {"version": 1, "granularity": "attn_sequence", "layers": [1, 2], "base_model": str(base_dir)}
    routers = random_routers(ModConfig.parse(config, "test"), 32)
    write_routers(tmp_path / "routers", ModConfig.parse(config, "test"), routers)
    assert calibrate(tmp_path / "routers", data_file, "--operating-points", "0.5", target="0.4") == 0
    stored = json.loads((tmp_path / "routers" / "mod_config.json").read_text())
    assert stored == config | {"threshold": record_of(tmp_path / "routers")["threshold"]}
    del config["base_model"]
    write_routers(tmp_path / "nameless", ModConfig.parse(config, "test"), routers)
    assert calibrate(tmp_path / "nameless", data_file) == 2
    assert "--model" in capsys.readouterr().err


def test_routers_alone_are_calibrated_with_the_adapter_they_were_trained_with(base_dir, texts, tmp_path):
    """The kept ratio of what is served: the same routers without the adapter keep something else."""
    from peft import LoraConfig

    from router_tuning.lora import adapter_tensors, attach_adapter, write_adapter

    data = {"version": 1, "granularity": "attn_sequence", "layers": [1, 2], "base_model": str(base_dir)}
    config = ModConfig.parse(data, "test")
    settings = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["down_proj", "o_proj"])
    model = load_base(base_dir, torch.float32)
    attach_adapter(model, settings)
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(t.shape, generator=generator) for name, t in adapter_tensors(model).items()}
    for name in ("with", "without"):
        write_routers(tmp_path / name, config, random_routers(config, 32))
    write_adapter(tmp_path / "with" / "adapter", settings, tensors)
    for name in ("with", "without"):
        assert calibrate(tmp_path / name, texts, "--operating-points", "0.5", target="0.4") == 0
        parts = [
            "--model",
            str(base_dir),
            "--routers",
            str(tmp_path / name),
            "--output",
            str(tmp_path / f"{name}-full"),
        ]
        assert main(["export", *parts]) == 0
        kept = served_kept(tmp_path / f"{name}-full", texts)
        assert sum(kept.values()) / len(kept) == pytest.approx(record_of(tmp_path / name)["kept"], abs=1e-3)
        assert record_of(tmp_path / name)["kept"] == pytest.approx(0.4, abs=0.02)
    thresholds = [read_mod_config(tmp_path / name).threshold for name in ("with", "without")]
    assert abs(thresholds[0] - thresholds[1]) > 0.05


def test_routers_alone_with_the_bases_config_beside_them(base_dir, data_file, tmp_path):
    data = {"version": 1, "granularity": "attn_sequence", "layers": [1, 2], "base_model": str(base_dir)}
    config = ModConfig.parse(data, "test")
    out = write_routers(tmp_path / "routers", config, random_routers(config, 32))
    (out / "config.json").write_bytes((base_dir / "config.json").read_bytes())
    assert calibrate(out, data_file, "--operating-points", "0.5", target="0.4") == 0
    assert read_mod_config(out).threshold == record_of(out)["threshold"]
    assert (out / "config.json").read_bytes() == (base_dir / "config.json").read_bytes()


def test_a_held_out_part(routed, data_file):
    checkpoint = routed("attn_sequence")
    assert calibrate(checkpoint, data_file, "--operating-points", "0.5", "--eval-fraction", "0.25") == 0
    assert record_of(checkpoint)["samples"] == 36


def test_what_cannot_be_calibrated_is_refused_before_the_work(routed, base_dir, data_file, tmp_path, capsys):
    checkpoint = routed("attn_sequence")
    static = routed_checkpoint(base_dir, tmp_path / "static", "attn_static", (1, 2))
    few = tmp_path / "few.jsonl"
    few.write_text("".join(data_file.read_text().splitlines(keepends=True)[:7]))
    before = {path: path.read_bytes() for path in (checkpoint / "config.json", static / "config.json")}
    cases = [
        ((tmp_path / "absent", data_file), {}, "absent: no such checkpoint"),
        ((base_dir, data_file), {}, "key 'mod_config' is missing"),
        ((static, data_file), {}, "attn_static has no routers"),
        ((checkpoint, tmp_path / "no.jsonl"), {}, "no.jsonl: no such file"),
        ((checkpoint, few), {}, "few.jsonl: 7 usable prompts"),
        ((checkpoint, data_file), {"target": "1.01"}, "--target-capacity 1.01"),
        ((checkpoint, data_file), {"target": "nan"}, "--target-capacity nan"),
        ((checkpoint, data_file, "--operating-points", "0.5", "-1"), {}, "--operating-points -1"),
        ((checkpoint, data_file, "--eval-fraction", "1"), {}, "--eval-fraction 1"),
        ((checkpoint, data_file, "--max-samples", "0"), {}, "--max-samples 0"),
    ]
    for arguments, keywords, message in cases:
        assert calibrate(*arguments, **keywords) == 2, message
        errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
        assert len(errors) == 1 and message in errors[0]
    assert all(path.read_bytes() == text for path, text in before.items())
    assert not (checkpoint / "calibration.json").exists()
    with pytest.raises(SystemExit):
        main(["calibrate", str(checkpoint), "--data", str(data_file)])
    assert "--target-capacity" in capsys.readouterr().err


def test_a_model_that_overflows_is_named(routed, data_file, capsys):
    checkpoint = routed("attn_sequence")
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"].fill_(torch.finfo(torch.float32).max)
    (checkpoint / "model.safetensors").unlink()  # it is the base's
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    before = (checkpoint / "config.json").read_bytes()
    assert calibrate(checkpoint, data_file, "--max-samples", "20") == 2
    assert "layer 1: scores are not finite; the base model overflows on these samples" in capsys.readouterr().err
    assert (checkpoint / "config.json").read_bytes() == before and not (checkpoint / "calibration.json").exists()


def test_an_interrupt_leaves_the_checkpoint_as_it_was(routed, data_file, monkeypatch):
    checkpoint = routed("attn_sequence")
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("router_tuning.calibrate.fit", interrupted)
    assert calibrate(checkpoint, data_file) == 130
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before


def test_padding_is_never_counted(routed):
    checkpoint = routed("attn_token")
    model = load_reference(checkpoint)
    batch = {
        "input_ids": torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
        "prompt_mask": torch.tensor([[True, True, False, False], [True, False, False, False]]),
    }
    found = measure(model, [batch])
    assert {layer: pairs[:, 1].tolist() for layer, pairs in found.pairs.items()} == {i: [4, 2] for i in (1, 2, 3)}
    assert all(len(scores) == 6 for scores in found.scores.values())
