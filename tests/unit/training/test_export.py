"""`router-tuning export`: routers from where they may lie, and nothing of a base that makes it another model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from router_tuning.cli import main
from router_tuning.model import load_base, load_reference, reference_logits
from router_tuning.records import read_arguments
from tests.support.models import edit_json, random_routers
from tests.unit.training.test_trainer import one_error, train
from vllm_mod.checkpoint import read_mod_config, router_name, write_checkpoint, write_routers
from vllm_mod.config import ModConfig
from vllm_mod.tensors import Patch

CONFIG = ModConfig.parse({"version": 1, "granularity": "attn_sequence", "layers": [1, 2]}, "test")
ROUTERS = random_routers(CONFIG, 32)
FLAGS = ["--granularity", "attn_sequence", "--layers", "1", "2"]
IDS = list(range(3, 12))


def export(base: Path, output: Path, *more: str) -> int:
    return main(["export", "--model", str(base), "--output", str(output), *more])


def logits(checkpoint: Path) -> torch.Tensor:
    return reference_logits(load_reference(checkpoint), IDS, 6)


@pytest.fixture
def base(base_dir, tmp_path) -> Path:
    return Path(shutil.copytree(base_dir, tmp_path / "base"))


@pytest.fixture
def expected(base_dir, tmp_path) -> torch.Tensor:
    write_routers(tmp_path / "plain", CONFIG, ROUTERS)
    assert export(base_dir, tmp_path / "right", "--routers", str(tmp_path / "plain")) == 0
    return logits(tmp_path / "right")


@pytest.fixture
def authors(tmp_path) -> Path:
    """Routers as the authors' code saves them: HF's names, and a config of its own beside them."""
    directory = tmp_path / "authors"
    directory.mkdir()
    save_file({router_name(i): w for i, w in ROUTERS.items()}, directory / "model.safetensors")
    config = {
        "architectures": ["LlamaMindSkipForCausalLM"],
        "model_type": "llama_mindskip",
        "granularity": "attn_sequence",
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("config", ["theirs", "the base's", "none"])
def test_routers_of_the_reference_implementation(base, authors, tmp_path, expected, capsys, config):
    if config == "the base's":
        shutil.copy(base / "config.json", authors / "config.json")
    elif config == "none":
        (authors / "config.json").unlink()
    assert export(base, tmp_path / "out", "--routers", str(authors), *FLAGS) == 0
    assert torch.equal(logits(tmp_path / "out"), expected)
    capsys.readouterr()
    assert export(base, tmp_path / "again", "--routers", str(authors)) == 2
    assert "no mod_config; say what the routers are for with --granularity, --layers" in one_error(capsys)


def test_routers_of_the_reference_implementation_in_shards(base, authors, tmp_path, expected):
    (authors / "model.safetensors").unlink()
    names = {}
    for number, (layer, weight) in enumerate(ROUTERS.items(), 1):
        names[router_name(layer)] = f"model-0000{number}-of-00002.safetensors"
        save_file({router_name(layer): weight}, authors / names[router_name(layer)])
    (authors / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert export(base, tmp_path / "out", "--routers", str(authors), *FLAGS) == 0
    assert torch.equal(logits(tmp_path / "out"), expected)


def test_a_model_saved_whole_with_its_routers_is_base_and_routers(base, tmp_path, expected):
    """As the authors' trainer saves it without `router_only`."""
    tensors = load_file(base / "model.safetensors") | {router_name(i): w for i, w in ROUTERS.items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    assert export(base, tmp_path / "out", "--routers", str(base), *FLAGS) == 0
    assert torch.equal(logits(tmp_path / "out"), expected)
    assert ".router." not in "".join(load_file(tmp_path / "out/model.safetensors"))


def test_flags_against_what_a_directory_says(base, tmp_path, capsys):
    write_routers(tmp_path / "routers", CONFIG, ROUTERS)
    assert export(base, tmp_path / "out", "--routers", str(tmp_path / "routers"), *FLAGS) == 2
    assert "says itself what it routes; drop --granularity" in one_error(capsys)


def test_of_an_adapter_its_own_files_are_taken(base, tmp_path, capsys):
    write_routers(tmp_path / "routers", CONFIG, ROUTERS)
    adapter = tmp_path / "routers" / "adapter"
    adapter.mkdir()
    for name in ("adapter_config.json", "adapter_model.bin", "optimizer.pt"):
        (adapter / name).write_text('{"r": 8}')
    assert export(base, tmp_path / "out", "--routers", str(tmp_path / "routers")) == 2
    assert "adapter: adapter_model.safetensors is missing; the routers were trained with" in one_error(capsys)
    save_file({"x": torch.ones(1)}, adapter / "adapter_model.safetensors")
    assert export(base, tmp_path / "out", "--routers", str(tmp_path / "routers")) == 0
    names = {path.name for path in (tmp_path / "out/adapter").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}


def test_a_base_with_strangers(base, tmp_path, expected, caplog):
    """The checkpoint is the one of the base alone, and what was left out is said."""
    write_routers(tmp_path / "routers", CONFIG, ROUTERS)
    (base / "params.json").write_text("{}")
    shutil.copy(base / "model.safetensors", base / "consolidated.safetensors")
    (base / "adapter_config.json").write_text("{}")
    assert export(base, tmp_path / "out", "--routers", str(tmp_path / "routers")) == 0
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in (tmp_path / "right").iterdir()}
    assert torch.equal(logits(tmp_path / "out"), expected)
    for name in ("consolidated.safetensors", "adapter_config.json"):
        assert f"{base / name} is left out" in caplog.text


class TestLoadingABase:
    """It is loaded as it would be served: without what transformers alone would act on."""

    def loaded(self, base: Path) -> torch.Tensor:
        with torch.no_grad():
            return load_base(base, torch.float32).eval()(torch.tensor([IDS])).logits

    @pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin"])
    def test_an_adapter_beside_it_is_not_attached(self, base, base_dir, caplog, weights):
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        dense = self.loaded(base_dir)
        settings = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
        get_peft_model(load_base(base_dir, torch.float32), settings).save_pretrained(base)
        if weights.endswith(".bin"):
            torch.save(load_file(base / "adapter_model.safetensors"), base / weights)
            (base / "adapter_model.safetensors").unlink()
        else:
            with torch.no_grad():  # this is what would happen
                attached = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)(torch.tensor([IDS])).logits
            assert not torch.allclose(attached, dense, atol=1e-2)
        caplog.clear()
        assert torch.equal(self.loaded(base), dense)
        assert f"{base}/adapter_config.json is left out: transformers would attach" in caplog.text

    def test_weights_that_the_index_does_not_name_are_not_read(self, base, base_dir, caplog):
        dense = self.loaded(base_dir)
        tensors = load_file(base / "model.safetensors")
        save_file(tensors, base / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
        save_file({n: t + 1 for n, t in tensors.items()}, base / "model.safetensors", metadata={"format": "pt"})
        torch.save({n: t + 2 for n, t in tensors.items()}, base / "pytorch_model.bin")
        names = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
        (base / "model.safetensors.index.json").write_text(json.dumps(names))
        assert torch.equal(self.loaded(base), dense)
        assert "model.safetensors is left out: transformers would read it, vLLM the files" in caplog.text

    def test_a_config_that_names_other_weights(self, base, base_dir):
        save_file({"x": torch.ones(1)}, base / "other.safetensors")
        edit_json(base / "config.json", transformers_weights="other.safetensors")
        assert torch.equal(self.loaded(base), self.loaded(base_dir))

    @pytest.mark.parametrize("known", [True, False])
    def test_code_beside_it_is_never_run(self, base, base_dir, tmp_path, capsys, monkeypatch, known):
        monkeypatch.setattr("builtins.input", lambda *_: "y")  # transformers would ask on a terminal
        (base / "modeling.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
        names = {"AutoConfig": "modeling.Own", "AutoModelForCausalLM": "modeling.Own"}
        edit_json(base / "config.json", auto_map=names, **({} if known else {"model_type": "own"}))
        if known:
            assert torch.equal(self.loaded(base), self.loaded(base_dir))
        else:
            with pytest.raises(ValueError, match="not a causal language model that transformers knows"):
                load_base(base, torch.float32)
        assert not (tmp_path / "ran").exists()

    def test_where_it_came_from_is_kept(self, base):
        model = load_base(base, torch.float32)
        assert model.name_or_path == model.config.name_or_path == str(base)

    def test_missing_and_broken_weights_are_named(self, base):
        """transformers would fill in random numbers."""
        tensors = load_file(base / "model.safetensors")
        lost = tensors.pop("model.layers.1.mlp.up_proj.weight")
        save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(
            ValueError, match=r"base: the weights lack model\.layers\.1\.mlp\.up_proj\.weight \(1 tensor"
        ):
            load_base(base, torch.float32)
        save_file(tensors | {"model.layers.1.mlp.up_proj.weight": lost[:2].contiguous()}, base / "model.safetensors")
        with pytest.raises(ValueError, match=r"up_proj\.weight has shape \[2, 32\], the config asks for \[48, 32\]"):
            load_base(base, torch.float32)
        (base / "model.safetensors").write_bytes(b"")
        with pytest.raises(ValueError, match="not a readable safetensors file"):
            load_base(base, torch.float32)


def test_a_base_that_cannot_be_written_is_refused_before_it_is_trained(base, data_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("router_tuning.run.load_base", lambda *_: pytest.fail("the model was loaded"))
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").rename(base / "consolidated-00001-of-00001.safetensors")
    for file, words in (
        ("consolidated-00001-of-00001.safetensors", "is for weights in Mistral's own format; rename it"),
        ("model-00001-of-00002.safetensors", "is listed, and is not in"),
        ("../base/model.safetensors", "only the plain name"),
    ):
        index = json.dumps({"weight_map": dict.fromkeys(tensors, file)})
        (base / "model.safetensors.index.json").write_text(index)
        assert train(base, data_file, tmp_path / "out") == 2
        assert words in one_error(capsys)


def test_the_config_read_is_the_one_that_was_written(base, authors, tmp_path):
    assert export(base, tmp_path / "out", "--routers", str(authors), *FLAGS) == 0
    assert read_mod_config(tmp_path / "out") == CONFIG.model_copy(update={"base_model": str(base)})


def test_routers_alone_are_what_is_shared(base_dir, tmp_path, expected, capsys):
    """Out of a full checkpoint, with what stands in for skipped sublayers and all that is told of them; and back."""
    config = ModConfig.parse(
        {"version": 2, "granularity": "attn_sequence", "layers": [1, 2], "window": 4, "patch": {"rank": 2},
         "cutoff": [0.25, -0.5], "base_model": "some/base"}, "test",
    )  # fmt: skip
    patches = {layer: Patch(torch.randn(32), torch.randn(2, 32), torch.randn(32, 2)) for layer in (1, 2)}
    arguments = {"seed": 3, "learning_rate": 0.1, "per_device_train_batch_size": 1, "data": ["x"], "eval_fraction": 0.1}
    records = {"train_command.txt": "router-tuning train --data mine\n", "training_args.json": json.dumps(arguments)}
    write_checkpoint(base_dir, tmp_path / "full", config, ROUTERS, records, patches=patches)
    alone = ["--routers", str(tmp_path / "full"), "--without-base"]
    assert export(base_dir, tmp_path / "alone", *alone) == 0
    assert {path.name for path in (tmp_path / "alone").iterdir()} == {
        "README.md", "mod_config.json", "routers.safetensors", "train_command.txt", "training_args.json",
    }  # fmt: skip
    assert (tmp_path / "alone/train_command.txt").read_text() == records["train_command.txt"]
    assert read_mod_config(tmp_path / "alone") == config
    assert export(base_dir, tmp_path / "joined", "--routers", str(tmp_path / "alone")) == 0
    assert "router-tuning export" in (tmp_path / "joined/train_command.txt").read_text()
    trained = read_arguments(tmp_path / "joined")
    assert trained is not None and (trained.data, trained.eval_fraction) == (["x"], 0.1)
    assert torch.equal(logits(tmp_path / "joined"), logits(tmp_path / "full"))
    assert not torch.equal(logits(tmp_path / "joined"), expected)
    capsys.readouterr()
    assert export(base_dir, tmp_path / "alone", *alone) == 2
    assert str(tmp_path / "alone") in one_error(capsys)


def test_a_static_drop_is_shared_without_its_base_too(base_dir, tmp_path):
    static = ["--granularity", "attn_static", "--layers", "1"]
    assert export(base_dir, tmp_path / "alone", *static, "--without-base") == 0
    assert export(base_dir, tmp_path / "joined", "--routers", str(tmp_path / "alone")) == 0
    assert export(base_dir, tmp_path / "full", *static) == 0
    assert torch.equal(logits(tmp_path / "joined"), logits(tmp_path / "full"))
