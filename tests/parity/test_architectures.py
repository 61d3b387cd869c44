"""What architectures differ in: the stock model of each, and what becomes of a sublayer's output in it.

Granularities without version 2's windows and patches are in `test_dense` and `test_moe`.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from router_tuning.model import load_base
from tests.support.architectures import DENSE, EXPERTS, WINDOW
from tests.support.models import routed_checkpoint, tiny_model
from vllm_mod.config import ConfigError

from .harness import LOGPROB_TOLERANCE, assert_equals_reference, assert_same, engine, generate, random_prompts
from .test_decode import static_decode

LAYERS = [1, 2, 3]
LENGTHS = (3, 40, 1, 70, 33, 100)
SHAPES = DENSE | EXPERTS
PATCHED = {"version": 2, "patch": {"rank": 4}}
WINDOWED = PATCHED | {"window": WINDOW}
#: One per architecture, each target, and both levels.
QUICK = {
    ("phi3", "mlp_token"): PATCHED,
    ("granite", "block_sequence"): WINDOWED,
    ("gemma2", "attn_sequence"): WINDOWED,
    ("gemma3_text", "block_sequence"): WINDOWED,
    ("qwen3_moe", "expert_token"): {},
    ("mixtral", "mlp_sequence"): WINDOWED,
    ("qwen2", "block_sequence"): WINDOWED,
    ("qwen3", "attn_sequence"): WINDOWED,
    ("mistral", "attn_sequence"): WINDOWED,
    ("olmoe", "mlp_sequence"): WINDOWED,
    ("deepseek", "block_sequence"): WINDOWED,
}
#: All of those that multiply or norm a sublayer's output, or call the MLP by another name.
SLOW = {
    (model, f"{target}_{level}"): WINDOWED if level == "sequence" else PATCHED
    for model in ("granite", "gemma2", "gemma3_text", "mixtral")
    for target in ("attn", "mlp", "block")
    for level in ("token", "sequence", "static")
}
CASES = [
    *(pytest.param(*case, config, id="-".join(case)) for case, config in QUICK.items()),
    *(
        pytest.param(*case, config, id="-".join(case), marks=pytest.mark.slow)
        for case, config in SLOW.items()
        if case not in QUICK
    ),
]
EARLIER = ("qwen2", "qwen3", "mistral", "olmoe", "deepseek")
_LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1 + 0.05 * i for i in range(16)],
    "long_factor": [1 + 0.3 * i for i in range(16)],
}
#: What some published configs have besides.
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("phi3", {"sliding_window": WINDOW}),
    ("phi3", {"rope_parameters": _LONG, "original_max_position_embeddings": 256}),
    ("mixtral", {"sliding_window": WINDOW}),
    ("qwen3_moe", {"use_sliding_window": True, "sliding_window": WINDOW}),
    ("qwen3_moe", {"mlp_only_layers": [], "decoder_sparse_step": 2, "norm_topk_prob": False}),
]
STOCK = [
    *(pytest.param(m, {}, id=m, marks=pytest.mark.slow if m in EARLIER else ()) for m in SHAPES),
    *(pytest.param(m, more, id=f"{m}-{'-'.join(more)}", marks=pytest.mark.slow) for m, more in VARIANTS),
]


def _base(path: Path, model: str, **more: Any) -> Path:
    return tiny_model(path, model, num_hidden_layers=5, **SHAPES[model] | more)


@torch.no_grad()
@pytest.mark.parametrize(("model", "more"), STOCK)
def test_stock_vllm_equals_the_unrouted_reference(tmp_path: Path, model: str, more: dict[str, Any]) -> None:
    """Before anything is routed; else routed parity would compare two different models."""
    base, prompts = _base(tmp_path / "base", model, **more), random_prompts(LENGTHS)
    with engine(base) as llm:
        answers = generate(llm, prompts, 16)
    assert len({token for answer in answers for token in answer.tokens}) > 10  # not one token for ever
    reference = load_base(base, torch.float32).eval()
    for prompt, answer in zip(prompts, answers, strict=True):
        logits = reference(torch.tensor([prompt + answer.tokens]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == answer.tokens
        expected = logits.log_softmax(-1).gather(1, torch.tensor(answer.tokens)[:, None])[:, 0]
        assert (expected - torch.tensor(answer.logprobs)).abs().max() < LOGPROB_TOLERANCE


@pytest.mark.parametrize(("model", "granularity", "config"), CASES)
def test_windows_and_patches(tmp_path: Path, model: str, granularity: str, config: dict[str, Any]) -> None:
    checkpoint = routed_checkpoint(_base(tmp_path / "base", model), tmp_path / "c", granularity, LAYERS, **config)
    # Packed KV has no place for a window shorter than the context.
    short = granularity in ("attn_token", "block_token") and "sliding_window" in SHAPES[model]
    prompts, more = (random_prompts([n % WINDOW or 1 for n in LENGTHS] if short else LENGTHS, seed=s) for s in (0, 1))
    new_tokens = [min(16, WINDOW - len(p)) for p in prompts] if short else 16
    checked: list[int] = []
    with engine(checkpoint, max_num_batched_tokens=64, max_model_len=WINDOW if short else 256) as llm:
        answers = generate(llm, prompts, new_tokens)
        if not granularity.endswith("static"):
            with static_decode(llm, checked):
                again = generate(llm, more, new_tokens)
            assert checked or granularity == "expert_token"
            assert_equals_reference(checkpoint, more, again)
    assert_equals_reference(checkpoint, prompts, answers)
    if "patch" in config:
        without = {key: value for key, value in config.items() if key != "patch"}
        other = routed_checkpoint(tmp_path / "base", tmp_path / "without", granularity, LAYERS, **without)
        with pytest.raises(AssertionError):  # the patch is no small thing
            assert_equals_reference(other, prompts, answers)


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["attn_token", "block_token"])
@pytest.mark.parametrize("model", ["gemma2", "gemma3_text"])
def test_packed_kv_of_layers_that_see_everything_beside_sliding_ones(
    tmp_path: Path, model: str, granularity: str
) -> None:
    full = [1, 3]
    checkpoint = routed_checkpoint(_base(tmp_path / "base", model), tmp_path / "c", granularity, full)
    prompts = random_prompts(LENGTHS)
    with engine(checkpoint, max_num_batched_tokens=64) as llm:
        answers = generate(llm, prompts, 16)
    assert_equals_reference(checkpoint, prompts, answers)
    others = routed_checkpoint(tmp_path / "base", tmp_path / "others", granularity, [1, 2])
    with pytest.raises((ConfigError, ValueError), match=r"layers \[2\] have a window of 24 tokens"), engine(others):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("model", ["granite", "gemma2"])
def test_skipping_everything_equals_the_static_checkpoint(tmp_path: Path, model: str) -> None:
    base = _base(tmp_path / "base", model)
    routed, static = (
        routed_checkpoint(base, tmp_path / g, g, LAYERS, **PATCHED) for g in ("attn_token", "attn_static")
    )
    answers = []
    for checkpoint, mod in ((routed, {"force": "skip"}), (static, None)):
        with engine(checkpoint, mod, max_model_len=WINDOW) as llm:
            answers.append(generate(llm, random_prompts((3, 5, 10)), 12))
    assert_same(*answers)
