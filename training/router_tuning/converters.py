"""Rows of other instruction data sets -> the forms `chat.read_row` reads: `messages`, `prompt` + `completion`, `text`.

A converter takes one row and returns one. It raises Unusable for a row it has no use for (an unknown speaker, say), and
KeyError for one without its keys. What stands beside the turns (`chat.BESIDE`) goes along with every chat.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from .chat import BESIDE, MESSAGE_KEYS
from .values import Unusable, missing, text

Row = dict[str, Any]

_ROLES = {
    "human": "user", "user": "user", "system": "system",
    "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant", "assistant": "assistant",
    "function_call": "assistant", "observation": "tool", "function_response": "tool", "tool": "tool",
}  # fmt: skip


@dataclass(frozen=True)
class Converter:
    """`convert`, and what it reads: keys of a row, and of the turns that stand in a list below some of them."""

    convert: Callable[[Row], Row]
    needs: tuple[str, ...]
    may: tuple[str, ...] = BESIDE
    turns: tuple[str, ...] = ()
    turn_keys: tuple[str, ...] = MESSAGE_KEYS

    def fits(self, row: Row) -> bool:
        return all(not missing(row.get(key)) for key in self.needs)

    def not_read(self, row: Row) -> Iterator[str]:
        """Names of fields that say something and that nobody reads."""
        read = {*self.needs, *self.may}
        yield from (str(key) for key, value in row.items() if key not in read and _says_something(value))
        for key in self.turns:
            turns = row.get(key)
            found = {
                f"{key}[].{name}"
                for turn in (turns if isinstance(turns, list) else ())
                for name, value in (turn.items() if isinstance(turn, dict) else ())
                if name not in self.turn_keys and _says_something(value)
            }
            yield from sorted(found)


def _says_something(value: Any) -> bool:
    return not missing(value) and value not in ("", [], {})


def _beside(row: Row) -> Row:
    return {key: row[key] for key in BESIDE if not missing(row.get(key))}


def _turn(row: Row, prompt: str, answer: Any) -> Row:
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return {"messages": turns} | _beside(row)


def _conversation(row: Row, unwanted: tuple[str, ...] = ()) -> Row:
    """`conversations` of `from` / `value`. One with an unknown or unwanted speaker is left out as a whole."""
    messages = []
    for turn in row["conversations"]:
        speaker = turn["from"]
        if speaker in unwanted or speaker not in _ROLES:
            raise Unusable("unreadable", f"a turn of speaker {speaker!r}")
        message = {"role": _ROLES[speaker], "content": turn["value"]}
        if speaker == "function_call":
            message = {"role": "assistant", "tool_calls": _calls(turn["value"])}
        messages.append(message | ({"weight": turn["weight"]} if "weight" in turn else {}))
    # Long conversations come in pieces, and a later piece may begin with the answer to nothing.
    while messages and messages[0]["role"] == "assistant":
        messages.pop(0)
    return {"messages": messages} | _beside(row)


def _calls(value: Any) -> Any:
    try:
        calls = json.loads(value)
    except ValueError:
        raise Unusable("bad_value", "a function_call that is not JSON") from None
    return calls if isinstance(calls, list) else [calls]


def sharegpt(row: Row) -> Row:
    return _conversation(row)


def evol_instruct(row: Row) -> Row:
    """As the paper: conversations with a system turn are left out."""
    return _conversation(row, unwanted=("system",))


def metamath(row: Row) -> Row:
    return _turn(row, row["query"], row["response"])


def alpaca(row: Row) -> Row:
    """`instruction`, `input` (joined as the paper joins it) and `output`."""
    more = "" if missing(row.get("input")) else text(row["input"], "input")
    joined = text(row["instruction"], "instruction") + (f"\nInput: {more}\n" if more else "")
    return _turn(row, joined, row["output"])


def evol_codealpaca(row: Row) -> Row:
    return _turn(row, row["instruction"], row["output"])


def messages(row: Row) -> Row:
    return {"messages": row["messages"]} | _beside(row)


def completion(row: Row) -> Row:
    return {"prompt": row.get("prompt"), "completion": row["completion"]} | _beside(row)


def plain_text(row: Row) -> Row:
    return {"text": row["text"]}


_SHAREGPT = Converter(
    sharegpt, ("conversations",), turns=("conversations",), turn_keys=("from", "value", "weight")
)  # fmt: skip
_ALPACA = Converter(alpaca, ("instruction", "output"), ("input", *BESIDE))
CONVERTERS: dict[str, Converter] = {
    "messages": Converter(messages, ("messages",), turns=("messages",)),
    "completion": Converter(completion, ("completion",), ("prompt", *BESIDE), turns=("prompt", "completion")),
    "text": Converter(plain_text, ("text",), ()),
    "sharegpt": _SHAREGPT,
    "evol_instruct": replace(_SHAREGPT, convert=evol_instruct),
    "slim_orca": _SHAREGPT,
    "metamath": Converter(metamath, ("query", "response")),
    "evol_codealpaca": Converter(evol_codealpaca, ("instruction", "output")),
    "alpaca": _ALPACA,
}
#: What rows are known by. `text` is last: some sets carry a rendered one beside their fields.
_FORMS = ("messages", "completion", "sharegpt", "alpaca", "metamath")
NAMES = ("auto", *CONVERTERS)


def converter_of(row: Row, name: str) -> Converter:
    """By name, or by the row's keys; ValueError where more than one form would do, KeyError where none."""
    if name != "auto":
        return CONVERTERS[name]
    found = [form for form in _FORMS if CONVERTERS[form].fits(row)]
    if len(found) > 1:
        raise ValueError(f"could be {' or '.join(found)}")
    return CONVERTERS[found[0] if found else "text"]
