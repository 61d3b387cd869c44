"""Weights of a routed model in every portion that vLLM may hand over."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from vllm.model_executor.model_loader.checkpoint_weight_patch import (
    CheckpointWeightPatch,
    load_checkpoint_weight_patches,
)
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)

from tests.support.loading import ALL, BASE, CONFIG, HIDDEN, NEW, NUMBER, ROUTERS, START, Model, checkpoint, started
from vllm_mod.config import ConfigError
from vllm_mod.tensors import patch_name, router_name


@pytest.fixture
def directory(bare_base: Path, tmp_path: Path) -> Path:
    return checkpoint(bare_base, tmp_path / "started")


def test_start_up_loads_all(directory: Path) -> None:
    model = Model(directory, CONFIG, range(NUMBER), {})
    assert model.load_weights(iter(ALL.items())) == set(ALL)
    model.process_weights_after_loading()
    assert model.values == START


def test_start_up_in_several_calls(directory: Path) -> None:
    model = Model(directory, CONFIG, range(NUMBER), {})
    for item in ALL.items():
        model.load_weights([item])
    model.process_weights_after_loading()
    assert model.values == START


@pytest.mark.parametrize("missing", ROUTERS)
def test_what_lacks_is_named_where_start_up_ends(directory: Path, missing: str) -> None:
    model = Model(directory, CONFIG, range(NUMBER), {})
    # vLLM itself complains of parameters that no call returns, in words that do not help.
    assert missing in model.load_weights((name, ALL[name]) for name in ALL if name != missing)
    with pytest.raises(ConfigError, match=f"{missing} is missing") as error:
        model.process_weights_after_loading()
    assert str(directory) in str(error.value) and "\n" not in str(error.value)


def test_formats_that_do_not_ask_the_model_are_not_asked_for_routers(directory: Path) -> None:
    """`--load-format dummy`, `sharded_state`: the parameters are filled in past `load_weights`."""
    Model(directory, CONFIG, range(NUMBER), {}).process_weights_after_loading()


def test_a_pipeline_rank_takes_its_own(directory: Path) -> None:
    model = started(directory, here=(3, 4, 5))
    assert model.load_weights(ALL.items()) == {name for name in ALL if any(f".{i}." in name for i in (3, 4, 5))}
    with pytest.raises(ConfigError, match="another base model"):
        model.load_weights([(router_name(2), torch.zeros(1, 3))])  # all ranks refuse what any of them must


def pieces(kind: str) -> Iterator[list[tuple[str, Tensor]]]:
    """Portions of an update in which every tensor has 100 added."""
    new = {name: tensor + 100 for name, tensor in ALL.items()}
    items = list(new.items())
    if kind == "one tensor at a time":
        yield from ([item] for item in reversed(items))
    elif kind == "buckets":
        yield from (items[i : i + 3] for i in range(0, len(items), 3))
    elif kind == "only routers":
        yield [(name, new[name]) for name in ROUTERS]
    elif kind == "only base":
        yield [(name, new[name]) for name in BASE]
    elif kind == "one router":
        yield [(router_name(4), new[router_name(4)])]
    elif kind == "half a patch":
        yield [(patch_name(4, part), new[patch_name(4, part)]) for part in ("up.weight", "bias")]


KINDS = ["one tensor at a time", "buckets", "only routers", "only base", "one router", "half a patch"]


@pytest.mark.parametrize("layerwise", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_an_update_changes_what_it_contains(directory: Path, kind: str, layerwise: bool) -> None:
    model = started(directory)
    addresses = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    expected = dict(START)
    if layerwise:
        initialize_layerwise_reload(model)
    for piece in pieces(kind):
        assert model.load_weights(piece) == {name for name, _ in piece}
        expected |= {name: NEW[name] for name, _ in piece}
    if layerwise:
        finalize_layerwise_reload(model, model.model_config)
    assert model.values == expected
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == addresses  # graphs read there


def test_after_a_reload_of_something_else(directory: Path) -> None:
    """vLLM's reloading leaves its own loaders on biases."""
    model = started(directory)
    initialize_layerwise_reload(model)
    finalize_layerwise_reload(model, model.model_config)
    model.load_weights([(name, tensor + 100) for name, tensor in ALL.items()])
    assert model.values == NEW


BAD = {
    "model.layers.3.router.weight": (torch.zeros(1, HIDDEN), "no routed layer"),
    "model.layers.2.router.gain": (torch.zeros(1, HIDDEN), "no routed layer"),
    patch_name(2, "scale"): (torch.zeros(HIDDEN), "no part of a patch of rank 2"),
    patch_name(2, "up.weight"): (torch.zeros(HIDDEN, 3), "rank 2"),
    patch_name(4, "bias"): (torch.full((HIDDEN,), torch.nan), "not finite"),
    router_name(2): (torch.zeros(2, HIDDEN), "shape"),
    router_name(4): (torch.full((1, HIDDEN), torch.inf), "not finite"),
}


@pytest.mark.parametrize("layerwise", [True, False])
@pytest.mark.parametrize("bad", BAD)
def test_nothing_is_written_of_a_call_with_a_bad_router(directory: Path, bad: str, layerwise: bool) -> None:
    model = started(directory)
    if layerwise:
        initialize_layerwise_reload(model)
    tensor, words = BAD[bad]
    with pytest.raises(ConfigError, match=words) as error:
        model.load_weights([(name, t + 100) for name, t in ALL.items() if name != bad] + [(bad, tensor)])
    assert bad in str(error.value)
    assert model.values == START  # not on the meta device either, where vLLM puts them for the time of an update


def test_a_bad_router_late_in_a_stream(directory: Path) -> None:
    """It cannot be looked at beforehand: modules that are complete are new by then, no other one is touched."""
    model, half = started(directory), "model.layers.0.mlp.down_proj.weight"
    model.get_submodule(half.removesuffix(".weight")).register_parameter("scale", nn.Parameter(torch.ones(1)))
    record_metadata_for_reloading(model)  # the module is half loaded by what comes
    initialize_layerwise_reload(model)
    stream = {name: tensor + 100 for name, tensor in BASE.items()} | {
        router_name(4): torch.full((1, HIDDEN), torch.nan)
    }
    with pytest.raises(ConfigError, match="not finite"):
        model.load_weights(iter(stream.items()))
    new = {name: NEW[name] for name in BASE if name != half}
    assert model.values == START | new | {half.replace("weight", "scale"): 1.0}


def test_sparse_patches(directory: Path) -> None:
    """vLLM marks with NaN what a patch leaves as it is."""
    model = started(directory)
    name = router_name(4)
    patch = CheckpointWeightPatch(name, (1, HIDDEN), torch.float32, torch.tensor([-1.0, 7.0]), torch.tensor([0, 3]))
    assert load_checkpoint_weight_patches(model, [patch]) == {name}
    assert model.state_dict()[name].tolist() == [[-1.0, 4, 4, 7.0, 4, 4, 4, 4]]
    endless = patch._replace(values=torch.tensor([torch.inf, 7.0]))
    with pytest.raises(ConfigError, match="not finite"):
        load_checkpoint_weight_patches(model, [endless])


def test_a_dry_run_of_weight_transfer(directory: Path) -> None:
    """Its stand-ins for tensors have no values; they record which parameter takes what."""
    fake = pytest.importorskip("vllm.distributed.weight_transfer.sharded_rdt_fake")
    model, sink, device = started(directory), fake.BakeSink(), torch.device("cpu")
    made = [(name, fake.FakeRDTTensor(name, t.shape, t.dtype, device, sink=sink)) for name, t in ALL.items()]
    assert model.load_weights(made) == sink.copied_names == set(ALL)
    assert model.values == START
