"""A data row's form: a chat, or plain text. What its values are is up to `values`."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any

from .values import Unusable, clean, missing, objects, text, texts, tool_calls, tools

#: Beside the turns, in every form: what came before them, and what a template is given besides.
BESIDE = ("system", "system_prompt", "history", "tools", "documents", "chat_template_kwargs")
#: What is read of a message. `weight` is OpenAI's: an answer of weight 0 is context, not trained on.
MESSAGE_KEYS = (
    "role", "content", "name", "tool_calls", "tool_call_id", "reasoning", "reasoning_content", "weight"
)  # fmt: skip

Message = dict[str, Any]


@dataclass(frozen=True)
class Plain:
    """Text without roles. An empty prompt: all of the row is its answer."""

    prompt: str
    answer: str
    #: `text` rows end as they end; a completion ends with the end token.
    closed: bool


@dataclass(frozen=True)
class Chat:
    """`content` of a message is a list of texts; `reasoning`, `name`, `tool_calls`, `tool_call_id`, `context` are there
    where they say something. An assistant's turn is an answer unless `context` is set."""

    messages: list[Message]
    tools: list[dict[str, Any]] = field(default_factory=list)
    documents: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    #: one turn of strings, for tokenizers without a template
    plain: Plain | None = None


def answers(chat: Chat) -> list[int]:
    """Indices of the turns that are trained on. A greeting before the first question is context."""
    found = [
        k
        for k, m in enumerate(chat.messages)
        if m["role"] == "assistant" and not m.get("context") and ("tool_calls" in m or "".join(m["content"]).strip())
    ]
    return found[1:] if found[:1] == [0] and len(found) > 1 else found


def read_row(row: Any) -> Chat | Plain:
    """`messages`, `prompt` + `completion` (strings or lists of messages) or `text`. Raises Unusable."""
    if not isinstance(row, dict):
        raise Unusable("unreadable", "the row is no object")
    if "unusable" in row:  # a converter has said so
        raise Unusable(*row["unusable"])
    try:
        return _read(row)
    except RecursionError:
        raise Unusable("bad_value", "nested too deeply") from None


def _read(row: dict[str, Any]) -> Chat | Plain:
    if not missing(row.get("messages")):
        return _chat(row, _messages(row["messages"], "messages"))
    if not missing(row.get("completion")):
        prompt, completion = None if missing(row.get("prompt")) else row.get("prompt"), row["completion"]
        prompts = _as_messages(prompt, "user", "prompt")
        # Answers in the prompt are context.
        prompts = [m | {"context": True} if m["role"] == "assistant" else m for m in prompts]
        chat = _chat(row, prompts + _as_messages(completion, "assistant", "completion"))
        if not isinstance(completion, str) or isinstance(prompt, list):
            return chat
        if not completion.strip():
            raise Unusable("no_answer", "completion is empty")
        plain = Plain(text(prompt or "", "prompt"), text(completion, "completion"), closed=True)
        alone = not any(not missing(row.get(key)) for key in BESIDE)
        return plain if alone and not prompt else Chat(**vars(chat) | {"plain": plain if alone else None})
    if not missing(row.get("prompt")):
        raise Unusable("no_answer", "no completion")
    if missing(row.get("text")):
        raise Unusable("unreadable", "neither messages, nor prompt and completion, nor text")
    words = text(row["text"], "text")
    if not words.strip():
        raise Unusable("no_answer", "text is empty")
    return Plain("", words, closed=False)


def _chat(row: dict[str, Any], messages: list[Message]) -> Chat:
    system = [text(row[key], key) for key in ("system", "system_prompt") if not missing(row.get(key))]
    before: list[Message] = [{"role": "system", "content": [words]} for words in system if words]
    if before and messages and messages[0]["role"] == "system":
        if messages[0]["content"] == before[0]["content"]:
            before = []
        else:
            raise Unusable("bad_value", "a system field beside a system turn with other words")
    start = 1 if messages and messages[0]["role"] == "system" else 0
    history = [] if missing(row.get("history")) else _history(row["history"])
    settings = {} if missing(row.get("chat_template_kwargs")) else row["chat_template_kwargs"]
    if not isinstance(settings, dict):
        raise Unusable("bad_value", "chat_template_kwargs is no object")
    return Chat(
        before + messages[:start] + history + messages[start:],
        [] if missing(row.get("tools")) else tools(row["tools"]),
        [] if missing(row.get("documents")) else objects(row["documents"], "documents"),
        clean(settings, "chat_template_kwargs"),
    )


def _history(value: Any) -> list[Message]:
    """Earlier turns, as pairs (question, answer) or messages: context, like all of the prompt."""
    if not isinstance(value, list):
        raise Unusable("bad_value", "history is no list")
    found: list[Message] = []
    for turn in value:
        if isinstance(turn, dict):
            found += _messages([turn], "history")
        elif isinstance(turn, (list, tuple)) and len(turn) == 2:
            found += _as_messages(turn[0], "user", "history") + _as_messages(turn[1], "assistant", "history")
        else:
            raise Unusable("bad_value", "history: pairs of question and answer, or messages, are needed")
    return [m | {"context": True} if m["role"] == "assistant" else m for m in found]


def _as_messages(value: Any, role: str, where: str) -> list[Message]:
    if isinstance(value, list):
        return _messages(value, where)
    return [{"role": role, "content": [text(value, where)]}] if value is not None and value != "" else []


def _messages(value: Any, where: str) -> list[Message]:
    if not isinstance(value, list):
        raise Unusable("bad_value", f"{where} is no list of messages")
    return [_message(m, where) for m in value]


def _message(message: Any, where: str) -> Message:
    """What vLLM passes on of a message, and no more."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise Unusable("bad_value", f"{where}: a message without a role")
    role, content = text(message["role"], "role"), message.get("content")
    if content is None and role == "assistant":  # it calls tools, or says nothing
        content = []
    found: Message = {"role": role, "content": texts(content, f"{role}: content")}
    if role == "assistant":
        if not missing(message.get("tool_calls")) and (calls := tool_calls(message["tool_calls"])):
            found["tool_calls"] = calls
        thought = next((message[k] for k in ("reasoning", "reasoning_content") if not missing(message.get(k))), None)
        if thought is not None:
            found["reasoning"] = text(thought, "reasoning")
        weight = message.get("weight")
        if not missing(weight) and weight not in (0, 1):
            raise Unusable("bad_value", "weight: 0 (context) or 1 is needed")
        if weight == 0:
            found["context"] = True
    if role == "tool" and isinstance(message.get("tool_call_id"), str):
        found["tool_call_id"] = clean(message["tool_call_id"], "tool_call_id")
    if isinstance(message.get("name"), str):
        found["name"] = clean(message["name"], "name")
    return found


def fingerprint(row: Any) -> bytes | None:
    """Equal for rows that say the same, whatever the white space and the form; None where nothing is said."""
    try:
        said = _said(read_row(row))
    except Unusable:
        return None
    return _digest(said, 16) if said else None


def prompt_digest(row: Any) -> str:
    """Equal for rows that ask the same before their first answer (all of a row without a prompt), whatever the answer.

    It does not depend on the tokenizer or the chat template, some of which put the day into every prompt.
    """
    found = read_row(row)
    if isinstance(found, Plain):
        found = replace(found, answer="") if found.prompt else found
    elif first := next(iter(answers(found)), 0):
        found = replace(found, messages=found.messages[:first])
    return _digest(_said(found), 6).hex()


def answered(row: Plain | Chat, answer: str) -> dict[str, Any]:
    """A row that asks the same, with this answer in place of its first one, and nothing behind it."""
    if isinstance(row, Plain):
        return {"prompt": row.prompt, "completion": answer}
    messages = [_written(message) for message in row.messages[: answers(row)[0]]]
    beside = {"tools": row.tools, "documents": row.documents, "chat_template_kwargs": row.settings}
    answering = {"role": "assistant", "content": answer}
    return {"messages": [*messages, answering]} | {key: value for key, value in beside.items() if value}


def _written(message: Message) -> dict[str, Any]:
    """As `_message` reads it."""
    parts = message["content"]
    content = parts[0] if len(parts) == 1 else [{"type": "text", "text": part} for part in parts] or None
    more = {key: value for key, value in message.items() if key not in ("role", "content", "context")}
    weight = {"weight": 0} if message.get("context") else {}
    return {"role": message["role"], "content": content} | more | weight


def _said(row: Plain | Chat) -> list[Any]:
    if isinstance(row, Plain):
        return [["assistant" if row.closed else "text", " ".join((row.prompt + row.answer).split())]]
    beside = {k: v for k, v in vars(row).items() if k in ("tools", "documents", "settings") and v}
    return [
        [m["role"], " ".join(" ".join(m["content"]).split()), *_more(m)] for m in row.messages
    ] + ([beside] if beside else [])  # fmt: skip


def _digest(said: list[Any], size: int) -> bytes:
    return blake2b(json.dumps(said, sort_keys=True).encode(), digest_size=size).digest()


def _more(message: Message) -> list[Any]:
    more = {key: value for key, value in message.items() if key not in ("role", "content")}
    return [more] if more else []
