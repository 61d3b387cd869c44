"""Settings and fixtures of the whole suite. What is imported directly lives in `tests/support`."""

import json
import os
import signal
from pathlib import Path

# Tiny shapes on a machine that runs other things: threads of one op waiting for each other cost 10x.
# Read when torch is first imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings
from safetensors.torch import save_file

# Before vLLM or transformers are imported, by a test or by a process that a test starts.
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests bring their own models
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# A shell without job control (`make test &` in a script) ignores Ctrl-C for what it starts, and tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

#: They take minutes, so they start first: begun last, one would leave the other worker without work. (`make test` has
#: --no-loadscope-reorder; without it pytest-xdist starts modules with few tests last.)
LONG = (
    "parity/test_v2.py",
    "parity/test_soak.py",
    "parity/test_parallel.py",
    "recovery/test_recovery.py",
    "e2e/test_examples.py",
    "parity/test_rehearsal.py",
    "parity/test_architectures.py",
    "parity/test_moe.py",
    "parity/test_quantised.py",
    "parity/test_dense.py",
    "parity/test_lm_eval.py",
    "parity/test_trained_adapter.py",
    "parity/test_lora.py",
    "parity/test_llama.py",
    "unit/training/test_real_model.py",
    "e2e/test_serve.py",
    "e2e/test_dial.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    names = {str(Path(__file__).parent / name): place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: names.get(str(item.path), len(names)))


settings.register_profile("suite", deadline=None, max_examples=100, print_blob=True)
settings.load_profile("suite")


@pytest.fixture
def bare_base(tmp_path: Path) -> Path:
    """What `checkpoint.py` needs of a Llama of 6 layers and hidden size 8, and no more: nothing can run it."""
    base = tmp_path / "base"
    base.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": 6,
        "hidden_size": 8,
        "num_attention_heads": 2,
    }
    (base / "config.json").write_text(json.dumps(config))
    (base / "tokenizer.json").write_text("{}")
    weights = {f"model.layers.{i}.mlp.down_proj.weight": torch.full((8, 8), float(i)) for i in range(6)}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    return base


@pytest.fixture(scope="session")
def tiny_llama_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random-weight Llama that runs, written once."""
    from tests.support.models import tiny_llama

    return tiny_llama(tmp_path_factory.mktemp("models") / "tiny-llama")
