"""Patches brought nearer to the dense model's predictions: what it gains, what it leaves alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from router_tuning.distill import distill
from router_tuning.model import attach_routers, load_base
from router_tuning.patches import collate, fit_patches, give
from router_tuning.routing import routing_of
from tests.support.models import tiny_model
from vllm_mod.config import ConfigError, ModConfig

RANK = 2


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("distill") / "base", "llama", num_hidden_layers=4)


def samples(number: int = 40) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(number):
        length = int(torch.randint(9, 16, (1,), generator=generator))
        ids = torch.randint(6, 60, (length,), generator=generator).tolist()
        found.append({"input_ids": ids, "labels": [-100] * 5 + ids[5:], "prompt_len": 5})
    return found


@pytest.fixture(params=["attn", "mlp", "block"])
def fitted(request: pytest.FixtureRequest, base: Path, tmp_path: Path) -> Any:
    """Layers 1 and 2 are skipped behind a window of 3 tokens, and have patches."""
    settings = {"version": 2, "granularity": f"{request.param}_sequence", "layers": [1, 2], "window": 3}
    config = ModConfig.parse(settings | {"cutoff": [1.0, 1.0]}, "test")
    model = load_base(base, torch.float32).eval()
    attach_routers(model, config)
    fit_patches(model, collate(samples(), config, RANK, 8, "test"), RANK, tmp_path, quiet=True)
    return model


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_predictions_come_nearer_and_nothing_else_changes(fitted: Any) -> None:
    before, patches = weights(fitted), {i: patch.tensors() for i, patch in routing_of(fitted).patches.items()}
    found = distill(fitted, samples(), quiet=True)
    assert found.steps == 5 and 0 <= found.after < found.before  # 36 samples, 8 at once
    again = distill(fitted, samples(), rate=0.0, quiet=True)
    assert again.before == pytest.approx(found.after)
    after = weights(fitted)
    assert all(torch.equal(before[name], after[name]) for name in before if "patch" not in name)
    for layer, patch in routing_of(fitted).patches.items():
        assert not torch.equal(patch.tensors().bias, patches[layer].bias)
        assert not any(parameter.requires_grad for parameter in patch.parameters())
    assert routing_of(fitted).cutoffs is None


def test_more_passes_are_more_steps_and_come_nearer(fitted: Any) -> None:
    state = routing_of(fitted)
    patches = {i: patch.tensors() for i, patch in state.patches.items()}
    once = distill(fitted, samples(), quiet=True)
    for layer, patch in patches.items():
        give(state, layer, patch, fitted)
    often = distill(fitted, samples(), passes=6, quiet=True)
    assert often.before == once.before and often.steps == 6 * once.steps and often.after < once.after


def test_what_gains_nothing_is_taken_back(fitted: Any) -> None:
    patches = {i: patch.tensors() for i, patch in routing_of(fitted).patches.items()}
    found = distill(fitted, samples(), rate=10.0, quiet=True)
    assert found.steps == 0 and found.after == found.before
    for layer, patch in routing_of(fitted).patches.items():
        for name in ("bias", "down", "up"):
            assert torch.equal(getattr(patch.tensors(), name), getattr(patches[layer], name))


def test_a_base_that_overflows_is_one_line(fitted: Any) -> None:
    fitted.model.norm.weight.data[0] = float("nan")
    with pytest.raises(ConfigError, match="not finite"):
        distill(fitted, samples(), quiet=True)
