"""Under torch.compile: the compiler sees one opaque op per routed sublayer, whose row count stays out of its sight."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.architectures import DENSE, EXPERTS
from tests.support.models import routed_checkpoint, tiny_model

from .harness import assert_equals_reference, engine, generate, random_prompts
from .test_llama import ROUTED, STATIC

SHAPES = DENSE | EXPERTS
CASES: list[Any] = [("llama", granularity, {}) for granularity in ROUTED + STATIC]
# On the CPU the compiler traces into stock MoE layers.
CASES += [
    ("olmoe", "expert_token", {}),
    ("olmoe", "mlp_static", {}),
    ("deepseek", "expert_token", {}),
    ("deepseek", "mlp_sequence", {}),
]
WINDOWED = {"version": 2, "window": 24, "patch": {"rank": 4}}
CASES += [("llama", granularity, WINDOWED) for granularity in ("attn_sequence", "block_sequence", "mlp_sequence")]


#: What is added otherwise than in Llama, and a patch beside it.
PATCHED = [("granite", "block_sequence"), ("gemma2", "attn_sequence"), ("gemma3_text", "mlp_token")]
CASES += [
    pytest.param(*case, {"version": 2, "patch": {"rank": 4}}, marks=pytest.mark.slow) for case in PATCHED
]  # fmt: skip


@pytest.mark.parametrize(("model", "granularity", "config"), CASES)
def test_parity(
    base: Path, tmp_path: Path, model: str, granularity: str, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.config.compilation import CompilationMode

    monkeypatch.setenv("VLLM_CPU_CI_ENV", "1")  # traced, not optimised
    if model != "llama":
        base = tiny_model(tmp_path / "base", model, num_hidden_layers=5, **SHAPES[model])
    checkpoint = routed_checkpoint(base, tmp_path / "c", granularity, [1, 2, 3], **config)
    prompts = random_prompts((3, 40, 1, 70))
    with engine(checkpoint, enforce_eager=False) as llm:
        assert llm.llm_engine.vllm_config.compilation_config.mode != CompilationMode.NONE
        answers = generate(llm, prompts, 10)
    assert_equals_reference(checkpoint, prompts, answers)
