"""A row's values: the one place where they become text, tools or calls, or make the row unusable.

Nothing here guesses: a number, a NaN or an image among the words is no text, and its row is counted and left out.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

_SURROGATE = re.compile("[\ud800-\udfff]")
#: Content parts that vLLM reads as text -> the key of their text.
_TEXT_PARTS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
    "thinking": "thinking",
}


class Unusable(ValueError):
    """A row that cannot be trained on. `kind` is one of `counts.LEFT_OUT`; the message is one line."""

    def __init__(self, kind: str, reason: object) -> None:
        self.kind, self.reason = kind, first_line(reason)
        super().__init__(self.reason)


def first_line(reason: object) -> str:
    """Of a message; of an exception without one its name."""
    words = clean_text(str(reason)).strip() or type(reason).__name__
    line = words.splitlines()[0].strip()
    return line if len(line) <= 200 else line[:197] + "…"


def missing(value: Any) -> bool:
    """None, or the NaN that pandas writes for it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def clean_text(text: str) -> str:
    """Halves of surrogate pairs joined; a lone one, which no tokenizer takes, becomes U+FFFD."""
    if text.isascii() or not _SURROGATE.search(text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def text(value: Any, where: str) -> str:
    """A string. Raises Unusable for anything else, and says where it stands."""
    if isinstance(value, str):
        return clean_text(value)
    raise Unusable("bad_value", f"{where} is {_shown(value)}, text is needed")


def texts(value: Any, where: str) -> list[str]:
    """A message's content: a string or content parts -> the texts of it."""
    if not isinstance(value, list):
        return [text(value, where)]
    return [found for part in value if (found := _part(part, where)) is not None]


def _part(part: Any, where: str) -> str | None:
    if isinstance(part, str):
        return clean_text(part)
    kind = part.get("type") if isinstance(part, dict) else None
    key = _TEXT_PARTS.get(kind) if isinstance(kind, str) else None
    if key is None:
        what = f"a part of type {kind!r}" if isinstance(kind, str) else f"the part {_shown(part)}"
        raise Unusable("bad_value", f"{where} has {what}; only text is trained on")
    found = part.get(key)
    return None if found is None and key != "thinking" else text(found, f"{where}: part {kind!r}")


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, (bool, int, float)):
        return json.dumps(value)
    return "an object" if isinstance(value, dict) else f"of type {type(value).__name__}"


def clean(value: Any, where: str) -> Any:
    """A JSON value with clean strings, for tools and their arguments. Raises Unusable for what JSON has not."""
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, dict):
        return {clean_text(str(key)): clean(item, where) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(item, where) for item in value]
    if value is None or isinstance(value, (bool, int)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise Unusable("bad_value", f"{where} has a value that is {_shown(value)}")


def without_nulls(value: Any) -> Any:
    """Nested objects without their nulls: Arrow writes one for every key that any row has."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def objects(value: Any, where: str) -> list[dict[str, Any]]:
    """A list of objects, also as JSON text (many data sets keep tools so). Raises Unusable."""
    value = _parsed(value, where)
    items = [_parsed(item, where) for item in value] if isinstance(value, list) else None
    if items is None or not all(isinstance(item, dict) for item in items):
        raise Unusable("bad_value", f"{where}: a list of objects is needed")
    return [clean(item, where) for item in items]


def _parsed(value: Any, where: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else []
    except ValueError:
        raise Unusable("bad_value", f"{where} is text that is not JSON") from None


def tools(value: Any) -> list[dict[str, Any]]:
    """Function descriptions, bare or as OpenAI's `{"type": "function", "function": …}` -> as vLLM shows them to a
    template: its own keys, in its order."""
    found = []
    for item in objects(value, "tools"):
        function = item.get("function", item)
        if item.get("type", "function") != "function" or not isinstance(function, dict):
            raise Unusable("bad_value", "tools: only functions are known")
        shown: dict[str, Any] = {"name": text(function.get("name"), "tools: a function's name")}
        shown |= {key: function.get(key) for key in ("description", "parameters")}
        if function.get("strict") is not None:
            shown["strict"] = function["strict"]
        found.append({"type": "function", "function": shown})
    return found


def tool_calls(value: Any) -> list[dict[str, Any]]:
    """An assistant's calls, arguments as objects: templates print those, and vLLM parses what comes as text."""
    found = []
    for item in objects(value, "tool_calls"):
        call = item if "function" in item else {"function": item}
        function = call["function"]
        if call.get("type", "function") != "function" or not isinstance(function, dict):
            raise Unusable("bad_value", "tool_calls: only calls of functions are known")
        name, arguments = text(function.get("name"), "tool_calls: a function's name"), function.get("arguments")
        arguments = clean(_parsed(arguments, "tool_calls: arguments"), "tool_calls") or {}
        if not isinstance(arguments, dict):
            raise Unusable("bad_value", "tool_calls: arguments are no object")
        found.append({"type": "function"} | call | {"function": function | {"name": name, "arguments": arguments}})
    return found
