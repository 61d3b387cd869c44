"""Rows of other instruction data sets -> the forms `chat.encode` reads: `messages`, `prompt` + `completion`, `text`.

A converter takes one row and returns one. A row it has no use for (an unknown speaker, say) becomes empty
`messages`, which are counted as rows without an answer; a row without the converter's keys raises KeyError.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Row = dict[str, Any]

_ROLES = {
    "human": "user", "user": "user", "system": "system",
    "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant", "assistant": "assistant",
}  # fmt: skip


def _turn(prompt: str, answer: str) -> Row:
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}


def _conversation(row: Row, unwanted: tuple[str, ...] = ()) -> Row:
    """`conversations` of `from` / `value`. One with an unknown or unwanted speaker is left out as a whole."""
    messages = []
    for turn in row["conversations"]:
        speaker = turn["from"]
        if speaker in unwanted or speaker not in _ROLES:
            return {"messages": []}
        messages.append({"role": _ROLES[speaker], "content": turn["value"]})
    # Long conversations come in pieces, and a later piece may begin with the answer to nothing.
    while messages and messages[0]["role"] == "assistant":
        messages.pop(0)
    return {"messages": messages}


def sharegpt(row: Row) -> Row:
    return _conversation(row)


def evol_instruct(row: Row) -> Row:
    """As the paper: conversations with a system turn are left out."""
    return _conversation(row, unwanted=("system",))


def metamath(row: Row) -> Row:
    return _turn(row["query"], row["response"])


def alpaca(row: Row) -> Row:
    """`instruction`, `input` (joined as the paper joins it) and `output`."""
    more = row.get("input") or ""
    return _turn(row["instruction"] + (f"\nInput: {more}\n" if more else ""), row["output"])


def evol_codealpaca(row: Row) -> Row:
    return _turn(row["instruction"], row["output"])


def messages(row: Row) -> Row:
    return {"messages": row["messages"]}


def completion(row: Row) -> Row:
    return {"prompt": row.get("prompt"), "completion": row["completion"]}


def text(row: Row) -> Row:
    return {"text": row["text"]}


def auto(row: Row) -> Row:
    """By the keys of the row; ValueError where more than one form would do, KeyError where none."""
    found = [name for name, keys in _FORMS.items() if all(row.get(key) is not None for key in keys)]
    if len(found) > 1:
        raise ValueError(f"could be {' or '.join(found)}")
    if found:
        return CONVERTERS[found[0]](row)
    return text(row)  # last: some sets carry a rendered `text` beside their fields


#: What `auto` knows a form by.
_FORMS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "completion": ("completion",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "metamath": ("query", "response"),
}

CONVERTERS: dict[str, Callable[[Row], Row]] = {
    "auto": auto,
    "messages": messages,
    "completion": completion,
    "text": text,
    "sharegpt": sharegpt,
    "evol_instruct": evol_instruct,
    "slim_orca": sharegpt,
    "metamath": metamath,
    "evol_codealpaca": evol_codealpaca,
    "alpaca": alpaca,
}
