"""The plugin's hook: settings it makes, and what it refuses at start-up. No engine is started."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.models import edit_json, routed_checkpoint, tiny_llama, tiny_model
from vllm_mod.architectures import ARCHITECTURES
from vllm_mod.checkpoint import ROUTERS_FILE

LAYERS = [1, 2]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("engine") / "llama", num_hidden_layers=4)


def settings(checkpoint: Path, mod: dict[str, Any] | None = None, **options: Any) -> Any:
    """vLLM's whole configuration, as `vllm serve` makes it."""
    from vllm.engine.arg_utils import EngineArgs

    extra = {} if mod is None else {"additional_config": {"mod": mod}}
    return EngineArgs(model=str(checkpoint), max_model_len=512, **extra, **options).create_engine_config()


@pytest.mark.parametrize(
    ("granularity", "chunked", "cached"),
    [
        ("attn_sequence", False, False),
        ("mlp_sequence", False, False),
        ("attn_token", True, False),
        ("block_token", True, False),
        ("mlp_token", True, True),
    ],
)
def test_settings(base: Path, tmp_path: Path, granularity: str, chunked: bool, cached: bool) -> None:
    checkpoint = routed_checkpoint(base, tmp_path / "c", granularity, LAYERS)
    config = settings(
        checkpoint, max_num_batched_tokens=256, max_num_scheduled_tokens=128, long_prefill_token_threshold=32
    )
    assert config.scheduler_config.enable_chunked_prefill == chunked
    assert config.cache_config.enable_prefix_caching == cached
    scheduler = config.scheduler_config
    limits = scheduler.max_num_batched_tokens, scheduler.max_num_scheduled_tokens
    if granularity.endswith("sequence"):  # or a prompt that needs more steps than one would wait for ever
        assert min(limits) >= 512 and scheduler.long_prefill_token_threshold == 0
    else:
        assert limits == (256, 128) and scheduler.long_prefill_token_threshold == 32
    assert config.kv_transfer_config.kv_connector == "MoDConnector"


def test_chunks_of_a_decision_window(base: Path, tmp_path: Path) -> None:
    """Its decisions need no whole prompt: limits below a prompt's length stay as they are asked for."""
    asked = {"max_num_batched_tokens": 256, "max_num_scheduled_tokens": 128, "long_prefill_token_threshold": 32}
    config = settings(routed_checkpoint(base, tmp_path / "c", "attn_sequence", LAYERS, window=64), **asked)
    assert {key: getattr(config.scheduler_config, key) for key in asked} == asked


def test_log_names_layers_and_thresholds(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_mod import engine

    lines: list[str] = []
    monkeypatch.setattr(engine.logger, "info", lambda message, *args: lines.append(message % args))
    settings(routed_checkpoint(base, tmp_path / "c", "attn_sequence", LAYERS, threshold=[0.25, 0.75]))
    assert lines == [
        "attn_sequence: prefix caching off (a decision needs its whole prompt)",
        "attn_sequence: chunked prefill off (a decision needs its whole prompt)",
        "attn_sequence: 2 of 4 layers routed: 1, 2",
        "attn_sequence: kept where sigmoid(w . x) >= 0.25, 0.75",
    ]


def test_log_names_cutoffs(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_mod import engine

    lines: list[str] = []
    monkeypatch.setattr(engine.logger, "info", lambda message, *args: lines.append(message % args))
    checkpoint = routed_checkpoint(base, tmp_path / "c", "mlp_token", LAYERS, cutoff=[40.5, -2])
    settings(checkpoint)
    settings(checkpoint, {"threshold": 0.25})
    kept = [line for line in lines if "kept where" in line]
    assert kept == ["mlp_token: kept where w . x >= 40.5, -2", "mlp_token: kept where sigmoid(w . x) >= 0.25"]


@pytest.mark.parametrize("kind", ["longrope", "default"])
def test_rotary_factors_that_training_has_not_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """As Phi-3's files were published."""
    from transformers import AutoConfig

    from vllm_mod import engine

    factors = {"type": kind, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8} if kind == "longrope" else None
    shape = {"model_type": "phi3", "hidden_size": 64, "num_attention_heads": 4}
    lengths = {"max_position_embeddings": 1024, "original_max_position_embeddings": 256}
    (tmp_path / "config.json").write_text(json.dumps(shape | lengths | {"rope_scaling": factors}))
    loaded, lines = AutoConfig.from_pretrained(tmp_path), []
    monkeypatch.setattr(engine.logger, "warning", lambda message, *args: lines.append(message % args))
    for length in (256, 512):
        engine.warn_of_long_factors(SimpleNamespace(hf_text_config=loaded, max_model_len=length))
    assert [line.split(":")[0] for line in lines] == (["max_model_len 512"] if kind == "longrope" else [])
    assert all("more than 256 tokens" in line and "--max-model-len 256" in line for line in lines)


def test_static_needs_nothing(base: Path, tmp_path: Path) -> None:
    config = settings(routed_checkpoint(base, tmp_path / "c", "attn_static", LAYERS))
    assert config.kv_transfer_config is None
    assert config.cache_config.enable_prefix_caching


def test_registering_twice_changes_nothing() -> None:
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from vllm_mod import register

    register()
    before = {row.routed: MODELS_CONFIG_MAP[row.routed] for row in ARCHITECTURES.values()}
    register()
    assert before == {row.routed: MODELS_CONFIG_MAP[row.routed] for row in ARCHITECTURES.values()}
    assert {row.routed for row in ARCHITECTURES.values()} <= set(ModelRegistry.get_supported_archs())


HF_FORMAT = {"config_format": "hf", "load_format": "hf", "tokenizer_mode": "hf"}
PARAMS = {
    "dim": 64, "n_layers": 4, "head_dim": 32, "hidden_dim": 160, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-6,
    "vocab_size": 262, "rope_theta": 10000.0, "max_seq_len": 1024,
}  # fmt: skip


def published_by_mistral(directory: Path) -> Path:
    (directory / "params.json").write_text(json.dumps(PARAMS))
    shutil.copy(directory / "model.safetensors", directory / "consolidated.safetensors")
    return directory


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mistral") / "base"
    return published_by_mistral(tiny_model(path, "mistral", num_hidden_layers=4, sliding_window=None))


class TestMistralsOwnFormat:
    """Mistral publishes `params.json` + `consolidated*.safetensors` beside the HF files, and vLLM prefers those."""

    def test_a_checkpoint_of_such_a_base_is_served_routed(self, mistral: Path, tmp_path: Path) -> None:
        config = settings(routed_checkpoint(mistral, tmp_path / "c", "attn_sequence", LAYERS))
        assert config.model_config.architecture == "MistralMoDForCausalLM"
        assert config.model_config.hf_config.mod_config["layers"] == LAYERS

    def test_a_checkpoint_that_carries_them_is_refused(self, mistral: Path, tmp_path: Path) -> None:
        checkpoint = published_by_mistral(routed_checkpoint(mistral, tmp_path / "c", "attn_sequence", LAYERS))
        with pytest.raises(ValueError) as error:
            settings(checkpoint)
        words = (str(checkpoint), "as MistralForCausalLM, without its routers", "params.json", "remove them")
        for word in words:
            assert word in str(error.value)
        assert settings(checkpoint, **HF_FORMAT).model_config.architecture == "MistralMoDForCausalLM"
        for flag in HF_FORMAT:  # all three are needed
            with pytest.raises(ValueError, match="remove"):
                settings(checkpoint, **{name: value for name, value in HF_FORMAT.items() if name != flag})

    @pytest.mark.parametrize("name", ["consolidated.00.safetensors", "original/consolidated.safetensors"])
    def test_weights_alone_are_refused(self, base: Path, tmp_path: Path, name: str) -> None:
        """The config is read as ours then, and the weights are not."""
        checkpoint = routed_checkpoint(base, tmp_path / "c", "mlp_static", LAYERS)
        (checkpoint / name).parent.mkdir(exist_ok=True)
        shutil.copy(base / "model.safetensors", checkpoint / name)
        with pytest.raises(ValueError, match=rf"{name}: vLLM would read this file.*remove it"):
            settings(checkpoint)

    def test_stock_models_are_served_as_ever(self, mistral: Path, base: Path) -> None:
        assert settings(mistral).model_config.architecture == "MistralForCausalLM"
        assert settings(base).model_config.architecture == "LlamaForCausalLM"


@pytest.mark.parametrize("more", [{}, {"model_impl": "transformers"}])
def test_a_routed_checkpoint_is_not_served_as_its_base(base: Path, tmp_path: Path, more: dict[str, str]) -> None:
    checkpoint = routed_checkpoint(base, tmp_path / "c", "attn_sequence", LAYERS)
    with pytest.raises(ValueError, match=r"without its routers.*drop --hf-overrides"):
        settings(checkpoint, hf_overrides={"architectures": ["LlamaForCausalLM"]}, **more)


def test_routers_in_a_weight_shard_are_found(base: Path, tmp_path: Path) -> None:
    checkpoint = routed_checkpoint(base, tmp_path / "c", "attn_sequence", LAYERS)
    (checkpoint / ROUTERS_FILE).rename(checkpoint / "model-00002-of-00002.safetensors")
    index = checkpoint / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(ROUTERS_FILE, "model-00002-of-00002.safetensors"))
    assert settings(checkpoint).model_config.architecture == "LlamaMoDForCausalLM"


def _edit_routers(checkpoint: Path, change: Any) -> None:
    tensors = load_file(checkpoint / ROUTERS_FILE)
    change(tensors)
    (checkpoint / ROUTERS_FILE).unlink()
    save_file(tensors, checkpoint / ROUTERS_FILE)


NAME = "model.layers.2.router.weight"
DRAFT = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
CONNECTOR = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mod": {"treshold": 0.5}}, ["additional-config", "treshold", "threshold"]),
        ({"mod": {"threshold": 2}}, ["threshold", "0 (keep everything)"]),
        ({"mod": {"threshold": [0.5]}}, ["threshold", "1 numbers for 2 routed layers"]),
        ({"mod": {"force": "off"}}, ["force", "keep"]),
        ({"speculative_config": DRAFT}, ["attn_sequence", "speculative"]),
        ({"kv_transfer_config": CONNECTOR}, ["attn_sequence", "--kv-transfer-config"]),
        ({"kv_sharing_fast_prefill": True}, ["--kv-sharing-fast-prefill"]),
        ({"kv_offloading_size": 1.0}, ["attn_sequence", "--kv-offloading-size"]),
    ],
)
def test_refused_flags(base: Path, tmp_path: Path, options: dict[str, Any], words: list[str]) -> None:
    from vllm.config import KVTransferConfig

    if "kv_transfer_config" in options:
        options = {"kv_transfer_config": KVTransferConfig(**options["kv_transfer_config"])}
    checkpoint = routed_checkpoint(base, tmp_path / "c", "attn_sequence", LAYERS)
    with pytest.raises(ValueError) as error:
        settings(checkpoint, **options)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(NAME), [NAME, "is missing"]),
        (
            lambda t: t.update({"model.layers.3.router.weight": torch.zeros(1, 64)}),
            ["model.layers.3", "no routed layer"],
        ),
        (lambda t: t.update({NAME: torch.zeros(1, 32)}), [NAME, "[1, 32]", "[1, 64]", "another base model"]),
        (lambda t: t.update({NAME: torch.full((1, 64), torch.nan)}), [NAME, "not finite"]),
    ],
)
def test_refused_routers(base: Path, tmp_path: Path, change: Any, words: list[str]) -> None:
    checkpoint = routed_checkpoint(base, tmp_path / "c", "attn_sequence", LAYERS)
    _edit_routers(checkpoint, change)
    with pytest.raises(ValueError) as error:
        settings(checkpoint)
    for word in [ROUTERS_FILE, *words]:
        assert word in str(error.value)


def test_a_state_of_vllms_own_has_no_file_of_routers(base: Path, tmp_path: Path) -> None:
    checkpoint = routed_checkpoint(base, tmp_path / "c", "attn_sequence", LAYERS)
    (checkpoint / ROUTERS_FILE).unlink()
    settings(checkpoint, load_format="sharded_state")


@pytest.mark.parametrize(
    ("mod_config", "words"),
    [
        (None, ["mod_config", "missing"]),
        ({"version": 1, "granularity": "attn_sequence", "layers": [1, 4]}, ["layers", "4", "0 to 3"]),
        ({"version": 1, "granularity": "attn_sequence", "layers": [1, 2], "depth": 3}, ["unknown key 'depth'"]),
        ({"version": 1, "granularity": "expert_token", "layers": [1, 2]}, ["granularity", "dense"]),
    ],
)
def test_refused_config(base: Path, tmp_path: Path, mod_config: Any, words: list[str]) -> None:
    checkpoint = routed_checkpoint(base, tmp_path / "c", "attn_sequence", LAYERS)
    edit_json(checkpoint / "config.json", mod_config=mod_config)
    with pytest.raises(ValueError) as error:
        settings(checkpoint)
    for word in ["config.json", *words] if "depth" in str(mod_config) else words:
        assert word in str(error.value)
