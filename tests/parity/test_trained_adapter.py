"""What `router-tuning train --lora-r` writes, merged and as an adapter: vLLM answers the same from both."""

import json
from pathlib import Path

import pytest

from tests.support.architectures import DENSE, EXPERTS
from tests.support.models import tiny_model

from .harness import Answer, assert_equals_reference, assert_same, engine, generate, random_prompts

LAYERS = [2, 4, 5]
SHAPES = DENSE | EXPERTS


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    rows = [{"prompt": f"{a} + {b} =", "completion": str(a + b)} for a in range(12) for b in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def train(base: Path, data: Path, output: Path, granularity: str, form: str) -> Path:
    from router_tuning.cli import main

    flags = ["--model", str(base), "--data", str(data), "--output", str(output), "--granularity", granularity]
    flags += ["--layers", *map(str, LAYERS), "--max-steps", "8", "--max-length", "64", "--use-cpu", "true"]
    flags += ["--lora-r", "4", "--lora-learning-rate", "3e-3", "--lora-output", form, "--disable-tqdm", "true"]
    assert main(["train", *flags]) == 0
    return output


def generate_with(llm: object, adapter: Path, prompts: list[list[int]], max_tokens: int) -> list[Answer]:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    outputs = llm.generate(  # type: ignore[attr-defined]
        [{"prompt_token_ids": p} for p in prompts],
        SamplingParams(temperature=0, max_tokens=max_tokens, logprobs=0, ignore_eos=True),
        lora_request=LoRARequest("a", 1, str(adapter)),
        use_tqdm=False,
    )
    return [Answer.of(output) for output in outputs]


CASES = [("llama", granularity) for granularity in ("attn_sequence", "attn_token", "mlp_token")]
#: Fused linears, outputs that are multiplied or normed before they are added, experts.
NIGHTLY = [(model, "attn_sequence") for model in ("phi3", "granite", "gemma2", "gemma3_text", "qwen3_moe", "mixtral")]


@pytest.mark.parametrize(
    ("model", "granularity"), [*CASES, *(pytest.param(*case, marks=pytest.mark.nightly) for case in NIGHTLY)]
)
def test_merged_and_adapter_are_served_the_same(data: Path, tmp_path: Path, model: str, granularity: str) -> None:
    base = tiny_model(tmp_path / "base", model, **SHAPES.get(model, {}))
    merged = train(base, data, tmp_path / "merged", granularity, "merged")
    unmerged = train(base, data, tmp_path / "unmerged", granularity, "adapter")
    prompts = random_prompts((3, 40, 17, 70, 33, 90), seed=4)
    # Thresholds in the middle of the trained scores, so that about half is kept, whatever eight steps taught.
    mod = {"threshold": middle(merged, prompts)}
    with engine(merged, mod=mod) as llm:
        from_merged = generate(llm, prompts, 12)
    # One more slot than adapters: see test_lora.
    with engine(unmerged, mod=mod, enable_lora=True, max_lora_rank=8, max_loras=2) as llm:
        from_adapter = generate_with(llm, unmerged / "adapter", prompts, 12)
        without = generate(llm, prompts, 12)
    assert_same(from_merged, from_adapter)
    assert [a.tokens for a in without] != [a.tokens for a in from_adapter]
    config = thresholds(merged, mod["threshold"])
    for checkpoint in (merged, unmerged):
        decisions = assert_equals_reference(checkpoint, prompts, from_adapter, config)
        keeps = [bool(k) for d in decisions for keep in d.values() for k in keep.flatten()]
        assert 0.1 < sum(keeps) / len(keeps) < 0.9


def thresholds(checkpoint: Path, values: list[float]):  # type: ignore[no-untyped-def]
    from vllm_mod.checkpoint import read_mod_config
    from vllm_mod.config import ModConfig

    return ModConfig.parse(read_mod_config(checkpoint).model_dump() | {"threshold": values}, "test")


def middle(checkpoint: Path, prompts: list[list[int]]) -> list[float]:
    """One threshold per layer, far from every score of the prompts: in the widest gap of the middle of its range."""
    import torch

    from router_tuning.model import load_reference, reference_logits, reference_scores

    model = load_reference(checkpoint)
    scores: dict[int, list[torch.Tensor]] = {layer: [] for layer in LAYERS}
    for prompt in prompts:
        reference_logits(model, prompt, len(prompt))
        for layer, score in reference_scores(model).items():
            scores[layer].append(score.flatten())
    values = []
    for layer in LAYERS:
        ordered = torch.cat(scores[layer]).double().sort().values
        inner = ordered[len(ordered) // 3 : 2 * len(ordered) // 3 + 1]
        gap = int((inner[1:] - inner[:-1]).argmax())
        values.append(float(torch.sigmoid((inner[gap] + inner[gap + 1]) / 2)))
    return values
