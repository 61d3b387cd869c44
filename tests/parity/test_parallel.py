"""Two processes give the same answers as one, tensor or pipeline parallel; ranks that disagree never hang."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.architectures import DENSE, EXPERTS
from tests.support.models import routed_checkpoint, tiny_model
from tests.support.workers import negate_routers_of_rank_1

from .harness import assert_equals_reference, assert_same, counter, engine, generate, random_prompts

SHAPES = DENSE | EXPERTS
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
NIGHTLY = pytest.mark.nightly  #: of models that other rows have on one rank; CI lacks the time for all of them


GRANULARITIES = ["attn_sequence", "attn_token", "block_sequence", "mlp_token", "block_static"]
CASES: list[tuple[str, str, dict[str, Any]]] = [(p, granularity, {}) for p in PARALLEL for granularity in GRANULARITIES]
CASES += [("pp", "mlp_sequence", {}), ("pp", "block_token", {})]
WINDOWED = {"version": 2, "window": 24, "patch": {"rank": 4}}
CASES += [
    (p, granularity, WINDOWED) for p in PARALLEL for granularity in ("attn_sequence", "block_sequence", "mlp_sequence")
]


@pytest.mark.parametrize(("parallel", "granularity", "config"), CASES)
def test_two_processes(
    base: Path, tmp_path: Path, granularity: str, parallel: str, config: dict[str, Any]
) -> None:  # fmt: skip
    checkpoint = routed_checkpoint(base, tmp_path / "c", granularity, LAYERS, **config)
    prompts = random_prompts((3, 40, 17, 70, 33, 64, 128))
    with engine(checkpoint, **PARALLEL[parallel]) as llm:
        answers = generate(llm, prompts, 12)
        if config:  # found in the cache: the sums of all ranks' layers are there
            assert_same(answers, generate(llm, prompts, 12))
            assert counter(llm, "vllm:prefix_cache_hits") > 0
        kept, routed = (counter(llm, f"vllm:mod_{name}") for name in ("kept", "routed"))
    decisions = assert_equals_reference(checkpoint, prompts, answers)
    if granularity.endswith("sequence"):  # every layer's decisions are counted once
        assert routed == (1 + bool(config)) * len(prompts) * len(LAYERS)
        assert kept == (1 + bool(config)) * sum(int(d[i]) for d in decisions for i in LAYERS)


PATCH = {"patch": {"rank": 4}}


@pytest.mark.parametrize(
    ("parallel", "model", "granularity", "more"),
    [
        pytest.param("tp", "phi3", "mlp_token", {}, marks=NIGHTLY),
        pytest.param("tp", "granite", "block_token", PATCH, marks=NIGHTLY),
        ("tp", "gemma2", "attn_sequence", PATCH),
        pytest.param("tp", "gemma3_text", "mlp_sequence", PATCH, marks=NIGHTLY),
        ("pp", "gemma2", "block_sequence", {}),
    ],
)
def test_other_dense_models_on_two_ranks(
    tmp_path: Path, parallel: str, model: str, granularity: str, more: dict[str, Any]
) -> None:
    assert_two_ranks_equal_the_reference(tmp_path, parallel, model, granularity, **more)


@pytest.mark.parametrize(
    ("parallel", "model", "granularity"),
    [
        ("tp", "olmoe", "expert_token"),
        ("tp", "olmoe", "mlp_sequence"),
        ("tp", "deepseek", "expert_token"),
        ("tp", "deepseek", "block_token"),
        pytest.param("pp", "olmoe", "expert_token", marks=NIGHTLY),
        ("pp", "deepseek", "expert_token"),
        pytest.param("tp", "mixtral", "expert_token", marks=NIGHTLY),
        pytest.param("pp", "mixtral", "mlp_static", marks=NIGHTLY),
        ("tp", "qwen3_moe", "expert_token"),
        pytest.param("pp", "qwen3_moe", "expert_token", marks=NIGHTLY),
    ],
)
def test_experts_on_two_ranks(tmp_path: Path, parallel: str, model: str, granularity: str) -> None:
    assert_two_ranks_equal_the_reference(tmp_path, parallel, model, granularity)


def assert_two_ranks_equal_the_reference(
    tmp_path: Path, parallel: str, model: str, granularity: str, **config: Any
) -> None:
    base = tiny_model(tmp_path / "base", model, num_hidden_layers=5, **SHAPES[model])
    checkpoint = routed_checkpoint(base, tmp_path / "c", granularity, [1, 2, 3], **config)
    prompts = random_prompts((3, 40, 17, 70))
    with engine(checkpoint, **PARALLEL[parallel]) as llm:
        answers = generate(llm, prompts, 12)
    assert_equals_reference(checkpoint, prompts, answers)


@pytest.fixture
def bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step in which ranks wait for each other ends as an error."""
    monkeypatch.setenv("VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", "60")


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize(
    ("model", "granularity"),
    [
        ("llama", "attn_token"),
        ("llama", "block_token"),
        ("olmoe", "expert_token"),
        ("olmoe", "attn_token"),
        ("olmoe", "block_sequence"),
    ],
)
def test_ranks_that_disagree_do_not_wait(base: Path, tmp_path: Path, model: str, granularity: str) -> None:
    """Answers are of no use then, but there are some. OLMoE's attention exchanges rows: rank 0 decides for all."""
    if model == "olmoe":
        base = tiny_model(tmp_path / "base", model, num_hidden_layers=5, **SHAPES[model])
    checkpoint = routed_checkpoint(base, tmp_path / "c", granularity, [1, 2, 3])
    prompts = random_prompts((3, 40, 17, 70))
    with engine(checkpoint, tensor_parallel_size=2) as llm:
        llm.collective_rpc(negate_routers_of_rank_1)
        answers = generate(llm, prompts, 12)
    assert [len(a.tokens) for a in answers] == [12] * 4
    if model == "olmoe" and granularity != "expert_token":
        assert_equals_reference(checkpoint, prompts, answers)
    else:  # they did disagree
        with pytest.raises(AssertionError, match=r"log-probability off|not the reference's choice"):
            assert_equals_reference(checkpoint, prompts, answers)


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize("granularity", ["attn_sequence", "block_sequence", "mlp_sequence"])
def test_ranks_that_disagree_about_pages_stop_the_engine(base: Path, tmp_path: Path, granularity: str) -> None:
    checkpoint = routed_checkpoint(base, tmp_path / "c", granularity, LAYERS)
    with engine(checkpoint, tensor_parallel_size=2) as llm:
        llm.collective_rpc(negate_routers_of_rank_1)
        with pytest.raises(RuntimeError, match="ranks disagree on routing decisions"):
            generate(llm, random_prompts((3, 40, 17)), 12)
