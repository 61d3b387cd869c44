"""What is compiled on a GPU, and which steps its graphs hold. No engine is started."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_mod.config import ConfigError


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.platforms.cpu import CpuPlatform

    monkeypatch.setattr(CpuPlatform, "is_cpu", lambda self: False)
    for variable in ("VLLM_USE_BREAKABLE_CUDAGRAPH", "VLLM_BATCH_INVARIANT"):
        monkeypatch.delenv(variable, raising=False)


def compilation(speculates: bool = False, **options: Any) -> Any:
    from vllm.config import CompilationConfig

    from vllm_mod.compilation import set_compilation

    config = CompilationConfig(**options)
    set_compilation(SimpleNamespace(compilation_config=config, speculative_config=speculates or None))  # type: ignore[arg-type]
    return config


@pytest.mark.parametrize(
    ("asked", "mode", "graphs"),
    [
        (None, None, None),
        (None, "FULL", "FULL_AND_PIECEWISE"),
        (3, "FULL", "FULL_AND_PIECEWISE"),
        (0, "FULL", "FULL_DECODE_ONLY"),
        (None, "PIECEWISE", "PIECEWISE"),
        (None, "FULL_DECODE_ONLY", "FULL_DECODE_ONLY"),
        (None, "NONE", "NONE"),
    ],
)
def test_graphs_hold_no_mixed_steps(cuda: None, asked: int | None, mode: str | None, graphs: str | None) -> None:
    chosen = compilation(mode=asked, cudagraph_mode=mode).cudagraph_mode
    assert (None if chosen is None else chosen.name) == graphs


@pytest.mark.parametrize("variable", ["VLLM_USE_BREAKABLE_CUDAGRAPH", "VLLM_BATCH_INVARIANT"])
@pytest.mark.parametrize(
    ("mode", "graphs"),
    [
        (None, "FULL_DECODE_ONLY"),
        ("FULL", "FULL_DECODE_ONLY"),
        ("FULL_AND_PIECEWISE", "FULL_DECODE_ONLY"),
        ("PIECEWISE", "NONE"),
        ("NONE", "NONE"),
    ],
)
def test_graphs_do_not_break_inside_of_a_forward(
    cuda: None, monkeypatch: pytest.MonkeyPatch, variable: str, mode: str | None, graphs: str
) -> None:
    """Where nothing is compiled they would hold the model's whole forward, what its steps decide on the host, too."""
    monkeypatch.setenv(variable, "1")
    assert compilation(cudagraph_mode=mode).cudagraph_mode.name == graphs


def test_graphs_with_speculative_decoding(cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compilation(speculates=True).cudagraph_mode.name == "PIECEWISE"
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "1")
    assert compilation(speculates=True).cudagraph_mode.name == "NONE"


def test_compiled_pieces_end_at_every_operator_of_ours(cuda: None) -> None:
    import vllm_mod.models  # noqa: F401  (registers them)

    registered = {
        name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("vllm_mod::")
    }
    ops = compilation().splitting_ops
    assert {op.removeprefix("vllm_mod::") for op in ops if op.startswith("vllm_mod::")} == registered
    assert "vllm::unified_attention_with_output" in ops


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"splitting_ops": []}, ["splitting_ops", "vllm_mod::routed_attention"]),
        ({"splitting_ops": ["vllm::unified_attention_with_output"]}, ["splitting_ops", "vllm_mod::routed_mlp"]),
        ({"pass_config": {"fuse_attn_quant": True}}, ["fuse_attn_quant"]),
    ],
)
def test_refused_compilation(cuda: None, options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        compilation(**options)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)
