"""Checkpoints say which requests they were fitted on, so that an evaluation can leave them out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from router_tuning.cli import main
from router_tuning.data import read_sources, tokenize
from router_tuning.patch_record import fitted_on
from router_tuning.seen import prompt_digest, prompt_digests
from router_tuning.tokenizer import load_tokenizer
from tests.support.models import edit_json, routed_checkpoint


def written(path: Path, numbers: range) -> Path:
    rows = [{"query": f"what is {a} and {a}?", "response": f"it is {a + a}, I think"} for a in numbers]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def digests(base: Path, data: Path) -> set[str]:
    rows = read_sources([str(data)])[str(data)]
    return set(prompt_digests(tokenize(rows, load_tokenizer(base), 128)[0]))


@pytest.fixture
def first(tmp_path: Path) -> Path:
    return written(tmp_path / "first.jsonl", range(30))


@pytest.fixture
def checkpoint(base_dir: Path, tmp_path: Path) -> Path:
    return routed_checkpoint(base_dir, tmp_path / "c", "attn_sequence", [1, 2])


def patch(checkpoint: Path, data: Path, *more: str) -> None:
    flags = ["--rank", "1", "--eval-fraction", "0", "--distilled-samples", "0"]
    assert main(["patch", str(checkpoint), "--data", str(data), *flags, *more]) == 0


def test_a_prompt_is_known_whatever_follows_it() -> None:
    sample = {"input_ids": [5, 6, 7, 8, 9], "prompt_len": 3}
    assert prompt_digest(sample) == prompt_digest({"input_ids": [5, 6, 7, 1], "prompt_len": 3})
    others = [([5, 6, 7, 8, 9], 2), ([5, 6, 4, 8, 9], 3), ([5, 6, 7, 8, 9], 4), ([7, 6, 5, 8, 9], 3)]
    for ids, length in others:
        assert prompt_digest({"input_ids": ids, "prompt_len": length}) != prompt_digest(sample)
    assert len(prompt_digests([sample, sample])) == 1
    texts = [prompt_digest({"input_ids": list(range(n)), "prompt_len": n}) for n in (100, 200, 80)]
    assert len(set(texts)) == 1


def test_patch_adds_to_what_was_seen_before(checkpoint: Path, base_dir: Path, first: Path, tmp_path: Path) -> None:
    second = written(tmp_path / "second.jsonl", range(100, 130))
    assert fitted_on(checkpoint) == set()
    patch(checkpoint, first)
    assert fitted_on(checkpoint) == digests(base_dir, first) and len(fitted_on(checkpoint)) == 30
    patch(checkpoint, second, "--output", str(tmp_path / "d"))
    assert fitted_on(tmp_path / "d") == digests(base_dir, first) | digests(base_dir, second)
    assert len(fitted_on(tmp_path / "d")) == 60


def test_only_what_was_used_is_named(checkpoint: Path, base_dir: Path, first: Path) -> None:
    patch(checkpoint, first, "--max-samples", "20", "--eval-fraction", "0.1")
    assert len(fitted_on(checkpoint)) == 20 and fitted_on(checkpoint) < digests(base_dir, first)
    last = written(first.parent / "last.jsonl", range(27, 30))
    assert not fitted_on(checkpoint) & digests(base_dir, last)


@pytest.mark.parametrize("command", ["fit", "export", "train"])
def test_every_command_that_fits_names_it(base_dir: Path, first: Path, tmp_path: Path, command: str) -> None:
    flags = {
        "fit": ["--window", "4", "--distilled-samples", "0", "--eval-fraction", "0"],
        "export": ["--drop-attention", "1", "--distilled-samples", "0", "--eval-fraction", "0"],
        "train": ["--window", "4", "--max-steps", "1", "--layers", "1-2", "--eval-fraction", "0.1"],
    }[command] + ["--patch-rank", "1"]
    output = tmp_path / "made"
    assert main([command, "--model", str(base_dir), "--data", str(first), "--output", str(output), *flags]) == 0
    assert len(fitted_on(output)) == (27 if command == "train" else 30)
    assert fitted_on(output) <= digests(base_dir, first)
    alone = ["export", "--model", str(base_dir), "--routers", str(output), "--without-base", "--output"]
    assert main([*alone, str(tmp_path / "alone")]) == 0
    assert fitted_on(tmp_path / "alone") == fitted_on(output)  # it goes where the routers go


def test_a_record_of_before_says_nothing(checkpoint: Path, first: Path) -> None:
    patch(checkpoint, first)
    edit_json(checkpoint / "patches.json", prompts=None)
    assert fitted_on(checkpoint) == set()
