"""Weights of a routed model, at start-up and while the engine runs.

vLLM hands weights over in one call (start-up, `reload_weights`) or in many (weight transfer, weight patches), in any
order and of any part of the model. A router tensor is looked at before anything of its call is written; whether all of
them have come is asked where loading ends, and not at all of an update.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from vllm.transformers_utils.repo_utils import get_hf_file_to_dict

from .calibration import CALIBRATION_FILE, read_calibration
from .checkpoint import read_json, read_routers
from .compat import abandon_reload, drop_loaders_of_ended_reloads, leaves_out_nan, reads_model_path
from .config import ConfigError, ModConfig
from .plan import Plan
from .tensors import check_tensor, expected_tensors, is_router_name

if TYPE_CHECKING:
    from vllm.config import VllmConfig

#: Keys of `mod_config` that what is served does not depend on.
_INFORMATION = ("version", "target_capacity", "base_model")


def load_parameter(param: Tensor, loaded_weight: Tensor) -> None:
    """`weight_loader` of everything that a router has; vLLM puts another tensor in place of the argument `param`.

    As vLLM's default. Not that one, because what vLLM knows to be a plain copy may be sent past `load_weights`.
    """
    assert param.shape == loaded_weight.shape
    param.data.copy_(loaded_weight)


class RoutedWeights:
    """Mixin of a routed model before its stock class."""

    mod_config: ModConfig

    def expect_weights(self, vllm_config: VllmConfig, plan: Plan) -> None:
        """Called once the routers are there."""
        self._vllm_config, self._plan = vllm_config, plan
        self._path: str = vllm_config.model_config.model  #: where its weights come from
        self._started = False
        self._seen: set[str] | None = None  #: router tensors of start-up; None while there was no call
        for name in self._expected:
            if (parameter := self._parameter(name)) is not None:
                parameter.weight_loader = load_parameter  # type: ignore[attr-defined]

    @property
    def _expected(self) -> dict[str, tuple[int, ...]]:
        return expected_tensors(self.mod_config, self._plan.shape)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Any part of a checkpoint. Returns the parameters that were loaded; raises ConfigError."""
        if self._started:
            drop_loaders_of_ended_reloads(self)  # type: ignore[arg-type]
        try:
            if self._started and (self._path != self._vllm_config.model_config.model or reads_model_path(weights)):
                self._follow_path()
            if isinstance(weights, Sequence):  # what comes one by one is checked one by one
                for name, tensor in weights:
                    self._check(name, tensor)
            return self._load(weights)
        except ConfigError:
            if self._started:
                abandon_reload(self, self._vllm_config.model_config)  # type: ignore[arg-type]
            raise

    def _load(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        routers: set[str] = set()

        def base() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in weights:
                if is_router_name(name):
                    self._check(name, tensor)
                    if (parameter := self._parameter(name)) is not None:
                        parameter.weight_loader(parameter, tensor)  # type: ignore[attr-defined]
                    routers.add(name)
                elif not self._is_dropped(name):
                    yield name, tensor

        loaded: set[str] = super().load_weights(base())  # type: ignore[misc]
        if not self._started:
            self._seen = (self._seen or set()) | routers
            # Those that lack are named where loading ends, and not by vLLM before.
            routers = set(self._expected)
        return loaded | {name for name in routers if self._parameter(name) is not None}

    def process_weights_after_loading(self) -> None:
        """vLLM calls it once, when start-up has loaded everything."""
        parent: Any = super()
        if hasattr(parent, "process_weights_after_loading"):
            parent.process_weights_after_loading()
        if self._seen is not None and (missing := set(self._expected) - self._seen):
            raise ConfigError(
                f"{self._path}: router tensor {sorted(missing)[0]} is missing ({len(missing)} in all); "
                "export the checkpoint again"
            )
        self._started = True

    def _is_dropped(self, name: str) -> bool:
        """A base model's tensor that a static checkpoint has no use for."""
        return False

    def _parameter(self, name: str) -> nn.Parameter | None:
        """None on the pipeline ranks that do not have its layer."""
        module_name, _, parameter_name = name.rpartition(".")
        try:
            return self.get_submodule(module_name).get_parameter(parameter_name)  # type: ignore[attr-defined]
        except AttributeError:
            return None

    def _check(self, name: str, tensor: Tensor) -> None:
        if is_router_name(name):
            check_tensor(name, _values(tensor), self.mod_config, self._plan.shape, "weights")

    def _follow_path(self) -> None:
        """Before weights are loaded from a path (`reload_weights`): what is there must route as this engine does."""
        model = self._vllm_config.model_config
        path = model.model
        try:
            config = _mod_config_of(path, model.revision)
            self._check_same_routing(config, path)
            if Path(path).is_dir():
                self._check_same_table(config, path)
                read_routers(path, config, self._plan.shape)
        except ConfigError:
            model.model = self._path
            raise
        self._path = path

    def _check_same_routing(self, config: ModConfig, path: str) -> None:
        """What is routed, and by which thresholds, the scheduler, the KV cache and captured graphs know, too."""
        its, mine = (_routing_of(c) for c in (self._plan.knobs.apply(config), self.mod_config))
        for key in its.keys() | mine.keys():
            if its.get(key) != mine.get(key):
                raise ConfigError(
                    f"{path}/config.json: mod_config: key {key!r}: {its.get(key)}, and this engine was started with "
                    f"{mine.get(key)}; start an engine for this checkpoint"
                )

    def _check_same_table(self, config: ModConfig, path: str) -> None:
        """Single requests' dials are looked up by the scheduler, in the table it was started with."""
        mine, layers = self._plan.table, len(config.layers)
        if config.window is None or mine is None:
            return
        its = read_calibration(path, config)
        if its is None or its.points(layers) != mine.points(layers):
            raise ConfigError(
                f"{path}/{CALIBRATION_FILE}: {'there is none' if its is None else 'another table'}, and this engine "
                "was started with one that requests are dialled by; start an engine for this checkpoint"
            )


def _mod_config_of(path: str, revision: str | None) -> ModConfig:
    """Of a checkpoint directory, or of a hub name."""
    directory, where = Path(path), f"{path}/config.json"
    data = read_json(directory / "config.json") if directory.is_dir() else get_hf_file_to_dict(
        "config.json", path, revision
    )  # fmt: skip
    if data is None:
        raise ConfigError(f"{where}: no such file")
    if "mod_config" not in data:
        raise ConfigError(
            f"{where}: key 'mod_config' is missing: this model routes nothing, and the engine does; "
            "join it with routers by `router-tuning export`"
        )
    return ModConfig.parse(data["mod_config"], f"{where}: mod_config")


def _routing_of(config: ModConfig) -> dict[str, Any]:
    """What of a config decides what is served, one value per key."""
    return config.to_dict() | {config.criterion: list(config.limits)} | dict.fromkeys(_INFORMATION)


def _values(tensor: Tensor) -> Tensor:
    """What of a tensor can be checked."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta:  # a dry run of vLLM's weight transfer
        return torch.zeros(tensor.shape, dtype=tensor.dtype)
    return torch.nan_to_num(tensor, nan=0.0, posinf=torch.inf, neginf=-torch.inf) if leaves_out_nan() else tensor
