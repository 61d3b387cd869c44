"""One data row to tokens, and which of them the assistant wrote."""

from __future__ import annotations

import json
from hashlib import blake2b
from typing import Any

Span = tuple[int, int]

#: For tokenizers that have none.
PLAIN_TEMPLATE = (
    "{% for m in messages %}{{ '### ' + m['role'] | capitalize + ':\n' + (m['content'] | trim) }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}"
)


class NoAnswer(ValueError):
    """The row has nothing to supervise, or a form that is not known."""


def encode(row: dict[str, Any], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """A row -> (token ids, supervised?) of equal length. Raises NoAnswer.

    `prompt` + `completion` of strings is one turn of a chat where the tokenizer has a template, plain text otherwise.
    """
    messages = row.get("messages")
    if messages is None and row.get("completion") is not None:
        prompt, completion = row.get("prompt") or "", row["completion"]
        if isinstance(prompt, list) or isinstance(completion, list):
            messages = _as_messages(prompt, "user") + _as_messages(completion, "assistant")
        elif not completion.strip():
            raise NoAnswer("empty completion")
        elif tokenizer.chat_template and prompt:
            messages = _as_messages(prompt, "user") + _as_messages(completion, "assistant")
        else:
            end = tokenizer.eos_token or ""
            return _tokens(prompt + completion + end, [(len(prompt), 1 << 60)], tokenizer, special=True)
    if messages is not None:
        text, spans = render(messages, tokenizer)
        return _tokens(text, spans, tokenizer, special=False)
    plain = row.get("text")
    if not isinstance(plain, str) or not plain.strip():
        raise NoAnswer("neither messages, prompt + completion, nor text")
    return _tokens(plain, [(0, 1 << 60)], tokenizer, special=True)


def fingerprint(row: Any) -> bytes | None:
    """Equal for rows of the same roles and words, whatever the white space and the form; None of an empty row."""
    if not isinstance(row, dict):
        return None
    messages = row.get("messages")
    if messages is None and row.get("completion") is not None:
        messages = _as_messages(row.get("prompt"), "user") + _as_messages(row["completion"], "assistant")
    if messages is None:
        messages = _as_messages(row.get("text"), "text")
    try:
        turns = [(m["role"], " ".join(str(m.get("content") or "").split())) for m in messages]
    except (TypeError, KeyError, AttributeError):
        return None
    return blake2b(json.dumps(turns).encode(), digest_size=16).digest() if turns else None


def _as_messages(value: Any, role: str) -> list[dict[str, str]]:
    return list(value) if isinstance(value, list) else [{"role": role, "content": value}] if value else []


def render(messages: list[dict[str, Any]], tokenizer: Any) -> tuple[str, list[Span]]:
    """Chat -> (text, character spans of the assistant's answers, end tokens included).

    An answer is what rendering one message more adds after the generation prompt. Templates that rewrite earlier
    turns (Qwen3 drops old thoughts) break that; then the answer's own words are looked up in the text.
    """
    if not isinstance(messages, list) or not all(isinstance(m, dict) and "role" in m for m in messages):
        raise NoAnswer("messages without roles")
    answers = [k for k, m in enumerate(messages) if m["role"] == "assistant" and str(m.get("content") or "").strip()]
    if not answers:
        raise NoAnswer("no assistant message")
    messages = [m if m.get("content") is not None else {**m, "content": ""} for m in messages]
    template = None if tokenizer.chat_template else PLAIN_TEMPLATE

    def to_text(part: list[dict[str, Any]], ask: bool = False) -> str:
        try:
            return tokenizer.apply_chat_template(
                part, tokenize=False, add_generation_prompt=ask, **({"chat_template": template} if template else {})
            )
        except Exception as error:  # templates refuse roles they do not know, in exceptions of any kind
            raise NoAnswer(f"the chat template refuses this row: {error}") from None

    full = to_text(messages)
    spans: list[Span] = []
    for k in answers:
        end_of_last = spans[-1][1] if spans else 0
        before = to_text(messages[:k], ask=True) if k else ""
        after = to_text(messages[: k + 1])
        if after.startswith(before) and full.startswith(after) and len(before) >= end_of_last:
            spans.append((len(before), len(after)))
            continue
        content = str(messages[k]["content"]).strip()
        start = full.find(content, end_of_last)
        if start < 0:
            raise NoAnswer("the answer is not in the rendered chat")
        spans.append((start, start + len(content)))
    return full, spans


def _tokens(text: str, spans: list[Span], tokenizer: Any, special: bool) -> tuple[list[int], list[bool]]:
    """Tokenize; a token is supervised if it begins inside a span. Rendered chats bring their own special tokens."""
    encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
    supervised = [any(a <= start < b and end > start for a, b in spans) for start, end in encoded["offset_mapping"]]
    return list(encoded["input_ids"]), supervised
