"""Costs of layers against a direct measurement, and what `train` routes where no layers are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from router_tuning.cli import main
from router_tuning.data import IGNORED
from router_tuning.model import attach_routers, load_base
from router_tuning.selection import cheapest, measure
from tests.support.architectures import DENSE, EXPERTS
from tests.support.models import tiny_model
from tests.unit.training.test_patches import some_samples
from vllm_mod.architectures import BaseShape
from vllm_mod.config import ModConfig

SHAPES = DENSE | EXPERTS


def shape_of(base: Path) -> BaseShape:
    return BaseShape.of(json.loads((base / "config.json").read_text()), "config.json")


def answered(number: int) -> list[dict[str, object]]:
    """Samples whose second half is the answer."""
    found = []
    for sample in some_samples(number):
        ids = sample["input_ids"]
        half = max(len(ids) // 2, 1)
        found.append({"input_ids": ids, "labels": [IGNORED] * half + list(ids[half:]), "prompt_len": half})
    return found


@torch.no_grad()
@pytest.mark.parametrize("target", ["attn", "mlp", "block"])
@pytest.mark.parametrize("name", SHAPES)
def test_cost_is_what_dropping_does(tmp_path: Path, name: str, target: str) -> None:
    """Each sublayer is really dropped, alone, in a static model, and the whole model is run on one sample at a time."""
    base = tiny_model(tmp_path / "base", name, num_hidden_layers=4, **SHAPES[name])
    samples = answered(7)
    model = load_base(base, torch.float32).eval()
    found = measure(model, samples, shape_of(base), target, None, None, tmp_path, quiet=True).costs()
    assert list(found.values()) == sorted(found.values())

    def predictions(layers: list[int]) -> torch.Tensor:
        model = load_base(base, torch.float32).eval()
        if layers:
            config = {"version": 1, "granularity": f"{target}_static", "layers": layers}
            attach_routers(model, ModConfig.parse(config, "test"))
        rows = []
        for sample in samples:
            ids, labels = torch.tensor([sample["input_ids"]]), torch.tensor(sample["labels"])
            rows.append(model(ids, use_cache=False).logits[0, :-1][labels[1:] != IGNORED].log_softmax(-1))
        return torch.cat(rows)

    dense = predictions([])
    for layer in range(4):
        without = predictions([layer])
        nats = float((dense.exp() * (dense - without)).sum(-1).mean())
        assert found[layer] == pytest.approx(nats, rel=1e-3, abs=1e-6)


def test_a_window_and_a_patch_make_a_layer_cheaper(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", "llama", num_hidden_layers=4)
    samples = answered(60)

    def sums(window: int | None, rank: int | None) -> float:
        model = load_base(base, torch.float32).eval()
        measured = measure(model, samples, shape_of(base), "attn", window, rank, tmp_path, quiet=True)
        return sum(measured.costs().values())

    assert sums(None, 16) < sums(None, None)
    assert 0 < sums(1_000, None) < sums(None, None)  # the whole prompt runs, answers skip


def test_cheapest_are_ascending_and_the_earlier_one_first() -> None:
    assert cheapest({3: 0.1, 1: 0.2, 0: 0.2, 2: 0.3}, 2) == [0, 3]


def test_train_routes_the_cheaper_half(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two layers of four add next to nothing: they are found, named, and kept by a run that resumes."""
    base = tiny_model(tmp_path / "base", "llama", num_hidden_layers=4)
    from safetensors.torch import load_file, save_file

    (path,) = base.glob("*.safetensors")
    tensors = load_file(path)
    for layer in (0, 2):
        tensors[f"model.layers.{layer}.self_attn.o_proj.weight"].mul_(1e-3)
    save_file(tensors, path, metadata={"format": "pt"})
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{i} and", "completion": f" {i + 1}"}) + "\n" for i in range(80)))
    words = ["train", "--model", str(base), "--data", str(data), "--eval-fraction", "0.1", "--max-steps", "2"]
    assert main([*words, "--output", str(tmp_path / "c")]) == 0
    assert json.loads((tmp_path / "c" / "config.json").read_text())["mod_config"]["layers"] == [0, 2]
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("layer ")]
    assert [line.endswith("routed") for line in shown] == [True, False, True, False]
