"""Every granularity of the dense architectures beside Llama against the float32 reference."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.architectures import DENSE as SHAPES
from tests.support.architectures import WINDOW
from tests.support.models import routed_checkpoint, tiny_model
from vllm_mod.config import ConfigError

from .harness import (
    assert_equals_reference,
    assert_no_kv_cache_of,
    assert_same,
    engine,
    generate,
    random_prompts,
    runner_model,
)

LAYERS = [1, 2, 3]
LENGTHS = (3, 40, 1, 70, 33, 100)
DYNAMIC = ["attn_token", "attn_sequence", "mlp_token", "mlp_sequence", "block_token", "block_sequence"]
GRANULARITIES = [*DYNAMIC, "attn_static", "mlp_static", "block_static"]
#: Each granularity once per `make test` is enough for what architectures share; see `test_architectures` for the rest.
QUICK = ("qwen2", "qwen3", "mistral")
#: `make test-slow` has each granularity of these in `test_architectures`, with windows and patches.
NIGHTLY = ("granite", "gemma2", "gemma3_text")


def _marks(model: str) -> Any:
    return () if model in QUICK else pytest.mark.nightly if model in NIGHTLY else pytest.mark.slow


CASES = [
    pytest.param(model, granularity, marks=_marks(model), id=f"{model}-{granularity}")
    for model in SHAPES
    for granularity in GRANULARITIES
]


def _checkpoint(tmp_path: Path, model: str, granularity: str, **overrides: Any) -> Path:
    base = tiny_model(tmp_path / "base", model, num_hidden_layers=5, **SHAPES[model] | overrides)
    return routed_checkpoint(base, tmp_path / "routed", granularity, LAYERS)


@pytest.mark.parametrize(("model", "granularity"), CASES)
def test_parity(tmp_path: Path, model: str, granularity: str) -> None:
    # Packed KV has no place for a window shorter than the context: that is refused, see below.
    packed = granularity in ("attn_token", "block_token")
    options = {"max_model_len": WINDOW} if packed and "sliding_window" in SHAPES[model] else {}
    checkpoint = _checkpoint(tmp_path, model, granularity)
    prompts = random_prompts([n % WINDOW or 1 for n in LENGTHS] if options else LENGTHS)
    new_tokens = [min(16, WINDOW - len(p)) for p in prompts] if options else 16
    with engine(checkpoint, max_num_batched_tokens=64, **options) as llm:
        assert type(runner_model(llm)).__name__.endswith("MoDForCausalLM")
        if granularity in ("attn_static", "block_static"):
            assert_no_kv_cache_of(llm, LAYERS, 5)
        answers = generate(llm, prompts, new_tokens)
    decisions = assert_equals_reference(checkpoint, prompts, answers)
    if granularity in DYNAMIC:  # the test means something only where requests disagree
        kept = torch.cat([d[layer].flatten() for d in decisions for layer in LAYERS])
        assert 0 < kept.float().mean() < 1


@pytest.mark.parametrize(
    ("model", "granularity", "reclaim"),
    [
        ("qwen3", "attn_sequence", True),
        ("qwen3", "attn_sequence", False),
        ("qwen3", "mlp_sequence", True),
        ("qwen3", "mlp_token", True),
        ("qwen2", "block_sequence", True),
    ],
)
def test_sliding_window_with_reused_pages(tmp_path: Path, model: str, granularity: str, reclaim: bool) -> None:
    """Requests far longer than the window, in a pool that pages change hands in: a request is still known."""
    windowed = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 0}
    checkpoint = _checkpoint(tmp_path, model, granularity, **windowed)
    prompts = random_prompts((90, 10, 64, 33, 100, 50, 20, 70) * 2, seed=2)
    new_tokens = [100, 30, 80, 10] * 4  # requests begin while others are far beyond the window
    heads_size = {"qwen3": 4 * 64, "qwen2": 1 * 32}[model]  # KV heads, head size
    token_block = 2 * 32 * heads_size * 4 * 5  # bytes: K and V, tokens, heads, float32, layers
    with engine(checkpoint, {"kv_reclaim": reclaim}, kv_cache_memory_bytes=14 * token_block, max_num_seqs=5) as llm:
        answers = generate(llm, prompts, new_tokens)
    assert_equals_reference(checkpoint, prompts, answers)


@pytest.mark.parametrize("granularity", ["attn_token", "block_token"])
def test_packed_kv_refuses_a_window_shorter_than_the_context(tmp_path: Path, granularity: str) -> None:
    checkpoint = _checkpoint(tmp_path, "mistral", granularity)
    with (
        pytest.raises((ConfigError, ValueError), match=r"layers \[1, 2, 3\] have a window of 24 tokens"),
        engine(checkpoint),
    ):
        pass


@pytest.mark.parametrize("model", QUICK)
def test_threshold_0_is_stock(tmp_path: Path, model: str) -> None:
    checkpoint = _checkpoint(tmp_path, model, "block_sequence")
    answers = []
    for path, mod in ((tmp_path / "base", None), (checkpoint, {"threshold": 0})):
        with engine(path, mod) as llm:
            answers.append(generate(llm, random_prompts((5, 40, 90))))
    assert_same(*answers)
