"""Under torch.compile: the compiler sees one opaque op per routed sublayer, whose row count stays out of its sight."""

from pathlib import Path

import pytest

from tests.support.architectures import DENSE, EXPERTS
from tests.support.models import routed_checkpoint, tiny_model

from .harness import assert_equals_reference, engine, generate, random_prompts
from .test_llama import ROUTED, STATIC

SHAPES = DENSE | EXPERTS
CASES = [("llama", granularity) for granularity in ROUTED + STATIC]
# On the CPU the compiler traces into stock MoE layers.
CASES += [
    ("olmoe", "expert_token"),
    ("olmoe", "mlp_static"),
    ("deepseek", "expert_token"),
    ("deepseek", "mlp_sequence"),
]


#: What is added otherwise than in Llama, and a patch beside it.
PATCHED = [("granite", "block_sequence"), ("gemma2", "attn_sequence"), ("gemma3_text", "mlp_token")]


@pytest.mark.parametrize(
    ("model", "granularity"), [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in PATCHED)]
)
def test_parity(base: Path, tmp_path: Path, model: str, granularity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.config.compilation import CompilationMode

    monkeypatch.setenv("VLLM_CPU_CI_ENV", "1")  # traced, not optimised
    if model != "llama":
        base = tiny_model(tmp_path / "base", model, num_hidden_layers=5, **SHAPES[model])
    more = {"version": 2, "patch": {"rank": 4}} if (model, granularity) in PATCHED else {}
    checkpoint = routed_checkpoint(base, tmp_path / "c", granularity, [1, 2, 3], **more)
    prompts = random_prompts((3, 40, 1, 70))
    with engine(checkpoint, enforce_eager=False) as llm:
        assert llm.llm_engine.vllm_config.compilation_config.mode != CompilationMode.NONE
        answers = generate(llm, prompts, 10)
    assert_equals_reference(checkpoint, prompts, answers)
