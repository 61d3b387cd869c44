"""A decision is taken over what a request was submitted with, and belongs to that request alone."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.sampling_params import BeamSearchParams

from tests.support.models import routed_checkpoint, tiny_llama

from .harness import Answer, assert_equals_reference, engine, random_prompts

LAYERS = [1, 2, 3]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("prompts")
    base = tiny_llama(directory / "base", num_hidden_layers=5)
    return routed_checkpoint(base, directory / "routed", "attn_sequence", LAYERS)


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_DISABLE_REQUEST_ID_RANDOMIZATION", "1")
        with engine(checkpoint) as llm:
            yield llm


def test_a_request_id_that_is_used_again(llm: Any, checkpoint: Path) -> None:
    """Its first request's end and its second's prefill are told to the worker in the same step."""
    prompts, answers = random_prompts((40, 33, 5, 64, 17)), []
    for prompt in prompts:
        parameters = SamplingParams(temperature=0, max_tokens=8, logprobs=0, ignore_eos=True)
        llm.llm_engine.add_request("same", {"prompt_token_ids": prompt}, parameters)
        outputs = []
        while llm.llm_engine.has_unfinished_requests():
            outputs = llm.llm_engine.step() or outputs
        answers.append(Answer.of(outputs[-1]))
    decisions = assert_equals_reference(checkpoint, prompts, answers)
    assert len({tuple(bool(d[layer]) for layer in LAYERS) for d in decisions}) > 1, "they have to differ"


def test_beam_search_decides_anew_at_each_token(llm: Any, checkpoint: Path) -> None:
    """vLLM submits prompt and beam as a new prompt each time; with one beam that is greedy search."""
    from router_tuning.model import load_reference, reference_decisions, reference_logits

    reference, seen = load_reference(checkpoint), set()
    prompts = random_prompts((9, 4, 21))
    outputs = llm.beam_search(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        BeamSearchParams(beam_width=1, max_tokens=6, ignore_eos=True),
    )
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens, decisions = list(prompt), set()
        for _ in range(6):
            logits = reference_logits(reference, tokens, len(tokens))
            decisions.add(tuple(bool(reference_decisions(reference)[layer]) for layer in LAYERS))
            tokens.append(int(logits[-1].argmax()))
        assert output.sequences[0].tokens == tokens
        seen.add(len(decisions))
    assert max(seen) > 1, "no decision changed on the way"
