"""What more measured requests are worth: on costs that follow the inputs, more of them show more."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import measured_requests
from router_tuning.costs_file import CostsFile, Rows
from vllm_mod.config import ConfigError


@pytest.fixture
def costs(tmp_path: Path) -> Path:
    """300 requests, 6 layers, 40 numbers each of which the costs of a layer follow in a direction of its own."""
    draws = torch.Generator().manual_seed(0)
    inputs = torch.randn(300, 6, 40, generator=draws)
    directions = torch.randn(6, 40, generator=draws) / 40**0.5
    nats = ((inputs * directions).sum(2) + torch.randn(300, 6, generator=draws) / 3 - 3).double().exp()
    file = CostsFile(tmp_path / "costs.safetensors", {"window": "64"})
    file.rows = Rows(torch.arange(300).flip(0), nats, torch.ones(300).double(), inputs)
    file.write()
    return file.path


def run(monkeypatch: pytest.MonkeyPatch, costs: Path, output: Path, *more: str) -> None:
    monkeypatch.setattr(sys, "argv", ["measured_requests", str(costs), "--output", str(output), *more])
    measured_requests.main()


def test_more_requests_show_more(costs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    output = tmp_path / "r" / "result.json"
    output.parent.mkdir()
    run(monkeypatch, costs, output, "--sizes", "50", "150", "300", "--skip", "2")
    few, more, all_of_them = json.loads(output.read_text())["points"]
    assert [few["groups"], more["groups"], all_of_them["groups"]] == [6, 2, 1]
    assert 0 < few["share"] < more["share"] < all_of_them["share"] < 1
    assert few["explained"] < all_of_them["explained"]
    for row in (few, more, all_of_them):
        assert row["oracle"] < row["routed"] < row["static"]
    assert output.with_suffix(".png").is_file()


def test_groups_are_disjoint_and_whole(costs: Path) -> None:
    rows = CostsFile(costs, {}).rows
    assert rows is not None
    found = measured_requests.groups(rows, 70)
    assert torch.cat([group.sample for group in found]).tolist() == list(range(280))
    assert torch.equal(found[1].nats, rows.nats.flip(0)[70:140])


def test_what_cannot_be_is_one_line(costs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        run(monkeypatch, tmp_path / "none", tmp_path / "r.json")
    for sizes in ("31", "301"):
        with pytest.raises(ConfigError, match="from 32 to the 300 requests"):
            run(monkeypatch, costs, tmp_path / "r.json", "--sizes", sizes)
    with pytest.raises(ConfigError, match="--skip 0: hardly any request"):
        run(monkeypatch, costs, tmp_path / "r.json", "--sizes", "50", "--skip", "0")
    assert not (tmp_path / "r.json").exists()
