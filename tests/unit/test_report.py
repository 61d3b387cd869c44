"""`vllm-mod report`: which pictures come of which statistics, and why others do not."""

import builtins
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_mod import report
from vllm_mod.checkpoint import write_checkpoint
from vllm_mod.cli import main
from vllm_mod.config import ModConfig

pytest.importorskip("matplotlib")


def log(kept: float = 0.5, layers: tuple[int, ...] = (2, 3), samples: int = 100, **held_out: Any) -> dict[str, Any]:
    """What training stores."""
    held = {"loss": 2.5, "kept": kept, "perplexity": 12.0, "dense_loss": 2.3, "dense_perplexity": 10.0}
    held |= {"kept_per_layer": {str(i): kept for i in layers}}
    rows = {"read": samples, "used": samples}
    data = {"sources": ["d.jsonl"], "training": rows, "held_out": rows}
    return {"target_capacity": 0.5, "held_out": held | held_out, "data": data, "log": [], "steps": []}


@pytest.fixture
def make(bare_base: Path, tmp_path: Path) -> Any:
    def checkpoint(name: str, layers: tuple[int, ...] = (2, 3), **files: dict[str, Any]) -> Path:
        config = ModConfig(version=1, granularity="attn_sequence", layers=layers, target_capacity=0.5)
        records = {f"{stem}.json": json.dumps(content) for stem, content in files.items()}
        return write_checkpoint(bare_base, tmp_path / name, config, {i: torch.zeros(1, 8) for i in layers}, records)

    return checkpoint


def outcome(capsys: pytest.CaptureFixture[str], output: Path, *checkpoints: Path) -> dict[str, str]:
    """File name -> what was printed about it."""
    assert main(["report", *map(str, checkpoints), "--output", str(output)]) == 0
    lines = capsys.readouterr().out.splitlines()
    return {name: line for name in report.PICTURES for line in lines if name in line}


def written(path: Path) -> bool:
    return path.is_file() and path.read_bytes().startswith(b"\x89PNG")


def test_one_checkpoint(make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = outcome(capsys, tmp_path / "out", make("one", trainer_log=log()))
    assert said["kept_per_layer.png"].startswith("written") and written(tmp_path / "out" / "kept_per_layer.png")
    assert written(tmp_path / "out" / "quality_against_kept.png")
    assert "expert_token" in said["experts.png"] and "two or more" in said["routed_layers.png"]
    assert not (tmp_path / "out" / "experts.png").exists()


def test_nothing_stored(make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = outcome(capsys, tmp_path / "out", make("bare"))
    assert all(line.startswith("not drawn") for line in said.values()) and len(said) == len(report.PICTURES)


def test_checkpoints_that_differ_in_one_thing(make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = make("few", trainer_log=log(samples=50))
    many = make("many", trainer_log=log(samples=100))
    said = outcome(capsys, tmp_path / "a", few, many)
    assert written(tmp_path / "a" / "training_samples.png") and "nothing else" in said["routed_layers.png"]
    deep = make("deep", layers=(1, 2, 3), trainer_log=log(layers=(1, 2, 3)))
    said = outcome(capsys, tmp_path / "b", many, deep)
    assert written(tmp_path / "b" / "routed_layers.png") and "nothing else" in said["training_samples.png"]


def test_experts(make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    statistics = {"selected_per_expert": {"2": [5, 3, 0], "3": [1, 1, 1]}, "kept_per_expert": {"2": [1, 0.5, None]}}
    statistics["kept_per_expert"]["3"] = [0.2, 0.4, 0.6]
    outcome(capsys, tmp_path / "out", make("moe", trainer_log=log(**statistics)))
    assert written(tmp_path / "out" / "experts.png")


def test_calibration_counts_more_than_training(make: Any) -> None:
    calibrated = make("one", trainer_log=log(kept=0.4), calibration={"kept_per_layer": {"2": 0.6, "3": 0.7}})
    assert report.read_record(calibrated).kept_per_layer == {2: 0.6, 3: 0.7}


def test_evaluated_points_are_drawn(make: Any) -> None:
    points = [{"system": s, "kept": k, "ratio_to_base": 1.1} for s in ("routed", "static") for k in (0.5, 0.75)]
    evaluation = {"command": "quality", "tasks": {}, "curve": points}
    evaluation |= {"recovery": 0.98, "static_recovery": 0.9, "kept_ratio": 0.5}
    figure = report.quality_against_kept([report.read_record(make("one", evaluation=evaluation))])
    left, right = figure.axes
    drawn = {tuple(line.get_xdata()) for line in left.lines}
    assert (0.5, 0.75) in drawn
    assert {line.get_ydata()[0] for line in right.lines} >= {0.98, 0.9}


@pytest.mark.parametrize(
    "names",
    [
        ["a", "b"],
        ["ckpt", "ckpt"],
        [f"attn_sequence-0.5-layers5.6.7.8.9.10-{n}-alpaca_17k+dolly_3k+code_4k-seed0" for n in (240, 960, 1920)],
        ["x" * 60, "x" * 61],
        ["x" * 60 + c + "y" * 60 for c in "ab"],
        ["same" * 30] * 2,
    ],
)
def test_names_in_a_legend_differ(names: list[str]) -> None:
    found = report.legend_names(names)
    assert len(set(found)) == len(names) and all(0 < len(name) <= 45 for name in found)
    assert max(map(len, names)) > 40 or len(set(names)) < len(names) or found == names


@pytest.mark.parametrize("count", ["240", "1920"])
def test_a_legend_shows_what_differs(count: str) -> None:
    names = [f"attn_sequence-0.5-layers5.6.7-{n}-alpaca_17k+dolly_3k+code_4k-seed0" for n in (240, 960, 1920)]
    assert any(count in name for name in report.legend_names(names))


def test_without_matplotlib(
    make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    load = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return load(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    assert main(["report", str(make("one", trainer_log=log())), "--output", str(tmp_path / "out")]) == 2
    assert 'pip install "vllm-mod[bench]"' in capsys.readouterr().err


def test_bad_input_is_one_line(make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    good = make("one", trainer_log=log())
    misspelt = make("misspelt", trainer_log=log(kept_per_leyer={}))
    for argv, said in [
        ([str(misspelt)], "trainer_log.json: unknown key 'held_out.kept_per_leyer'"),
        ([str(tmp_path / "nowhere")], "no such directory"),
        ([str(good), "--output", str(tmp_path / "file")], "cannot be written"),
    ]:
        assert main(["report", *argv]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
