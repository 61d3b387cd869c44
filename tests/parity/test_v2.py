"""The parity tests once more, at vLLM's Model Runner V2 (its Triton kernels interpreted)."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.v2 import v2_environment

#: Files, and which of their tests. First all granularities of Llama, and one architecture with experts.
QUICK = {
    ("test_llama.py",): "test_mixed_batch and (attn_sequence or attn_token)",
    ("test_moe.py",): "test_parity and deepseek and not static",
    ("test_async.py",): "test_steps_in_flight",
    ("test_rehearsal.py",): "[block_token or [patched] or [patched-",
    ("test_window.py", "test_dial.py", "test_patches.py"): (
        "(test_chunks and 24 and attn_sequence) or (test_each_request and attn_sequence)"
        " or (test_parity and attn_sequence)"
    ),
    ("test_decode.py", "../unit/test_kernels.py"): (
        "(test_dense and (attn_sequence or attn_token) and True)"
        " or test_split_pages or test_decide or test_token_scores or test_window"
    ),
}
SLOW = {
    ("test_llama.py", "test_scale.py"): (
        "test_mixed_batch or (test_preemption and (attn_sequence or attn_token)) or test_a_few_requests"
    ),
    ("test_dense.py",): "test_parity and (qwen2 or mistral) and not static",
    ("test_moe.py",): "test_parity and olmoe and not static",
    ("test_window.py", "test_patches.py"): (
        "(test_chunks and (mlp_sequence or block_sequence) and (24 or 4096))"
        " or (test_one_token_per_step and attn_sequence) or (test_preemption and 24) or test_parity"
    ),
}
#: Ten minutes each.
NIGHTLY = {
    ("test_dense.py",): "test_parity and qwen3 and not static",
    ("test_soak.py",): "test_shared_prefixes_and_dials and 120",
    ("test_rehearsal.py",): "not [block_token and not [patched] and not [patched-",
    ("test_dense.py", "test_architectures.py"): "(test_parity or test_windows) and (phi3 or granite) and not static",
    ("test_architectures.py", "test_dense.py"): "(test_parity or test_windows) and gemma and not static",
    ("test_moe.py", "test_architectures.py"): "(test_parity or test_windows) and (qwen3_moe or mixtral) and not static",
}
#: The GPU worker of vLLM 0.31 starts up in other steps than the rehearsal knows.
OLD_WORKER = importlib.util.find_spec("vllm.model_executor.warmup.attention_warmup") is None


def _marks(files: tuple[str, ...]) -> list[pytest.MarkDecorator]:
    return [pytest.mark.skipif(OLD_WORKER, reason="needs vLLM 0.32")] if "test_rehearsal.py" in files else []


CASES = [
    *(pytest.param(*case, id=case[1], marks=_marks(case[0])) for case in QUICK.items()),
    *(pytest.param(*case, id=case[1], marks=[pytest.mark.slow, *_marks(case[0])]) for case in SLOW.items()),
    *(pytest.param(*case, id=case[1], marks=[pytest.mark.nightly, *_marks(case[0])]) for case in NIGHTLY.items()),
]


@pytest.mark.v2
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("files", "selected"), CASES)
def test_parity_at_model_runner_v2(files: tuple[str, ...], selected: str) -> None:
    here = Path(__file__).parent
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            *(str(here / file) for file in files),
            "-k",
            selected,
        ],
        env=os.environ | v2_environment(),
        cwd=here.parent.parent,
        capture_output=True,
        text=True,
        timeout=1700,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
