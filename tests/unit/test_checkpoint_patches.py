"""Patches in checkpoint directories: written, read back, and refused where they do not fit."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.unit.checkpoints import PATCHED, SHAPE, assert_equal, mod_config, one_line, patches, routers, tree
from vllm_mod.checkpoint import (
    INDEX_FILE,
    ROUTERS_FILE,
    read_json,
    read_mod_config,
    read_patches,
    read_routers,
    write_checkpoint,
    write_routers,
)
from vllm_mod.config import ConfigError


@pytest.fixture
def full(bare_base, tmp_path):
    return write_checkpoint(bare_base, tmp_path / "full", mod_config(target_capacity=0.5), routers())


class TestPatches:
    @pytest.mark.parametrize("granularity", ["attn_sequence", "mlp_token", "block_static"])
    @pytest.mark.parametrize("rank", [0, 1, 3])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_they_come_back_as_written(self, bare_base, tmp_path, granularity, rank, dtype):
        config = mod_config(version=2, granularity=granularity, patch={"rank": rank})
        weights = {} if config.is_static else routers()
        full = write_checkpoint(bare_base, tmp_path / "full", config, weights, patches=patches(rank=rank, dtype=dtype))
        alone = write_routers(tmp_path / "routers", config, weights, patches(rank=rank, dtype=dtype))
        for directory in (full, alone):
            assert read_mod_config(directory) == config
            assert read_routers(directory, config, SHAPE).keys() == weights.keys()
            assert_equal(read_patches(directory, config, SHAPE), patches(rank=rank, dtype=dtype))

    def test_the_index_and_the_file_have_the_names_of_the_format(self, bare_base, tmp_path):
        config = mod_config(**PATCHED)
        full = write_checkpoint(bare_base, tmp_path / "full", config, routers(), patches=patches())
        names = {
            f"model.layers.{i}.router.{part}": shape
            for i in (2, 4)
            for part, shape in {
                "weight": [1, 8], "patch.bias": [8], "patch.down.weight": [3, 8], "patch.up.weight": [8, 3],
            }.items()
        }  # fmt: skip
        assert {n: list(t.shape) for n, t in load_file(full / ROUTERS_FILE).items()} == names
        files = read_json(full / INDEX_FILE)["weight_map"]
        assert {name for name, file in files.items() if file == ROUTERS_FILE} == set(names)

    def test_patches_of_an_earlier_export_are_left_out(self, bare_base, tmp_path):
        config = mod_config(**PATCHED)
        full = write_checkpoint(bare_base, tmp_path / "full", config, routers(), patches=patches())
        out = write_checkpoint(full, tmp_path / "out", mod_config(), routers())
        assert not [name for name in read_json(out / INDEX_FILE)["weight_map"] if "patch" in name]

    def test_a_config_without_patches_has_none(self, full):
        assert read_patches(full, mod_config(), SHAPE) == {}

    NAME = "model.layers.4.router.patch."

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (lambda t, n: t.pop(n + "bias"), "router tensor {n}bias is missing (1 in all)"),
            (lambda t, n: t.pop(n + "up.weight"), "router tensor {n}up.weight is missing (1 in all)"),
            (lambda t, n: t.pop(n + "down.weight"), "router tensor {n}down.weight is missing (1 in all)"),
            (lambda t, n: t.update({n + "scale": torch.ones(1)}), "{n}scale is no part of a patch of rank 3"),
            (lambda t, n: t.update({n.replace("4", "5") + "bias": torch.ones(8)}), "5.router.patch.bias belongs to no"),
            (lambda t, n: t.update({n + "bias": torch.ones(1, 8)}), "{n}bias has shape [1, 8], this model needs [8]"),
            (lambda t, n: t.update({n + "bias": torch.ones(9)}), "needs [8]; the routers belong to another base"),
            (
                lambda t, n: t.update({n + "down.weight": torch.ones(2, 8)}),
                "{n}down.weight has shape [2, 8], this model needs [3, 8]; key 'patch' says rank 3",
            ),
            (
                lambda t, n: t.update({n + "up.weight": torch.ones(8, 4)}),
                "{n}up.weight has shape [8, 4], this model needs [8, 3]; key 'patch' says rank 3",
            ),
            (lambda t, n: t.update({n + "bias": torch.ones(8).int()}), "{n}bias is torch.int32, a float type"),
            (lambda t, n: t[n + "up.weight"][0].fill_(torch.nan), "{n}up.weight has values that are not finite"),
            (lambda t, n: t[n + "bias"][3:].fill_(-torch.inf), "{n}bias has values that are not finite"),
        ],
    )
    @pytest.mark.parametrize("granularity", ["attn_sequence", "attn_static"])
    def test_bad_ones_name_file_and_tensor(self, bare_base, tmp_path, granularity, change, said):
        config = mod_config(granularity=granularity, **PATCHED)
        weights = {} if config.is_static else routers()
        out = write_checkpoint(bare_base, tmp_path / "out", config, weights, patches=patches())
        tensors = load_file(out / ROUTERS_FILE)
        change(tensors, self.NAME)
        save_file(tensors, out / ROUTERS_FILE)
        for read in (read_routers, read_patches):
            with pytest.raises(ConfigError) as error:
                read(out, read_mod_config(out), SHAPE)
            assert said.format(n=self.NAME) in one_line(error)
            assert str(out / ROUTERS_FILE) in str(error.value)

    def test_tensors_that_the_config_does_not_name(self, bare_base, tmp_path):
        out = write_checkpoint(bare_base, tmp_path / "out", mod_config(**PATCHED), routers(), patches=patches())
        for config, said in (
            (mod_config(), r"patch\.bias is part of a patch, and mod_config has no key 'patch'"),
            (mod_config(version=2, patch={"rank": 0}), r"down\.weight is no part of a patch of rank 0 \(key 'patch'\)"),
        ):
            with pytest.raises(ConfigError, match=said):
                read_routers(out, config, SHAPE)

    @pytest.mark.parametrize("given", [{}, patches(layers=[2]), patches(rank=2), patches(rank=0)])
    def test_a_write_that_lacks_them_is_refused(self, bare_base, tmp_path, given):
        before = tree(tmp_path)
        with pytest.raises(ConfigError, match=r"patch\.\w+(\.weight)? (is missing|has shape)"):
            write_checkpoint(bare_base, tmp_path / "out", mod_config(**PATCHED), routers(), patches=given)
        assert tree(tmp_path) == before
