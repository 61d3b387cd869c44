"""Where the answers stand in a rendered chat, found by rendering it again and never by searching for their words.

A turn's end is where the text goes on that does not change when another answer is put in its place. Its beginning is
where serving would let the model go on: behind the generation prompt, or, where a template renders past turns
otherwise than it asks for new ones (R1 distillations, Qwen3 and its old thoughts), where the other answer begins.
"""

from __future__ import annotations

from dataclasses import dataclass

from .chat import Chat, Message, answers
from .template import Span, Template
from .values import Unusable


@dataclass(frozen=True)
class Marked:
    text: str
    #: characters of `text` that are trained on: each answer as the template renders it, with its end token
    spans: list[Span]
    #: characters that serving would submit to get the first of them; None: nothing comes before it
    prompt: int | None


def mark(chat: Chat, template: Template) -> Marked:
    """Render and find the answers. Raises Unusable where the template refuses, or where an answer is not certain."""
    return _Finder(template.adapted(chat), template).marked()


@dataclass(frozen=True)
class _Turn:
    """Character positions: where the prompt ends, the answer begins and ends, and its end token ends."""

    prompt: int
    start: int
    inner: int
    end: int


class _Finder:
    def __init__(self, chat: Chat, template: Template) -> None:
        self.chat, self.template = chat, template
        self.answers = answers(chat)
        if not self.answers:
            raise Unusable("no_answer", "no assistant turn has words or calls")
        self.full = template.render(chat, chat.messages)
        self.other = "\ue000"  # another answer, that no template knows or changes
        while self.other in self.full:
            self.other += "\ue001"
        self.closing = self._closing()

    def marked(self) -> Marked:
        marks = self.template.marks(self.chat)
        spans: list[Span] = []
        prompt: int | None = None
        for k in self.answers:
            turn = self._turn(k)
            if spans and turn.start < spans[-1][1]:
                raise _unsure("two answers overlap in the rendered chat")
            inside = [(turn.start, turn.end)] if marks is None else _cut(marks, turn)
            if not inside:
                continue  # the template's author left it out
            words = self._words(k, self.full[turn.start : turn.inner])
            if len(_squeezed(self.full[inside[-1][0] : min(inside[-1][1], turn.inner)])) < words:
                raise _unsure("the chat template marks an answer as generated only in part")
            if not spans:
                prompt = turn.prompt if k else None
            spans += inside
        if not spans:
            raise _unsure("the chat template marks none of the answers as generated")
        return Marked(self.full, spans, prompt)

    def _turn(self, k: int) -> _Turn:
        message = self.chat.messages[k]
        frame = self._frame(k, len(self.chat.messages))
        if "tool_calls" in message:
            inner, end = self._end_of_calls(k)
        elif frame and self.full.endswith(frame[1]):
            inner = len(self.full) - len(frame[1])
            end = inner + (len(self.closing[0]) if frame[1].startswith(self.closing[0]) else 0)
        else:
            raise _unsure("the rendered chat does not show where an answer ends")
        asked = self._try(self.chat.messages[:k], ask=True) if k else None
        before = frame[0] if frame and self.full.startswith(frame[0]) and len(frame[0]) < inner else None
        if asked and self.full.startswith(asked) and len(asked) <= inner:
            start = len(asked)
            # In a template without a generation prompt what it writes before the words is a header, not the answer.
            header = before and self.template.special.search(before, start)
            if before and header and asked == self._try(self.chat.messages[:k]):
                start = len(before)
            return _Turn(len(asked), start, inner, end)
        start = self._behind_the_previous(k) or len(before or "")
        if 0 < start < inner:
            return _Turn(start, start, inner, end)
        raise _unsure("the rendered chat does not show where an answer begins")

    def _behind_the_previous(self, k: int) -> int | None:
        """Behind the words of message k - 1 and the generation prompt, if that stands there.

        For templates that render earlier messages otherwise when more follow (Mistral's, with its tools).
        """
        messages = self.chat.messages
        if k == 0:
            return None
        changed = [*messages[: k - 1], {**messages[k - 1], "content": [self.other]}]
        shown, asked = self._try([*changed, *messages[k:]]), self._try(changed, ask=True)
        if shown is None or asked is None or shown.count(self.other) != 1 or asked.count(self.other) != 1:
            return None
        rest, prompt = shown.partition(self.other)[2], asked.partition(self.other)[2]
        if not (self.full.endswith(rest) and rest.startswith(prompt)):
            return None
        return len(self.full) - len(rest) + len(prompt)

    def _frame(self, k: int, size: int) -> tuple[str, str] | None:
        """What the template writes before and behind the words of turn k, in a chat of the first `size` messages."""
        turn = {**self.chat.messages[k], "content": [self.other]}
        turn.pop("tool_calls", None)
        shown = self._try([*self.chat.messages[:k], turn, *self.chat.messages[k + 1 : size]])
        if shown is None or shown.count(self.other) != 1:
            return None
        before, _, behind = shown.partition(self.other)
        return before, behind

    def _closing(self) -> tuple[str, str]:
        """(what ends an answer, the token that it ends with): all up to the first special token behind the words.

        Where that is none of the tokenizer's tokens, it is all that the template writes.
        """
        last = self.answers[-1]
        frame = self._frame(last, last + 1)
        behind = frame[1] if frame else ""
        found = self.template.special.search(behind) or self.template.added.search(behind)
        return (behind[: found.end()], found[0]) if found else (behind.rstrip(), behind.strip())

    def _end_of_calls(self, k: int) -> tuple[int, int]:
        """(where turn k's calls end, where its end token ends)"""
        messages = self.chat.messages
        fake = {"type": "function", "function": {"name": self.other, "arguments": {self.other: self.other}}}
        turn = {**messages[k], "tool_calls": [{**call, **fake} for call in messages[k]["tool_calls"]]}
        shown = self._try([*messages[:k], turn, *messages[k + 1 :]])
        if shown is None or shown == self.full:
            raise _unsure("the chat template does not show tool calls")
        inner = len(self.full) - _common(self.full[::-1], shown[::-1])
        if not self.closing[1]:  # no end token: the turn as it is without what follows
            alone = self._try(messages[: k + 1]) or ""
            end = len(alone.rstrip()) if self.full.startswith(alone) else -1
            if end >= inner:
                return end, end
        else:
            end = self.full.find(self.closing[1], inner, self._beginning(k + 1))
            if end >= 0:
                return end, end + len(self.closing[1])
        raise _unsure("the rendered chat does not show where tool calls end")

    def _beginning(self, k: int) -> int:
        """Where the words of message k begin, or the end of the text."""
        messages = self.chat.messages
        if k == len(messages):
            return len(self.full)
        shown = self._try([*messages[:k], {**messages[k], "content": [self.other]}, *messages[k + 1 :]])
        return _common(self.full, shown or "")

    def _words(self, k: int, shown: str) -> int:
        """How many characters (white space aside) at the end of what is trained on are the answer itself.

        The template may trim it, and write, change or drop a thought before it; anything else is no answer.
        """
        message = self.chat.messages[k]
        rendered, words = _squeezed(shown), _squeezed("".join(message["content"]))
        if "tool_calls" in message:
            if words not in rendered or any(c["function"]["name"] not in shown for c in message["tool_calls"]):
                raise _unsure("the chat template does not show all of a turn with tool calls")
            return len(rendered)
        same = _common(rendered[::-1], words[::-1])
        # What differs ends with a tag, or the tag that ends it is part of what is the same.
        tagged = 0 < same < len(words) and (words[-same - 1] in ">]" or words[-same] in "<[")
        if not same or not (same == len(words) or tagged):
            raise _unsure("the chat template does not show an answer as it is")
        return same

    def _try(self, messages: list[Message], ask: bool = False) -> str | None:
        """A rendering that the template may well refuse, since no one asked for it."""
        try:
            return self.template.render(self.chat, messages, ask)
        except Unusable:
            return None


def _cut(marks: list[Span], turn: _Turn) -> list[Span]:
    """Of the marks what is in the turn, joined where they touch; one up to the turn's end gets the end token, too."""
    found: list[Span] = []
    for a, b in sorted((max(a, turn.start), min(b, turn.end)) for a, b in marks):
        if a < b:
            found.append((found.pop()[0], b) if found and found[-1][1] >= a else (a, b))
    return [(a, turn.end if b >= turn.inner else b) for a, b in found]


def _common(a: str, b: str) -> int:
    """Characters that both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _unsure(reason: str) -> Unusable:
    return Unusable("unverified", reason)
