"""A LoRA adapter on the base's linears, beside requests without one: each like its merged model."""

from pathlib import Path

import pytest
import torch

from tests.support.models import routed_checkpoint

from .harness import Answer, assert_equals_reference, engine, random_prompts

LAYERS = [1, 2, 4, 5, 6]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A random adapter that changes the model, and the base with it merged."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = tmp_path_factory.mktemp("lora")
    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data.mul_(0.3)
    model.save_pretrained(directory / "adapter")
    model.merge_and_unload().save_pretrained(directory / "merged")
    AutoTokenizer.from_pretrained(base).save_pretrained(directory / "merged")
    return directory / "adapter", directory / "merged"


@pytest.mark.parametrize(
    "granularity", ["attn_sequence", "attn_token", "mlp_sequence", "mlp_token", "block_sequence", "block_token"]
)
def test_mixed_batch(base: Path, adapter: tuple[Path, Path], tmp_path: Path, granularity: str) -> None:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    checkpoint = routed_checkpoint(base, tmp_path / "plain", granularity, LAYERS)
    merged = routed_checkpoint(adapter[1], tmp_path / "merged", granularity, LAYERS)
    prompts = random_prompts((3, 40, 17, 70, 33, 90), seed=4)
    request = LoRARequest("a", 1, str(adapter[0]))
    # Two slots for one adapter: vLLM 0.32's CPU kernels give rows without an adapter (index -1) the last slot's,
    # stock models included; an empty last slot is zero.
    with engine(checkpoint, enable_lora=True, max_lora_rank=8, max_loras=2) as llm:
        outputs = llm.generate(
            [{"prompt_token_ids": p} for p in prompts],
            SamplingParams(temperature=0, max_tokens=12, logprobs=0, ignore_eos=True),
            lora_request=[request if i % 2 else None for i in range(len(prompts))],
            use_tqdm=False,
        )
    answers = []
    for output in outputs:
        tokens = list(output.outputs[0].token_ids)
        answers.append(Answer(tokens, [s[t].logprob for s, t in zip(output.outputs[0].logprobs, tokens, strict=True)]))
    with_adapter = assert_equals_reference(merged, prompts[1::2], answers[1::2])
    without = assert_equals_reference(checkpoint, prompts[::2], answers[::2])
    assert any(not d[i].all() for d in with_adapter for i in LAYERS)
    assert any(not d[i].all() for d in without for i in LAYERS)
