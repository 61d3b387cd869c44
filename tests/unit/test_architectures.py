"""The table of architectures in vLLM: classes, what is refused for them, and the scores of single experts."""

import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.support.architectures import DENSE, EXPERTS
from tests.support.models import edit_json, routed_checkpoint, tiny_model
from vllm_mod import engine, expert_adapters, models
from vllm_mod.architectures import ARCHITECTURES, Architecture, BaseShape, architecture_of
from vllm_mod.checkpoint import check_routers, read_json, router_name
from vllm_mod.config import ConfigError, ModConfig, default_layers
from vllm_mod.gate import pair_scores, token_scores
from vllm_mod.sublayers import _norms_all_heads

ROOT = Path(__file__).parents[2]
DEEPSEEK = {"n_routed_experts": 8, "num_experts_per_tok": 3, "first_k_dense_replace": 2}


@pytest.mark.parametrize("row", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_a_row_of_the_table_is_a_class(row: Architecture) -> None:
    made = getattr(models, row.routed)
    assert made is getattr(models, row.routed)
    assert issubclass(made, models.MoDModel) and row.base in {c.__name__ for c in made.__mro__}
    assert architecture_of(row.base) is architecture_of(row.routed) is row


def test_other_architectures_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"'GPT2LMHeadModel' is not supported; supported: .*LlamaForCausalLM"):
        architecture_of("GPT2LMHeadModel")


def test_other_names_are_unknown() -> None:
    with pytest.raises(AttributeError, match="GPT2MoDForCausalLM"):
        models.GPT2MoDForCausalLM  # noqa: B018


@pytest.mark.parametrize(
    ("part", "message"),
    [("self_attn", "decoder layer Layer has no sub-module 'mlp'"), (None, "no decoder layers at model.layers")],
)
def test_an_architecture_of_another_kind_is_refused_by_name(part: str | None, message: str) -> None:
    class Layer(nn.Module):
        pass

    class Other(models.MoDModel):
        def __init__(self) -> None:
            nn.Module.__init__(self)

    model = Other()
    model.mod_config = ModConfig.parse({"version": 1, "granularity": "mlp_token", "layers": [0]}, "test")
    model.mod_row = ARCHITECTURES["LlamaForCausalLM"]
    if part is not None:
        layer = Layer()
        setattr(layer, part, nn.Identity())
        model.model = nn.Module()
        model.model.layers = nn.ModuleList([layer])
    with pytest.raises(ConfigError, match=f"Other: .*{message}"):
        model._layers_to_change()


def test_contributing_shows_the_real_diff_of_an_architecture() -> None:
    """It is applied: without its new lines no code knows this architecture, with them the files are what they are."""
    part = (ROOT / "CONTRIBUTING.md").read_text().split("<!-- architectures")[1].split("<!-- /architectures")[0]
    diff = part.split("```diff\n")[1].split("```")[0]
    assert len(diff.splitlines()) < 30
    before: dict[Path, str] = {}
    for hunk in diff.split("--- a/")[1:]:
        name, new_name, *lines = hunk.splitlines()
        assert new_name == f"+++ b/{name}"
        new = "".join(f"{line[1:]}\n" for line in lines if line[0] != "-")
        old = "".join(f"{line[1:]}\n" for line in lines if line[0] != "+")
        text = before.get(ROOT / name) or (ROOT / name).read_text()
        assert text.count(new) == 1, name
        without = text.replace(new, old)
        assert without.replace(old, new) == text
        before[ROOT / name] = without
    known = {"__name__": "vllm_mod.architectures", "__package__": "vllm_mod"}
    exec(before[ROOT / "vllm_mod/architectures.py"], known)
    added = ARCHITECTURES.keys() - known["ARCHITECTURES"].keys()  # type: ignore[attr-defined]
    assert len(added) == 1
    name = added.pop().removesuffix("ForCausalLM")
    code = (path for folder in ("vllm_mod", "training") for path in (ROOT / folder).rglob("*.py"))
    assert not [path for path in code if name in before.get(path, path.read_text())]
    assert f'"{name.lower()}"' not in before[ROOT / "tests/support/architectures.py"]


def _row(model_type: str) -> Architecture:
    names = {name.lower().replace("_", ""): row for name, row in ARCHITECTURES.items()}
    return names[f"{model_type.removesuffix('_text').replace('_', '')}forcausallm"]


def test_each_architecture_has_a_shape_in_the_tests() -> None:
    """So that all parity and training tests run on it."""
    assert {_row(name).base for name in DENSE | EXPERTS} == ARCHITECTURES.keys() - {"LlamaForCausalLM"}
    assert {_row(name).base for name in EXPERTS} == {name for name, row in ARCHITECTURES.items() if row.experts}


def shape(architecture: str, **config: Any) -> BaseShape:
    return BaseShape.of({"num_hidden_layers": 6, "hidden_size": 4, **config}, "config.json", architecture)


def test_shapes_of_models_with_experts() -> None:
    assert shape("LlamaForCausalLM", num_experts=8) == BaseShape("LlamaForCausalLM", 6, 4, None)
    assert shape("OlmoeForCausalLM", num_experts=8) == BaseShape("OlmoeForCausalLM", 6, 4, 8)
    assert shape("MixtralMoDForCausalLM", num_local_experts=8).num_experts == 8
    deepseek = functools.partial(shape, "DeepseekForCausalLM")
    assert deepseek(n_routed_experts=None, first_k_dense_replace=1) == BaseShape("DeepseekForCausalLM", 6, 4, None)
    assert deepseek(n_routed_experts=8, first_k_dense_replace=2).dense_layers == (0, 1)
    assert deepseek(n_routed_experts=8, moe_layer_freq=2).dense_layers == (1, 3, 5)
    assert not set(default_layers(6)) & set(deepseek(**DEEPSEEK).dense_layers)
    qwen = functools.partial(shape, "Qwen3MoeForCausalLM", num_experts=8)
    assert qwen().dense_layers == qwen(mlp_only_layers=None, decoder_sparse_step=1).dense_layers == ()
    assert qwen(mlp_only_layers=[0, 5]).dense_layers == (0, 5)
    assert qwen(mlp_only_layers=[1], decoder_sparse_step=2).dense_layers == (0, 1, 2, 4)
    for name in ("OlmoeForCausalLM", "MixtralForCausalLM", "Qwen3MoeForCausalLM", "DeepseekForCausalLM"):
        with pytest.raises(ConfigError, match=r"config\.json: key '(num|n)_.*experts' is missing"):
            shape(name)


def _loaded(model_type: str) -> Any:
    from transformers import AutoConfig

    from vllm_mod.deepseek import register_config

    register_config()
    fields = {"num_hidden_layers": 6, "architectures": [_row(model_type).routed], **EXPERTS[model_type]}
    return AutoConfig.for_model(model_type, **fields)


@pytest.mark.parametrize("name", EXPERTS)
def test_a_file_and_a_loaded_config_name_the_same_experts(tmp_path: Path, name: str) -> None:
    """transformers writes some keys under other names than the published files have."""
    loaded, fields = _loaded(name), {"num_hidden_layers": 6, **EXPERTS[name]}
    loaded.save_pretrained(tmp_path)
    for config in (fields, loaded.to_dict(), read_json(tmp_path / "config.json")):
        found = BaseShape.of({"hidden_size": 4, **config}, "config.json", _row(name).base)
        assert (found.num_experts, found.dense_layers) == (8, (0,) if name in ("qwen3_moe", "deepseek") else ())


@pytest.mark.parametrize("name", EXPERTS)
def test_guards_see_the_experts_of_a_loaded_config(name: str) -> None:
    """A loaded config of Qwen3-MoE's names them otherwise than its file."""
    loaded = _loaded(name)
    parallel = SimpleNamespace(
        decode_context_parallel_size=1, prefill_context_parallel_size=1, enable_dbo=False, data_parallel_size=2
    )
    vllm_config: Any = SimpleNamespace(
        model_config=SimpleNamespace(hf_text_config=loaded, model="m", hf_config=loaded),
        parallel_config=parallel,
        speculative_config=None,
        kv_transfer_config=None,
        cache_config=SimpleNamespace(kv_offloading_size=None, kv_sharing_fast_prefill=False),
        lora_config=object(),
    )
    assert expert_adapters.experts_without_adapters(vllm_config)
    mod = ModConfig.parse({"version": 1, "granularity": "mlp_token", "layers": [2]}, "test")
    with pytest.raises(ConfigError, match="of a model with experts cannot be served data-parallel"):
        engine.refuse_what_cannot_work(vllm_config, mod)


def test_what_is_added_to_the_residual_stream() -> None:
    assert shape("GraniteForCausalLM", residual_multiplier=0.25).residual_multiplier == 0.25
    assert shape("GraniteForCausalLM").residual_multiplier == 1.0  # as in transformers
    assert shape("LlamaForCausalLM", residual_multiplier=0.25).residual_multiplier == 1.0


@pytest.mark.parametrize(
    ("config", "layers", "rows", "message"),
    [
        ({"n_routed_experts": None}, [2], 1, "needs experts, and this model is dense"),
        (DEEPSEEK, [1, 2], 8, r"layers \[1\] of this model have one dense MLP \(8 experts in the others\)"),
        (DEEPSEEK, [2], 1, r"shape \[1, 4\], this model needs \[8, 4\], a gate for each of its 8 experts"),
        (DEEPSEEK, [2], 64, r"shape \[64, 4\], this model needs \[8, 4\]"),
    ],
)
def test_expert_routers_that_do_not_fit(config: dict[str, Any], layers: list[int], rows: int, message: str) -> None:
    mod = ModConfig.parse({"version": 1, "granularity": "expert_token", "layers": layers}, "test")
    routers = {router_name(i): torch.zeros(rows, 4) for i in layers}
    with pytest.raises(ConfigError, match=message):
        check_routers(routers, mod, shape("DeepseekForCausalLM", **config), "routers")


def test_pair_scores_are_those_of_each_experts_gate() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(7, 64, generator=generator).bfloat16(), torch.randn(5, 64, generator=generator)
    experts = torch.randint(5, (7, 3), generator=generator, dtype=torch.int32)
    scores = pair_scores(x, weight, experts)
    assert scores.shape == (7, 3) and scores.dtype == torch.float32
    for t in range(7):
        assert torch.equal(scores[t], pair_scores(x[t : t + 1], weight, experts[t : t + 1])[0])
        for k in range(3):
            assert scores[t, k] == token_scores(x[t], weight[experts[t, k]][None])


@pytest.mark.parametrize(("norm", "expected"), [(None, False), (32, False), (4 * 32, True)])
def test_attentions_whose_ranks_exchange_rows(norm: int | None, expected: bool) -> None:
    """Those with a norm over all heads (OLMoE), not over each (Qwen3)."""
    module = nn.Module()
    if norm is not None:
        module.q_norm = nn.RMSNorm(norm)
    attention: Any = SimpleNamespace(head_size=32)
    assert _norms_all_heads(module, attention) == expected


def _settings(checkpoint: Path, **options: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(model=str(checkpoint), **{"max_model_len": 256, **options}).create_engine_config()


@pytest.mark.parametrize("granularity", ["attn_token", "block_token", "attn_sequence", "mlp_token"])
def test_a_window_and_packed_kv(tmp_path: Path, granularity: str) -> None:
    """Packed KV has lost the true positions that a window counts, unless the window sees everything."""
    base = tiny_model(tmp_path / "base", "mistral", num_hidden_layers=4, sliding_window=64)
    checkpoint = routed_checkpoint(base, tmp_path / "c", granularity, [1, 2])
    if granularity not in ("attn_token", "block_token"):
        _settings(checkpoint)
        return
    with pytest.raises(ValueError, match=r"layers \[1, 2\] have a window of 64 tokens, less than max_model_len 256"):
        _settings(checkpoint)
    _settings(checkpoint, max_model_len=64)


def test_adapters_leave_routed_experts_out(tmp_path: Path) -> None:
    """vLLM has no kernel for them on the CPU, and would start with one for CUDA."""
    base = tiny_model(tmp_path / "base", "deepseek", num_hidden_layers=4, head_dim=None, **DEEPSEEK)
    checkpoint = routed_checkpoint(base, tmp_path / "c", "expert_token", [2, 3])
    targets = _settings(checkpoint, enable_lora=True).lora_config.target_modules
    assert {"q_proj", "down_proj", "gate"} < set(targets) and "experts" not in targets
    asked = _settings(checkpoint, enable_lora=True, lora_target_modules=["o_proj"]).lora_config.target_modules
    assert asked == ["o_proj"]
    for name in ("experts", "experts.3.up_proj"):
        with pytest.raises(ValueError, match="no kernel for LoRA adapters on routed experts; pass --lora-target-modul"):
            _settings(checkpoint, enable_lora=True, lora_target_modules=["o_proj", name])


def test_adapters_of_a_dense_model_are_as_in_stock_vllm(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", "qwen3", num_hidden_layers=4)
    checkpoint = routed_checkpoint(base, tmp_path / "c", "mlp_token", [1, 2])
    assert _settings(checkpoint, enable_lora=True).lora_config.target_modules is None


def test_deepseek_checkpoints_load_without_their_own_code(tmp_path: Path) -> None:
    """As published: rotary settings of transformers 4, and `auto_map`, whose code is not run."""
    from router_tuning.model import load_base

    base = tiny_model(tmp_path / "base", "deepseek", num_hidden_layers=4, head_dim=None, **DEEPSEEK)
    names = load_file(base / "model.safetensors")
    assert {"model.layers.2.mlp.experts.7.up_proj.weight", "model.layers.2.mlp.gate.weight"} <= set(names)
    edit_json(
        base / "config.json",
        architectures=["DeepseekForCausalLM"],
        auto_map={"AutoConfig": "configuration_deepseek.DeepseekConfig"},
        rope_parameters=None,
        rope_theta=20000.0,
        head_dim=None,
    )
    checkpoint = routed_checkpoint(base, tmp_path / "c", "expert_token", [2, 3])
    config = _settings(checkpoint).model_config.hf_config
    assert type(config).__name__ == "DeepseekConfig" and config.n_routed_experts == 8
    assert config.rope_parameters["rope_theta"] == 20000.0
    assert type(load_base(checkpoint, torch.float32)).__name__ == "DeepseekForCausalLM"
