"""The parity tests once more, at vLLM's Model Runner V2 (its Triton kernels interpreted)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.v2 import v2_environment

SELECTED = "test_mixed_batch or (test_preemption and (attn_sequence or attn_token))"


@pytest.mark.v2
def test_parity_at_model_runner_v2() -> None:
    here = Path(__file__).parent
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(here / "test_llama.py"), "-k", SELECTED],
        env=os.environ | v2_environment(),
        cwd=here.parent.parent,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
