"""Every architecture run layer by layer: the same hidden states as in one go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from router_tuning.data import IGNORED, Collator
from router_tuning.layerwise import advance, answer_logits, sublayer
from router_tuning.model import attach_routers, given_prompts, load_base, load_reference, reference_decisions
from tests.support.models import routed_checkpoint, tiny_model
from tests.unit.training.test_architectures import MODELS
from tests.unit.training.test_patches import some_samples
from vllm_mod.config import ModConfig

#: transformers' masks go by the layer's number here, the first layers' being full.
KINDS = MODELS | {
    "llama": {},
    "qwen2": MODELS["qwen2"] | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
}


@pytest.fixture(scope="module", params=KINDS)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    name = request.param
    return tiny_model(tmp_path_factory.mktemp("layerwise") / name, name, num_hidden_layers=4, **KINDS[name])


def batch() -> dict[str, Tensor]:
    return Collator(0)([sample | {"labels": []} for sample in some_samples(5)])


@torch.no_grad()
def in_one_go(model: Any, inputs: dict[str, Tensor], layer: int) -> Tensor:
    seen: list[Tensor] = []
    hook = model.model.layers[layer].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with given_prompts(model, inputs["prompt_mask"]):
        model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    hook.remove()
    return seen[0]


@torch.no_grad()
def test_answers_are_predicted_as_in_one_go(base: Path) -> None:
    """Of each answer's tokens, from the tokens and from the states before a layer."""
    config = ModConfig.parse({"version": 1, "granularity": "attn_sequence", "layers": [1, 2]}, "test")
    model = load_base(base, torch.float32).eval()
    attach_routers(model, config)  # zeros: nothing is skipped
    samples = [sample | {"labels": [IGNORED] * i + sample["input_ids"][i:]} for i, sample in enumerate(some_samples(5))]
    inputs = Collator(0)(samples)
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    expected = logits[:, :-1][inputs["labels"][:, 1:] != IGNORED]
    assert len(expected) < logits[:, :-1].flatten(0, 1).shape[0]
    torch.testing.assert_close(answer_logits(model, inputs), expected)
    states = advance(model, inputs, None, 0, 2)
    torch.testing.assert_close(answer_logits(model, inputs, states, 2), expected)


@pytest.mark.parametrize("granularity", ["attn_token", "mlp_token", "block_sequence", "attn_static"])
def test_the_same_hidden_states(base: Path, tmp_path: Path, granularity: str) -> None:
    model = load_reference(
        routed_checkpoint(base, tmp_path / "c", granularity, [0, 1, 2], version=2, patch={"rank": 2})
    )
    inputs, states = batch(), None
    for first, stop in ((0, 0), (0, 1), (1, 3)):
        states = advance(model, inputs, states, first, stop)
    whole = in_one_go(model, inputs, 3)
    assert states is not None and torch.equal(
        states[inputs["attention_mask"].bool()], whole[inputs["attention_mask"].bool()]
    )
    decisions = torch.cat([keep.flatten() for keep in reference_decisions(model).values()] or [torch.tensor([0, 1])])
    assert 0 < decisions.float().mean() < 1


def test_what_a_block_adds_is_what_the_residual_gains(base: Path) -> None:
    model, inputs = load_base(base, torch.float32).eval(), batch()
    before, after = in_one_go_stock(model, inputs)
    attach_routers(model, ModConfig(version=1, granularity="block_static", layers=(1, 2)))
    x, y, may_skip = sublayer(model, inputs, before, 2)
    assert torch.equal(may_skip, inputs["attention_mask"].bool())
    torch.testing.assert_close(y[may_skip].float(), (after - before)[may_skip], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(x, model.model.layers[2].input_layernorm(before))


@torch.no_grad()
def in_one_go_stock(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Before and after layer 2 of the base."""
    found = model(inputs["input_ids"], inputs["attention_mask"], output_hidden_states=True).hidden_states
    return found[2], found[3]
