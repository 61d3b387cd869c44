"""vLLM's Model Runner V2 on a machine without a GPU."""

import os
from pathlib import Path


def v2_environment() -> dict[str, str]:
    """Environment of a subprocess in which vLLM picks Model Runner V2 on the CPU; merge it into `os.environ`.

    Triton looks for backends when it is first imported, so this must stand before the process starts. Kernels are
    interpreted: keep such tests to a few tokens of a tiny model, with enforce_eager.
    """
    path = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "TRITON_INTERPRET": "1",
        "TRITON_DEFAULT_BACKEND": "cpu",
        "VLLM_USE_V2_MODEL_RUNNER": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
