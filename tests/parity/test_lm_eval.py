"""lm-eval through vLLM gives what its Hugging Face backend gives on the reference, decisions included."""

import json
from pathlib import Path

import pytest

from benchmarks import quality
from tests.support.models import routed_checkpoint
from tests.support.tasks import task_data


@pytest.mark.parametrize("granularity", ["attn_sequence", pytest.param("attn_token", marks=pytest.mark.nightly)])
def test_scores_equal_the_references(
    granularity: str, tiny_llama_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two tasks: one scored by likelihoods (and prompts longer than the model allows), one by generated text."""
    checkpoint = routed_checkpoint(tiny_llama_path, tmp_path / "mod", granularity, [2, 3, 5])
    output = tmp_path / "quality.json"
    engine = {"max_model_len": 512, "kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 16}
    quality.main([
        str(checkpoint), "--model", str(tiny_llama_path), "--data-dir", str(task_data(tmp_path / "data")),
        "--tasks", "boolq", "hellaswag", "gsm8k", "--limit", "4", "--reference", "2", "--static", "3",
        "--dtype", "float32", "--model-args", json.dumps(engine), "--output", str(output),
    ])  # fmt: skip
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(line) == {"tasks", "recovery", "kept_ratio", "static_recovery"}
    assert 0.05 < line["kept_ratio"] < 0.95  # decisions differ, so that wrong ones would be seen
    record = json.loads(output.read_text())
    assert record["tasks"]["hellaswag"]["truncated"] == 1 and record["tasks"]["boolq"]["truncated"] == 0
    assert record["tasks"]["boolq"]["in_window"] == 0 and record["tasks"]["boolq"]["shots"] == 0
    for name, compared in record["reference"].items():
        assert compared["samples"] == (1 if name == "gsm8k" else 2)
        assert compared["vllm"] == compared["reference"], name
    assert record["reference"]["boolq"]["largest_likelihood_difference"] < 1e-2
    assert record["reference"]["hellaswag"]["largest_likelihood_difference"] < 1e-2
    assert json.loads((checkpoint / "evaluation.json").read_text())["tasks"] == line["tasks"]
    assert (checkpoint / "README.md").is_file()
    assert not output.with_suffix(".partial.json").exists()
