"""`router-tuning fit`: routers or the same layers for everyone, whichever serves better with its patches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from router_tuning import distill, patched_choice
from router_tuning.cli import main
from router_tuning.data import tokenize
from router_tuning.model import load_reference, routing_of
from router_tuning.tokenizer import load_tokenizer
from tests.unit.training.test_fit_command import ROWS, base, data, words
from vllm_mod.checkpoint import read_mod_config

__all__ = ["base", "data"]  # fixtures


def test_what_is_nearest_with_its_patches_is_written(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Routers or the same layers for everyone: as `--static`, and as without the comparison, would have written it."""
    more = ["--layers", "0-3", "--target-capacity", "0.4", "--costs", str(tmp_path / "costs")]
    for name, flags in {"static": ["--static"], "routed": ["--compare-static", "false"]}.items():
        assert main(words(base, data, tmp_path / name, *more, *flags)) == 0
    capsys.readouterr()
    for wanted in ("routed", "static"):

        def found(model: Any, *_: Any, wanted: str = wanted) -> tuple[torch.Tensor, torch.Tensor]:
            routers = routing_of(model).routers.values()
            name = "routed" if any(bool(router.weight.any()) for router in routers) else "static"
            return torch.tensor([1.0, 4.0]) * (1 if name == wanted else 2), torch.tensor([8.0, 12.0])

        output = tmp_path / f"c-{wanted}"
        with monkeypatch.context() as patch:
            patch.setattr(patched_choice, "divergence", found)
            assert main(words(base, data, output, *more)) == 0
        said = capsys.readouterr().out
        assert ("taken: the same layers for everyone\n" in said) == (wanted == "static")
        assert f"difference {'+' if wanted == 'routed' else '-'}0.2500 ± 0." in said
        assert ("--compare-static false keeps" in said) == (wanted == "static")
        written, expected = (load_file(path / "routers.safetensors") for path in (output, tmp_path / wanted))
        assert written.keys() == expected.keys()
        assert all(torch.equal(written[name], expected[name]) for name in written)
        record = json.loads((output / "patches.json").read_text())
        assert sorted(record["compared"].values()) == [0.25, 0.5]
        assert "0.250 (" in (output / "README.md").read_text()
        assert read_mod_config(output) == read_mod_config(tmp_path / wanted)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c-routed", "c-static", "costs", "routed", "static"]


@pytest.mark.parametrize("kept", [0.25, 0.5, 0.75])
def test_each_skips_as_much_where_they_are_compared(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: float
) -> None:
    """Whatever its own cutoffs say, which are left as they were."""
    assert main(words(base, data, tmp_path / "c", "--layers", "0-3", "--compare-static", "false")) == 0
    model = load_reference(tmp_path / "c")
    state, inner = routing_of(model), distill._divergences
    samples = list(tokenize(ROWS, load_tokenizer(base), 512)[0])
    tokens_kept = [0, 0]

    def noted(model: Any, batch: Any, dense: Any) -> Any:
        result, tokens = inner(model, batch, dense), (batch["labels"] != -100).sum(1)
        tokens_kept[0] += sum(int((decision.keep * tokens).sum()) for decision in state.decisions.values())
        tokens_kept[1] += 4 * int(tokens.sum())
        return result

    monkeypatch.setattr(distill, "_divergences", noted)
    found = []
    for cutoffs in (None, tuple(cutoff + 7 for cutoff in state.config.cutoffs), (0.5, 0.0, -0.5, 0.25)):
        state.cutoffs, tokens_kept[:] = cutoffs, [0, 0]
        sums, numbers = distill.divergence(model, samples, kept)
        assert sums.shape == numbers.shape == (6,) and 4 * int(numbers.sum()) == tokens_kept[1]
        found.append(float(sums.sum()))
        assert tokens_kept[0] / tokens_kept[1] == pytest.approx(kept, abs=0.03)  # six samples, of four layers
        assert state.cutoffs == cutoffs
    assert found[0] == pytest.approx(found[1]) and min(found) > 0
    assert distill.divergence(model, samples, 1.0)[0].tolist() == pytest.approx([0] * 6, abs=1e-6)


def test_nothing_is_compared_without_distillation(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(base, data, tmp_path / "c", "--distilled-samples", "0")) == 0
    assert "taken" not in capsys.readouterr().out
    assert json.loads((tmp_path / "c/patches.json").read_text())["compared"] == {}
