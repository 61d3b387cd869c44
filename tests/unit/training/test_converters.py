"""Each converter on rows of the shape of the data set it is for."""

from __future__ import annotations

import pytest

from router_tuning.chat import NoAnswer, encode
from router_tuning.converters import CONVERTERS

ROWS = {
    "sharegpt": (
        {
            "id": "QWJhYvA_0",
            "conversations": [
                {"from": "human", "value": "Summarize the main ideas."},
                {"from": "gpt", "value": "Here are three."},
                {"from": "human", "value": "Shorter."},
                {"from": "gpt", "value": "One."},
            ],
        },
        [("user", "Summarize the main ideas."), ("assistant", "Here are three."), ("user", "Shorter."),
         ("assistant", "One.")],
    ),
    "evol_instruct": (
        {"idx": "alpaca_1", "conversations": [
            {"from": "human", "value": "Give two tips."}, {"from": "gpt", "value": "Eat. Sleep."}]},
        [("user", "Give two tips."), ("assistant", "Eat. Sleep.")],
    ),
    "slim_orca": (
        {"conversations": [
            {"from": "system", "value": "You are an AI assistant.", "weight": None},
            {"from": "human", "value": "Write an article.", "weight": 0.0},
            {"from": "gpt", "value": "Title: …", "weight": 1.0}]},
        [("system", "You are an AI assistant."), ("user", "Write an article."), ("assistant", "Title: …")],
    ),
    "metamath": (
        {"type": "MATH_AnsAug", "query": "What is 1 + 1?", "response": "The answer is: 2"},
        [("user", "What is 1 + 1?"), ("assistant", "The answer is: 2")],
    ),
    "evol_codealpaca": (
        {"instruction": "Write a loop.", "output": "for i in x: ..."},
        [("user", "Write a loop."), ("assistant", "for i in x: ...")],
    ),
    "alpaca": (
        {"instruction": "Add them.", "input": "1, 2", "output": "3", "text": "Below is an instruction …"},
        [("user", "Add them.\nInput: 1, 2\n"), ("assistant", "3")],
    ),
    "messages": (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "id": 7},
        [("user", "a"), ("assistant", "b")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("by", ["name", "keys"])
def test_rows_become_messages(name, by):
    row, expected = ROWS[name]
    converted = CONVERTERS[name if by == "name" else "auto"](row)
    assert [(m["role"], m["content"]) for m in converted["messages"]] == expected


def test_an_empty_input_is_not_joined():
    row = CONVERTERS["alpaca"]({"instruction": "Say a.", "input": "", "output": "a"})
    assert row["messages"][0]["content"] == "Say a."


@pytest.mark.parametrize(
    ("name", "speakers"),
    [
        ("sharegpt", ["human", "bing"]),
        ("sharegpt", ["human", "gpt", "tool"]),
        ("evol_instruct", ["system", "human", "gpt"]),
        ("sharegpt", ["gpt"]),
        ("slim_orca", ["system", "human"]),
    ],
)
def test_conversations_that_are_of_no_use_have_no_answer(tokenizer, name, speakers):
    row = CONVERTERS[name]({"conversations": [{"from": who, "value": "x"} for who in speakers]})
    with pytest.raises(NoAnswer):
        encode(row, tokenizer)


def test_a_piece_of_a_conversation_begins_with_its_first_question():
    turns = [("gpt", "… and so on."), ("human", "Go on."), ("gpt", "Done.")]
    row = CONVERTERS["sharegpt"]({"conversations": [{"from": who, "value": text} for who, text in turns]})
    assert [m["content"] for m in row["messages"]] == ["Go on.", "Done."]


def test_own_forms_and_plain_text_are_known_by_their_keys():
    auto = CONVERTERS["auto"]
    assert auto({"prompt": "a", "completion": "b", "id": 1}) == {"prompt": "a", "completion": "b"}
    assert auto({"text": "a", "source": "x"}) == {"text": "a"}
    with pytest.raises(ValueError, match="completion or alpaca"):
        auto({"prompt": "a", "completion": "b", "instruction": "a", "output": "c"})
    with pytest.raises(KeyError):
        auto({"question": "a", "answer": "b"})
