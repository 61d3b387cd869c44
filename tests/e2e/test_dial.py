"""A dial per request through the real `vllm serve`: what is asked, what is answered, and what is refused."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.models import routed_checkpoint
from tests.support.server import Server, serve

LAYERS = [1, 2, 4, 5, 6]
FLAGS = ["--max-model-len", "512", "--max-num-seqs", "16", "--kv-cache-memory-bytes", str(256 << 20)]
FLAGS += ["--block-size", "32", "--dtype", "float32", "--enforce-eager", "--served-model-name", "tiny"]
FLAGS += ["--max-num-batched-tokens", "128", "--enable-prompt-tokens-details"]
SYSTEM = "You answer in few words, and only what was asked. " * 3
TABLE = {0.8: [-1.5] * 5, 0.2: [1.5] * 5}  # of random routers, whose scores are of that order


@pytest.fixture(scope="module")
def server(tiny_llama_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("dial")
    checkpoint = routed_checkpoint(tiny_llama_path, directory / "routed", "attn_sequence", LAYERS, version=2, window=48)
    points = [{"target": kept, "kept": kept, "cutoff": cutoff} for kept, cutoff in TABLE.items()]
    (checkpoint / "calibration.json").write_text(json.dumps({"operating_points": points}))
    with serve(checkpoint, *FLAGS, log=directory / "serve.log", env={"OMP_NUM_THREADS": "1"}) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)


def ask(client: openai.OpenAI, dial: dict[str, Any] | None, prompt: str = SYSTEM + "Why?", **options: Any) -> Any:
    extra = {"ignore_eos": True, "return_token_ids": True} | ({"vllm_xargs": dial} if dial is not None else {})
    extra |= options.pop("extra", {})
    return client.completions.create(
        **{"model": "tiny", "prompt": prompt, "max_tokens": 12, "temperature": 0, "extra_body": extra} | options
    )


def kept(completion: Any) -> dict[str, Any]:
    return completion.kv_transfer_params["mod"]


@pytest.mark.parametrize(
    ("dial", "ratio", "said"),
    [
        ({"mod_threshold": 0}, 1.0, {"threshold": 0, "by": "request"}),
        ({"mod_threshold": 1}, 0.0, {"threshold": 1, "by": "request"}),
        ({"mod_kept": 1}, 1.0, {"kept": 1, "by": "request"}),
        ({"mod_kept": 0.2}, None, {"kept": 0.2, "by": "request"}),
        ({"mod_kept": 0.5}, None, {"kept": 0.5, "by": "request"}),  # between two points of the table
    ],
)
def test_the_answer_says_what_was_kept(client, dial, ratio, said):
    found = kept(ask(client, dial))
    assert found["dial"] == said
    assert found["kept_ratio"] == 1 - len(found["skipped_layers"]) / len(LAYERS)
    assert ratio is None or found["kept_ratio"] == ratio
    assert set(found["skipped_layers"]) <= set(LAYERS)


def test_without_a_dial_the_checkpoint_decides(client):
    assert "dial" not in kept(ask(client, None))
    assert "dial" not in kept(ask(client, {"somebody_elses": 1}))


def test_a_dial_changes_the_tokens_and_no_other_request(client):
    dense, none, plain = (ask(client, dial) for dial in ({"mod_threshold": 0}, {"mod_threshold": 1}, None))
    assert dense.choices[0].token_ids != none.choices[0].token_ids
    both = [ask(client, dial).choices[0].token_ids for dial in ({"mod_threshold": 1}, {"mod_threshold": 0})]
    assert both == [none.choices[0].token_ids, dense.choices[0].token_ids]
    assert ask(client, None).choices[0].token_ids == plain.choices[0].token_ids


def test_a_prefix_is_found_by_requests_of_one_dial(client):
    prompt = SYSTEM + "And now?"
    for dial in ({"mod_threshold": 0}, {"mod_threshold": 1}):
        first, second = (ask(client, dial, prompt) for _ in range(2))
        assert second.usage.prompt_tokens_details.cached_tokens >= 32 * (len(prompt) // 32 - 1)
        assert first.choices[0].token_ids == second.choices[0].token_ids


def test_several_answers_and_a_stream(client):
    several = ask(client, {"mod_threshold": 1}, n=2, temperature=1.0, seed=3)
    assert kept(several)["kept_ratio"] == 0 and len(several.choices) == 2
    whole = ask(client, {"mod_kept": 0.2}).choices[0].token_ids
    chunks = list(ask(client, {"mod_kept": 0.2}, stream=True))
    assert [token for chunk in chunks for token in chunk.choices[0].token_ids or []] == whole


def test_in_a_chat(client):
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Why?"}]
    options: dict[str, Any] = {"model": "tiny", "messages": messages, "max_tokens": 8, "temperature": 0}
    chat = client.chat.completions.create(**options, extra_body={"vllm_xargs": {"mod_threshold": 1}})
    assert kept(chat)["kept_ratio"] == 0


@pytest.mark.parametrize(
    ("dial", "words"),
    [
        ({"mod_threshold": 1.5}, "'mod_threshold': a number from 0 to 1"),
        ({"mod_kept": "half"}, "'mod_kept': a number from 0 to 1"),
        ({"mod_kept": -1}, "'mod_kept': a number from 0 to 1"),
        ({"mod_treshold": 0.5}, "'mod_treshold' is unknown"),
        ({"mod_kept": 0.5, "mod_threshold": 0.5}, "'mod_threshold' and 'mod_kept'"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_dial_is_http_400_and_disturbs_nobody(client, server, dial, words, stream):
    """A stream has begun when vLLM checks what was asked: there the same error is its only event."""
    before = ask(client, None).choices[0].token_ids
    with pytest.raises(openai.APIError) as error:
        list(ask(client, dial, stream=stream))
    assert isinstance(error.value, openai.BadRequestError) != stream
    body = error.value.body
    assert words in body["message"] and "\n" not in body["message"].strip()
    assert body["code"] == 400
    assert server.healthy() and ask(client, None).choices[0].token_ids == before


def test_dials_are_counted(client, server):
    def counts() -> dict[str, float]:
        families = text_string_to_metric_families(server.get("/metrics"))
        samples = [s for family in families for s in family.samples if s.name == "vllm:mod_dial_total"]
        return {sample.labels["dial"]: sample.value for sample in samples}

    before = counts()
    ask(client, {"mod_threshold": 0.25})
    ask(client, None)  # what the scheduler has counted is told with a step's statistics
    after = counts()
    changed = {dial: n - before.get(dial, 0) for dial, n in after.items() if n != before.get(dial, 0)}
    assert sum(changed.values()) == 1 and "0.25" in next(iter(changed))
