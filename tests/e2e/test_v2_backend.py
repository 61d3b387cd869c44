"""The stand-in Triton backend does what it is for: vLLM picks Model Runner V2 on a machine without a GPU."""

import os
import subprocess
import sys

import pytest

from tests.support.v2 import v2_environment


@pytest.mark.v2
def test_vllm_takes_triton_for_usable():
    code = "from vllm.triton_utils import HAS_TRITON; import triton.runtime as r; "
    code += "assert HAS_TRITON; assert r.driver.active.get_current_target().backend == 'cpu'"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | v2_environment())
