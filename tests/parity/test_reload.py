"""Weights that change while the engine runs: after each update it answers as the reference of what it has now."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from tests.support.models import routed_checkpoint, tiny_llama, tiny_model
from vllm_mod.checkpoint import read_mod_config, write_mod_config
from vllm_mod.config import ConfigError
from vllm_mod.tensors import is_router_name

from .harness import Answer, assert_equals_reference, assert_same, engine, generate, random_prompts, runner_model
from .test_moe import SHAPES

LAYERS = [1, 2, 3]
PROMPTS = random_prompts((3, 40, 1, 70))
#: Granularity and further keys of `mod_config` of what is not just a granularity.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "compiled": ("attn_sequence", {}),
    "patched_static": ("block_static", {"patch": {"rank": 0}}),
    "patched": ("block_sequence", {"window": 24, "patch": {"rank": 4}}),
}


@dataclass
class Running:
    """An engine, and checkpoints of two base models and two sets of routers: "base routers" -> path."""

    llm: Any
    checkpoints: dict[str, Path]
    now: str = "00"

    def tensors(self, base: str, routers: str) -> dict[str, Tensor]:
        path = self.checkpoints[base + routers]
        files = [load_file(file) for file in sorted(path.glob("*.safetensors"))]
        return {name: tensor for file in files for name, tensor in file.items()}

    def answers(self) -> list[Answer]:
        self.llm.reset_prefix_cache()  # as after any change of weights
        return generate(self.llm, PROMPTS, 8)

    def answers_as(self, now: str) -> None:
        assert_equals_reference(self.checkpoints[now], PROMPTS, self.answers())
        self.now = now

    def update(self, portions: Iterable[list[tuple[str, Tensor]]]) -> None:
        """The calls of vLLM's weight transfer."""
        worker = self.llm.llm_engine.model_executor.driver_worker.worker
        model = runner_model(self.llm)
        initialize_layerwise_reload(model)
        for portion in portions:
            model.load_weights(portion)
        finalize_layerwise_reload(model, worker.model_config)


@pytest.fixture(scope="module")
def running(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Of the granularity, or one of `KINDS`, that a test asks for; "compiled" is under the compiler."""
    compiled, directory = request.param == "compiled", tmp_path_factory.mktemp("reload")
    granularity, config = KINDS.get(request.param, (request.param, {}))
    checkpoints = {}
    for seed in (0, 1):
        path = directory / f"base{seed}"
        base = (
            tiny_model(path, "deepseek", seed=seed, num_hidden_layers=5, **SHAPES["deepseek"])
            if granularity == "expert_token"
            else tiny_llama(path, seed=seed, num_hidden_layers=5)
        )
        for routers in (0, 1):
            name = f"{seed}{routers}"
            checkpoints[name] = routed_checkpoint(base, directory / name, granularity, LAYERS, seed=routers, **config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_CI_ENV", "1")  # traced, not optimised
        with engine(checkpoints["00"], enforce_eager=not compiled) as llm:
            yield Running(llm, checkpoints)


def of(*granularities: str) -> Any:
    return pytest.mark.parametrize("running", granularities, indirect=True, scope="module")


# The compiler turns vLLM's own kernels off, and routed sublayers have copies of the modules that have them.
@of("attn_sequence", "block_token", "patched", "patched_static", "compiled")
def test_another_checkpoint(running: Running) -> None:
    for now in ("11", "01", "10", "00"):
        running.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(running.checkpoints[now])})
        running.answers_as(now)


@of("attn_sequence", "block_token", "patched")
def test_one_tensor_at_a_time(running: Running) -> None:
    running.update([item] for item in reversed(list(running.tensors("1", "1").items())))
    running.answers_as("11")


@of("attn_sequence", "block_token", "patched")
def test_buckets(running: Running) -> None:
    items = list(running.tensors("0", "1").items())
    running.update(items[i : i + 7] for i in range(0, len(items), 7))
    running.answers_as("01")


# Of experts no more: vLLM's CPU kernels keep a copy of their weights that reloading does not reach.
@of("attn_sequence", "block_token", "patched", "expert_token")
@pytest.mark.parametrize("layerwise", [True, False])
def test_only_routers(running: Running, layerwise: bool) -> None:
    base, routers = running.now[0], "0" if running.now[1] == "1" else "1"
    items = [item for item in running.tensors(base, routers).items() if is_router_name(item[0])]
    if layerwise:
        running.update([items])
    else:
        assert runner_model(running.llm).load_weights(items) == {name for name, _ in items}
    running.answers_as(base + routers)


@of("attn_sequence", "block_token", "patched")
def test_only_base(running: Running) -> None:
    base, routers = "0" if running.now[0] == "1" else "1", running.now[1]
    running.update([[item] for item in running.tensors(base, routers).items() if not is_router_name(item[0])])
    running.answers_as(base + routers)


@of("attn_sequence", "block_token", "patched")
def test_a_refused_update_changes_nothing(running: Running, tmp_path: Path) -> None:
    before = running.answers()
    base = running.checkpoints["00"].parent / "base1"
    elsewhere = routed_checkpoint(base, tmp_path / "c", "attn_sequence", [1, 2], seed=1)
    mine, config = running.checkpoints["00"], read_mod_config(running.checkpoints["00"])
    with pytest.raises(ConfigError, match=str(elsewhere)):
        running.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(elsewhere)})
    name, tensor = next(item for item in running.tensors("1", "1").items() if is_router_name(item[0]))
    with pytest.raises(ConfigError, match="not finite"):
        running.update([[*running.tensors("1", "1").items(), (name, tensor * float("nan"))]])
    write_mod_config(mine, config.with_threshold(0.7))
    with pytest.raises(ConfigError, match="threshold"):
        running.llm.collective_rpc("reload_weights")  # of the path it had
    assert_same(before, running.answers())
    write_mod_config(mine, config)
    running.llm.collective_rpc("reload_weights")
    running.answers_as("00")
