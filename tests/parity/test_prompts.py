"""The prompt that a decision is trained on is the one that vLLM makes of the same request, token by token."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest

from router_tuning.chat import read_row
from router_tuning.encode import Encoder
from router_tuning.template import Template
from router_tuning.values import Unusable
from tests.support.models import tiny_llama
from tests.support.templates import QWEN3, TEMPLATES, template_tokenizer

ASSISTANT = {"role": "assistant", "content": "1, of course."}
TOOLS = [
    {"function": {"parameters": {"type": "object", "properties": {"n": {"type": "integer"}}}, "name": "add_one"}},
    {"type": "function", "function": {"name": "now", "description": "The time.", "parameters": None, "strict": True}},
]
# The keys of a past call in the order in which vLLM's server hands them on; ours stay as they are in the data.
CALL = {"id": "abcdefghi", "type": "function", "function": {"arguments": '{"n": 0}', "name": "add_one"}}


def text(*parts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": part} for part in parts]


REQUESTS: dict[str, dict[str, Any]] = {
    "words": {"messages": [{"role": "user", "content": " What is 0 plus one? "}]},
    "system": {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "0+1?"}]},
    "parts": {"messages": [{"role": "user", "content": text("What is", "0+1?")}]},
    "more turns": {
        "messages": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nYo", "weight": 0},
            {"role": "user", "content": "0+1?"},
        ]
    },
    "thought": {
        "messages": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Yo", "reasoning_content": "Hm.", "weight": 0},
            {"role": "user", "content": "0+1?"},
        ]
    },
    "developer": {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "developer", "content": text("Be", "kind.")},
            {"role": "user", "content": "0+1?"},
        ]
    },
    "tools": {"tools": TOOLS, "messages": [{"role": "user", "content": "0+1?"}]},
    "call": {
        "tools": TOOLS,
        "messages": [
            {"role": "user", "content": "0+1?"},
            {"role": "assistant", "content": None, "tool_calls": [CALL], "weight": 0},
            {"role": "tool", "content": text("1", "one"), "tool_call_id": "abcdefghi"},
        ],
    },
    "setting": {
        "messages": [{"role": "user", "content": "0+1?"}],
        "chat_template_kwargs": {"enable_thinking": False},
    },
}
#: In training as in serving.
REFUSED = {(name, request) for name in ("gemma", "mistral_v1") for request in ("system", "developer", "call")}


@pytest.fixture(scope="module")
def renderer(tmp_path_factory):
    """vLLM's, of a model whose tokenizer knows the special tokens of all templates."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.renderers import renderer_from_config

    path = tiny_llama(tmp_path_factory.mktemp("renderer") / "llama")
    template_tokenizer("".join(template for template, _ in TEMPLATES.values())).save_pretrained(path)
    return renderer_from_config(EngineArgs(model=str(path), max_model_len=1024).create_engine_config())


def served_prompt(renderer: Any, request: dict[str, Any], template: str) -> str:
    """What `/v1/chat/completions` submits, before it is made into tokens."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    asked = ChatCompletionRequest.model_validate({"model": "m", **copy.deepcopy(request)})
    tools = [tool.model_dump() for tool in asked.tools] if asked.tools else None
    params = asked.build_chat_params(template, "auto").with_defaults({"tools": tools, "tokenize": False})
    return renderer.render_messages(asked.messages, params)[1]["prompt"]


@pytest.mark.parametrize("request_name", REQUESTS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_is_rendered_as_vllm_renders_it(renderer, name, request_name):
    from vllm.exceptions import VLLMValidationError

    template, request = TEMPLATES[name][0], REQUESTS[request_name]
    renderer.get_tokenizer().chat_template = template
    ours = Template(renderer.get_tokenizer())
    chat = ours.adapted(read_row(request))
    if (name, request_name) in REFUSED:
        with pytest.raises(Unusable, match=r"roles must alternate|System role not supported") as refused:
            ours.render(chat, chat.messages, ask=True)
        with pytest.raises(VLLMValidationError, match=re.escape(refused.value.reason)):
            served_prompt(renderer, request, template)
    else:
        assert ours.render(chat, chat.messages, ask=True) == served_prompt(renderer, request, template)


def test_the_trained_prompt_is_the_served_one(renderer):
    tokenizer = renderer.get_tokenizer()
    tokenizer.chat_template = QWEN3
    for request in REQUESTS.values():
        ids, _, prompt_len, _ = Encoder(tokenizer)(request | {"messages": [*request["messages"], ASSISTANT]})
        served = served_prompt(renderer, request, QWEN3)
        assert ids[:prompt_len] == tokenizer(served, add_special_tokens=False)["input_ids"]


def test_templates_take_content_in_parts_where_vllm_thinks_so():
    from vllm.renderers.hf import _detect_content_format

    for template, _ in TEMPLATES.values():
        parts, _, _ = Template(template_tokenizer(template))._of(template)
        assert ("openai" if parts else "string") == _detect_content_format(template, default="string")
