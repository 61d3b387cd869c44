"""The tokenizer is the one that serving uses, or the reason why not is said at once."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path

import pytest

from router_tuning.cli import main
from router_tuning.encode import Encoder
from router_tuning.tokenizer import load_tokenizer
from tests.support.models import edit_json
from tests.unit.training.helpers import make_tokenizer
from vllm_mod.config import ConfigError

ROW = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}


def tekken(path: Path) -> None:
    """A small one of Mistral's own format: one token per byte."""
    vocab = [{"rank": n, "token_bytes": base64.b64encode(bytes([n])).decode(), "token_str": None} for n in range(256)]
    config = {"pattern": r"[^\s]+|\s+", "num_vocab_tokens": 256, "default_vocab_size": 1256,
              "default_num_special_tokens": 1000, "version": "v3"}  # fmt: skip
    path.write_text(json.dumps({"config": config, "vocab": vocab}))


@pytest.fixture
def mistral(base_dir, tmp_path) -> Path:
    """A Mistral as it is published: its own tokenizer beside that of Hugging Face."""
    shutil.copytree(base_dir, tmp_path / "mistral")
    edit_json(tmp_path / "mistral/config.json", architectures=["MistralForCausalLM"], model_type="mistral")
    tekken(tmp_path / "mistral/tekken.json")
    return tmp_path / "mistral"


def test_mistrals_own_tokenizer_is_passed_over(mistral):
    pytest.importorskip("mistral_common")
    from transformers import AutoTokenizer

    assert type(AutoTokenizer.from_pretrained(mistral)).__name__ == "MistralCommonBackend"  # takes no chat template
    tokenizer = load_tokenizer(mistral)
    assert tokenizer.chat_template == make_tokenizer().chat_template
    ids, supervised, *_ = Encoder(tokenizer)(ROW)
    assert tokenizer.decode(ids) == "<|user|>Hi<|assistant|>Yo<eos>" and sum(supervised) == 3


def test_it_is_the_one_that_vllm_takes(mistral):
    get_tokenizer = pytest.importorskip("vllm.tokenizers.registry").get_tokenizer
    served, ours = get_tokenizer(str(mistral)), load_tokenizer(mistral)
    assert served.get_vocab() == ours.get_vocab() and served.chat_template == ours.chat_template


def test_a_tokenizer_that_cannot_be_read_is_told_before_the_data(base_dir, data_file, tmp_path, monkeypatch, capsys):
    shutil.copytree(base_dir, tmp_path / "base")
    (tmp_path / "base/tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="base: its tokenizer cannot be read: ") as error:
        load_tokenizer(tmp_path / "base")
    assert "\n" not in str(error.value)
    for command in (["train", "--model"], ["export", "--drop-attention", "1", "--model"]):
        more = ["--data", str(data_file), "--output", str(tmp_path / "out")]
        assert main([*command, str(tmp_path / "base"), *more]) == 2
        assert "its tokenizer cannot be read" in capsys.readouterr().err


def test_a_tokenizer_without_templates_is_told(base_dir, monkeypatch):
    class MistralCommonBackend:
        pass

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_, **__: MistralCommonBackend())
    with pytest.raises(ConfigError, match=r"needs a tokenizer\.json; MistralCommonBackend takes no chat template"):
        load_tokenizer(base_dir)
