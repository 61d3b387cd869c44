"""The model card: what it says of each record, and that it can be written again and again."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from router_tuning import card
from router_tuning.cli import main
from router_tuning.model import greedy, load_reference
from tests.support.models import routed_checkpoint
from tests.unit.training.test_trainer import train
from vllm_mod.config import ConfigError

CALIBRATION = {
    "command": "router-tuning calibrate CKPT --data d.jsonl --target-capacity 0.5",
    "data": ["d.jsonl"], "samples": 100, "per_layer": True, "target_capacity": 0.5, "kept": 0.501,
    "kept_per_layer": {"1": 0.48, "2": 0.522}, "threshold": [0.51, 0.49],
    "operating_points": [{"target": 0.75, "kept": 0.7503, "threshold": [0.4, 0.41]},
                         {"target": 0.5, "kept": 0.501, "threshold": 0.5}],
}  # fmt: skip
EVALUATION = {
    "command": "python -m benchmarks.quality CKPT --model BASE",
    "machine": {},
    "tasks": {
        "boolq": {"metric": "acc", "shots": 32, "base": 0.8, "base_stderr": 0.01, "checkpoint": 0.79,
                  "checkpoint_stderr": 0.011, "static": 0.6, "static_stderr": None, "samples": 3270},
        "piqa": {"metric": "acc_norm", "shots": 0, "base": 0.7, "base_stderr": 0.01, "checkpoint": 0.7,
                 "checkpoint_stderr": 0.01, "static": 0.65, "static_stderr": 0.01, "samples": 1838},
    },
    "perplexity": {"base": 5.0, "checkpoint": 5.1, "static": 6.25},
    "recovery": 0.994, "static_recovery": 0.84, "kept_ratio": 0.497,
}  # fmt: skip


def write_json(path: Path, data: dict) -> None:
    path.write_text(json.dumps(data))


def checkpoint(directory: Path, base_model: str | None = "meta-llama/Meta-Llama-3-8B", **mod) -> Path:
    directory.mkdir(exist_ok=True)
    settings = {"version": 1, "granularity": "attn_sequence", "layers": [1, 2], "target_capacity": 0.5, **mod}
    write_json(directory / "config.json", {"mod_config": settings | ({"base_model": base_model} if base_model else {})})
    return directory


def card_of(directory: Path):
    """The card as the hub reads it."""
    from huggingface_hub import ModelCard

    card.write(directory)
    return ModelCard((directory / "README.md").read_text())


def test_a_trained_checkpoint_has_one(base_dir, data_file, tmp_path):
    more = ("--lora-r", "24", "--lora-output", "adapter")
    assert train(base_dir, data_file, tmp_path / "out", *more) == 0
    text = (tmp_path / "out/README.md").read_text()
    for fact in (
        "| chat.jsonl | 144 | x 1 |", "Training: 64 of 64 rows", "| seed | 42 |", "| LoRA rank | 24 |",
        "| in layers | 1-3 |",
        "$ router-tuning train --model", "transformers ", "kept on held-out data, after training", "| 2 | 0.5 | ",
        "--lora-modules tuned=CKPT/adapter --max-lora-rank 32", "See the base model.", "Perplexity of held-out answers",
    ):  # fmt: skip
        assert fact in text, fact
    picture = re.search(r"!\[.*\]\((.*)\)", text)
    assert picture is not None and (tmp_path / "out" / picture[1]).is_file()
    before = text
    card.write(tmp_path / "out")
    assert (tmp_path / "out/README.md").read_text() == before
    assert not list((tmp_path / "out").glob(".README*"))


def test_front_matter_is_the_hubs(tmp_path):
    data = card_of(checkpoint(tmp_path)).data
    assert data.base_model == "meta-llama/Meta-Llama-3-8B"
    assert (data.library_name, data.pipeline_tag, data.license) == ("vllm-mod", "text-generation", "unknown")
    assert {"vllm", "dynamic-depth", "attn_sequence"} <= set(data.tags)


@pytest.mark.parametrize("name", ["/home/someone/models/llama", "./models/llama", "~/llama", "llama", None])
def test_directories_are_no_hub_names_and_are_not_shown(tmp_path, name):
    found = card_of(checkpoint(tmp_path, base_model=name))
    assert found.data.base_model is None
    assert "someone" not in found.content and "models/" not in found.content


def test_a_relative_directory_that_looks_like_a_hub_name(tmp_path, monkeypatch):
    (tmp_path / "models/llama").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert card_of(checkpoint(tmp_path / "out", base_model="models/llama")).data.base_model is None


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("README.md", "---\nlicense: llama3\ntags: [a]\n---\n# Llama", {"license": "llama3"}),
        (
            "README.md",
            "---\nlicense: other\nlicense_name: qwen\nlicense_link: LICENSE\n---\n",
            {"license": "other", "license_name": "qwen", "license_link": "LICENSE"},
        ),
        ("LICENSE", "\n    Apache License\n    Version 2.0, January 2004", {"license": "apache-2.0"}),
        ("LICENSE.txt", "META LLAMA 3 COMMUNITY LICENSE AGREEMENT", {"license": "llama3"}),
        ("LICENSE", "All rights reserved", {"license": "unknown"}),
        ("README.md", "# no header\n", {"license": "unknown"}),
        ("README.md", "---\nlicense: [\n---\n", {"license": "unknown"}),
    ],
)
def test_the_bases_licence_is_kept(tmp_path, file, text, expected):
    checkpoint(tmp_path)
    (tmp_path / file).write_text(text)
    for _ in range(2):  # the second time from our own card
        found = card_of(tmp_path)
        assert {k: v for k, v in found.data.to_dict().items() if k.startswith("license")} == expected
    assert (expected.get("license_name") or expected["license"]) in found.content


def test_operating_points_are_lines_to_copy(tmp_path):
    write_json(checkpoint(tmp_path) / "calibration.json", CALIBRATION)
    text = card_of(tmp_path).content
    assert """| 0.75 | 0.7503 | `--additional-config '{"mod": {"threshold": [0.4, 0.41]}}'` |""" in text
    assert """| 0.50 | 0.5010 | `--additional-config '{"mod": {"threshold": 0.5}}'` |""" in text
    assert "| 2 | 0.5 | 0.522 |" in text and "| all |  | 0.501 |" in text and CALIBRATION["command"] in text


def test_window_patch_and_cutoffs_are_explained(tmp_path):
    directory = checkpoint(tmp_path, version=2, cutoff=[40.5, -2], window=64, patch={"rank": 8})
    point = {"target": 0.75, "kept": 0.7503, "cutoff": [40.4, -3]}
    write_json(directory / "calibration.json", {"samples": 100, "operating_points": [point]})
    text = card_of(directory).content
    assert "per request, from the mean over the first 64 tokens of its prompt, whether it runs. These tokens" in text
    assert "a patch is added: a linear map of rank 8 of its input and a bias." in text
    assert "| layer | cutoff |" in text and "| 1 | 40.5 |" in text and "| 2 | -2 |" in text
    assert """| 0.75 | 0.7503 | `"vllm_xargs": {"mod_kept": 0.75}` |""" in text


def test_a_point_that_only_calibrate_can_set(tmp_path):
    directory = checkpoint(tmp_path, version=2, cutoff=[40.5, -2], patch={"rank": 0})
    write_json(directory / "calibration.json", {"operating_points": [{"target": 0.75, "kept": 0.75, "cutoff": 40}]})
    text = card_of(directory).content
    assert "| 0.75 | 0.7500 | `router-tuning calibrate CKPT --data D --target-capacity 0.75` |" in text
    assert "a patch is added: a bias." in text and "(measured on ? calibration samples)" in text


def test_a_static_checkpoint_with_patches(tmp_path):
    text = card_of(checkpoint(tmp_path, version=2, granularity="attn_static", patch={"rank": 8})).content
    assert "there are no routers. In place of what is skipped a patch is added" in text


def test_evaluation_with_errors_and_recovery(tmp_path):
    write_json(checkpoint(tmp_path) / "evaluation.json", EVALUATION)
    text = card_of(tmp_path).content
    assert "| boolq | acc, 32-shot | 3270 | 0.800 ± 0.010 | 0.790 ± 0.011 | 0.600 |" in text
    assert "| checkpoint / base, mean over tasks |  |  |  | 0.994 |  |" in text
    assert "| static / base, mean over tasks |  |  |  |  | 0.840 |" in text
    assert "5.00 base, 5.10 checkpoint, 6.25 static" in text and "0.497" in text and EVALUATION["command"] in text


def test_evaluation_without_a_static_drop(tmp_path):
    tasks = {"piqa": {k: v for k, v in EVALUATION["tasks"]["piqa"].items() if "static" not in k}}
    record = EVALUATION | {"tasks": tasks, "static_recovery": None, "perplexity": {}}
    write_json(checkpoint(tmp_path) / "evaluation.json", record)
    text = card_of(tmp_path).content
    assert "| piqa | acc_norm, 0-shot | 1838 | 0.700 ± 0.010 | 0.700 ± 0.010 |\n" in text
    assert "static" not in text and "Perplexity" not in text


def test_a_static_checkpoint_has_no_kept_ratio(base_dir, tmp_path):
    out = tmp_path / "static"
    flags = ["--granularity", "attn_static", "--layers", "1", "2", "--output", str(out)]
    assert main(["export", "--model", str(base_dir), *flags]) == 0
    text = (out / "README.md").read_text()
    assert "without the self-attention of layers 1-2" in text and "Kept ratio" not in text
    assert "$ router-tuning export" in text


def test_how_it_is_used_in_transformers(base_dir, tmp_path):
    """The card's command answers as the routed model does; `AutoModelForCausalLM` would answer as the dense one."""
    out = routed_checkpoint(base_dir, tmp_path / "out", "attn_sequence", (1, 2, 3), seed=3)
    card.write(out)
    text = (out / "README.md").read_text()
    assert "gives the *dense base model*" in text and "lm_eval --model vllm" in text
    (command,) = [line[2:] for line in text.splitlines() if "load_reference" in line]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    found = subprocess.run(
        command.replace("CKPT", str(out)),
        shell=True,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PATH": path, "PYTHONPATH": ":".join(sys.path)},
    )
    assert found.returncode == 0, found.stderr
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer("The capital of France is").input_ids
    assert found.stdout.strip("\n") == tokenizer.decode(greedy(load_reference(out), ids, 8)[0]).strip("\n")


def test_a_router_only_directory_says_how_to_join_it(tmp_path):
    settings = {"version": 1, "granularity": "mlp_token", "layers": [3], "base_model": "Qwen/Qwen3-8B"}
    write_json(tmp_path / "mod_config.json", settings)
    assert "router-tuning export --model Qwen/Qwen3-8B --routers ROUTERS --output CKPT" in card_of(tmp_path).content


def test_the_bases_own_card_is_not_written_through_a_link(tmp_path):
    base = tmp_path / "base.md"
    base.write_text("---\nlicense: mit\n---\n# Base")
    os.link(base, checkpoint(tmp_path / "out") / "README.md")
    card.write(tmp_path / "out")
    assert base.read_text().endswith("# Base") and "license: mit" in (tmp_path / "out/README.md").read_text()


def test_a_broken_record_is_named_and_the_card_left(tmp_path):
    card.write(checkpoint(tmp_path))
    before = (tmp_path / "README.md").read_text()
    (tmp_path / "evaluation.json").write_text("{")
    with pytest.raises(ConfigError, match=r"evaluation\.json: cannot be read"):
        card.write(tmp_path)
    (tmp_path / "evaluation.json").unlink()
    write_json(tmp_path / "calibration.json", CALIBRATION | {"operating_point": []})
    with pytest.raises(ConfigError, match=r"calibration\.json: unknown key 'operating_point'"):
        card.write(tmp_path)
    assert (tmp_path / "README.md").read_text() == before
    with pytest.raises(ConfigError, match=r"config\.json: no such file"):
        card.write(tmp_path / "absent")
