"""`router-tuning fit`: routers or the same layers for everyone, whichever serves better with its patches."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from router_tuning import patched_choice
from router_tuning.cli import main
from router_tuning.model import routing_of
from tests.unit.training.test_fit_command import base, data, words
from vllm_mod.checkpoint import read_mod_config

__all__ = ["base", "data"]  # fixtures


def kl_of(said: str) -> float:
    """What distillation left, by the last line of a report."""
    found = re.findall(r"answers: \S+ as fitted, (\S+) distilled", said)
    return float(found[-1])


def test_what_is_nearest_with_its_patches_is_written(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Routers or the same layers for everyone: as `--static`, and as without the comparison, would have written it."""
    more = ["--layers", "0-3", "--target-capacity", "0.4", "--costs", str(tmp_path / "costs")]
    nats = {}
    for name, flags in {"static": ["--static"], "routed": ["--compare-static", "false"]}.items():
        assert main(words(base, data, tmp_path / name, *more, *flags)) == 0
        nats[name] = kl_of(capsys.readouterr().out)
    expected = {name: load_file(tmp_path / name / "routers.safetensors") for name in nats}
    inner = patched_choice.make_patches
    for wanted, other in (("routed", "static"), ("static", "routed")):
        worse = {name: nats[name] + 2 * max(nats.values()) * (name == other) for name in nats}

        def made(model: Any, *rest: Any, worse: dict[str, float] = worse) -> Any:
            record = inner(model, *rest)
            routers = routing_of(model).routers.values()
            name = "routed" if any(bool(router.weight.any()) for router in routers) else "static"
            assert record.distilled is not None and record.distilled.after == pytest.approx(nats[name], abs=6e-5)
            return record.model_copy(update={"distilled": record.distilled.model_copy(update={"after": worse[name]})})

        monkeypatch.setattr(patched_choice, "make_patches", made)
        assert main(words(base, data, tmp_path / f"c-{wanted}", *more)) == 0
        said = capsys.readouterr().out
        assert "taken, of" in said and ("): the same layers for everyone\n" in said) == (wanted == "static")
        assert ("--compare-static false keeps" in said) == (wanted == "static")
        found = load_file(tmp_path / f"c-{wanted}" / "routers.safetensors")
        assert found.keys() == expected[wanted].keys()
        assert all(torch.equal(found[name], expected[wanted][name]) for name in found)
        record = json.loads((tmp_path / f"c-{wanted}" / "patches.json").read_text())
        assert sorted(record["compared"].values()) == sorted(worse.values())
        assert record["distilled"]["after"] == worse[wanted] == min(worse.values())
        assert f"{worse[wanted]:.3f} (" in (tmp_path / f"c-{wanted}" / "README.md").read_text()
        assert read_mod_config(tmp_path / f"c-{wanted}") == read_mod_config(tmp_path / wanted)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c-routed", "c-static", "costs", "routed", "static"]


def test_nothing_is_compared_without_distillation(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(base, data, tmp_path / "c", "--distilled-samples", "0")) == 0
    assert "taken" not in capsys.readouterr().out
    assert json.loads((tmp_path / "c/patches.json").read_text())["compared"] == {}
