"""Every granularity of a routed Llama against the float32 reference (run again at Model Runner V2 by test_v2)."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.models import routed_checkpoint

from .harness import (
    Answer,
    assert_equals_reference,
    assert_no_kv_cache_of,
    assert_nothing_left,
    assert_same,
    counter,
    engine,
    generate,
    random_prompts,
    runner_model,
)

LAYERS = [1, 2, 4, 5, 6]
LENGTHS = (3, 17, 40, 1, 70, 33, 64, 128)
PLAIN_LENGTHS = (5, 40, 90)
ROUTED = ["attn_token", "attn_sequence", "mlp_token", "mlp_sequence", "block_token", "block_sequence"]
STATIC = ["attn_static", "mlp_static", "block_static"]


def _checkpoint(base: Path, tmp_path: Path, granularity: str, **config: object) -> Path:
    return routed_checkpoint(base, tmp_path / granularity, granularity, LAYERS, **config)


@pytest.mark.parametrize("granularity", ROUTED + STATIC)
def test_mixed_batch(base: Path, tmp_path: Path, granularity: str) -> None:
    """Short and long prompts at once, prompts in chunks and prefixes cached wherever the granularity allows it."""
    checkpoint = _checkpoint(base, tmp_path, granularity)
    prompts = random_prompts(LENGTHS)
    prompts.append(prompts[-1][:96] + prompts[0])  # shares its first blocks with another prompt
    with engine(checkpoint, max_num_batched_tokens=64, enable_prefix_caching=True) as llm:
        settings = llm.llm_engine.vllm_config
        assert settings.scheduler_config.enable_chunked_prefill == (not granularity.endswith("sequence"))
        allowed = granularity in ("mlp_token", *STATIC)
        assert settings.cache_config.enable_prefix_caching == allowed
        if granularity in ("attn_static", "block_static"):
            assert_no_kv_cache_of(llm, LAYERS, 8)
        first = generate(llm, prompts)
        alone = [generate(llm, [p])[0] for p in prompts]  # blocks are reused, cached prefixes are hit
        if allowed:
            assert counter(llm, "vllm:prefix_cache_hits") > 0
    decisions = assert_equals_reference(checkpoint, prompts, first)
    assert_same(first, alone)  # neighbours do not matter
    if granularity in ROUTED:  # the test means something only where requests disagree
        for layer in LAYERS:
            kept = torch.cat([d[layer].flatten() for d in decisions])
            assert 0 < kept.float().mean() < 1, f"layer {layer}"


@pytest.fixture(scope="module")
def plain_answers(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Answer]]:
    """Of the stock architecture, and of the static checkpoint of each target."""
    directory, answers = tmp_path_factory.mktemp("static"), {}
    for name in ["stock", *STATIC]:
        checkpoint = base if name == "stock" else _checkpoint(base, directory, name)
        with engine(checkpoint) as llm:
            answers[name] = generate(llm, random_prompts(PLAIN_LENGTHS))
    return answers


@pytest.mark.parametrize("granularity", ROUTED)
def test_threshold_0_is_stock_and_1_is_static(
    base: Path, tmp_path: Path, plain_answers: dict[str, list[Answer]], granularity: str
) -> None:
    checkpoint = _checkpoint(base, tmp_path, granularity)
    static = granularity.split("_")[0] + "_static"
    keep, skip = (
        ({"threshold": 0}, {"threshold": 1}) if "token" in granularity else ({"force": "keep"}, {"force": "skip"})
    )
    for mod, same in ((keep, "stock"), (skip, static)):
        with engine(checkpoint, mod) as llm:
            assert_same(plain_answers[same], generate(llm, random_prompts(PLAIN_LENGTHS)))


@pytest.mark.parametrize("granularity", ["attn_sequence", "block_sequence", "mlp_sequence", "attn_token"])
def test_preemption(base: Path, tmp_path: Path, granularity: str) -> None:
    """A pool so small that requests are preempted and pages change hands: decisions and answers stay."""
    checkpoint = _checkpoint(base, tmp_path, granularity)
    prompts = random_prompts((30, 60, 25, 90, 31, 64, 10, 50, 40, 20), seed=1)
    page = 2 * 32 * 2 * 32 * 4 * 8  # K and V, tokens, heads, head size, float32, layers
    with engine(checkpoint, kv_cache_memory_bytes=14 * page, max_num_seqs=8) as llm:
        answers = generate(llm, prompts, 80)
        assert counter(llm, "vllm:num_preemptions") > 0
        if granularity in ("attn_sequence", "block_sequence"):
            assert_nothing_left(llm)
    assert_equals_reference(checkpoint, prompts, answers)


@pytest.mark.parametrize(
    ("granularity", "linear"),
    [
        ("attn_sequence", "self_attn.qkv_proj"),
        ("attn_token", "self_attn.qkv_proj"),
        ("mlp_token", "mlp.gate_up_proj"),
        ("block_sequence", "mlp.gate_up_proj"),
    ],
)
def test_skipped_rows_are_not_computed(base: Path, tmp_path: Path, granularity: str, linear: str) -> None:
    """The rows that reach a routed layer's GEMMs are exactly the kept ones; none where all skip."""
    checkpoint = _checkpoint(base, tmp_path, granularity)
    prompts = random_prompts((20, 30, 40, 50, 60, 70))
    for force in (None, "skip") if granularity == "attn_sequence" else (None,):
        rows = dict.fromkeys(range(8), 0)
        with engine(checkpoint, {"force": force}) as llm:
            model = runner_model(llm)
            for index, layer in enumerate(model.model.layers):

                def count(module: object, inputs: Any, index: int = index, rows: dict[int, int] = rows) -> None:
                    rows[index] += len(inputs[0])

                layer.get_submodule(linear).register_forward_pre_hook(count)
            answers = generate(llm, prompts, 2)
        # The last token of an answer is never fed back.
        fed = sum(len(p) + 1 for p in prompts)
        if force == "skip":
            assert {i: n for i, n in rows.items() if i in LAYERS} == dict.fromkeys(LAYERS, 0)
            continue
        decisions = assert_equals_reference(checkpoint, prompts, answers)
        for index in range(8):
            expected = fed
            if index in LAYERS:
                expected = 0
                for prompt, decision in zip(prompts, decisions, strict=True):
                    keep = decision[index][0]
                    expected += int(keep[: len(prompt) + 1].sum()) if keep.dim() else int(keep) * (len(prompt) + 1)
            assert rows[index] == expected, f"layer {index}"
        assert 0 < sum(rows[i] for i in LAYERS) < fed * len(LAYERS)
