"""Row forms, answer-only labels, what is skipped and counted, and what is refused."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path

import pytest
import torch

from router_tuning.chat import NoAnswer, encode
from router_tuning.data import IGNORED, Collator, read_sources, split_tail, tokenize
from tests.unit.training.helpers import CHAT, make_tokenizer
from vllm_mod.config import ConfigError

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yo"},
    {"role": "user", "content": "Yo"},
    {"role": "assistant", "content": "Hi"},
]


def supervised_text(row: dict, tokenizer) -> tuple[str, list[str]]:
    """(unsupervised prefix, supervised runs)."""
    ids, supervised = encode(row, tokenizer)
    assert len(ids) == len(supervised)
    runs: list[list[int]] = []
    for t, token in enumerate(ids):
        if supervised[t]:
            if t == 0 or not supervised[t - 1]:
                runs.append([])
            runs[-1].append(token)
    first = supervised.index(True)
    return tokenizer.decode(ids[:first]), [tokenizer.decode(run) for run in runs]


def test_every_answer_of_a_chat_is_supervised_and_nothing_else(tokenizer):
    prefix, answers = supervised_text({"messages": TURNS}, tokenizer)
    assert answers == ["Yo<eos>", "Hi<eos>"]
    assert prefix == "<|system|>Be brief.<|user|>Hi<|assistant|>"


def test_a_template_that_rewrites_earlier_turns():
    drops_last_letter_of_old_answers = CHAT.replace(
        "m['content'] }}",
        "(m['content'] if loop.last or m['role'] != 'assistant' else '[' + m['content'] + ']') }}",
    )
    tokenizer = make_tokenizer(drops_last_letter_of_old_answers)
    _, answers = supervised_text({"messages": TURNS}, tokenizer)
    assert answers == ["Yo", "Hi<eos>"]


def test_a_tokenizer_without_template_gets_a_plain_one():
    prefix, answers = supervised_text({"messages": TURNS}, make_tokenizer(None))
    assert answers == ["Yo<eos>\n\n", "Hi<eos>\n\n"]
    assert prefix.endswith("### Assistant:\n")


@pytest.mark.parametrize("prompt", ["Say a", [{"role": "user", "content": "Say a"}]])
def test_prompt_and_completion(tokenizer, prompt):
    completion = "a" if isinstance(prompt, str) else [{"role": "assistant", "content": "a"}]
    row = {"prompt": prompt, "completion": completion}
    assert supervised_text(row, tokenizer) == ("<|user|>Say a<|assistant|>", ["a<eos>"])


def test_prompt_and_completion_without_a_template():
    assert supervised_text({"prompt": "1+1=", "completion": "2"}, make_tokenizer(None)) == ("1+1=", ["2<eos>"])


def test_text_is_all_supervised_and_all_of_it_is_the_prompt(tokenizer):
    dataset, counts = tokenize([{"text": "abc"}], tokenizer, 100)
    assert dataset[0]["labels"] == dataset[0]["input_ids"] and dataset[0]["prompt_len"] == 3
    assert counts.used == 1


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TURNS[:2]},
        {"messages": [*TURNS[:2], {"role": "assistant", "content": " "}]},
        {"messages": [*TURNS[:2], {"role": "assistant", "content": None}]},
        {"messages": []},
        {"messages": "hello"},
        {"prompt": "a", "completion": ""},
        {"prompt": "a"},
        {"text": ""},
        {"instruction": "a", "output": "b"},
        {},
    ],
)
def test_rows_without_an_answer_are_skipped_and_counted(tokenizer, row):
    with pytest.raises(NoAnswer):
        encode(row, tokenizer)
    dataset, counts = tokenize([row, {"messages": TURNS}], tokenizer, 100)
    assert len(dataset) == 1 and counts.to_dict() == {
        "read": 2, "used": 1, "no_answer": 1, "truncated": 0, "too_long": 0, "duplicates": 0,
    }  # fmt: skip


def test_long_rows_are_truncated_or_dropped_and_counted(tokenizer):
    answer_cut = {"prompt": "abc", "completion": "d" * 50}
    prompt_cut = {"prompt": "a" * 50, "completion": "d"}
    dataset, counts = tokenize([answer_cut, prompt_cut], tokenizer, 12)
    assert [len(s["input_ids"]) for s in dataset] == [12]
    assert (counts.used, counts.truncated, counts.too_long, counts.no_answer) == (1, 1, 1, 0)


def test_samples_are_limited_and_chosen_by_the_seed(tokenizer):
    rows = [{"prompt": "a" * n, "completion": "b"} for n in range(1, 40)]

    def chosen(seed):
        return [len(s["input_ids"]) for s in tokenize(rows, tokenizer, 100, 10, seed)[0]]

    assert len(chosen(1)) == 10 and chosen(1) == chosen(1) != chosen(2)


def test_the_collator_pads_and_marks_prompts(tokenizer):
    dataset, _ = tokenize([{"messages": TURNS}, {"prompt": "a", "completion": "b"}], tokenizer, 100, seed=1)
    batch = Collator(pad_id=2)([dataset[0], dataset[1]])
    for i, sample in enumerate((dataset[0], dataset[1])):
        size = len(sample["input_ids"])
        assert batch["input_ids"][i, :size].tolist() == sample["input_ids"]
        assert (batch["input_ids"][i, size:] == 2).all() and (batch["labels"][i, size:] == IGNORED).all()
        assert batch["attention_mask"][i].sum() == size
        assert batch["prompt_mask"].dtype == torch.bool
        first = int((batch["labels"][i] != IGNORED).nonzero()[0])
        assert batch["prompt_mask"][i].nonzero().flatten().tolist() == list(range(first))


def test_files_of_every_kind(tmp_path):
    rows = [{"text": "é"}, {"text": "b"}]
    lines = "".join(json.dumps(r) + "\n" for r in rows).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "c.jsonl.xz").write_bytes(lzma.compress(lines))
    (tmp_path / "d.json").write_text(json.dumps(rows))
    (tmp_path / "e.json").write_bytes(lines)
    (tmp_path / "ignored.txt").write_text("no")
    tables = read_sources([str(tmp_path)])
    assert [Path(name).name for name in tables] == ["a.jsonl", "b.jsonl.gz", "c.jsonl.xz", "d.json", "e.json"]
    assert all(table == rows for table in tables.values())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "no rows"),
        ("a.json", b"[]", "no rows"),
        ("a.jsonl", b'{"text": "a"}\n{"text', "line 2 is not JSON"),
        ("a.jsonl", b"\xff\xfe", "cannot be read"),
        ("a.jsonl.gz", b"not gzip", "cannot be read"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 100, mtime=0)[:-12], "cannot be read"),
        ("a.json", b"[1, 2]", "a list of JSON objects"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=f"{name}.*{message}"):
        read_sources([str(tmp_path / name)])


def test_missing_files_and_empty_directories_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.jsonl: no such file"):
        read_sources([str(tmp_path / "absent.jsonl")])
    with pytest.raises(ConfigError, match="in this directory"):
        read_sources([str(tmp_path)])


def test_the_tail_of_every_table_is_held_out():
    train, held_out = split_tail({"a": list(range(100)), "b": list(range(1000, 1010))}, 0.02)
    assert held_out == [98, 99, 1009] and len(train) == 107
    assert split_tail({"a": [1, 2]}, 0.0) == ([1, 2], [])
    assert split_tail({"a": [1]}, 0.5) == ([1], [])
