"""Which part of a rendered chat is trained on, with templates that behave like those of real models."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router_tuning.encode import Encoder
from router_tuning.values import Unusable
from tests.support.templates import (
    CHATML,
    LLAMA3,
    MARKED,
    MISTRAL,
    PARTS,
    QWEN3,
    R1_DISTILL,
    TEMPLATES,
    template_tokenizer,
)

TOKENIZERS = {name: template_tokenizer(template) for name, (template, _) in TEMPLATES.items()}
TOOLS = [{"type": "function", "function": {"name": "add_one", "parameters": {"type": "object"}}}]


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def answer(content: Any = None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def call(name: str = "add_one", **arguments: Any) -> dict[str, Any]:
    return {"id": "abcdefghi", "type": "function", "function": {"name": name, "arguments": arguments}}


def trained(messages: list[dict[str, Any]], tokenizer: Any, **beside: Any) -> tuple[str, list[str]]:
    """(prompt, each run of supervised text)."""
    ids, supervised, prompt_len, _ = Encoder(tokenizer)({"messages": messages} | beside)
    runs: list[list[int]] = []
    for t, token in enumerate(ids):
        if supervised[t]:
            if t == 0 or not supervised[t - 1]:
                runs.append([])
            runs[-1].append(token)
    return tokenizer.decode(ids[:prompt_len]), [tokenizer.decode(run) for run in runs]


def refused(messages: list[dict[str, Any]], template: str, **beside: Any) -> str:
    with pytest.raises(Unusable) as error:
        trained(messages, template_tokenizer(template), **beside)
    assert error.value.kind == "unverified"
    return error.value.reason


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_answer_whose_words_the_question_has_too(name):
    """831 of 2,000 such rows were once supervised in the question."""
    prompt, runs = trained([user("Say yes or no: yes?"), answer("yes")], TOKENIZERS[name])
    thought = "<think>\n\n</think>\n\n" if name == "qwen3" else ""  # the template writes it
    space = " " if name == "mistral" else ""
    assert runs == [thought + space + "yes" + TEMPLATES[name][1]] and "yes?" in prompt


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_answer_of_several_turns_with_its_end_token(name):
    messages = [user("Yo?"), answer("Yo"), user("Again: Yo, Hi"), answer("Yo, Hi"), user("?"), answer("Hi")]
    prompt, runs = trained(messages, TOKENIZERS[name])
    assert [run.removeprefix("<think>\n\n</think>\n\n").lstrip(" ") for run in runs] == [
        words + TEMPLATES[name][1] for words in ("Yo", "Yo, Hi", "Hi")
    ]
    assert "Yo?" in prompt and "Again" not in prompt


WORDS = st.text(max_size=6) | st.text(st.sampled_from("ay \n"), max_size=6)


@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3), st.sampled_from([*TEMPLATES]))
def test_what_is_trained_on_are_the_answers_whatever_they_say(turns, name):
    """Words that repeat each other, white space, tags, nothing at all."""
    end = TEMPLATES[name][1]
    messages = [message for asked, said in turns for message in (user(asked), answer(said))]
    wanted = [said.split("</think>")[-1] for _, said in turns if said.strip()]
    if not wanted:
        with pytest.raises(Unusable, match="no assistant turn has words"):
            trained(messages, TOKENIZERS[name])
        return
    _, runs = trained(messages, TOKENIZERS[name])
    assert len(runs) == len(wanted) and all(run.endswith(end) for run in runs)
    for run, said in zip(runs, wanted, strict=True):
        rest = run.removesuffix(end).removeprefix("<think>\n\n</think>\n\n")
        assert rest == said or rest.strip() == said.strip(), (run, said)


PIECES = ["<think>", "</think>", "\n", "ay", "a", "<|im_end|>", "</s>"]
TAGGED = st.lists(st.sampled_from(PIECES), max_size=5).map("".join)


@given(st.lists(st.tuples(TAGGED, TAGGED), min_size=1, max_size=3), st.sampled_from([*TEMPLATES]))
def test_thoughts_and_special_tokens_among_the_words(turns, name):
    """The row may be left out, but never is anything else than its answers trained on."""
    messages = [message for asked, said in turns for message in (user(asked), answer(said))]
    said = ["".join(said.split()) for _, said in turns if said.strip()]
    with contextlib.suppress(Unusable):
        runs = trained(messages, TOKENIZERS[name])[1]
        assert len(runs) == len(said)
        for run, words in zip(runs, said, strict=True):
            shown, end = "".join(run.split()), TEMPLATES[name][1]
            final = words.split("</think>")[-1]
            assert shown.endswith(final.removeprefix("<think>") + end)  # what R1 asks with may be what it begins with
            thought = shown.removesuffix(end).removesuffix(final)
            assert thought in ("", "<think></think>") or "think>" in words


def test_r1_distillations_ask_with_a_thought_and_render_none():
    tokenizer = TOKENIZERS["r1_distill"]
    messages = [user("Hi yo"), answer("<think>\nyo?\n</think>\n\nyo"), user("Bye yo"), answer("yo")]
    prompt, runs = trained(messages, tokenizer)
    assert runs == ["\n\nyo<｜end▁of▁sentence｜>", "yo<｜end▁of▁sentence｜>"]  # noqa: RUF001
    assert prompt == "<s><｜User｜>Hi yo<｜Assistant｜>"  # noqa: RUF001


def test_an_answer_that_is_a_thought_alone_leaves_nothing():
    assert "does not show" in refused([user("Hi"), answer("<think>Hm.</think>")], R1_DISTILL)


def test_qwen3_drops_old_thoughts_and_keeps_the_last():
    messages = [user("Hi"), answer("<think>\nold\n</think>\n\nYo"), user("?"), answer("<think>\nnew\n</think>\n\nHi")]
    prompt, runs = trained(messages, TOKENIZERS["qwen3"])
    assert runs == ["Yo<|im_end|>", "<think>\nnew\n</think>\n\nHi<|im_end|>"]
    assert prompt == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    thoughts = [user("Hi"), answer("Yo", reasoning_content="old"), user("?"), answer("Hi", reasoning="new")]
    assert trained(thoughts, TOKENIZERS["qwen3"]) == (prompt, runs)


def test_settings_of_a_row_reach_the_template():
    beside = {"chat_template_kwargs": {"enable_thinking": False}}
    prompt, runs = trained([user("Hi"), answer("Yo")], TOKENIZERS["qwen3"], **beside)
    assert prompt.endswith("<think>\n\n</think>\n\n") and runs == ["Yo<|im_end|>"]


def test_context_is_prompt():
    """History, answers of weight 0, and the answers in a conversational prompt."""
    expected = ("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
                "<|im_start|>assistant\n", ["Yo<|im_end|>"])  # fmt: skip
    tokenizer = TOKENIZERS["chatml"]
    assert trained([user("Hi"), answer("Yo")], tokenizer, history=[["a", "b"]]) == expected
    assert trained([user("a"), answer("b", weight=0), user("Hi"), answer("Yo", weight=1)], tokenizer) == expected


@pytest.mark.parametrize("words", [None, "", "Let me see."])
def test_calls_are_answers(words):
    messages = [user("0+1?"), answer(words, tool_calls=[call(n=0), call(n=1)]), {"role": "tool", "content": "1"},
                answer("It is 1.")]  # fmt: skip
    prompt, runs = trained(messages, TOKENIZERS["qwen3"], tools=TOOLS)
    calls = [f'<tool_call>\n{{"name": "add_one", "arguments": {{"n": {n}}}}}\n</tool_call>' for n in (0, 1)]
    assert runs == [
        "\n".join(filter(None, [words, *calls])) + "<|im_end|>", "<think>\n\n</think>\n\nIt is 1.<|im_end|>"
    ]  # fmt: skip
    assert '"name": "add_one"' in prompt and prompt.endswith("0+1?<|im_end|>\n<|im_start|>assistant\n")
    only = trained(messages[:2], TOKENIZERS["qwen3"], tools=TOOLS)[1]
    assert len(only) == 1 and only[0].endswith("</tool_call><|im_end|>")


def test_calls_without_arguments_and_of_a_template_with_tokens_inside():
    result = {"role": "tool", "content": "1", "tool_call_id": "abcdefghi"}
    messages = [user("?"), answer(tool_calls=[call("now")]), result, answer("1")]
    messages += [user("0+1?"), answer(tool_calls=[call(n=0)])]
    prompt, runs = trained(messages, TOKENIZERS["mistral"], tools=TOOLS)
    assert runs == [
        '[TOOL_CALLS] [{"name": "now", "arguments": {}, "id": "abcdefghi"}]</s>', " 1</s>",
        '[TOOL_CALLS] [{"name": "add_one", "arguments": {"n": 0}, "id": "abcdefghi"}]</s>',
    ]  # fmt: skip
    assert prompt == "<s>[INST] ?[/INST]"  # the tools are shown with the last question


@pytest.mark.parametrize(
    ("template", "words", "reason"),
    [
        (CHATML, "", "does not show tool calls"),
        (CHATML, "Let me see.", "does not show tool calls"),
        (LLAMA3, "Let me see.", "does not show all of a turn with tool calls"),
    ],
)
def test_calls_that_the_template_leaves_out_are_no_answer(template, words, reason):
    assert reason in refused([user("0+1?"), answer(words, tool_calls=[call(n=0)])], template, tools=TOOLS)


def test_a_template_without_end_token_has_none_supervised():
    bare = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    prompt, runs = trained([user("Hi"), answer("Yo"), user("?"), answer("Hi")], template_tokenizer(bare))
    assert runs == ["Yo", "Hi"] and prompt == "user: Hi\nassistant: "


def test_an_end_token_that_nobody_calls_special():
    from tokenizers import AddedToken

    bye = "{% if not add_generation_prompt %}{{ 'Bye.' }}{% endif %}"
    tokenizer = template_tokenizer(CHATML.replace("<|im_end|>", "<end>") + bye)
    tokenizer.add_tokens([AddedToken("<end>", special=False)])
    assert trained([user("Hi"), answer("Yo")], tokenizer)[1] == ["Yo<end>"]


def test_calls_that_end_without_a_token_do_not_take_that_of_a_later_turn():
    end = "{{- '<|im_end|>\\n' }}\n    {%- elif m.role == 'tool'"
    open_calls = QWEN3.replace(end, end.replace("'<|im_end|>", "'' if m.tool_calls else '<|im_end|>"))
    assert open_calls != QWEN3
    messages = [user("?"), answer(tool_calls=[call(n=0)]), {"role": "tool", "content": "1"}, answer("1")]
    assert "where tool calls end" in refused(messages, open_calls, tools=TOOLS)


def test_an_end_that_is_no_token_is_supervised_as_it_is_written():
    tokenizer = template_tokenizer(CHATML.replace("|>", ">").replace("<|", "<"))
    assert trained([user("Hi"), answer("Yo")], tokenizer)[1] == ["Yo<im_end>"]


def test_a_header_that_is_not_in_the_generation_prompt_is_no_answer():
    silent = CHATML.replace("{% if add_generation_prompt %}", "{% if false %}")
    prompt, runs = trained([user("Hi"), answer("Yo")], template_tokenizer(silent))
    assert runs == ["Yo<|im_end|>"] and prompt == "<|im_start|>user\nHi<|im_end|>\n"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("m['content'] +", "m['content'] | replace('Y', 'y') +"), "does not show an answer as it is"),
        (("m['content'] +", "m['content'][:1] +"), "does not show an answer as it is"),
        (("m['content'] +", "m['content'] + m['content'] +"), "where an answer ends"),
        (("m['content'] +", "(m['content'] if m['role'] == 'user' else '') +"), "where an answer ends"),
    ],
)
def test_an_answer_that_the_template_changes_is_not_trained_on(change, reason):
    assert reason in refused([user("Hi Yo"), answer("Yo")], CHATML.replace(*change))


def test_what_a_template_marks_is_what_is_trained_on():
    messages = [user("Yo?"), answer("Yo"), user("?"), answer("Hi")]
    assert trained(messages, TOKENIZERS["marked"])[1] == ["Yo<|im_end|>", "Hi<|im_end|>"]
    last = MARKED.replace("{% if m['role'] == 'assistant' %}", "{% if loop.last %}")
    prompt, runs = trained(messages, template_tokenizer(last))
    assert runs == ["Hi<|im_end|>"] and "Yo<|im_end|>" in prompt
    no_end = MARKED.replace("+ '<|im_end|>\n' }}{% endgeneration %}", "}}{% endgeneration %}{{ '<|im_end|>\n' }}")
    assert trained(messages, template_tokenizer(no_end))[1] == ["Yo<|im_end|>", "Hi<|im_end|>"]
    pieces = MARKED.replace("+ '<|im_end|>\n'", "}}{% endgeneration %}{% generation %}{{ '<|im_end|>\n'", 1)
    assert trained(messages, template_tokenizer(pieces))[1] == ["Yo<|im_end|>", "Hi<|im_end|>"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("{{ m['content'] + '<|im_end|>\n' }}{% endgen", "{{ m['content'][:1] }}{% endgen"), "as it is"),
        (("if m['role'] == 'assistant'", "if m['role'] == 'user'"), "marks none of the answers"),
        (("{% generation %}{{ m['content'] +", "{{ m['content'][0] }}{% generation %}{{ m['content'][1:] +"),
         "only in part"),
        (("{% generation %}{{ m['content'] + '<|im_end|>\n' }}{% endgeneration %}",
          "{{ m['content'] }}{% generation %}{{ '<|im_end|>\n' }}{% endgeneration %}"), "only in part"),
    ],
)  # fmt: skip
def test_marks_that_miss_the_answer_are_not_believed(change, reason):
    assert reason in refused([user("Hi"), answer("Yo")], MARKED.replace(*change))


def test_a_chat_that_begins_with_an_answer_has_no_prompt():
    tokenizer = TOKENIZERS["chatml"]
    ids, supervised, prompt_len, _ = Encoder(tokenizer)({"messages": [answer("Yo")]})
    trained_on = [token for token, s in zip(ids, supervised, strict=True) if s]
    assert prompt_len == len(ids) and tokenizer.decode(trained_on) == "Yo<|im_end|>"


def test_content_in_parts_reads_as_vllm_reads_it():
    """Joined by line breaks, or handed on as parts where the template takes them."""
    parts = [{"type": "text", "text": text} for text in ("It", "is 1.")]
    messages = [user([{"type": "text", "text": "0+1?"}]), answer(parts)]
    assert trained(messages, TOKENIZERS["chatml"])[1] == ["It\nis 1.<|im_end|>"]
    assert trained(messages, TOKENIZERS["parts"])[1] == ["Itis 1.<|im_end|>"]


def test_content_parts_that_the_template_prints_as_they_are():
    """Which it takes for the user alone; serving would print the same."""
    raw = PARTS.replace("{%- if m.content is string %}", "{%- if m.content is string or m.role == 'system' %}")
    messages = [{"role": "system", "content": "Be brief."}, user("Hi"), answer("Yo")]
    with pytest.raises(Unusable, match="it prints the content parts of system as Python text"):
        trained(messages, template_tokenizer(raw))
    assert trained(messages[1:], template_tokenizer(raw))[1] == ["Yo<|im_end|>"]


def test_developers_are_the_system_where_the_template_knows_none():
    messages = [{"role": "system", "content": "a"}, {"role": "developer", "content": "b"}, user("Hi"), answer("Yo")]
    prompt, runs = trained(messages, TOKENIZERS["chatml"])
    assert prompt.startswith("<|im_start|>system\na\n\nb<|im_end|>\n<|im_start|>user") and runs == ["Yo<|im_end|>"]
    known = CHATML.replace("{% for", "{# 'developer' #}{% for", 1)
    assert "<|im_start|>developer\nb" in trained(messages, template_tokenizer(known))[0]


def test_tokenizers_with_a_template_of_their_own_for_tools():
    tokenizer = template_tokenizer(QWEN3)
    tokenizer.chat_template = {"default": CHATML, "tool_use": QWEN3}
    messages = [user("Hi"), answer("Yo")]
    assert trained(messages, tokenizer)[1] == ["Yo<|im_end|>"]
    assert "# Tools" in trained(messages, tokenizer, tools=TOOLS)[0]
    tokenizer.chat_template = {"tool_use": MISTRAL}
    with pytest.raises(Unusable) as error:
        trained(messages, tokenizer)
    assert error.value.kind == "template_refused"
