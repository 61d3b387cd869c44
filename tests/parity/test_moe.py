"""Every granularity of the architectures with experts against the float32 reference."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.architectures import EXPERTS as SHAPES
from tests.support.models import routed_checkpoint, tiny_model
from vllm_mod.granularity import POLICIES

from .harness import (
    Answer,
    assert_equals_reference,
    assert_no_kv_cache_of,
    assert_same,
    counter,
    engine,
    generate,
    random_prompts,
    runner_model,
)

LAYERS = [1, 2, 3]
LENGTHS = (3, 40, 1, 70, 33, 100)
DYNAMIC = [name for name, policy in POLICIES.items() if not policy.is_static]
STATIC = [name for name, policy in POLICIES.items() if policy.is_static]
CACHING = ["mlp_token", "expert_token", *STATIC]  #: cached prefixes may be used
#: Each granularity once per `make test` is enough for what architectures share; see `test_architectures` for the rest.
QUICK = ("olmoe", "deepseek")


def _marks(model: str, granularity: str) -> Any:
    if model in QUICK:
        return ()
    # `make test-slow` has the others of Mixtral in `test_architectures`, with windows and patches.
    elsewhere = model == "mixtral" and granularity != "expert_token"
    return pytest.mark.nightly if elsewhere else pytest.mark.slow


CASES = [
    pytest.param(model, granularity, marks=_marks(model, granularity), id=f"{model}-{granularity}")
    for model in SHAPES
    for granularity in POLICIES
]


def _checkpoint(tmp_path: Path, model: str, granularity: str, **config: Any) -> Path:
    base = tiny_model(tmp_path / "base", model, num_hidden_layers=5, **SHAPES[model])
    return routed_checkpoint(base, tmp_path / "routed", granularity, LAYERS, **config)


def _generate(checkpoint: Path, mod: dict[str, Any] | None = None) -> list[Answer]:
    with engine(checkpoint, mod) as llm:
        return generate(llm, random_prompts((5, 40, 90)), 12)


@pytest.mark.parametrize(("model", "granularity"), CASES)
def test_parity(tmp_path: Path, model: str, granularity: str) -> None:
    checkpoint = _checkpoint(tmp_path, model, granularity)
    prompts = random_prompts(LENGTHS)
    with engine(checkpoint, max_num_batched_tokens=64, enable_prefix_caching=True) as llm:
        assert type(runner_model(llm)).__name__.endswith("MoDForCausalLM")
        chunked = llm.llm_engine.vllm_config.scheduler_config.enable_chunked_prefill
        assert chunked == (not granularity.endswith("sequence"))  # the longest prompts take two steps then
        if granularity in ("attn_static", "block_static"):
            assert_no_kv_cache_of(llm, LAYERS, 5)
        first = generate(llm, prompts, 16)
        alone = [generate(llm, [p], 16)[0] for p in prompts[:3]]
        if granularity in CACHING:
            assert counter(llm, "vllm:prefix_cache_hits") > 0
    decisions = assert_equals_reference(checkpoint, prompts, first)
    assert_same(first[:3], alone)  # neighbours do not matter
    if granularity in DYNAMIC:  # the test means something only where requests disagree
        kept = torch.cat([d[layer].flatten() for d in decisions for layer in LAYERS])
        assert 0 < kept.float().mean() < 1


@pytest.mark.parametrize("model", QUICK)
def test_skipped_pairs_are_not_computed(tmp_path: Path, model: str) -> None:
    """The rows that reach the fused kernel are the kept (token, expert) pairs, and the counters say so."""
    checkpoint = _checkpoint(tmp_path, model, "expert_token")
    prompts, rows = random_prompts((20, 30, 40)), dict.fromkeys(range(5), 0)
    places = SHAPES[model]["num_experts_per_tok"]
    with engine(checkpoint) as llm:
        counts = runner_model(llm).routing.counts
        take, counts.take = counts.take, lambda: None  # nothing is reported meanwhile
        for index, layer in enumerate(runner_model(llm).model.layers):
            if not hasattr(layer.mlp, "experts"):
                continue
            method = layer.mlp.experts.routed_experts.quant_method
            apply = method.apply

            def count(*args: Any, index: int = index, apply: Any = apply, **kwargs: Any) -> Any:
                rows[index] += kwargs["topk_ids"].numel()
                return apply(*args, **kwargs)

            method.apply = count
        answers = generate(llm, prompts, 2)
        stats = take()
    decisions = assert_equals_reference(checkpoint, prompts, answers)
    fed = sum(len(p) + 1 for p in prompts)  # the last token of an answer is never fed back
    for index in LAYERS:
        kept = sum(int(d[index][0, : len(p) + 1].sum()) for d, p in zip(decisions, prompts, strict=True))
        assert 0 < kept < fed * places
        assert rows[index] == kept, f"layer {index}"
        assert stats.data["kept"][str(index)] == kept
        assert stats.data["routed"][str(index)] == fed * places
    assert rows[4] == fed * places


def test_pairs_stay_in_their_places_where_experts_have_adapters(tmp_path: Path) -> None:
    """Kernels for these (CUDA only) know a row's adapter by its place: nothing moves, and skipped pairs weigh 0."""
    checkpoint = _checkpoint(tmp_path, "deepseek", "expert_token")
    prompts, weights = random_prompts((20, 30, 40)), []
    with engine(checkpoint) as llm:
        for index in LAYERS:
            experts = runner_model(llm).model.layers[index].mlp.experts.routed_experts
            experts.lora_base_layer_prefix = "base_layer."  # what vLLM sets where it wraps them
            apply = experts.quant_method.apply

            def note(*args: Any, apply: Any = apply, **kwargs: Any) -> Any:
                weights.append(kwargs["topk_weights"])
                return apply(*args, **kwargs)

            experts.quant_method.apply = note
        answers = generate(llm, prompts, 4)
    decisions = assert_equals_reference(checkpoint, prompts, answers)
    pairs = torch.cat([w.flatten() for w in weights])
    fed = sum(len(p) + 3 for p in prompts)  # the last token of an answer is never fed back
    kept = sum(int(d[i][0, :-1].sum()) for d in decisions for i in LAYERS)
    assert len(pairs) == fed * len(LAYERS) * SHAPES["deepseek"]["num_experts_per_tok"]
    assert int((pairs != 0).sum()) == kept < len(pairs)


@pytest.mark.parametrize("model", QUICK)
def test_experts_at_the_ends_of_the_threshold(tmp_path: Path, model: str) -> None:
    """0 is the stock model; at 1 no routed expert runs, shared experts still do."""
    checkpoint = _checkpoint(tmp_path, model, "expert_token")
    assert_same(_generate(tmp_path / "base"), _generate(checkpoint, {"threshold": 0}))
    answers = _generate(checkpoint, {"threshold": 1})
    skipping = routed_checkpoint(tmp_path / "base", tmp_path / "skipping", "expert_token", LAYERS, threshold=1.0)
    assert_equals_reference(skipping, random_prompts((5, 40, 90)), answers)
    if model == "olmoe":  # without shared experts nothing is left of the MLP
        static = routed_checkpoint(tmp_path / "base", tmp_path / "static", "mlp_static", LAYERS)
        assert_same(answers, _generate(static))
