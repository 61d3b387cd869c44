"""Small checkpoints of a base of six layers, and what is asked of them."""

import torch

from vllm_mod.architectures import BaseShape
from vllm_mod.config import ModConfig
from vllm_mod.tensors import Patch

SHAPE = BaseShape("LlamaForCausalLM", num_layers=6, hidden_size=8, num_experts=None)


def mod_config(**changes) -> ModConfig:
    return ModConfig.parse({"version": 1, "granularity": "attn_sequence", "layers": [2, 4]} | changes, "test")


def routers(layers=(2, 4), dtype=torch.float32):
    return {i: torch.arange(8, dtype=dtype).view(1, 8) + i for i in layers}


def tree(directory):
    """Every path below a directory: what a failed write must leave as it was."""
    return sorted(str(p.relative_to(directory)) for p in directory.rglob("*"))


def one_line(error) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


PATCHED = {"version": 2, "patch": {"rank": 3}}


def patches(layers=(2, 4), rank=3, dtype=torch.float32):
    def filled(*shape, by):
        return torch.arange(1, 1 + torch.Size(shape).numel(), dtype=dtype).view(shape) * by

    return {
        i: Patch(filled(8, by=i), *((filled(rank, 8, by=-i), filled(8, rank, by=0.5)) if rank else ())) for i in layers
    }


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for layer, patch in expected.items():
        for part in ("bias", "down", "up"):
            a, b = getattr(found[layer], part), getattr(patch, part)
            assert (a is None) == (b is None)
            assert a is None or (torch.equal(a, b) and a.dtype == b.dtype)
