"""An int8 base (compressed-tensors, W8A8) keeps its quantised linears; routers stay in float."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.models import edit_json, routed_checkpoint, tiny_llama, tiny_model

from .harness import LOGPROB_TOLERANCE, Answer, assert_same, engine, generate, random_prompts, runner_model
from .test_moe import SHAPES

LAYERS = {"llama": [1, 2, 4, 5, 6], "deepseek": [1, 2, 3]}
SCHEME = {"num_bits": 8, "type": "int", "symmetric": True}
LENGTHS = (5, 40, 90, 17)
DENSE = ["attn_sequence", "attn_token", "mlp_sequence", "mlp_token", "block_sequence", "block_token"]
#: Attention, shared experts and the dense MLP are quantised; vLLM's int8 kernel for routed experts needs AMX.
EXPERTS = ["expert_token", "attn_sequence", "mlp_token"]
WINDOWED = {"window": 24, "patch": {"rank": 4}}
CASES = [
    *(("llama", granularity, {}) for granularity in DENSE),
    *(("llama", granularity, WINDOWED) for granularity in ("attn_sequence", "block_sequence")),
    ("llama", "attn_token", {"patch": {"rank": 4}}),
    *(("deepseek", granularity, {}) for granularity in EXPERTS),
    ("deepseek", "mlp_sequence", WINDOWED),
]


def _quantise(path: Path) -> Path:
    """Per-channel int8 weights, per-token int8 activations, as llm-compressor writes them."""
    tensors = {}
    for name, weight in load_file(path / "model.safetensors").items():
        if not name.endswith("_proj.weight") or ".experts." in name:
            tensors[name] = weight
            continue
        scale = weight.abs().amax(1, keepdim=True) / 127
        tensors[name] = (weight / scale).round().to(torch.int8)
        tensors[name + "_scale"] = scale
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    group = {
        "targets": ["Linear"],
        "weights": SCHEME | {"strategy": "channel", "dynamic": False},
        "input_activations": SCHEME | {"strategy": "token", "dynamic": True},
    }
    ignore = ["lm_head", r"re:.*mlp\.gate$", r"re:.*\.experts\..*"]
    scheme = {"quant_method": "compressed-tensors", "format": "int-quantized", "ignore": ignore}
    edit_json(path / "config.json", quantization_config=scheme | {"config_groups": {"group_0": group}})
    return path


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("int8")
    tiny_llama(directory / "llama")
    tiny_model(directory / "deepseek", "deepseek", num_hidden_layers=5, **SHAPES["deepseek"])
    return {model: _quantise(directory / model) for model in LAYERS}


@pytest.fixture(scope="module")
def plain_answers(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Answer]]:
    """Of a stock base, or of a static drop of it."""
    made: dict[tuple[str, str, bool], list[Answer]] = {}

    def answers(model: str, name: str, patch: dict[str, int] | None = None) -> list[Answer]:
        key = model, name, patch is not None
        if key not in made:
            path = bases[model]
            if name != "stock":
                config = {} if patch is None else {"patch": patch}
                path = routed_checkpoint(path, tmp_path_factory.mktemp(name) / "c", name, LAYERS[model], **config)
            with engine(path) as llm:
                made[key] = generate(llm, random_prompts(LENGTHS), 12)
        return made[key]

    return answers


@pytest.mark.parametrize(("model", "granularity", "config"), CASES)
def test_quantised_base(
    bases: dict[str, Path],
    plain_answers: Callable[..., list[Answer]],
    tmp_path: Path,
    model: str,
    granularity: str,
    config: dict[str, Any],
) -> None:
    prompts = random_prompts(LENGTHS)
    routed = routed_checkpoint(bases[model], tmp_path / "routed", granularity, LAYERS[model], **config)
    answers = {}
    for name, mod in (("keep", {"force": "keep"}), ("skip", {"force": "skip"}), ("routed", {})):
        with engine(routed, mod) as llm:
            answers[name] = generate(llm, prompts, 12)
            if name == "routed":
                alone = [generate(llm, [p], 12)[0] for p in prompts]
                layer = runner_model(llm).model.layers[1]
                assert type(layer.self_attn.qkv_proj.quant_method).__name__ == "CompressedTensorsLinearMethod"
                assert layer.router.weight.dtype == torch.float32
    assert_same(plain_answers(model, "stock"), answers["keep"])
    # Otherwise shared experts, or a window's tokens, are left.
    if granularity != "expert_token" and "window" not in config:
        assert_same(plain_answers(model, granularity.split("_")[0] + "_static", config.get("patch")), answers["skip"])
    # Beside other rows a patch adds its products up in another order, and an activation may be rounded to the next of
    # 255 steps: seen on a CPU with AVX512.
    assert_same(answers["routed"], alone, 0.1 if "patch" in config else LOGPROB_TOLERANCE)
    assert answers["routed"] not in (answers["keep"], answers["skip"])
