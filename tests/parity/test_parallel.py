"""Two processes give the same answers as one: tensor and pipeline parallel."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.models import routed_checkpoint, tiny_model

from .harness import assert_equals_reference, counter, engine, generate, random_prompts
from .test_moe import SHAPES

LAYERS = [1, 2, 4, 5, 6]  # on both pipeline ranks
PARALLEL: dict[str, dict[str, Any]] = {
    "tp": {"tensor_parallel_size": 2},
    # Traced, so that vLLM warms up: without it stock pipeline ranks, too, fail on the CPU. Eager backend: it is quick.
    "pp": {
        "pipeline_parallel_size": 2,
        "enforce_eager": False,
        "compilation_config": {"mode": 2, "backend": "eager"},
    },
}

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("granularity", ["attn_sequence", "attn_token", "block_sequence", "mlp_token"])
@pytest.mark.parametrize("parallel", ["tp", "pp"])
def test_two_processes(base: Path, tmp_path: Path, granularity: str, parallel: str) -> None:
    checkpoint = routed_checkpoint(base, tmp_path / "c", granularity, LAYERS)
    prompts = random_prompts((3, 40, 17, 70, 33, 64, 128))
    with engine(checkpoint, **PARALLEL[parallel]) as llm:
        answers = generate(llm, prompts, 12)
        kept, routed = (counter(llm, f"vllm:mod_{name}") for name in ("kept", "routed"))
    decisions = assert_equals_reference(checkpoint, prompts, answers)
    if granularity.endswith("sequence"):  # every layer's decisions are counted once
        assert routed == len(prompts) * len(LAYERS)
        assert kept == sum(int(d[i]) for d in decisions for i in LAYERS)


@pytest.mark.parametrize(
    ("model", "granularity"),
    [("olmoe", "expert_token"), ("olmoe", "mlp_sequence"), ("deepseek", "expert_token"), ("deepseek", "block_token")],
)
def test_experts_on_two_tensor_parallel_ranks(tmp_path: Path, model: str, granularity: str) -> None:
    base = tiny_model(tmp_path / "base", model, num_hidden_layers=5, **SHAPES[model])
    checkpoint = routed_checkpoint(base, tmp_path / "c", granularity, [1, 2, 3])
    prompts = random_prompts((3, 40, 17, 70))
    with engine(checkpoint, tensor_parallel_size=2) as llm:
        answers = generate(llm, prompts, 12)
    assert_equals_reference(checkpoint, prompts, answers)
