"""Checkpoints say which requests they were fitted on, so that an evaluation can leave them out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from router_tuning.cli import main
from router_tuning.data import read_sources, tokenize
from router_tuning.patch_record import fitted_on
from router_tuning.tokenizer import load_tokenizer
from tests.support.models import edit_json, routed_checkpoint
from tests.unit.training.helpers import CHAT, make_tokenizer


def written(path: Path, numbers: range) -> Path:
    rows = [{"query": f"what is {a} and {a}?", "response": f"it is {a + a}, I think"} for a in numbers]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def digests(base: Path, data: Path) -> set[str]:
    rows = read_sources([str(data)])[str(data)]
    return set(tokenize(rows, load_tokenizer(base), 128)[0]["asked"])


@pytest.fixture
def first(tmp_path: Path) -> Path:
    return written(tmp_path / "first.jsonl", range(30))


@pytest.fixture
def checkpoint(base_dir: Path, tmp_path: Path) -> Path:
    return routed_checkpoint(base_dir, tmp_path / "c", "attn_sequence", [1, 2])


def patch(checkpoint: Path, data: Path, *more: str) -> None:
    flags = ["--rank", "1", "--eval-fraction", "0", "--distilled-samples", "0"]
    assert main(["patch", str(checkpoint), "--data", str(data), *flags, *more]) == 0


def asked(row: dict, length: int = 128, template: str | None = CHAT) -> str:
    samples, counts = tokenize([row], make_tokenizer(template), length)
    assert counts.used == 1
    return samples[0]["asked"]


def test_a_prompt_is_known_whatever_follows_it() -> None:
    row = {"prompt": "one and two", "completion": "three"}
    for same in (row, row | {"completion": "four, I think"}, {"prompt": " one  and two", "completion": "three"}):
        assert asked(same) == asked(row)
    assert asked(row, length=30) == asked(row)
    long = {"messages": [{"role": "user", "content": "one and two"}, {"role": "assistant", "content": "a"},
                         {"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]}  # fmt: skip
    assert asked(long) == asked(row)
    others = [
        row | {"prompt": "one and one"}, row | {"system": "be brief"}, {"text": "one and two"},
        {"messages": [*long["messages"][:1], long["messages"][1] | {"weight": 0}, *long["messages"][2:]]},
    ]  # fmt: skip
    assert len({asked(other) for other in [row, *others]}) == 1 + len(others)


def test_a_text_is_known_wherever_it_is_cut() -> None:
    text = {"text": "a b c d e f " * 20}
    assert asked(text, length=100) == asked(text, length=200) == asked(text, length=80)
    assert asked({"text": text["text"] + "g"}) != asked(text)


def test_a_template_that_names_the_day_changes_nothing() -> None:
    """Tokens of the prompt were told apart, so that nothing was left out of an evaluation on another day."""
    row = {"prompt": "one and two", "completion": "three"}
    days = [f"Today is day {n}. {CHAT}" for n in (1, 2)]
    ids = [tokenize([row], make_tokenizer(day), 128)[0][0]["input_ids"] for day in days]
    assert ids[0] != ids[1] and asked(row, template=days[0]) == asked(row, template=days[1])


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
