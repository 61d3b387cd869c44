"""A model that loads as vLLM's do, with routers and patches, and the tensors it is loaded with."""

import json
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vllm.model_executor.model_loader.reload import (
    record_metadata_for_reloading,
)
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from vllm_mod.architectures import BaseShape
from vllm_mod.calibration import read_calibration
from vllm_mod.checkpoint import write_checkpoint
from vllm_mod.config import ModConfig
from vllm_mod.knobs import EngineKnobs
from vllm_mod.loading import RoutedWeights
from vllm_mod.patch import Patch as ServedPatch
from vllm_mod.plan import Plan
from vllm_mod.step import Router
from vllm_mod.tensors import Patch, named_tensors

HIDDEN, NUMBER = 8, 6  #: of `bare_base`
LAYERS = [2, 4]
RANK = 2


def patch_of(number: float) -> Patch:
    """Its tensors are full of numbers of their own."""
    down, up = torch.full((RANK, HIDDEN), number + 0.2), torch.full((HIDDEN, RANK), number + 0.3)
    return Patch(torch.full((HIDDEN,), number + 0.1), down, up)


ROUTERS = named_tensors(
    {layer: torch.full((1, HIDDEN), float(layer)) for layer in LAYERS}, {layer: patch_of(layer) for layer in LAYERS}
)
BIASED = 1  #: the layer whose MLP has a bias
BASE = {f"model.layers.{i}.mlp.down_proj.weight": torch.full((HIDDEN, HIDDEN), 10.0 + i) for i in range(NUMBER)}
BASE[f"model.layers.{BIASED}.mlp.down_proj.bias"] = torch.full((HIDDEN,), 9.0)


class Stock(nn.Module):
    """As vLLM's models load: parameter by parameter, as the tensors come."""

    def __init__(self, here: Iterable[int]) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(nn.Module() for _ in range(NUMBER))
        for index in here:
            layer: Any = self.model.layers[index]
            layer.mlp = nn.Module()
            layer.mlp.down_proj = nn.Linear(HIDDEN, HIDDEN, bias=index == BIASED)
            if index in LAYERS:
                layer.router = Router(HIDDEN, 1, ServedPatch(HIDDEN, RANK, torch.float32))

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        parameters, loaded = dict(self.named_parameters()), set()
        for name, tensor in weights:
            if name in parameters:
                loader: Any = getattr(parameters[name], "weight_loader", default_weight_loader)
                loader(parameters[name], tensor)
                loaded.add(name)
        return loaded


class Model(RoutedWeights, Stock):
    def __init__(self, directory: Path, config: ModConfig, here: Iterable[int], mod: dict[str, Any]) -> None:
        super().__init__(here)
        self.mod_config = config
        hf = json.loads((directory / "config.json").read_text())
        self.model_config = SimpleNamespace(
            model=str(directory), revision=None, dtype=torch.float32, hf_text_config=SimpleNamespace(to_dict=lambda: hf)
        )
        knobs = EngineKnobs.from_additional_config({"mod": mod})
        plan = Plan(config, knobs, BaseShape.of(hf, "test"), read_calibration(directory, config))
        self.expect_weights(SimpleNamespace(model_config=self.model_config), plan)  # type: ignore[arg-type]
        record_metadata_for_reloading(self)

    @property
    def values(self) -> dict[str, float]:
        """One number stands for a tensor, all of whose elements are equal here."""
        state = self.state_dict()
        assert all((tensor == tensor.flatten()[0]).all() for tensor in state.values())
        return numbers(state)


def numbers(tensors: dict[str, Tensor], more: float = 0) -> dict[str, Any]:
    return {name: pytest.approx(float(tensor.flatten()[0]) + more, abs=1e-4) for name, tensor in tensors.items()}


CONFIG = ModConfig.parse(
    {"version": 2, "granularity": "attn_sequence", "layers": LAYERS, "window": 4, "patch": {"rank": RANK}}, "test"
)
ALL = BASE | ROUTERS
START, NEW = numbers(ALL), numbers(ALL, 100)


def checkpoint(base: Path, output: Path, **changes: Any) -> Path:
    config = ModConfig.parse(CONFIG.to_dict() | changes, "test")
    routers = {i: torch.full((1, HIDDEN), 50.0 + i) for i in config.layers}
    patches = {}
    if config.patch is not None:
        rank = config.patch.rank
        patch = Patch(torch.zeros(HIDDEN), torch.zeros(rank, HIDDEN), torch.zeros(HIDDEN, rank))
        patches = dict.fromkeys(config.layers, patch)
    return write_checkpoint(base, output, config, routers, patches=patches)


def started(directory: Path, here: Iterable[int] = range(NUMBER), mod: dict[str, Any] | None = None) -> Model:
    """A model whose start-up has ended."""
    model = Model(directory, CONFIG, here, mod or {})
    model.load_weights(ALL.items())
    model.process_weights_after_loading()
    return model
