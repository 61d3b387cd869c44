"""Checkpoint directories: what is written, what is read back, and how bad ones are refused."""

import errno
import json
import os
import shutil
import stat

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.models import edit_json
from tests.unit.checkpoints import SHAPE, mod_config, one_line, routers, tree
from vllm_mod.architectures import BaseShape
from vllm_mod.checkpoint import (
    INDEX_FILE,
    ROUTER_CONFIG_FILE,
    ROUTERS_FILE,
    WEIGHTS_FILE,
    load_router_tensors,
    read_json,
    read_mod_config,
    read_routers,
    router_name,
    write_checkpoint,
    write_mod_config,
    write_routers,
)
from vllm_mod.config import ConfigError


@pytest.fixture
def full(bare_base, tmp_path):
    return write_checkpoint(bare_base, tmp_path / "full", mod_config(target_capacity=0.5), routers())


class TestWrite:
    def test_a_full_checkpoint_is_the_base_plus_routers(self, bare_base, full):
        config = read_json(full / "config.json")
        base_config = read_json(bare_base / "config.json")
        assert config.pop("architectures") == ["LlamaMoDForCausalLM"]
        assert config.pop("mod_config") == mod_config(target_capacity=0.5).to_dict()
        base_config.pop("architectures")
        assert config == base_config
        assert (full / "tokenizer.json").read_text() == "{}"
        assert (full / WEIGHTS_FILE).samefile(bare_base / WEIGHTS_FILE)  # a hard link

    def test_the_index_lists_every_tensor_once(self, bare_base, full):
        index = read_json(full / INDEX_FILE)
        expected = dict.fromkeys(load_file(bare_base / WEIGHTS_FILE), WEIGHTS_FILE)
        expected |= dict.fromkeys(map(router_name, (2, 4)), ROUTERS_FILE)
        assert index["weight_map"] == expected
        assert index["metadata"]["total_size"] > 0

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_routers_come_back_as_written(self, bare_base, tmp_path, dtype):
        out = write_checkpoint(bare_base, tmp_path / "out", mod_config(), routers(dtype=dtype))
        config = read_mod_config(out)
        assert config == mod_config()
        back = read_routers(out, config, SHAPE)
        assert back.keys() == {2, 4}
        assert all(torch.equal(back[i], w) and back[i].dtype == dtype for i, w in routers(dtype=dtype).items())

    def test_layers_may_share_memory(self, tmp_path):
        one = torch.ones(3, 8)
        shared, views = dict.fromkeys((2, 4), one[:1]), {2: one[1:2], 4: one[:, :8].T.reshape(8, 3).T[2:]}
        for number, weights in enumerate((shared, views)):
            out = write_routers(tmp_path / str(number), mod_config(), weights)
            assert all(torch.equal(w, torch.ones(1, 8)) for w in read_routers(out, mod_config(), SHAPE).values())

    def test_router_only_directory(self, tmp_path):
        out = write_routers(tmp_path / "deep" / "routers", mod_config(threshold=[0.4, 0.6]), routers())
        assert tree(out) == [ROUTER_CONFIG_FILE, ROUTERS_FILE]
        assert read_mod_config(out).threshold == (0.4, 0.6)
        assert torch.equal(read_routers(out, read_mod_config(out), SHAPE)[4], routers()[4])

    def test_a_static_checkpoint_has_no_routers(self, bare_base, tmp_path):
        config = mod_config(granularity="attn_static")
        out = write_checkpoint(bare_base, tmp_path / "out", config, {})
        assert not (out / ROUTERS_FILE).exists()
        assert read_mod_config(out) == config
        assert read_routers(out, config, SHAPE) == {}

    def test_everybody_may_read_it(self, full):
        for path in [full, *full.iterdir()]:
            if path.name != WEIGHTS_FILE:  # as readable as the base's, whose file it is
                assert path.stat().st_mode & stat.S_IROTH

    def test_weights_are_copied_where_links_are_impossible(self, bare_base, tmp_path, monkeypatch):
        def no_link(*_):
            raise OSError(errno.EXDEV, "Invalid cross-device link")

        monkeypatch.setattr(os, "link", no_link)
        out = write_checkpoint(bare_base, tmp_path / "out", mod_config(), routers())
        assert (out / WEIGHTS_FILE).read_bytes() == (bare_base / WEIGHTS_FILE).read_bytes()
        assert not (out / WEIGHTS_FILE).samefile(bare_base / WEIGHTS_FILE)

    def test_hub_cache_links_are_followed(self, bare_base, tmp_path):
        blob = tmp_path / "blob"
        (bare_base / WEIGHTS_FILE).rename(blob)
        (bare_base / WEIGHTS_FILE).symlink_to(blob)
        out = write_checkpoint(bare_base, tmp_path / "out", mod_config(), routers())
        assert not (out / WEIGHTS_FILE).is_symlink()
        assert load_file(out / WEIGHTS_FILE)

    def test_other_weight_formats_are_left_out(self, bare_base, tmp_path):
        (bare_base / "pytorch_model.bin").write_bytes(b"pickle")
        out = write_checkpoint(bare_base, tmp_path / "out", mod_config(), routers())
        assert not (out / "pytorch_model.bin").exists()

    def test_a_sharded_base(self, bare_base, tmp_path):
        tensors = load_file(bare_base / WEIGHTS_FILE)
        (bare_base / WEIGHTS_FILE).unlink()
        names = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
        for file in set(names.values()):
            save_file({n: t for n, t in tensors.items() if names[n] == file}, bare_base / file)
        (bare_base / INDEX_FILE).write_text(json.dumps({"weight_map": names}))
        out = write_checkpoint(bare_base, tmp_path / "out", mod_config(), routers())
        assert read_json(out / INDEX_FILE)["weight_map"].items() > names.items()
        assert read_routers(out, mod_config(), SHAPE).keys() == {2, 4}

    def test_a_routed_checkpoint_can_be_a_base(self, full, tmp_path):
        out = write_checkpoint(full, tmp_path / "out", mod_config(layers=[3]), routers([3]))
        assert read_mod_config(out).layers == (3,)
        assert [n for n in read_json(out / INDEX_FILE)["weight_map"] if "router" in n] == [router_name(3)]
        assert read_routers(out, read_mod_config(out), SHAPE).keys() == {3}

    def test_keys_that_name_absent_files_are_not_carried(self, bare_base, tmp_path):
        edit_json(
            bare_base / "config.json",
            auto_map={"AutoModelForCausalLM": "modeling.Own"},
            transformers_weights="model.fp16.safetensors",
        )
        out = write_checkpoint(bare_base, tmp_path / "out", mod_config(), routers())
        assert not {"auto_map", "transformers_weights"} & set(read_json(out / "config.json"))

    def test_routers_among_the_bases_weights_are_left_behind(self, bare_base, tmp_path):
        """vLLM reads every tensor of a file, whatever the index says: old routers would take the place of the new."""
        tensors = load_file(bare_base / WEIGHTS_FILE)
        old = {router_name(i): torch.full((1, 8), 7.0) for i in (1, 2)}
        (bare_base / WEIGHTS_FILE).unlink()
        save_file(tensors | old, bare_base / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
        names = dict.fromkeys([*tensors, *old], "model-00001-of-00001.safetensors")
        (bare_base / INDEX_FILE).write_text(json.dumps({"weight_map": names}))
        out = write_checkpoint(bare_base, tmp_path / "out", mod_config(), routers())
        assert load_file(out / "model-00001-of-00001.safetensors").keys() == tensors.keys()
        assert torch.equal(read_routers(out, mod_config(), SHAPE)[2], routers()[2])
        assert old.keys() < load_file(bare_base / "model-00001-of-00001.safetensors").keys()  # the base is as it was
        static = write_checkpoint(bare_base, tmp_path / "static", mod_config(granularity="attn_static"), {})
        assert read_routers(static, read_mod_config(static), SHAPE) == {}

    def test_an_incomplete_adapter_is_not_half_written(self, bare_base, tmp_path):
        (tmp_path / "adapter").mkdir()
        (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
        with pytest.raises(ConfigError, match="adapter_model"):
            write_checkpoint(
                bare_base, tmp_path / "out", mod_config(), routers(), folders={"adapter": tmp_path / "adapter"}
            )
        assert not (tmp_path / "out").exists()


class TestRefusedReads:
    def test_no_mod_config(self, bare_base):
        with pytest.raises(ConfigError) as error:
            read_mod_config(bare_base)
        assert "config.json: key 'mod_config' is missing" in one_line(error)
        assert "router-tuning train" in str(error.value)

    @pytest.mark.parametrize("text", ["", "{", "[1]", "\xff"])
    def test_unreadable_config(self, full, text):
        (full / "config.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(ConfigError, match=r"config\.json: (cannot be read|a JSON object is needed)"):
            read_mod_config(full)

    def test_bad_keys_name_the_file(self, full):
        edit_json(full / "config.json", mod_config=mod_config().to_dict() | {"depth": 3})
        with pytest.raises(ConfigError, match=r"config\.json: mod_config: unknown key 'depth'"):
            read_mod_config(full)

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (lambda t: t.pop(router_name(4)), "router tensor model.layers.4.router.weight is missing (1 in all)"),
            (lambda t: t.clear(), "router tensor model.layers.2.router.weight is missing (2 in all)"),
            (lambda t: t.update({router_name(5): torch.zeros(1, 8)}), "model.layers.5.router.weight belongs to no"),
            (lambda t: t.update({"model.layers.2.gate": torch.zeros(1)}), "model.layers.2.gate belongs to no"),
            (lambda t: t.update({router_name(2): torch.zeros(8)}), "router.weight has shape [8], this model needs"),
            (lambda t: t.update({router_name(2): torch.zeros(2, 8)}), "router.weight has shape [2, 8], this model"),
            (lambda t: t.update({router_name(4): torch.zeros(1, 9)}), "[1, 9], this model needs [1, 8]; the routers"),
            (lambda t: t.update({router_name(4): torch.zeros(1, 8).long()}), "layers.4.router.weight is torch.int64"),
            (lambda t: t[router_name(4)].fill_(torch.nan), "layers.4.router.weight has values that are not finite"),
            (lambda t: t[router_name(2)][0, 3].fill_(torch.inf), "layers.2.router.weight has values that are not"),
        ],
    )
    def test_bad_routers_name_file_and_tensor(self, full, change, said):
        tensors = load_file(full / ROUTERS_FILE)
        change(tensors)
        save_file(tensors, full / ROUTERS_FILE)
        with pytest.raises(ConfigError) as error:
            read_routers(full, read_mod_config(full), SHAPE)
        assert said in one_line(error)
        assert str(full / ROUTERS_FILE) in str(error.value)

    def test_routers_with_a_static_config(self, full):
        with pytest.raises(ConfigError, match=r"model\.layers\.2\.router\.weight belongs to no routed layer"):
            read_routers(full, mod_config(granularity="mlp_static"), SHAPE)

    def test_a_base_with_fewer_layers(self, full):
        with pytest.raises(ConfigError, match="layer 4 is out of range, the model has layers 0 to 3"):
            read_routers(full, mod_config(), BaseShape("LlamaForCausalLM", 4, 8, None))

    def test_router_file_is_gone(self, full):
        (full / ROUTERS_FILE).unlink()
        with pytest.raises(ConfigError, match=r"model\.layers\.2\.router\.weight is missing \(2 in all\)"):
            read_routers(full, mod_config(), SHAPE)

    def test_empty_directory(self, tmp_path):
        with pytest.raises(ConfigError, match=f"^{tmp_path}: router tensor .* is missing"):
            read_routers(tmp_path, mod_config(), SHAPE)

    def test_truncated_router_file(self, full):
        content = (full / ROUTERS_FILE).read_bytes()
        (full / ROUTERS_FILE).write_bytes(content[:-8])
        with pytest.raises(ConfigError, match=f"{ROUTERS_FILE}: not a readable safetensors file"):
            read_routers(full, mod_config(), SHAPE)


class TestWhereRoutersLie:
    """vLLM reads all files that the index names; so do we."""

    def test_in_a_weight_shard(self, full):
        shard = full / "model-00002-of-00002.safetensors"
        save_file(load_file(full / ROUTERS_FILE) | {"model.layers.5.x": torch.ones(1)}, shard)
        (full / ROUTERS_FILE).unlink()
        names = read_json(full / INDEX_FILE)["weight_map"]
        names = {name: shard.name if ".router." in name else file for name, file in names.items()}
        edit_json(full / INDEX_FILE, weight_map=names | {"model.layers.5.x": shard.name})
        path, tensors = load_router_tensors(full)
        assert path == shard and tensors.keys() == set(map(router_name, (2, 4)))
        assert torch.equal(read_routers(full, mod_config(), SHAPE)[4], routers()[4])

    def test_spread_over_files_whatever_the_index_says_of_them(self, full):
        tensors, base = load_file(full / ROUTERS_FILE), load_file(full / WEIGHTS_FILE)
        (full / WEIGHTS_FILE).unlink()  # a hard link to the base's
        save_file(base | {router_name(2): tensors[router_name(2)]}, full / WEIGHTS_FILE)
        save_file({router_name(4): tensors[router_name(4)]}, full / ROUTERS_FILE)
        path, found = load_router_tensors(full)
        assert path == full and found.keys() == tensors.keys()

    def test_twice(self, full):
        tensors, base = load_file(full / ROUTERS_FILE), load_file(full / WEIGHTS_FILE)
        (full / WEIGHTS_FILE).unlink()
        save_file(base | tensors, full / WEIGHTS_FILE)
        with pytest.raises(
            ConfigError, match=rf"layers\.\d\.router\.weight lies in {WEIGHTS_FILE} and in {ROUTERS_FILE}"
        ):
            read_routers(full, mod_config(), SHAPE)

    def test_in_a_file_that_the_index_lacks(self, full):
        names = read_json(full / INDEX_FILE)["weight_map"]
        edit_json(full / INDEX_FILE, weight_map={n: f for n, f in names.items() if ".router." not in n})
        with pytest.raises(ConfigError, match=f"{INDEX_FILE}: does not list {ROUTERS_FILE}, so vLLM would not read it"):
            read_routers(full, mod_config(), SHAPE)

    def test_in_a_sharded_directory_of_the_reference_implementation(self, tmp_path):
        for i, w in routers().items():
            save_file({router_name(i): w}, tmp_path / f"model-{i}.safetensors")
        names = {router_name(i): f"model-{i}.safetensors" for i in routers()}
        (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": names}))
        (tmp_path / ROUTER_CONFIG_FILE).write_text(json.dumps(mod_config().to_dict()))
        assert read_routers(tmp_path, read_mod_config(tmp_path), SHAPE).keys() == {2, 4}

    def test_routers_are_no_base(self, bare_base, tmp_path):
        save_file({router_name(i): w for i, w in routers().items()}, bare_base / WEIGHTS_FILE)
        with pytest.raises(ConfigError, match="base: holds no weights of a base model"):
            write_checkpoint(bare_base, tmp_path / "out", mod_config(), routers())


def test_what_is_routed_is_said_in_one_place(full):
    """vLLM reads config.json: thresholds that are set in another file would change nothing."""
    (full / ROUTER_CONFIG_FILE).write_text(json.dumps(mod_config(threshold=0.9).to_dict()))
    for read in (read_mod_config, lambda d: write_mod_config(d, mod_config(threshold=0.3)), load_router_tensors):
        with pytest.raises(ConfigError, match=f"config.json and {ROUTER_CONFIG_FILE} both say what is routed; remove"):
            read(full)


def test_a_config_of_the_base_beside_routers_alone(tmp_path, bare_base):
    out = write_routers(tmp_path / "routers", mod_config(), routers())
    shutil.copy(bare_base / "config.json", out / "config.json")
    write_mod_config(out, mod_config(threshold=0.25))
    assert read_mod_config(out).threshold == 0.25
    assert read_json(out / "config.json") == read_json(bare_base / "config.json")


def test_expert_routers_have_a_row_per_expert(tmp_path):
    config, shape = mod_config(granularity="expert_token"), BaseShape("OlmoeForCausalLM", 6, 8, num_experts=4)
    out = write_routers(tmp_path / "out", config, {i: torch.zeros(4, 8) for i in (2, 4)})
    assert read_routers(out, config, shape)[2].shape == (4, 8)
    with pytest.raises(ConfigError, match=r"\[4, 8\], this model needs \[16, 8\], a gate for each of its 16 experts$"):
        read_routers(out, config, BaseShape("OlmoeForCausalLM", 6, 8, num_experts=16))


def test_router_only_file_of_the_reference_implementation(tmp_path):
    tensors = {router_name(i): w for i, w in routers().items()}
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    (tmp_path / ROUTER_CONFIG_FILE).write_text(json.dumps(mod_config().to_dict()))
    assert torch.equal(read_routers(tmp_path, read_mod_config(tmp_path), SHAPE)[2], routers()[2])


def test_routers_of_a_mixture_of_experts_are_not_ours(tmp_path):
    """Base models call their expert selection a router, too."""
    tensors = {router_name(2): torch.zeros(1, 8), "model.layers.2.mlp.router.weight": torch.zeros(4, 8)}
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    assert load_router_tensors(tmp_path)[1].keys() == {router_name(2)}


@pytest.mark.parametrize("alone", [False, True])
def test_a_config_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch, alone):
    path = tmp_path / (ROUTER_CONFIG_FILE if alone else "config.json")
    old = {"version": 1, "granularity": "attn_sequence", "layers": [1, 2], "threshold": 0.5}
    path.write_text(json.dumps(old if alone else {"mod_config": old, "x": 1}))
    (tmp_path / "linked.json").hardlink_to(path)
    before, new = path.read_text(), mod_config(layers=[1, 2], version=2, cutoff=[0.25, -40], window=7)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as context:
        context.setattr(os, "replace", fail)
        with pytest.raises(ConfigError, match="disk full; it is as it was"):
            write_mod_config(tmp_path, new)
    assert path.read_text() == before and len(list(tmp_path.iterdir())) == 2
    write_mod_config(tmp_path, new)
    assert read_mod_config(tmp_path) == new
    assert json.loads(path.read_text()) == (new.to_dict() if alone else {"mod_config": new.to_dict(), "x": 1})
    assert (tmp_path / "linked.json").read_text() == before


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' + "9" * 5000 + "}", "NaN"])
def test_json_beyond_what_python_reads(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json: (cannot be read|a JSON object is needed)") as error:
        read_json(tmp_path / "config.json")
    one_line(error)


# ---------------------------------------------------------------- patches
