"""A dial per request: each is decided by its own cutoffs, in one batch, also where prefixes are shared."""

import json
from pathlib import Path
from typing import Any

import pytest
from vllm.exceptions import VLLMValidationError

from tests.support.models import routed_checkpoint
from vllm_mod.checkpoint import read_mod_config

from .harness import Answer, assert_equals_reference, counter, engine, poison_free_pages, random_prompts

LAYERS = [0, 2, 3, 5, 7]
WINDOW = 40
#: kept ratio -> cutoffs of random routers, whose scores are of that order
TABLE = {0.75: [-2.0, -2.0, -1.0, -2.0, -1.0], 0.25: [1.0, 2.0, 1.0, 2.0, 1.0]}


def _calibrated(base: Path, directory: Path, granularity: str) -> Path:
    routed_checkpoint(base, directory, granularity, LAYERS, window=WINDOW)
    points = [{"target": kept, "kept": kept, "cutoff": cutoff} for kept, cutoff in TABLE.items()]
    (directory / "calibration.json").write_text(json.dumps({"operating_points": points}))
    return directory


@pytest.fixture(scope="module")
def checkpoint(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _calibrated(base, tmp_path_factory.mktemp("dial") / "c", "attn_sequence")


def _generate(llm: Any, prompts: list[list[int]], dials: list[dict[str, Any] | None], tokens: int = 12) -> list[Any]:
    from vllm import SamplingParams

    params = [
        SamplingParams(temperature=0, max_tokens=tokens, logprobs=0, ignore_eos=True, extra_args=dial) for dial in dials
    ]
    return llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)


@pytest.mark.parametrize("granularity", ["attn_sequence", "block_sequence", "mlp_sequence"])
def test_each_request_its_own(base: Path, tmp_path: Path, granularity: str) -> None:
    """Dense, all skipped, by the table and by the checkpoint, from the same prompts; the answer says what was kept."""
    checkpoint = _calibrated(base, tmp_path / "c", granularity)
    dials: list[dict[str, Any] | None] = [
        None, {"mod_threshold": 0}, {"mod_threshold": 1}, {"mod_threshold": 0.7}, {"mod_kept": 0.75},
        {"mod_kept": 0.25},
    ]  # fmt: skip
    shared = random_prompts((70,))[0]
    prompts = [p for p in [*random_prompts((5, 100), seed=3), [*shared, 9], [*shared, 10, 11]] for _ in dials]
    asked = dials * 4
    config = read_mod_config(checkpoint)
    configs = {
        "None": config,
        "{'mod_threshold': 0}": config.with_threshold(0.0),
        "{'mod_threshold': 1}": config.with_threshold(1.0),
        "{'mod_threshold': 0.7}": config.with_threshold(0.7),
        "{'mod_kept': 0.75}": config.with_cutoff(TABLE[0.75]),
        "{'mod_kept': 0.25}": config.with_cutoff(TABLE[0.25]),
    }
    with engine(checkpoint, max_num_batched_tokens=64) as llm:
        poison_free_pages(llm)
        for _ in range(2):
            outputs = _generate(llm, prompts, asked)
            for dial in map(str, dials):
                mine = [i for i, a in enumerate(asked) if str(a) == dial]
                decisions = assert_equals_reference(
                    checkpoint, [prompts[i] for i in mine], [Answer.of(outputs[i]) for i in mine], configs[dial]
                )
                for i, decision in zip(mine, decisions, strict=True):
                    said = outputs[i].kv_transfer_params["mod"]
                    keep = [bool(decision[layer]) for layer in LAYERS]
                    assert said["skipped_layers"] == [x for x, k in zip(LAYERS, keep, strict=True) if not k]
                    assert said["kept_ratio"] == sum(keep) / len(keep)
                    assert said.get("dial", {}).get("by") == (None if dial == "None" else "request")
        assert counter(llm, "vllm:prefix_cache_hits") > 0
        assert counter(llm, "vllm:mod_dial") == 2 * 4 * 5


def test_several_answers_to_one_prompt(checkpoint: Path) -> None:
    from vllm import SamplingParams

    with engine(checkpoint) as llm:
        params = SamplingParams(n=3, temperature=1.0, seed=0, max_tokens=8, extra_args={"mod_threshold": 1})
        (output,) = llm.generate([{"prompt_token_ids": random_prompts((60,))[0]}], params, use_tqdm=False)
    assert len(output.outputs) == 3
    assert output.kv_transfer_params["mod"]["kept_ratio"] == 0


@pytest.mark.parametrize(
    ("dial", "message"),
    [
        ({"mod_threshold": 1.5}, "'mod_threshold': a number from 0 to 1 is needed"),
        ({"mod_threshold": "half"}, "'mod_threshold': a number from 0 to 1"),
        ({"mod_kept": 0.1}, "'mod_kept': kept ratio 0.1 is not in the calibrated table"),
        ({"mod_kept": 0.5, "mod_threshold": 0.5}, "say the same thing twice"),
        ({"mod_keep": 0.5}, "'mod_keep' is unknown"),
    ],
)
def test_bad_dials_are_refused(checkpoint: Path, dial: dict[str, Any], message: str, shared_engine: Any) -> None:
    with pytest.raises(VLLMValidationError, match=message):  # HTTP 400
        _generate(shared_engine, [[7, 8, 9]], [dial])
    (fine,) = _generate(shared_engine, [[7, 8, 9]], [{"mod_threshold": 0.5}])  # nothing else is disturbed
    assert len(fine.outputs[0].token_ids) == 12


@pytest.fixture(scope="module")
def shared_engine(checkpoint: Path) -> Any:
    with engine(checkpoint) as llm:
        yield llm
