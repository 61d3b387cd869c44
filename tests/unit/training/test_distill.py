"""Patches brought nearer to the dense model's predictions: what it gains, what it leaves alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from router_tuning.distill import _batches, _Dense, _parts, distill
from router_tuning.layerwise import answer_logits
from router_tuning.model import attach_routers, load_base
from router_tuning.patches import collate, fit_patches, give
from router_tuning.routing import routing_of
from tests.support.models import tiny_model
from vllm_mod.config import ConfigError, ModConfig

RANK = 2


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("distill") / "base", "llama", num_hidden_layers=4)


def samples(number: int = 160) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(number):
        length = int(torch.randint(9, 16, (1,), generator=generator))
        ids = torch.randint(6, 60, (length,), generator=generator).tolist()
        found.append({"input_ids": ids, "labels": [-100] * 5 + ids[5:], "prompt_len": 5})
    return found


GRANULARITIES = ["attn_sequence", "mlp_sequence", "block_sequence", "attn_token", "mlp_static", "block_static"]


@pytest.fixture(params=GRANULARITIES)
def fitted(request: pytest.FixtureRequest, base: Path, tmp_path: Path) -> Any:
    """Layers 1 and 2 are skipped, by requests behind a window of 3 tokens, by tokens where a router says so."""
    settings: dict[str, Any] = {"version": 2, "granularity": request.param, "layers": [1, 2]}
    if request.param.endswith("sequence"):
        settings |= {"window": 3, "cutoff": [1.0, 1.0]}
    config = ModConfig.parse(settings, "test")
    model = load_base(base, torch.float32).eval()
    generator = torch.Generator().manual_seed(3)
    random = {layer: torch.randn(1, model.config.hidden_size, generator=generator) for layer in config.layers}
    attach_routers(model, config, random if request.param == "attn_token" else None)
    fit_patches(model, collate(samples(), config, RANK, 8, "test"), RANK, tmp_path, quiet=True)
    return model


def test_no_prompt_is_left_out_and_learned_from() -> None:
    found = samples(60)
    assert [len(part) for part in _parts(found)] == [6, 54] and _parts(found)[0] == found[::10]
    twice = [sample | {"asked": f"{number % 40}"} for number, sample in enumerate(found)]
    left_out, rest = ({sample["asked"] for sample in part} for part in _parts(twice))
    assert len(left_out) == 4 and len(rest) == 36 and not left_out & rest


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_predictions_come_nearer_and_nothing_else_changes(fitted: Any, tmp_path: Path) -> None:
    before, patches = weights(fitted), {i: patch.tensors() for i, patch in routing_of(fitted).patches.items()}
    found = distill(fitted, samples(), tmp_path, quiet=True)
    assert (found.samples, found.passes) == (160, 1) and 0 <= found.after < found.before
    again = distill(fitted, samples(), tmp_path, rate=0.0, quiet=True)
    assert again.before == pytest.approx(found.after)
    after = weights(fitted)
    assert all(torch.equal(before[name], after[name]) for name in before if "patch" not in name)
    for layer, patch in routing_of(fitted).patches.items():
        assert not torch.equal(patch.tensors().bias, patches[layer].bias)
        assert not any(parameter.requires_grad for parameter in patch.parameters())
    assert routing_of(fitted).cutoffs is None


def test_what_it_comes_nearer_to_is_the_dense_model(fitted: Any, base: Path, tmp_path: Path) -> None:
    batches = _batches(samples())
    dense = _Dense(fitted, tmp_path)
    for batch in batches:
        dense.note(batch)
    for patch in routing_of(fitted).patches.values():
        patch.bias.data.fill_(3.0)  # whatever becomes of the patches
    stock = load_base(base, torch.float32).eval()
    with torch.no_grad():
        for number, batch in enumerate(batches):
            logits = stock(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            expected = logits[:, :-1][batch["labels"][:, 1:] != -100].log_softmax(-1)
            torch.testing.assert_close(dense.predictions(number, batch), expected)
            assert not torch.allclose(answer_logits(fitted, batch).log_softmax(-1), expected, atol=1e-3)
    dense.close()


def test_more_passes_are_more_steps_and_come_nearer(fitted: Any, tmp_path: Path) -> None:
    state = routing_of(fitted)
    patches = {i: patch.tensors() for i, patch in state.patches.items()}
    once = distill(fitted, samples(), tmp_path, quiet=True)
    for layer, patch in patches.items():
        give(state, layer, patch, fitted)
    often = distill(fitted, samples(), tmp_path, passes=6, quiet=True)
    assert often.before == once.before and often.passes == 6 and often.after < once.after


def test_what_gains_nothing_is_taken_back(fitted: Any, tmp_path: Path) -> None:
    patches = {i: patch.tensors() for i, patch in routing_of(fitted).patches.items()}
    found = distill(fitted, samples(), tmp_path, rate=10.0, quiet=True)
    assert found.after == found.before
    for layer, patch in routing_of(fitted).patches.items():
        for name in ("bias", "down", "up"):
            assert torch.equal(getattr(patch.tensors(), name), getattr(patches[layer], name))


@pytest.mark.parametrize("fitted", ["mlp_sequence", "mlp_static"], indirect=True)
def test_a_way_that_leads_too_far_is_gone_in_part(fitted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a rate at which all of it would be taken back."""
    state = routing_of(fitted)
    patches = {i: patch.tensors() for i, patch in state.patches.items()}
    found = distill(fitted, samples(), tmp_path, rate=0.1, quiet=True)
    again = distill(fitted, samples(), tmp_path, rate=0.0, quiet=True)
    assert again.before == pytest.approx(found.after) and found.after < found.before
    for layer, patch in patches.items():
        give(state, layer, patch, fitted)
    monkeypatch.setattr("router_tuning.distill._SHARES", (1.0,))
    whole = distill(fitted, samples(), tmp_path, rate=0.1, quiet=True)
    assert whole.after == whole.before == found.before


def test_a_base_that_overflows_is_one_line(fitted: Any, tmp_path: Path) -> None:
    fitted.model.norm.weight.data[0] = float("nan")
    with pytest.raises(ConfigError, match="not finite"):
        distill(fitted, samples(), tmp_path, quiet=True)


def test_routers_that_stand_have_no_say_in_a_patch(base: Path, tmp_path: Path) -> None:
    """The patch of layer 1 changes what layer 2 decides on; its gradient is that of the decisions as they are."""
    config = ModConfig.parse({"version": 1, "granularity": "attn_sequence", "layers": [1, 2]}, "test")
    found = []
    for asks in (False, True):
        model = load_base(base, torch.float32).eval()
        generator = torch.Generator().manual_seed(3)
        weights = {layer: torch.randn(1, model.config.hidden_size, generator=generator) for layer in (1, 2)}
        attach_routers(model, config, weights)
        fit_patches(model, collate(samples(), config, RANK, 8, "test"), RANK, tmp_path, quiet=True)
        state = routing_of(model)
        state.cutoffs = (float("inf"), 0.0)
        model.requires_grad_(False)
        for router in state.routers.values():
            router.requires_grad_(asks)
        patch = state.patches[1].requires_grad_(True)
        answer_logits(model, _batches(samples())[0]).log_softmax(-1).square().sum().backward()
        found.append(patch.bias.grad)
        assert bool(state.effects) == asks
    assert found[0].any() and not torch.allclose(found[0], found[1])


def test_routers_that_know_nothing_decide_by_chance(base: Path, tmp_path: Path) -> None:
    config = ModConfig.parse({"version": 2, "granularity": "attn_sequence", "layers": [1, 2], "window": 3}, "test")
    model = load_base(base, torch.float32).eval()
    attach_routers(model, config)
    fit_patches(model, collate(samples(), config, RANK, 8, "test"), RANK, tmp_path, quiet=True)
    found = distill(model, samples(), tmp_path, passes=3, quiet=True)
    assert 0 < found.after < found.before
    assert not any(router.weight.any() for router in routing_of(model).routers.values())
