"""benchmarks.training and benchmarks.capacity: what they compare, and how they sum it up."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import capacity, training
from benchmarks.lib.shapes import SHAPES


def args(**changes: Any) -> argparse.Namespace:
    defaults = {"shape": "tiny", "granularity": "attn_sequence", "routed": 4, "batch": 1, "length": 8, "steps": 1}
    return argparse.Namespace(**(defaults | {"repeats": 1, "gradient_checkpointing": False} | changes))


def test_the_two_ways_differ_in_what_autograd_records(tmp_path: Path) -> None:
    model = training.random_model(args(), tmp_path)
    recorded: dict[int, bool] = {}
    for number, layer in enumerate(model.model.layers):

        def note(_: Any, __: Any, output: Any, number: int = number) -> None:
            recorded[number] = (output[0] if isinstance(output, tuple) else output).requires_grad

        layer.register_forward_hook(note)
    ids = torch.tensor([[3, 4, 5]])
    trunk = model(ids).logits
    assert [recorded[i] for i in range(8)] == [False] * 4 + [True] * 4
    with training.recording_from_the_embeddings(model):
        full = model(ids).logits
    assert all(recorded.values())
    assert torch.equal(trunk, full)
    model(ids)
    assert not recorded[0]


def test_a_run_of_each_way_is_measured() -> None:
    runs, flops = training.measure(args())
    for found in runs.values():
        assert [r["samples"] for r in found] == [1.0]
        assert all(r["seconds"] > 0 and r["cpu_seconds"] > 0 and r["peak_gib"] > 0 for r in found)
    sizes, tokens = SHAPES["tiny"], 8
    mlps = 3 * sizes["hidden_size"] * sizes["intermediate_size"] * sizes["num_hidden_layers"]
    assert flops["full"] > flops["trunk"] > 2 * tokens * mlps  # no backward pass through the trunk


def test_a_difference_within_the_spread_is_called_that() -> None:
    def runs(*seconds: float) -> list[dict[str, float]]:
        return [{"seconds": s, "cpu_seconds": s, "samples": 10.0, "peak_gib": 1.0} for s in seconds]

    clear = training.compared({"trunk": runs(1.0, 1.01), "full": runs(1.5, 1.51)})
    assert clear["speedup"] == pytest.approx(1.5, abs=0.01) and clear["not_significant"] == []
    assert clear["seconds_for_5000_samples"]["trunk"] == pytest.approx(502.5, abs=0.1)
    assert training.compared({"trunk": runs(1.0, 1.5), "full": runs(1.3, 1.6)})["not_significant"] == ["speedup"]


def test_capacity_counts_what_is_within_the_bars(tmp_path: Path) -> None:
    def run(target: float, after: float, calibrated: float) -> dict[str, Any]:
        return {"target": target, "after_training": {"kept": after}, "calibrated": {"kept": calibrated}}

    found = capacity.summary([run(0.5, 0.519, 0.5001), run(0.25, 0.229, 0.256)])
    assert found["within_0.02_after_training"] == "1 of 2" and found["farthest_after_training"] == 0.021
    assert found["within_0.005_after_calibration"] == "1 of 2"


def test_what_is_calibrated_on_is_not_measured_on(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(f'{{"prompt": "{i}", "completion": "x"}}\n' for i in range(100)))
    files = capacity.held_out_files(argparse.Namespace(data=[str(data)], eval_fraction=0.2, held_out=12), tmp_path)
    parts = [set(file.read_text().splitlines()) for file in files]
    assert [len(part) for part in parts] == [6, 6] and not parts[0] & parts[1]
    assert parts[0] | parts[1] <= set(data.read_text().splitlines()[80:])
