"""Every architecture behind tokens that are run once: the same predictions as with these run again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from router_tuning.data import IGNORED, Collator
from router_tuning.layerwise import Batch, advance, answer_logits
from router_tuning.model import attach_routers, load_base
from router_tuning.past import past_length, with_past
from router_tuning.routing import routing_of
from tests.support.models import tiny_model
from tests.unit.training.helpers import VOCAB
from tests.unit.training.test_layerwise import KINDS
from vllm_mod.config import ModConfig

WINDOW = 6


@pytest.fixture(scope="module", params=KINDS)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    name = request.param
    return tiny_model(tmp_path_factory.mktemp("past") / name, name, num_hidden_layers=4, **KINDS[name])


def batch_of(*sizes: tuple[int, int]) -> Batch:
    """sizes: of each row the tokens of prompt and answer."""
    generator = torch.Generator().manual_seed(5)
    samples = []
    for prompt, answer in sizes:
        ids = torch.randint(3, VOCAB, (prompt + answer,), generator=generator).tolist()
        samples.append({"input_ids": ids, "labels": [IGNORED] * prompt + ids[prompt:], "prompt_len": prompt})
    return Collator(0)(samples)


def routed(base: Path, target: str, window: int | None = WINDOW) -> Any:
    settings: dict[str, Any] = {"version": 1} if window is None else {"version": 2, "window": window}
    config = ModConfig.parse(settings | {"granularity": f"{target}_sequence", "layers": [1, 2, 3]}, "test")
    model = load_base(base, torch.float32).eval()
    attach_routers(model, config)
    routing_of(model).cutoffs = (0.0, 0.0, 0.0)
    return model


@torch.no_grad()
@pytest.mark.parametrize("target", ["attn", "mlp", "block"])
def test_what_comes_behind_is_predicted_alike(base: Path, target: str) -> None:
    model, batch = routed(base, target), batch_of((5, 9), (9, 4), (12, 1), (7, 3))
    kept = {**batch, "scores": torch.ones(4, 3).double()}
    skips = {**batch, "scores": torch.tensor([[1, -1, 1], [-1, -1, 1], [-1, 1, -1], [1, 1, 1]]).double()}
    dense, past = with_past(model, kept)
    assert [keys.shape[2] for keys in (*past.keys, *past.values)] == [
        4
    ] * 8  # the first answer token is predicted from the fifth
    torch.testing.assert_close(dense, answer_logits(model, kept))
    expected = answer_logits(model, skips)
    assert not torch.allclose(expected, dense, atol=1e-3)
    torch.testing.assert_close(answer_logits(model, skips, cache=past.cache()), expected)
    torch.testing.assert_close(answer_logits(model, kept, cache=past.cache()), dense)  # and is not written to
    states = advance(model, kept, None, 0, 2)
    torch.testing.assert_close(answer_logits(model, kept, states, 2, past.cache()), dense)


@torch.no_grad()
def test_decisions_are_not_taken_from_tokens_that_are_not_there(tmp_path: Path) -> None:
    batch = batch_of((9, 4))
    for target in ("attn", "mlp"):
        model = routed(tiny_model(tmp_path / target, "llama", num_hidden_layers=4), target)
        _, past = with_past(model, {**batch, "scores": torch.ones(1, 3).double()})
        for scores in ({}, {"scores": torch.tensor([[1, torch.nan, 1]]).double()}):
            with pytest.raises(NotImplementedError):
                answer_logits(model, {**batch, **scores}, cache=past.cache())


@pytest.mark.parametrize(
    ("sizes", "length"),
    [
        ([(9, 4), (8, 2)], WINDOW),
        ([(WINDOW, 4), (8, 2)], WINDOW - 1),
        ([(3, 4), (8, 2)], 2),
        ([(1, 4), (8, 2)], 0),
        ([(0, 4), (8, 2)], 0),
        ([(8, 0)], 0),
    ],
)
def test_how_many_tokens_are_run_once(tmp_path: Path, sizes: list[tuple[int, int]], length: int) -> None:
    base = tiny_model(tmp_path / "base", "llama", num_hidden_layers=4)
    assert past_length(routed(base, "attn"), batch_of(*sizes)) == length
    assert past_length(routed(base, "attn", window=None), batch_of(*sizes)) == 0
