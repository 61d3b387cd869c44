"""The forms of a row: what becomes a chat and what of it is context, what is plain text, which rows are equal."""

from __future__ import annotations

import contextlib
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router_tuning.chat import Chat, Plain, answers, fingerprint, read_row
from router_tuning.values import Unusable

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"n": 0}}}


def said(row: dict) -> list[tuple[str, str]]:
    """(role, words) of a chat, `*` before the roles of answers."""
    chat = read_row(row)
    assert isinstance(chat, Chat)
    trained = answers(chat)
    return [("*" * (k in trained) + m["role"], "|".join(m["content"])) for k, m in enumerate(chat.messages)]


def test_prompts_and_completions_are_chats_whose_prompt_is_context():
    expected = [("user", "Hi"), ("*assistant", "Yo")]
    assert said({"prompt": "Hi", "completion": "Yo"}) == expected
    assert said({"prompt": [USER], "completion": [ANSWER]}) == said({"prompt": [USER], "completion": "Yo"}) == expected
    longer = {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}
    assert said(longer) == [("user", "Hi"), ("assistant", "Yo"), ("user", "Hi"), ("*assistant", "Yo")]


def test_a_greeting_before_the_first_question_is_context():
    assert [role for role, _ in said({"messages": [ANSWER, USER, ANSWER]})] == ["assistant", "user", "*assistant"]
    assert [role for role, _ in said({"messages": [ANSWER]})] == ["*assistant"]


def test_plain_text_has_no_prompt():
    assert read_row({"text": "abc"}) == Plain("", "abc", closed=False)
    for prompt in ({}, {"prompt": ""}, {"prompt": None}, {"prompt": math.nan}):
        assert read_row({"completion": "abc"} | prompt) == Plain("", "abc", closed=True)


@pytest.mark.parametrize(
    "history", [[["Before", "Yes"]], [{"role": "user", "content": "Before"}, ANSWER | {"content": "Yes"}]]
)
@pytest.mark.parametrize("key", ["system", "system_prompt"])
def test_system_and_history_come_before_the_turns_as_context(key, history):
    before = [("system", "Brief."), ("user", "Before"), ("assistant", "Yes")]
    row = {key: "Brief.", "history": history}
    for turns in ({"messages": [USER, ANSWER]}, {"prompt": "Hi", "completion": "Yo"}):
        assert said(row | turns) == [*before, ("user", "Hi"), ("*assistant", "Yo")]


def test_history_comes_behind_a_system_turn():
    row = {"messages": [{"role": "system", "content": "Brief."}, USER, ANSWER], "history": [["Before", "Yes"]]}
    assert [role for role, _ in said(row)] == ["system", "user", "assistant", "user", "*assistant"]
    assert said(row | {"system": "Brief."}) == said(row)
    with pytest.raises(Unusable, match="system field beside a system turn with other words"):
        read_row(row | {"system": "Long."})


def test_empty_and_missing_fields_beside_the_turns_say_nothing():
    row = {"messages": [USER, ANSWER]}
    nothing = {"system": "", "history": [], "tools": [], "documents": [], "chat_template_kwargs": {}}
    assert read_row(row | nothing) == read_row(row | dict.fromkeys(nothing, math.nan)) == read_row(row)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"system": 5}, "system is 5, text is needed"),
        ({"history": "x"}, "history is no list"),
        ({"history": [["a", "b", "c"]]}, "pairs of question and answer"),
        ({"history": [["a", math.nan]]}, "history is NaN"),
        ({"history": [5]}, "pairs of question and answer"),
        ({"tools": "f(x)"}, "tools is text that is not JSON"),
        ({"tools": 5}, "tools: a list of objects"),
        ({"documents": ["a"]}, "documents is text that is not JSON"),
        ({"chat_template_kwargs": ["a"]}, "chat_template_kwargs is no object"),
        ({"messages": [USER, {"content": "a"}]}, "a message without a role"),
        ({"messages": [USER, "a"]}, "a message without a role"),
        ({"messages": [USER, ANSWER | {"content": math.nan}]}, "assistant: content is NaN"),
        ({"messages": [USER | {"content": 5}, ANSWER]}, "user: content is 5"),
        ({"messages": [USER | {"content": None}, ANSWER]}, "user: content is null"),
        ({"messages": [USER, {"role": "tool"}, ANSWER]}, "tool: content is null"),
        ({"messages": [USER, ANSWER | {"content": {"text": "a"}}]}, "assistant: content is an object"),
        ({"messages": [USER, ANSWER | {"weight": 0.5}]}, "weight: 0 .context. or 1"),
        ({"messages": [USER, ANSWER | {"tool_calls": [5]}]}, "tool_calls: a list of objects"),
        ({"messages": [USER, ANSWER | {"reasoning": 5}]}, "reasoning is 5"),
        ({"messages": None, "prompt": 5, "completion": "a"}, "prompt is 5"),
        ({"messages": None, "prompt": "a", "completion": {"a": 1}}, "completion is an object"),
        ({"messages": None, "text": 5}, "text is 5"),
    ],
)
def test_values_of_another_kind_make_the_row_unusable(change, message):
    with pytest.raises(Unusable, match=message) as refused:
        read_row({"messages": [USER, ANSWER]} | change)
    assert refused.value.kind == "bad_value"


INNER = st.sampled_from(["role", "content", "type", "text", "name", "function", "arguments"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | st.text(st.characters(), max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(INNER, inner),
    max_leaves=6,
)
KEYS = ["messages", "prompt", "completion", "text", "system", "history", "tools", "documents", "chat_template_kwargs"]
ROWS = st.dictionaries(st.sampled_from(KEYS), JSON)
OF_A_MESSAGE = st.sampled_from(["content", "tool_calls", "reasoning", "weight", "name", "tool_call_id"])
MESSAGES = st.lists(
    st.builds(lambda role, rest: {"role": role, **rest}, st.sampled_from(["user", "assistant", "tool"]),
              st.dictionaries(OF_A_MESSAGE, JSON)), max_size=2,
)  # fmt: skip


@given(ROWS, MESSAGES)
def test_no_row_is_a_traceback(row, messages):
    """Whatever a file may hold: a chat or text of strings that can be encoded, or Unusable."""
    for one in (row, row | {"messages": messages}, {"messages": messages}):
        fingerprint(one)
        with contextlib.suppress(Unusable):
            found = read_row(one)
            words = [found.answer] if isinstance(found, Plain) else [t for m in found.messages for t in m["content"]]
            assert all(isinstance(word, str) and word.encode() is not None for word in words)


def test_too_deep_is_a_bad_value():
    deep: object = "a"
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(Unusable, match="nested too deeply"):
        read_row({"messages": [USER, ANSWER], "tools": [{"name": "f", "parameters": deep}]})


def test_rows_that_say_the_same_are_equal():
    same = [
        {"messages": [USER, ANSWER]},
        {"messages": [USER | {"content": " Hi\n"}, ANSWER | {"content": [{"type": "text", "text": "Yo"}]}]},
        {"prompt": "Hi", "completion": "Yo "},
        {"prompt": [USER], "completion": [ANSWER], "tools": []},
    ]
    assert len({fingerprint(row) for row in same}) == 1 and fingerprint(same[0]) is not None


def test_rows_that_differ_in_anything_a_template_shows_are_not_equal():
    tools = {"tools": [{"name": "f"}]}
    call = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    other = {
        "role": "assistant",
        "content": None,
        "tool_calls": [CALL | {"function": {"name": "f", "arguments": {"n": 1}}}],
    }
    rows = [
        {"messages": [USER, ANSWER]}, {"messages": [USER, call]}, {"messages": [USER, other]},
        {"messages": [USER, call]} | tools, {"messages": [USER, ANSWER]} | tools,
        {"messages": [USER, ANSWER], "system": "Brief."}, {"messages": [USER, ANSWER], "history": [["a", "b"]]},
        {"messages": [USER, ANSWER], "documents": [{"text": "d"}]},
        {"messages": [USER, ANSWER], "chat_template_kwargs": {"enable_thinking": False}},
        {"messages": [USER, ANSWER | {"reasoning": "Hm."}]}, {"messages": [USER, ANSWER | {"weight": 0}]},
        {"text": "Yo"}, {"completion": "Yo"}, {"text": "Hi Yo"},
    ]  # fmt: skip
    assert len({fingerprint(row) for row in rows}) == len(rows)


def test_rows_that_say_nothing_or_cannot_be_read_are_nobodys_equal():
    for row in (
        {"messages": []},
        {},
        {"messages": [USER | {"content": 5}, ANSWER]},
        {"unusable": ["bad_value", "x"]},
        5,
    ):
        assert fingerprint(row) is None
