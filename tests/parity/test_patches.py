"""What a skipped sublayer adds in its place (version 2): served as the float32 reference computes it."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from router_tuning.patches import with_patch
from tests.support.models import routed_checkpoint
from vllm_mod.checkpoint import read_mod_config

from .harness import assert_equals_reference, assert_same, engine, generate, random_prompts
from .test_decode import static_decode

LAYERS = [1, 2, 4, 5, 6]
LENGTHS = (3, 17, 40, 1, 70, 33)
CASES = [
    ("attn_sequence", 0, {"window": 24}),
    ("attn_sequence", 8, {"window": 24}),
    ("attn_sequence", 8, {}),
    ("mlp_sequence", 8, {"window": 24}),
    ("block_sequence", 8, {"window": 24}),
    ("attn_token", 8, {}),
    ("mlp_token", 8, {}),
    ("block_token", 8, {}),
    ("attn_static", 8, {}),
    ("mlp_static", 0, {}),
    ("block_static", 8, {}),
]


@pytest.mark.parametrize(("granularity", "rank", "config"), CASES)
def test_parity(base: Path, tmp_path: Path, granularity: str, rank: int, config: dict[str, Any]) -> None:
    options = {"version": 2, "patch": {"rank": rank}, **config}
    checkpoint = routed_checkpoint(base, tmp_path / "c", granularity, LAYERS, **options)
    prompts = random_prompts(LENGTHS)
    checked: list[int] = []
    with engine(checkpoint, max_num_batched_tokens=64) as llm:
        answers = generate(llm, prompts, 16)
        if not granularity.endswith("static"):
            with static_decode(llm, checked):
                again = generate(llm, random_prompts(LENGTHS, seed=1), 16)
            assert checked
            assert_equals_reference(checkpoint, random_prompts(LENGTHS, seed=1), again)
    assert_equals_reference(checkpoint, prompts, answers)
    without = routed_checkpoint(base, tmp_path / "without", granularity, LAYERS, **{**options, "patch": None})
    with pytest.raises(AssertionError):  # the patch is no small thing
        assert_equals_reference(without, prompts, answers)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("granularity", "config"), [("attn_sequence", {"window": 8}), ("block_token", {}), ("mlp_static", {})]
)
def test_what_was_fitted_is_served(base: Path, tmp_path: Path, granularity: str, config: dict[str, Any]) -> None:
    from router_tuning.cli import main

    data, letters = tmp_path / "data.jsonl", random.Random(3)
    words = ["".join(letters.choices("abcdefgh ", k=letters.randint(4, 30))) for _ in range(60)]
    rows = [{"prompt": a, "completion": b} for a, b in zip(words[::2], words[1::2], strict=True)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    checkpoint = routed_checkpoint(base, tmp_path / "c", granularity, LAYERS, version=2, **config)
    assert main(["patch", str(checkpoint), "--data", str(data), "--rank", "4"]) == 0
    prompts = random_prompts(LENGTHS)
    with engine(checkpoint) as llm:
        answers = generate(llm, prompts, 16)
    assert_equals_reference(checkpoint, prompts, answers)
    with pytest.raises(AssertionError):
        assert_equals_reference(checkpoint, prompts, answers, with_patch(read_mod_config(checkpoint), None))


def test_skipping_everything_equals_the_static_checkpoint(base: Path, tmp_path: Path) -> None:
    """The same patches, chosen by every router or built in."""
    config = {"version": 2, "patch": {"rank": 8}}
    routed = routed_checkpoint(base, tmp_path / "routed", "block_sequence", LAYERS, **config)
    static = routed_checkpoint(base, tmp_path / "static", "block_static", LAYERS, **config)
    answers = []
    for checkpoint, mod in ((routed, {"force": "skip"}), (static, None)):
        with engine(checkpoint, mod) as llm:
            answers.append(generate(llm, random_prompts(LENGTHS)))
    assert_same(*answers)
