"""An int8 base (compressed-tensors, W8A8) keeps its quantised linears; routers stay in float."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.models import edit_json, routed_checkpoint, tiny_llama

from .harness import assert_same, engine, generate, random_prompts, runner_model

LAYERS = [1, 2, 4, 5, 6]
SCHEME = {"num_bits": 8, "type": "int", "symmetric": True}


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Per-channel int8 weights, per-token int8 activations, as llm-compressor writes them."""
    path = tiny_llama(tmp_path_factory.mktemp("int8") / "llama")
    tensors = {}
    for name, weight in load_file(path / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
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
    scheme = {"quant_method": "compressed-tensors", "format": "int-quantized", "ignore": ["lm_head"]}
    edit_json(path / "config.json", quantization_config=scheme | {"config_groups": {"group_0": group}})
    return path


@pytest.mark.parametrize("granularity", ["attn_sequence", "attn_token", "mlp_token"])
def test_quantised_base(quantised: Path, tmp_path: Path, granularity: str) -> None:
    prompts = random_prompts((5, 40, 90, 17))
    routed = routed_checkpoint(quantised, tmp_path / "routed", granularity, LAYERS)
    static = routed_checkpoint(quantised, tmp_path / "static", granularity.split("_")[0] + "_static", LAYERS)
    answers = {}
    for name, path, mod in (
        ("stock", quantised, None),
        ("static", static, None),
        ("keep", routed, {"force": "keep"}),
        ("skip", routed, {"force": "skip"}),
        ("routed", routed, {}),
    ):
        with engine(path, mod) as llm:
            answers[name] = generate(llm, prompts, 12)
            if name == "routed":
                alone = [generate(llm, [p], 12)[0] for p in prompts]
                layer = runner_model(llm).model.layers[1]
                assert type(layer.self_attn.qkv_proj.quant_method).__name__ == "CompressedTensorsLinearMethod"
                assert layer.router.weight.dtype == torch.float32
    assert_same(answers["stock"], answers["keep"])
    assert_same(answers["static"], answers["skip"])
    assert_same(answers["routed"], alone)
    assert answers["routed"] not in (answers["stock"], answers["static"])
