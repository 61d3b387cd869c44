"""Which files of a directory are its model: an allow-list, plain names, and nothing that somebody else would act on."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from vllm_mod.checkpoint import load_router_tensors, write_checkpoint
from vllm_mod.config import ConfigError, ModConfig
from vllm_mod.files import (
    INDEX_FILE,
    WEIGHTS_FILE,
    mistral_files,
    model_files,
    open_weights,
    side_files,
    strangers,
    weight_map,
    without_strangers,
)

CONFIG = ModConfig.parse({"version": 1, "granularity": "attn_sequence", "layers": [2, 4]}, "test")
ROUTERS = {i: torch.ones(1, 8) for i in (2, 4)}
#: What a base model may need, and what lies beside such models on the hub.
CARRIED = [
    "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "spiece.model", "tokenizer.4.9.0.json", "chat_template.jinja",
    "additional_chat_templates/rag.jinja", "quantize_config.json", "hf_quant_config.json", "README.md", "LICENSE",
    "LICENSE.txt", "NOTICE", "USE_POLICY.md",
]  # fmt: skip
FOREIGN = [
    "params.json", "consolidated.00.pth", "consolidated-00001-of-00002.safetensors",
    "consolidated.safetensors.index.json", "original/consolidated.safetensors", "original/params.json",
    "original/tokenizer.model", "tekken.json", "tokenizer.model.v3", "adapter_config.json", "adapter_model.safetensors",
    "adapter_model.bin", "pytorch_model.bin", "model.fp16.safetensors", "model-q4.gguf", "onnx/model.onnx",
    "modeling_llama.py", "custom_generate/generate.py", "sentence_bert_config.json", "modules.json",
    "trainer_log.json", "calibration.json", "evaluation.json", "training_args.bin", "optimizer.pt", ".gitattributes",
    "mod_config.json", "notes.txt",
]  # fmt: skip


def fill(directory: Path, names: list[str]) -> None:
    for name in names:
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text("{}")


def tree(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


def shard(base: Path, names: dict[str, object]) -> None:
    """An index beside the weights of `base`, whatever it names."""
    (base / INDEX_FILE).write_text(json.dumps({"weight_map": names}))


def test_a_checkpoint_holds_what_is_listed_and_nothing_else(bare_base, tmp_path):
    fill(bare_base, [*CARRIED, *FOREIGN])
    out = write_checkpoint(bare_base, tmp_path / "out", CONFIG, ROUTERS)
    ours = {"config.json", "tokenizer.json", WEIGHTS_FILE, INDEX_FILE, "routers.safetensors"}
    assert tree(out) == ours | set(CARRIED)
    assert strangers(out) == {}


def test_only_the_weight_files_that_the_index_names_are_carried(bare_base, tmp_path):
    tensors = load_file(bare_base / WEIGHTS_FILE)
    save_file(tensors, bare_base / "model-00001-of-00001.safetensors")
    save_file(tensors, bare_base / "model-00002-of-00002.safetensors")  # of an earlier upload
    shard(bare_base, dict.fromkeys(tensors, "model-00001-of-00001.safetensors"))
    out = write_checkpoint(bare_base, tmp_path / "out", CONFIG, ROUTERS)
    assert {name for name in tree(out) if "model-" in name or name == WEIGHTS_FILE} == {
        "model-00001-of-00001.safetensors"
    }
    assert strangers(bare_base).keys() == {WEIGHTS_FILE}  # transformers would read that


def test_mistrals_tokenizer_is_taken_where_there_is_no_other(tmp_path):
    fill(tmp_path, ["config.json", "tekken.json"])
    assert side_files(tmp_path) == ["config.json", "tekken.json"]
    fill(tmp_path, ["tokenizer.json"])
    assert side_files(tmp_path) == ["config.json", "tokenizer.json"]


@pytest.mark.parametrize(
    "name",
    [
        "/etc/model.safetensors", "../other/model.safetensors", "sub/model.safetensors", "./model.safetensors", "..",
        ".", "", "a\\b.safetensors", "a\0.safetensors", "\ud800.safetensors", "a" * 300 + ".safetensors",
        "pytorch_model.bin", "config.json", 3, None, ["model.safetensors"], {}, True,
    ],
)  # fmt: skip
def test_a_shard_is_a_plain_file_name(bare_base, tmp_path, name):
    from router_tuning.lora import merge_into_base
    from router_tuning.model import load_base

    tensor = "model.layers.0.mlp.down_proj.weight"
    shard(bare_base, {tensor: name})
    for read in (
        weight_map,
        model_files,
        load_router_tensors,
        lambda base: write_checkpoint(base, tmp_path / "out", CONFIG, ROUTERS),
        lambda base: merge_into_base(base, tmp_path / "merged", {}, 1.0),
        lambda base: load_base(base, torch.float32),
    ):
        with pytest.raises(ConfigError) as error:
            read(bare_base)
        assert str(bare_base / INDEX_FILE) in str(error.value)
        assert repr(name) in str(error.value) and tensor in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists() and not (tmp_path / "merged").exists()


@given(name=st.text(min_size=1) | st.text(alphabet="./\\a~ ", min_size=1).map(lambda s: f"{s}.safetensors"))
def test_no_name_leads_out_of_the_directory(tmp_path_factory, name):
    directory = tmp_path_factory.mktemp("shards")
    shard(directory, {"x": name})
    try:
        (found,) = weight_map(directory, complete=False).values()
    except ConfigError:
        return
    assert (directory / found).resolve().parent == directory.resolve()


class TestHubCache:
    """`models--org--name/snapshots/COMMIT` holds links to `models--org--name/blobs`."""

    @pytest.fixture
    def snapshot(self, bare_base, tmp_path):
        model = tmp_path / "hub" / "models--org--name"
        (model / "blobs").mkdir(parents=True)
        snapshot = model / "snapshots" / "abc"
        snapshot.mkdir(parents=True)
        for path in bare_base.iterdir():
            path.rename(model / "blobs" / path.name)
            (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
        return snapshot

    def test_links_to_blobs_are_followed(self, snapshot, tmp_path):
        shard(snapshot, weight_map(snapshot))
        out = write_checkpoint(snapshot, tmp_path / "out", CONFIG, ROUTERS)
        assert not any(path.is_symlink() for path in out.rglob("*"))

    @pytest.mark.parametrize("sharded", [False, True])
    def test_links_elsewhere_are_not(self, snapshot, tmp_path, sharded):
        if sharded:
            shard(snapshot, weight_map(snapshot))
        (snapshot / WEIGHTS_FILE).rename(tmp_path / "private.safetensors")
        save_file({"x": torch.ones(1)}, tmp_path / "private.safetensors")
        (snapshot / WEIGHTS_FILE).symlink_to(tmp_path / "private.safetensors")
        with pytest.raises(ConfigError, match=rf"{WEIGHTS_FILE}: a link out of the hub's cache, to .*private"):
            write_checkpoint(snapshot, tmp_path / "out", CONFIG, ROUTERS)
        with pytest.raises(ConfigError, match="a link out of the hub's cache"), open_weights(snapshot / WEIGHTS_FILE):
            pass


def test_strangers_are_named_with_what_would_be_made_of_them(bare_base):
    assert strangers(bare_base) == {}
    fill(bare_base, FOREIGN)
    assert strangers(bare_base) == {
        "consolidated-00001-of-00002.safetensors": "vLLM would read it as a model in Mistral's own format",
        "original/consolidated.safetensors": "vLLM would read it as a model in Mistral's own format",
        "adapter_config.json": "transformers would attach this adapter, vLLM would not",
        "tekken.json": "transformers would take it for the tokenizer, vLLM would not",
    }
    assert mistral_files(bare_base) == list(strangers(bare_base))[:2]


def test_a_view_of_the_model_alone(bare_base):
    fill(bare_base, [*FOREIGN, "additional_chat_templates/rag.jinja"])
    with without_strangers(bare_base) as view:
        expected = {"config.json", "tokenizer.json", WEIGHTS_FILE, "additional_chat_templates/rag.jinja"}
        assert tree(view) == expected
        assert (view / "config.json").read_text() == (bare_base / "config.json").read_text()
    assert not view.exists() and (bare_base / WEIGHTS_FILE).is_file()


@pytest.mark.parametrize("name", ["routers.safetensors", "consolidated-00001-of-00001.safetensors"])
def test_weight_files_with_a_name_that_means_something_else(bare_base, tmp_path, name):
    tensors = load_file(bare_base / WEIGHTS_FILE)
    (bare_base / WEIGHTS_FILE).rename(bare_base / name)
    shard(bare_base, dict.fromkeys(tensors, name))
    with pytest.raises(ConfigError, match=f"{name}: a file of this name is for"):
        write_checkpoint(bare_base, tmp_path / "out", CONFIG, ROUTERS)
