"""Static drops: `router-tuning export --drop-attention N`, and a base whose config skips layers itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from router_tuning.cli import main
from router_tuning.drop import attention_similarity, most_similar, sublayer_similarity
from router_tuning.model import architecture_of_model, attach_routers, load_base
from tests.support.architectures import DENSE, EXPERTS
from tests.support.models import tiny_model
from tests.unit.training.helpers import make_llama
from vllm_mod.checkpoint import read_mod_config
from vllm_mod.config import ModConfig

SHAPES = DENSE | EXPERTS


def test_an_attention_that_adds_nothing_is_dropped_first() -> None:
    model = make_llama()
    model.model.layers[2].self_attn.o_proj.weight.data.zero_()
    similarity = attention_similarity(model, [[5, 9, 30, 8], [7, 7, 40]])
    assert similarity[2] == pytest.approx(1)
    assert most_similar(similarity, 1) == [2]


def test_similarity_is_the_mean_over_all_tokens() -> None:
    """Against hidden states that the stock model itself gives: layer 0 sees the embeddings."""
    model, samples = make_llama(), [[5, 9, 30, 8], [7, 7, 40]]
    cosines = []
    for sample in samples:
        ids = torch.tensor([sample])
        with torch.no_grad():
            x = model.model.embed_tokens(ids)
            layer = model.model.layers[0]
            rotary = model.model.rotary_emb(x, torch.arange(len(sample))[None])
            mask = torch.full((1, 1, len(sample), len(sample)), -torch.inf).triu(1)
            out = layer.self_attn(layer.input_layernorm(x), position_embeddings=rotary, attention_mask=mask)[0]
            cosines.append(torch.cosine_similarity(x, x + out, dim=-1).flatten())
    assert attention_similarity(model, samples)[0] == pytest.approx(float(torch.cat(cosines).mean()), abs=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("target", ["attn", "mlp", "block"])
@pytest.mark.parametrize("name", SHAPES)
def test_similarity_is_what_dropping_does(tmp_path: Path, name: str, target: str) -> None:
    """Each sublayer is really dropped, alone: without it the residual stream is there what it was before it."""
    base = tiny_model(tmp_path / "base", name, num_hidden_layers=4, **SHAPES[name])
    samples = [[5, 9, 30, 8, 77], [7, 7, 40]]
    norm = architecture_of_model(model := load_base(base, torch.float32).eval()).mlp_norm
    found = sublayer_similarity(model, samples, target)

    def streams(model: Any, layer: int) -> list[torch.Tensor]:
        """Behind the sublayer of that layer, per sample."""
        seen: list[torch.Tensor] = []
        if target == "attn":
            hook = getattr(model.model.layers[layer], norm).register_forward_pre_hook(
                lambda _, args: seen.append(args[0])
            )
        else:
            hook = model.model.layers[layer].register_forward_hook(lambda _, args, output: seen.append(output))
        for sample in samples:
            model(torch.tensor([sample]), use_cache=False)
        hook.remove()
        return seen

    for layer in range(4):
        dropped = load_base(base, torch.float32).eval()
        config = {"version": 1, "granularity": f"{target}_static", "layers": [layer]}
        attach_routers(dropped, ModConfig.parse(config, "test"))
        pairs = zip(streams(model, layer), streams(dropped, layer), strict=True)
        cosines = torch.cat([torch.cosine_similarity(x, y, dim=-1).flatten() for x, y in pairs])
        assert found[layer] == pytest.approx(float(cosines.mean()), abs=1e-5)
    assert max(found) - min(found) > 1e-3


def test_ties_go_to_the_earlier_layer() -> None:
    assert most_similar([0.5, 0.9, 0.9, 0.9], 2) == [1, 2]


def test_export(base_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "d.jsonl"
    data.write_text("\n".join(json.dumps({"text": "some words, " * 3}) for _ in range(4)))
    words = ["export", "--model", str(base_dir), "--output", str(tmp_path / "c"), "--drop-attention", "2"]
    assert main(words) == 2 and "--data" in capsys.readouterr().err
    assert main([*words, "--data", str(data), "--layers", "1"]) == 2
    assert main([*words[:-1], "9", "--data", str(data)]) == 2 and "layers can be dropped" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()
    assert main([*words, "--data", str(data)]) == 0
    config = read_mod_config(tmp_path / "c")
    assert config.granularity == "attn_static" and len(config.layers) == 2


@pytest.mark.parametrize(
    ("per_layer", "expected"),
    [
        ({"1": {"skip": ["attention"]}, "2": {"skip": ["self_attn"]}}, ("attn_static", (1, 2))),
        ({"2": {"skip": ["mlp"]}, "0": {"intermediate_size": 48}}, ("mlp_static", (2,))),
        ({"3": {"skip": ["mlp", "self_attn"]}}, ("block_static", (3,))),
        ({"1": {"skip": ["attention"]}, "2": {"skip": ["mlp"]}}, "different sublayers"),
        ({"1": {"skip": ["norm"]}}, "'norm'"),
        ({"1": {"skip": []}}, "--routers is missing"),
    ],
)
def test_skip_lists_of_the_base(
    base_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], per_layer: object, expected: object
) -> None:
    base = tmp_path / "base"
    shutil.copytree(base_dir, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"per_layer_config": per_layer}))
    code = main(["export", "--model", str(base), "--output", str(tmp_path / "c")])
    if isinstance(expected, str):
        assert code == 2 and expected in capsys.readouterr().err
    else:
        written = read_mod_config(tmp_path / "c")
        assert code == 0 and (written.granularity, written.layers) == expected
