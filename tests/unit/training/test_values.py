"""What counts as text, tools and calls, and that nothing else ever becomes text."""

from __future__ import annotations

import json
import math
from datetime import date

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router_tuning.values import (
    Unusable,
    clean,
    clean_text,
    first_line,
    missing,
    objects,
    text,
    texts,
    tool_calls,
    tools,
    without_nulls,
)

NO_TEXT = [None, 5, 0, True, 1.5, math.nan, {"a": 1}, ["a"], b"a", date(2024, 1, 1)]


@pytest.mark.parametrize("value", NO_TEXT)
def test_nothing_but_a_string_is_text(value):
    with pytest.raises(Unusable, match=r"^output is .*, text is needed$") as refused:
        text(value, "output")
    assert refused.value.kind == "bad_value"


@given(st.text(st.characters()), st.text(st.characters(categories=["Cs"]), max_size=2))
def test_every_string_can_be_encoded_after_cleaning(words, halves):
    clean_text(words + halves + words).encode()
    assert clean_text(words) == words or any(0xD800 <= ord(c) < 0xE000 for c in words)


def test_halves_of_an_emoji():
    assert clean_text("a\ud83d") == "a\ufffd" and clean_text("\ude00b") == "\ufffdb"
    assert clean_text("\ud83d\ude00") == "😀"  # two halves that a tool has written one by one


def test_content_parts_are_their_texts():
    parts = [
        "a", {"type": "text", "text": "b\ud83d"}, {"type": "input_text", "text": "c"}, {"type": "text", "text": None},
        {"type": "output_text", "text": ""}, {"type": "refusal", "refusal": "no"},
        {"type": "thinking", "thinking": "hm"},
    ]  # fmt: skip
    assert texts(parts, "x") == ["a", "b\ufffd", "c", "", "no", "hm"]
    assert texts("a", "x") == ["a"] and texts([], "x") == []


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "image_url", "image_url": {"url": "a.png"}}, "a part of type 'image_url'; only text"),
        ({"type": "video"}, "a part of type 'video'"),
        ({"text": "no type"}, "the part an object"),
        ({"type": "text", "text": 5}, "part 'text' is 5, text is needed"),
        ({"type": "text", "text": ["a"]}, "part 'text' is of type list"),
        ({"type": ["text"], "text": "a"}, "the part an object"),
        (5, "the part 5"),
        (math.nan, "the part NaN"),
        (None, "the part null"),
        (["a"], "the part of type list"),
    ],
)
def test_other_parts_are_no_text(part, message):
    with pytest.raises(Unusable, match=message) as refused:
        texts([{"type": "text", "text": "a"}, part], "user: content")
    assert refused.value.kind == "bad_value" and "user: content" in refused.value.reason


@pytest.mark.parametrize("value", [5, None, math.nan, True, {"type": "text", "text": "a"}])
def test_content_that_is_neither_text_nor_parts(value):
    with pytest.raises(Unusable, match="text is needed"):
        texts(value, "user: content")


def test_what_is_missing():
    assert all(map(missing, (None, math.nan))) and not any(map(missing, ("", 0, False, [], math.inf, "nan")))


def test_nested_values_are_cleaned_and_checked():
    assert clean({"a\ud83d": ["b\ud83d", 1, None, True, 0.5]}, "tools") == {"a\ufffd": ["b\ufffd", 1, None, True, 0.5]}
    for bad in (math.nan, math.inf, b"a", {1, 2}, date(2024, 1, 1)):
        with pytest.raises(Unusable, match="tools has a value that is"):
            clean([{"a": bad}], "tools")


def test_arrows_nulls_are_no_keys():
    assert without_nulls({"a": None, "b": [{"c": None, "d": 0}, None]}) == {"b": [{"d": 0}, None]}


def test_objects_may_be_json_text():
    found = [{"name": "f"}, {"name": "g"}]
    assert objects(json.dumps(found), "tools") == objects([json.dumps(item) for item in found], "tools") == found
    assert objects("", "tools") == objects([], "tools") == []
    for bad in ("f, g", {"name": "f"}, ["f"], [5], 5, [None]):
        with pytest.raises(Unusable, match=r"^tools"):
            objects(bad, "tools")


def test_tools_are_shown_as_vllm_shows_them():
    bare = {"parameters": {"type": "object"}, "name": "f", "returns": "int"}
    shown = {"type": "function", "function": {"name": "f", "description": None, "parameters": {"type": "object"}}}
    assert tools([bare]) == tools([{"function": bare}]) == tools([{"type": "function", "function": bare}]) == [shown]
    assert list(tools([bare])[0]["function"]) == ["name", "description", "parameters"]
    assert tools([bare | {"strict": True}])[0]["function"]["strict"] is True
    for bad in ({"type": "web_search"}, {"function": "f"}, {"function": {}}, {"name": 5}):
        with pytest.raises(Unusable, match=r"^tools: "):
            tools([bad])


def test_calls_have_their_arguments_as_objects():
    call = {"type": "function", "function": {"name": "f", "arguments": {"n": 0}}}
    as_text = {"type": "function", "function": {"name": "f", "arguments": '{"n": 0}'}}
    assert tool_calls([call]) == tool_calls([as_text]) == tool_calls([call["function"]]) == [call]
    assert tool_calls([call | {"id": "x"}])[0]["id"] == "x"
    for nothing in (None, "", "{}", {}):
        found = tool_calls([{"function": {"name": "f", "arguments": nothing}}])
        assert found[0]["function"]["arguments"] == {}
    for bad in ("f(0)", "[1]", [1], 5, {"a": math.nan}):
        with pytest.raises(Unusable, match=r"^tool_calls"):
            tool_calls([{"function": {"name": "f", "arguments": bad}}])
    for bad in ({"type": "custom", "custom": {}}, {"function": {"arguments": {}}}, {"function": None}):
        with pytest.raises(Unusable, match=r"^tool_calls: "):
            tool_calls([bad])


def test_reasons_are_one_short_line():
    assert first_line(ValueError("\n no \ud83d role\nmore")) == "no \ufffd role"
    assert first_line(KeyError()) == "KeyError" and len(first_line("x" * 999)) == 198
