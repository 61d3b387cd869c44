"""The real `vllm serve`, asked by the official `openai` client."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from safetensors.torch import load_file, save_file

from tests.support.models import routed_checkpoint
from tests.support.server import Server, ServerError, serve
from vllm_mod.checkpoint import ROUTERS_FILE

ROUTED = [3, 4, 5, 6]
FLAGS = ["--max-model-len", "256", "--max-num-seqs", "32", "--kv-cache-memory-bytes", str(256 << 20)]
FLAGS += ["--block-size", "32", "--dtype", "float32", "--enforce-eager", "--served-model-name", "tiny"]
# Byte-level text of one letter or another has a mean of its own in each routed layer: requests disagree.
PROMPTS = [chr(ord("A") + i) * (3 + 2 * i) + f" {i}" for i in range(32)]


@pytest.fixture(scope="module")
def server(tiny_llama_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("serve")
    checkpoint = routed_checkpoint(tiny_llama_path, directory / "routed", "attn_sequence", ROUTED)
    with serve(checkpoint, *FLAGS, log=directory / "serve.log", env={"OMP_NUM_THREADS": "1"}) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)


def greedy(prompt: str, **options: Any) -> dict[str, Any]:
    """Arguments of a greedy completion of 12 tokens, token ids in the answer."""
    extra = {"ignore_eos": True, "return_token_ids": True}
    return {"model": "tiny", "prompt": prompt, "max_tokens": 12, "temperature": 0, "extra_body": extra} | options


@pytest.fixture(scope="module")
def answers(client: openai.OpenAI) -> list[list[int]]:
    """Token ids of every prompt, each asked alone."""
    return [client.completions.create(**greedy(prompt)).choices[0].token_ids for prompt in PROMPTS]


def counters(server: Server) -> dict[str, dict[int, float]]:
    """`kept` and `routed` of /metrics, per layer."""
    found: dict[str, dict[int, float]] = {"kept": {}, "routed": {}}
    for family in text_string_to_metric_families(server.get("/metrics")):
        for sample in family.samples:
            for name in found:
                if sample.name == f"vllm:mod_{name}_total":
                    found[name][int(sample.labels["layer"])] = sample.value
    return found


def test_model_is_listed(client):
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_completion(client):
    completion = client.completions.create(**greedy("Once upon a time"))
    assert completion.usage.completion_tokens == 12
    assert completion.choices[0].finish_reason == "length"
    assert completion.choices[0].text


def test_chat(client):
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    chat = client.chat.completions.create(model="tiny", messages=messages, max_tokens=8, temperature=0)
    assert chat.choices[0].message.role == "assistant"
    assert 1 <= chat.usage.completion_tokens <= 8
    streamed = client.chat.completions.create(model="tiny", messages=messages, max_tokens=8, temperature=0, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in streamed)
    assert text == chat.choices[0].message.content


def test_stream_equals_the_whole_answer(client, answers):
    chunks = list(client.completions.create(**greedy(PROMPTS[5], stream=True)))
    assert len(chunks) > 1
    assert [token for chunk in chunks for token in chunk.choices[0].token_ids or []] == answers[5]


def test_several_answers(client):
    sampled = greedy(PROMPTS[7], n=2, temperature=1.0, seed=1)  # greedy sampling allows one answer only
    first, second = [choice.token_ids for choice in client.completions.create(**sampled).choices]
    assert first != second
    assert [choice.token_ids for choice in client.completions.create(**sampled).choices] == [first, second]


def test_logprobs(client, answers):
    request = greedy(PROMPTS[9], logprobs=3)
    request["extra_body"] |= {"return_tokens_as_token_ids": True}  # many bytes are no text of their own
    choice = client.completions.create(**request).choices[0]
    assert choice.logprobs.tokens == [f"token_id:{token}" for token in answers[9]]
    assert len(choice.logprobs.token_logprobs) == len(choice.logprobs.top_logprobs) == 12
    for chosen, top in zip(choice.logprobs.token_logprobs, choice.logprobs.top_logprobs, strict=True):
        assert chosen == max(top.values()) <= 0  # greedy takes the likeliest


def test_several_prompts_in_one_request(client, answers):
    completion = client.completions.create(**greedy(PROMPTS[:4]))
    assert [choice.token_ids for choice in completion.choices] == answers[:4]


def test_aborted_stream(client, server, answers):
    stream = client.completions.create(**greedy(PROMPTS[3], max_tokens=200, stream=True))
    next(iter(stream))
    stream.close()
    assert server.healthy()
    assert client.completions.create(**greedy(PROMPTS[3])).choices[0].token_ids == answers[3]


def test_32_requests_at_once_answer_as_alone(server, answers):
    async def ask() -> list[list[int]]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=300) as client:
            completions = await asyncio.gather(*(client.completions.create(**greedy(p)) for p in PROMPTS))
        return [completion.choices[0].token_ids for completion in completions]

    assert asyncio.run(ask()) == answers
    assert server.healthy()


def test_bad_requests_are_refused_and_the_server_lives(client, server, answers):
    with pytest.raises(openai.BadRequestError, match="256"):
        client.completions.create(**greedy("x" * 300))
    assert client.completions.create(**greedy(PROMPTS[0])).choices[0].token_ids == answers[0]


def test_requests_disagree_and_skipping_is_counted(client, server):
    before = counters(server)
    for prompt in PROMPTS[:8]:
        client.completions.create(**greedy(prompt, max_tokens=1))
    after = counters(server)
    assert sorted(after["routed"]) == sorted(after["kept"]) == ROUTED
    routed, kept = ({i: after[name][i] - before[name].get(i, 0) for i in ROUTED} for name in ("routed", "kept"))
    assert routed == dict.fromkeys(ROUTED, 8)  # one decision per request and layer
    assert all(0 <= kept[i] <= 8 for i in ROUTED)
    assert 0 < sum(kept.values()) < 8 * len(ROUTED)


def test_a_broken_checkpoint_is_refused_at_start(tiny_llama_path, tmp_path):
    """One line of the log names file and tensor; the server does not come up."""
    checkpoint = routed_checkpoint(tiny_llama_path, tmp_path / "broken", "attn_sequence", ROUTED)
    tensors = load_file(checkpoint / ROUTERS_FILE)
    tensors["model.layers.4.router.weight"][0, 0] = torch.nan
    save_file(tensors, checkpoint / ROUTERS_FILE)
    said = rf"{ROUTERS_FILE}: model\.layers\.4\.router\.weight has values that are not finite"
    with pytest.raises(ServerError, match=said), serve(checkpoint, *FLAGS, log=tmp_path / "serve.log"):
        pass
