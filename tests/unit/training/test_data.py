"""What is tokenized, skipped and counted; the tail that is held out; batches."""

from __future__ import annotations

import pytest
import torch

from router_tuning.counts import LEFT_OUT
from router_tuning.data import IGNORED, Collator, split_tail, tokenize
from tests.unit.training.helpers import CHAT, make_tokenizer

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yo"},
    {"role": "user", "content": "Yo"},
    {"role": "assistant", "content": "Hi"},
]
FINE = {"messages": TURNS}
REFUSES = CHAT.replace("{% for m in messages %}", "{% for m in messages %}{% if m['role'] == 'tool' %}"
                       "{{ raise_exception('this model knows no tools\n(see the manual)') }}{% endif %}")  # fmt: skip


def left_out(counts) -> dict[str, int]:
    return {kind: n for kind in LEFT_OUT if (n := getattr(counts, kind))}


@pytest.mark.parametrize(
    ("row", "kind", "reason"),
    [
        ({"messages": TURNS[:2]}, "no_answer", "no assistant turn has words or calls"),
        ({"messages": [*TURNS[:2], {"role": "assistant", "content": " "}]}, "no_answer", "no assistant turn"),
        ({"messages": [*TURNS[:2], {"role": "assistant", "content": None}]}, "no_answer", "no assistant turn"),
        ({"messages": [*TURNS[:2], TURNS[2] | {"weight": 0}]}, "no_answer", "no assistant turn"),
        ({"messages": []}, "no_answer", "no assistant turn"),
        ({"prompt": "a", "completion": ""}, "no_answer", "completion is empty"),
        ({"prompt": "a"}, "no_answer", "no completion"),
        ({"text": ""}, "no_answer", "text is empty"),
        ({"instruction": "a", "output": "b"}, "unreadable", "neither messages, nor prompt and completion, nor text"),
        ({}, "unreadable", "neither messages"),
        ("hello", "unreadable", "no object"),
        ({"unusable": ["unreadable", "a turn of speaker 'bing'"]}, "unreadable", "'bing'"),
        ({"messages": "hello"}, "bad_value", "messages is no list of messages"),
        ({"messages": [*TURNS, {"role": "tool", "content": "1"}]}, "template_refused", "this model knows no tools"),
        ({"prompt": "abc", "completion": "unknown: é"}, "unverified", "the tokens of an answer do not give its text"),
        ({"prompt": "a" * 90, "completion": "d"}, "too_long", "tokens, 60 are allowed"),
    ],
)
def test_rows_that_cannot_be_used_are_counted_by_their_reason(row, kind, reason):
    dataset, counts = tokenize([row, FINE], make_tokenizer(REFUSES), 60)
    assert len(dataset) == 1 and (counts.read, counts.used) == (2, 1)
    assert left_out(counts) == {kind: 1} and reason in counts.reasons[kind]
    assert "\n" not in counts.reasons[kind] and f"1 {LEFT_OUT[kind]} ({counts.reasons[kind]})" in str(counts)


def test_a_tokenizer_that_fails_is_told_from_a_row_without_an_answer(monkeypatch):
    tokenizer = make_tokenizer()
    whole = type(tokenizer).__call__

    def fails(self, texts, **options):
        if any("boom" in text for text in texts):
            raise TypeError("TextEncodeInput must be Union[TextInputSequence, …]")
        return whole(self, texts, **options)

    monkeypatch.setattr(type(tokenizer), "__call__", fails)
    _, counts = tokenize([{"prompt": "boom", "completion": "a"}, FINE], tokenizer, 100)
    assert left_out(counts) == {"tokenizer_failed": 1}
    assert counts.reasons["tokenizer_failed"].startswith("TextEncodeInput must be")


def test_what_a_template_does_not_show_is_counted(tokenizer):
    """Serving would not show it, either, so the rows are used."""
    tools = [{"type": "function", "function": {"name": "f"}}]
    thought = [*TURNS[:2], TURNS[2] | {"reasoning_content": "Hm."}]
    rows = [FINE | {"tools": tools}, {"messages": thought, "chat_template_kwargs": {"enable_thinking": True}}, FINE]
    _, counts = tokenize(rows, tokenizer, 100)
    assert counts.used == 3 and counts.not_shown == {"tools": 1, "enable_thinking": 1, "reasoning": 1}
    assert "not shown by the chat template: " in str(counts) and "tools of 1 rows" in str(counts)


def test_text_is_all_supervised_and_all_of_it_is_the_prompt(tokenizer):
    dataset, counts = tokenize([{"text": "abc"}], tokenizer, 100)
    assert dataset[0]["labels"] == dataset[0]["input_ids"] and dataset[0]["prompt_len"] == 3
    assert counts.used == 1


def test_long_rows_are_truncated_or_dropped_and_counted(tokenizer):
    answer_cut = {"prompt": "abc", "completion": "d" * 50}
    prompt_cut = {"prompt": "a" * 50, "completion": "d"}
    dataset, counts = tokenize([answer_cut, prompt_cut], tokenizer, 12)
    assert [len(s["input_ids"]) for s in dataset] == [12]
    assert (counts.used, counts.truncated) == (1, 1) and left_out(counts) == {"too_long": 1}


def test_a_prompt_is_never_longer_than_its_truncated_row(tokenizer):
    dataset, counts = tokenize([{"text": "a" * 50}], tokenizer, 12)
    assert (dataset[0]["prompt_len"], len(dataset[0]["input_ids"]), counts.truncated) == (12, 12, 1)


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


def test_the_tail_of_every_table_is_held_out():
    train, held_out = split_tail({"a": list(range(100)), "b": list(range(1000, 1010))}, 0.02)
    assert held_out == [98, 99, 1009] and len(train) == 107
    assert split_tail({"a": [1, 2]}, 0.0) == ([1, 2], [])
    assert split_tail({"a": [1]}, 0.5) == ([1], [])
