"""A LoRA adapter on the base's linears, beside requests without one: each like its merged model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.models import routed_checkpoint, tiny_llama, tiny_model

from .harness import Answer, assert_equals_reference, engine, random_prompts, runner_model
from .test_moe import SHAPES

#: What the adapter changes; in models with experts all but those: there is no kernel for that on the CPU.
TARGETS = {
    "llama": "(q|k|v|o|gate|up|down)_proj",
    "olmoe": "(q|k|v|o)_proj",
    "deepseek": r"(q|k|v|o)_proj|mlp\.gate|shared_experts\.(gate|up|down)_proj|layers\.0\.mlp\.(gate|up|down)_proj",
}
LAYERS = {"llama": [1, 2, 4, 5, 6], "olmoe": [1, 2, 3], "deepseek": [1, 2, 3]}
DENSE = ["attn_sequence", "attn_token", "mlp_sequence", "mlp_token", "block_sequence", "block_token", "block_static"]
WINDOWED = {"window": 24, "patch": {"rank": 4}}
CASES: list[tuple[str, str, dict[str, Any]]] = [
    *(("llama", granularity, {}) for granularity in DENSE),
    *(("llama", granularity, WINDOWED) for granularity in ("attn_sequence", "block_sequence")),
    *(("olmoe", granularity, {}) for granularity in ("expert_token", "attn_token", "mlp_sequence", "mlp_static")),
    *(("deepseek", granularity, {}) for granularity in ("expert_token", "attn_sequence", "mlp_token", "block_token")),
    ("deepseek", "mlp_sequence", WINDOWED),
]
Adapter = tuple[Path, Path, Path]


def _make_adapter(directory: Path, model_type: str) -> Adapter:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = directory / "base"
    if model_type == "llama":
        tiny_llama(base)
    else:
        tiny_model(base, model_type, num_hidden_layers=5, **SHAPES[model_type])
    torch.manual_seed(0)
    config = LoraConfig(
        r=8, lora_alpha=16, target_modules=rf".*\.({TARGETS[model_type]})", init_lora_weights=False
    )  # fmt: skip
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data.mul_(0.3)
    model.save_pretrained(directory / "adapter")
    model.merge_and_unload().save_pretrained(directory / "merged")
    AutoTokenizer.from_pretrained(base).save_pretrained(directory / "merged")
    return base, directory / "adapter", directory / "merged"


@pytest.fixture(scope="module")
def adapter_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Adapter]:
    """Of a model type: the base, a random adapter that changes it, and the base with it merged."""
    made: dict[str, Adapter] = {}

    def make(model_type: str) -> Adapter:
        if model_type not in made:
            made[model_type] = _make_adapter(tmp_path_factory.mktemp(model_type), model_type)
        return made[model_type]

    return make


def _generate(llm: Any, prompts: list[list[int]], adapter: Path) -> list[Answer]:
    """Every other request with the adapter."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    request = LoRARequest("a", 1, str(adapter))
    outputs = llm.generate(
        [{"prompt_token_ids": p} for p in prompts],
        SamplingParams(temperature=0, max_tokens=12, logprobs=0, ignore_eos=True),
        lora_request=[request if i % 2 else None for i in range(len(prompts))],
        use_tqdm=False,
    )
    return [Answer.of(output) for output in outputs]


# Two slots for one adapter: vLLM 0.32's CPU kernels give rows without an adapter (index -1) the last slot's, stock
# models included; an empty last slot is zero.
OPTIONS = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 2}


@pytest.mark.parametrize(("model", "granularity", "config"), CASES)
def test_mixed_batch(
    adapter_of: Callable[[str], Adapter], tmp_path: Path, model: str, granularity: str, config: dict[str, Any]
) -> None:
    base, adapter, merged_base = adapter_of(model)
    layers = LAYERS[model]
    checkpoint = routed_checkpoint(base, tmp_path / "plain", granularity, layers, **config)
    merged = routed_checkpoint(merged_base, tmp_path / "merged", granularity, layers, **config)
    prompts = random_prompts((3, 40, 17, 70, 33, 90), seed=4)
    with engine(checkpoint, **OPTIONS) as llm:
        wrapped = [n for n, m in runner_model(llm).named_modules() if type(m).__name__.endswith("WithLoRA")]
        answers = _generate(llm, prompts, adapter)
    assert any(".self_attn.qkv_proj" in name for name in wrapped)
    assert not any(name.endswith(".experts") for name in wrapped)
    with_adapter = assert_equals_reference(merged, prompts[1::2], answers[1::2])
    without = assert_equals_reference(checkpoint, prompts[::2], answers[::2])
    for decisions in (with_adapter, without):
        assert granularity.endswith("static") or any(not d[i].all() for d in decisions for i in layers)


def test_an_adapter_on_routed_experts_is_refused(
    adapter_of: Callable[[str], Adapter], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By vLLM, which is told that there are none it could change; left out in silence, answers would be wrong."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    from vllm.lora.request import LoRARequest

    base, _, _ = adapter_of("deepseek")
    config = LoraConfig(r=8, target_modules=r".*\.experts\.\d\.up_proj", init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / "adapter")
    checkpoint = routed_checkpoint(base, tmp_path / "c", "expert_token", LAYERS["deepseek"])
    with engine(checkpoint, **OPTIONS) as llm, pytest.raises(ValueError, match=r"received \[.*experts\.0\.up_proj"):
        llm.llm_engine.add_lora(LoRARequest("a", 1, str(tmp_path / "adapter")))
