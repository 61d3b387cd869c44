"""A tokenizer's chat template, applied as vLLM applies it: the same messages give the same text as when served."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from .chat import Chat, Message
from .values import Unusable

Span = tuple[int, int]

#: For tokenizers that have none.
PLAIN_TEMPLATE = (
    "{% for m in messages %}{{ '### ' + m['role'] | capitalize + ':\n' + (m['content'] | trim) }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}"
)
_COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
_LOOP_OVER_CONTENT = re.compile(
    r"\bfor\s+\w+\s+in\s+(\w+\s*(\.content|\[\s*['\"]content['\"]\s*\])|content)\s*(%|\||-|if\b)"
)
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Template:
    """Renders chats."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        #: the special tokens in a text, and all that were added (not everyone calls an end token special)
        self.special = _any_of({str(t) for t in added if t.special} | set(tokenizer.all_special_tokens))
        self.added = _any_of({str(t) for t in added})
        self._facts: dict[str, tuple[bool, bool, bool]] = {}

    def source(self, chat: Chat) -> str:
        """Of the template for this chat; some tokenizers have one of their own for chats with tools."""
        if not self._tokenizer.chat_template:
            return PLAIN_TEMPLATE
        try:
            return self._tokenizer.get_chat_template(None, chat.tools or None)
        except Exception as error:
            raise Unusable("template_refused", error) from None

    def _of(self, source: str) -> tuple[bool, bool, bool]:
        """(content comes in parts?, answers are marked?, role `developer` is known?)"""
        if source not in self._facts:
            bare = _COMMENT.sub("", source)
            self._facts[source] = (
                _LOOP_OVER_CONTENT.search(bare) is not None,  # as vLLM tells its content formats apart
                _GENERATION.search(bare) is not None,
                "'developer'" in source or '"developer"' in source,
            )
        return self._facts[source]

    def adapted(self, chat: Chat) -> Chat:
        """vLLM turns developers into the system where the template does not know them."""
        if not any(m["role"] == "developer" for m in chat.messages) or self._of(self.source(chat))[2]:
            return chat
        messages = [m | {"role": "system"} if m["role"] == "developer" else m for m in chat.messages]
        if any(m["role"] == "system" for m in messages[1:]):
            words = ["\n".join(m["content"]) for m in messages if m["role"] == "system"]
            rest = [m for m in messages if m["role"] != "system"]
            messages = [{"role": "system", "content": ["\n\n".join(filter(None, words))]}, *rest]
        return Chat(messages, chat.tools, chat.documents, chat.settings)

    def render(self, chat: Chat, messages: Sequence[Message], ask: bool = False) -> str:
        """The text of `messages` in place of the chat's; ask: with the generation prompt behind it."""
        settings = self._settings(chat, messages) | {"add_generation_prompt": ask}
        try:
            text = self._tokenizer.apply_chat_template(tokenize=False, **settings, **chat.settings)
        except Exception as error:  # templates refuse what they do not know, in exceptions of any kind
            raise Unusable("template_refused", error) from None
        for shown in settings["conversation"]:
            if isinstance(shown["content"], list) and shown["content"] and str(shown["content"]) in text:
                raise Unusable("template_refused", f"it prints the content parts of {shown['role']} as Python text")
        return text

    def marks(self, chat: Chat) -> list[Span] | None:
        """Character spans that the template itself marks as generated; None where it marks none of any chat."""
        settings = self._settings(chat, chat.messages)
        if not self._of(settings["chat_template"])[1]:
            return None
        conversations = [settings.pop("conversation")]
        # What `apply_chat_template` calls; that one answers with tokens, and loses white space on the way.
        _, spans = render_jinja_template(
            conversations, return_assistant_tokens_mask=True, **settings, **self._tokenizer.special_tokens_map
            | chat.settings
        )  # fmt: skip
        return list(spans[0])

    def _settings(self, chat: Chat, messages: Sequence[Message]) -> dict[str, Any]:
        source = self.source(chat)
        parts = self._of(source)[0]
        return {
            "conversation": [_shown(m, parts) for m in messages],
            "tools": chat.tools or None,
            "documents": chat.documents or None,
            "chat_template": source,
        }

    def not_shown(self, chat: Chat) -> tuple[str, ...]:
        """What the chat has and the template never asks for: serving would not show it, either."""
        names: Iterable[str] = (
            *(name for name in ("tools", "documents") if getattr(chat, name)),
            *chat.settings,
            *(["reasoning"] if any("reasoning" in m for m in chat.messages) else []),
        )
        source = self.source(chat)
        return tuple(name for name in names if not re.search(rf"\b{re.escape(name)}", source))


def _any_of(tokens: set[str]) -> re.Pattern[str]:
    """Longest first; a pattern that never matches where there is none."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")


def _shown(message: Message, parts: bool) -> dict[str, Any]:
    """A message as vLLM hands it to a template: texts joined by line breaks, or each one a part."""
    shown = {key: value for key, value in message.items() if key != "context"}
    shown["content"] = "\n".join(message["content"])
    if parts and message["role"] != "tool":  # most templates print what a tool says
        shown["content"] = [{"type": "text", "text": words} for words in message["content"]]
    if "reasoning" in message:
        shown["reasoning_content"] = message["reasoning"]
    return shown
