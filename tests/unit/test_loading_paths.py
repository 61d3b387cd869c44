"""Weights that are read from another checkpoint while the engine runs: it must route as the engine does."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from tests.support.loading import ALL, CONFIG, NEW, NUMBER, START, Model, checkpoint, started
from tests.support.models import edit_json
from vllm_mod.calibration import Calibration, OperatingPoint, write_calibration
from vllm_mod.checkpoint import write_mod_config
from vllm_mod.config import ConfigError, ModConfig
from vllm_mod.tensors import router_name


@pytest.fixture
def directory(bare_base: Path, tmp_path: Path) -> Path:
    return checkpoint(bare_base, tmp_path / "started")


def reload(model: Model, path: Path, tensors: dict[str, Tensor]) -> None:
    """The order of vLLM's `reload_weights`."""

    def get_all_weights() -> Iterator[tuple[str, Tensor]]:  # as the method of vLLM's loader
        yield from tensors.items()

    model.model_config.model = str(path)
    initialize_layerwise_reload(model)
    model.load_weights(get_all_weights())
    finalize_layerwise_reload(model, model.model_config)


def test_another_path(directory: Path, bare_base: Path, tmp_path: Path) -> None:
    model = started(directory)
    other = checkpoint(bare_base, tmp_path / "other", target_capacity=0.3, base_model="another name")
    reload(model, other, {name: tensor + 100 for name, tensor in ALL.items()})
    assert model.values == NEW


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"granularity": "block_sequence"}, "granularity"),
        ({"window": 5}, "window"),
        ({"window": None}, "window"),
        ({"patch": {"rank": 3}}, "patch"),
        ({"patch": None}, "patch"),
        ({"layers": [2, 3]}, "layers"),
        ({"threshold": 0.7}, "threshold"),
        ({"threshold": [0.5, 0.6]}, "threshold"),
    ],
)
def test_a_path_that_routes_otherwise(directory: Path, bare_base: Path, tmp_path: Path, changes: Any, key: str) -> None:
    model = started(directory)
    other = checkpoint(bare_base, tmp_path / "other", **changes)
    with pytest.raises(ConfigError, match=f"key '{key}'") as error:
        reload(model, other, {name: tensor + 100 for name, tensor in ALL.items()})
    assert str(other) in str(error.value) and "\n" not in str(error.value)
    assert model.values == START and model.model_config.model == str(directory)


def test_the_same_path_calibrated_meanwhile(directory: Path) -> None:
    model = started(directory)
    write_mod_config(directory, CONFIG.with_threshold(0.7))
    with pytest.raises(ConfigError, match="key 'threshold'"):
        reload(model, directory, {name: tensor + 100 for name, tensor in ALL.items()})
    assert model.values == START
    model.load_weights([(name, tensor + 100) for name, tensor in ALL.items()])  # a trainer's, not of that path
    assert model.values == NEW


@pytest.mark.parametrize("mod", [{"threshold": 0.5}, {"force": "keep"}])
def test_thresholds_that_the_engine_overrides_do_not_matter(
    directory: Path, bare_base: Path, tmp_path: Path, mod: Any
) -> None:
    model = Model(directory, CONFIG, range(NUMBER), mod)
    model.mod_config = CONFIG if "threshold" in mod else ModConfig.parse(CONFIG.to_dict() | {"threshold": 0}, "test")
    model.load_weights(ALL.items())
    model.process_weights_after_loading()
    other = checkpoint(bare_base, tmp_path / "other", threshold=[0.2, 0.9])
    reload(model, other, {name: tensor + 100 for name, tensor in ALL.items()})
    assert model.values[router_name(2)] == 102


def test_a_table_that_requests_are_dialled_by(directory: Path, bare_base: Path, tmp_path: Path) -> None:
    """The scheduler has it from the start."""
    table = Calibration(operating_points=[OperatingPoint(target=0.5, kept=0.4, threshold=0.3)])
    write_calibration(directory, table)
    model, other = started(directory), checkpoint(bare_base, tmp_path / "other")
    with pytest.raises(ConfigError, match=r"calibration\.json: there is none"):
        reload(model, other, {name: tensor + 100 for name, tensor in ALL.items()})
    write_calibration(other, Calibration(operating_points=[OperatingPoint(target=0.5, kept=0.4, threshold=0.2)]))
    with pytest.raises(ConfigError, match="another table"):
        reload(model, other, {name: tensor + 100 for name, tensor in ALL.items()})
    assert model.values == START
    write_calibration(other, table)
    reload(model, other, {name: tensor + 100 for name, tensor in ALL.items()})
    assert model.values == NEW


def test_the_same_threshold_written_otherwise(directory: Path, bare_base: Path, tmp_path: Path) -> None:
    reload(started(directory), checkpoint(bare_base, tmp_path / "other", threshold=[0.5, 0.5]), ALL)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda path: edit_json(path / "config.json", mod_config=None), "'mod_config' is missing"),
        (lambda path: (path / "config.json").unlink(), "no such file"),
        (lambda path: (path / "config.json").write_text("{"), "cannot be read"),
        (lambda path: (path / "routers.safetensors").unlink(), "is missing"),
    ],
)
def test_a_path_that_is_no_routed_checkpoint(
    directory: Path, bare_base: Path, tmp_path: Path, edit: Any, words: str
) -> None:
    model = started(directory)
    other = checkpoint(bare_base, tmp_path / "other")
    edit(other)
    with pytest.raises(ConfigError, match=words):
        reload(model, other, {name: tensor + 100 for name, tensor in ALL.items()})
    assert model.values == START and model.model_config.model == str(directory)
