"""Each converter on rows of the shape of the data set it is for."""

from __future__ import annotations

import pytest

from router_tuning.converters import converter_of
from router_tuning.values import Unusable

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


def convert(row: dict, name: str = "auto") -> dict:
    return converter_of(row, name).convert(row)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("by", ["name", "keys"])
def test_rows_become_messages(name, by):
    row, expected = ROWS[name]
    converted = convert(row, name if by == "name" else "auto")
    assert [(m["role"], m["content"]) for m in converted["messages"]] == expected


def test_an_empty_input_is_not_joined():
    for nothing in ({}, {"input": ""}, {"input": None}, {"input": float("nan")}):
        row = convert({"instruction": "Say a.", "output": "a"} | nothing, "alpaca")
        assert row["messages"][0]["content"] == "Say a."


@pytest.mark.parametrize(
    ("name", "speakers", "unknown"),
    [
        ("sharegpt", ["human", "bing"], "bing"),
        ("sharegpt", ["human", "gpt", None], None),
        ("evol_instruct", ["system", "human", "gpt"], "system"),
    ],
)
def test_conversations_with_other_speakers_are_of_no_use(name, speakers, unknown):
    with pytest.raises(Unusable, match=f"a turn of speaker {unknown!r}") as refused:
        convert({"conversations": [{"from": who, "value": "x"} for who in speakers]}, name)
    assert refused.value.kind == "unreadable"


def test_conversations_with_calls_are_read():
    """As LLaMA-Factory and others write them."""
    turns = [("human", "0+1?"), ("function_call", '{"name": "add_one", "arguments": {"n": 0}}'), ("observation", "1"),
             ("gpt", "It is 1.")]  # fmt: skip
    tools = '[{"name": "add_one", "parameters": {}}]'
    row = convert({"conversations": [{"from": who, "value": text} for who, text in turns], "tools": tools})
    assert row["tools"] == tools and [m["role"] for m in row["messages"]] == ["user", "assistant", "tool", "assistant"]
    assert row["messages"][1]["tool_calls"] == [{"name": "add_one", "arguments": {"n": 0}}]
    with pytest.raises(Unusable, match="function_call that is not JSON"):
        convert({"conversations": [{"from": "function_call", "value": "add_one(0)"}]})


BESIDE = {
    "system": "Be brief.", "history": [["Hi", "Yo"]], "tools": [{"name": "f"}], "documents": [{"text": "d"}],
    "chat_template_kwargs": {"enable_thinking": False},
}  # fmt: skip


@pytest.mark.parametrize("name", [*ROWS, "completion"])
def test_what_stands_beside_the_turns_goes_along(name):
    row = ROWS[name][0] if name in ROWS else {"prompt": "a", "completion": "b"}
    converted = convert(row | BESIDE | {"system_prompt": None}, name)
    assert {key: converted[key] for key in BESIDE} == BESIDE and "system_prompt" not in converted


@pytest.mark.parametrize(
    ("row", "fields"),
    [
        (ROWS["sharegpt"][0], ["id"]),
        (ROWS["slim_orca"][0], []),
        (ROWS["alpaca"][0], ["text"]),
        (ROWS["metamath"][0], ["type"]),
        ({"messages": [{"role": "user", "content": "a", "mood": "good", "prefix": None}], "images": ["a.png"], "x": []},
         ["images", "messages[].mood"]),
        ({"conversations": [{"from": "human", "value": "a", "loss": False}], "system": "s"}, ["conversations[].loss"]),
        ({"prompt": [{"role": "user", "content": "a", "time": 1}], "completion": "b", "score": 0.5},
         ["score", "prompt[].time"]),
        ({"text": "a", "system": "b", "meta": float("nan")}, ["system"]),
    ],
)  # fmt: skip
def test_fields_that_nobody_reads_are_named(row, fields):
    assert list(converter_of(row, "auto").not_read(row)) == fields


@pytest.mark.parametrize("value", [5, True, 1.5, {"a": 1}, ["a"]])
def test_what_is_joined_to_a_question_must_be_text(value):
    for key in ("instruction", "input"):
        row = {"instruction": "a", "input": "b", "output": "c"} | {key: value}
        with pytest.raises(Unusable, match=f"{key} is .*text is needed"):
            convert(row)


def test_a_piece_of_a_conversation_begins_with_its_first_question():
    turns = [("gpt", "… and so on."), ("human", "Go on."), ("gpt", "Done.")]
    row = convert({"conversations": [{"from": who, "value": text} for who, text in turns]})
    assert [m["content"] for m in row["messages"]] == ["Go on.", "Done."]


def test_own_forms_and_plain_text_are_known_by_their_keys():
    auto = convert
    assert auto({"prompt": "a", "completion": "b", "id": 1}) == {"prompt": "a", "completion": "b"}
    assert auto({"text": "a", "source": "x"}) == {"text": "a"}
    with pytest.raises(ValueError, match="completion or alpaca"):
        auto({"prompt": "a", "completion": "b", "instruction": "a", "output": "c"})
    with pytest.raises(KeyError):
        auto({"question": "a", "answer": "b"})
    assert auto({"messages": float("nan"), "text": "a"}) == {"text": "a"}  # as pandas writes what is not there
