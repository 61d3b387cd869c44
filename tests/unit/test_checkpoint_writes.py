"""Checkpoints that are not written: what is wrong is said, and all is as it was."""

import errno
import json
import os
import resource
import shutil

import pytest
import torch

from tests.support.models import edit_json
from tests.unit.checkpoints import mod_config, one_line, routers, tree
from vllm_mod import checkpoint
from vllm_mod.architectures import ARCHITECTURES
from vllm_mod.checkpoint import (
    INDEX_FILE,
    WEIGHTS_FILE,
    write_checkpoint,
    write_routers,
)
from vllm_mod.config import ConfigError


@pytest.fixture
def full(bare_base, tmp_path):
    return write_checkpoint(bare_base, tmp_path / "full", mod_config(target_capacity=0.5), routers())


class TestRefusedWrites:
    """A write that fails says why in one line, and leaves the directory as it was."""

    def refused(self, tmp_path, base, config=None, weights=None, output="out"):
        before = tree(tmp_path)
        with pytest.raises(ConfigError) as error:
            write_checkpoint(base, tmp_path / output, config or mod_config(), routers() if weights is None else weights)
        assert tree(tmp_path) == before
        return one_line(error)

    def test_no_base(self, tmp_path):
        assert "base/config.json: no such file" in self.refused(tmp_path, tmp_path / "base")

    def test_unsupported_architecture(self, tmp_path, bare_base):
        edit_json(bare_base / "config.json", architectures=["GPT2LMHeadModel"])
        message = self.refused(tmp_path, bare_base)
        assert f"'GPT2LMHeadModel' is not supported; supported: {', '.join(ARCHITECTURES)}" in message

    def test_not_a_decoder(self, tmp_path, bare_base):
        edit_json(bare_base / "config.json", hidden_size=None)
        assert "key 'hidden_size' is missing" in self.refused(tmp_path, bare_base)

    def test_no_safetensors(self, tmp_path, bare_base):
        (bare_base / WEIGHTS_FILE).unlink()
        assert "only safetensors weights are read" in self.refused(tmp_path, bare_base)

    def test_unreadable_weights(self, tmp_path, bare_base):
        (bare_base / WEIGHTS_FILE).write_bytes(b"not safetensors")
        assert f"{WEIGHTS_FILE}: not a readable safetensors file" in self.refused(tmp_path, bare_base)

    def test_a_shard_is_missing(self, tmp_path, bare_base):
        (bare_base / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": "model-00001.safetensors"}}))
        assert "model-00001.safetensors is listed, and is not in" in self.refused(tmp_path, bare_base)

    def test_an_index_without_a_map(self, tmp_path, bare_base):
        (bare_base / INDEX_FILE).write_text("{}")
        assert f"{INDEX_FILE}: key 'weight_map' is missing" in self.refused(tmp_path, bare_base)

    def test_layer_out_of_range(self, tmp_path, bare_base):
        message = self.refused(tmp_path, bare_base, mod_config(layers=[2, 6]), routers([2, 6]))
        assert "layer 6 is out of range, the model has layers 0 to 5" in message

    def test_routers_of_another_base(self, tmp_path, bare_base):
        wide = {i: torch.zeros(1, 16) for i in (2, 4)}
        message = self.refused(tmp_path, bare_base, weights=wide)
        assert "model.layers.2.router.weight has shape [1, 16], this model needs [1, 8]" in message
        assert "another base model" in message

    @pytest.mark.parametrize("existing", ["file", "directory"])
    def test_existing_output_is_not_overwritten(self, tmp_path, bare_base, existing):
        if existing == "file":
            (tmp_path / "out").write_text("precious")
        else:
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "precious").write_text("")
        assert "out: exists already" in self.refused(tmp_path, bare_base)

    def test_an_empty_directory_may_be_there(self, tmp_path, bare_base):
        (tmp_path / "out").mkdir()
        assert write_checkpoint(bare_base, tmp_path / "out", mod_config(), routers()).is_dir()

    def test_the_parent_is_a_file(self, tmp_path, bare_base):
        (tmp_path / "file").write_text("")
        assert "cannot be written" in self.refused(tmp_path, bare_base, output="file/out")

    @pytest.mark.parametrize("step", ["save_file", "link_or_copy", "write_json"])
    def test_full_disk(self, tmp_path, bare_base, monkeypatch, step):
        def full_disk(*_, **__):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(checkpoint, step, full_disk)
        message = self.refused(tmp_path, bare_base)
        assert "out: cannot be written: " in message
        assert "No space left on device; nothing was left behind" in message

    def test_full_disk_after_a_failed_link(self, tmp_path, bare_base, monkeypatch):
        def full_disk(*_, **__):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "link", full_disk)
        monkeypatch.setattr(shutil, "copyfile", full_disk)
        assert "No space left on device" in self.refused(tmp_path, bare_base)

    def test_a_file_really_cannot_grow(self, tmp_path):
        """The kernel refuses the write half-way, as a full disk does."""
        wide = {i: torch.zeros(1, 1 << 16) for i in (2, 4)}
        before, limits = tree(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
        try:
            with pytest.raises(ConfigError) as error:
                write_routers(tmp_path / "out", mod_config(), wide)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert "out: cannot be written" in one_line(error)
        assert tree(tmp_path) == before

    def test_interrupted(self, tmp_path, bare_base, monkeypatch):
        def interrupt(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr(checkpoint, "save_file", interrupt)
        before = tree(tmp_path)
        with pytest.raises(KeyboardInterrupt):
            write_checkpoint(bare_base, tmp_path / "out", mod_config(), routers())
        assert tree(tmp_path) == before
