"""Every architecture in training: routers learn, the base stays, and single experts can be gated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from router_tuning.cli import main
from router_tuning.model import (
    architecture_of_model,
    attach_routers,
    freeze_base,
    given_prompts,
    load_base,
    load_reference,
    reference_decisions,
    reference_logits,
    router_weights,
)
from router_tuning.sublayers import nothing_skipped
from tests.support.architectures import DENSE, EXPERTS
from tests.support.models import routed_checkpoint, tiny_model
from vllm_mod.architectures import BaseShape
from vllm_mod.checkpoint import read_json
from vllm_mod.config import ConfigError, ModConfig

ROUTED = (1, 2)
DYNAMIC = [f"{target}_{level}" for target in ("attn", "mlp", "block") for level in ("token", "sequence")]
#: A window shorter than the sequence of these tests, where there is one.
MODELS: dict[str, dict[str, Any]] = {
    name: fields | ({"sliding_window": 5} if "sliding_window" in fields else {})
    for name, fields in (DENSE | EXPERTS).items()
}
WITH_EXPERTS = [*EXPERTS]
CASES = [(m, g) for m in MODELS for g in [*DYNAMIC, "expert_token"] if g in DYNAMIC or m in WITH_EXPERTS]
IDS = torch.randint(6, 260, (1, 23), generator=torch.Generator().manual_seed(5))
PROMPT = 9


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("bases")
    return {name: tiny_model(directory / name, name, num_hidden_layers=4, **fields) for name, fields in MODELS.items()}


def config(granularity: str, layers: tuple[int, ...] = ROUTED, **more: Any) -> ModConfig:
    return ModConfig.parse({"version": 1, "granularity": granularity, "layers": list(layers), **more}, "test")


def stock(base: Path) -> Any:
    return load_base(base, torch.float32).eval()


@pytest.mark.parametrize(("name", "granularity"), CASES)
def test_zero_routers_equal_the_base_model(bases: dict[str, Path], name: str, granularity: str) -> None:
    model = stock(bases[name])
    with torch.no_grad():
        base = model(IDS, use_cache=False).logits[0]
    attach_routers(model, config(granularity))
    torch.testing.assert_close(reference_logits(model, IDS[0].tolist(), PROMPT), base, atol=1e-5, rtol=1e-5)
    assert all(keep.all() for keep in reference_decisions(model).values())


@pytest.mark.parametrize(("name", "granularity"), CASES)
def test_only_routers_learn(bases: dict[str, Path], tmp_path: Path, name: str, granularity: str) -> None:
    model = load_reference(routed_checkpoint(bases[name], tmp_path / "c", granularity, ROUTED)).train()
    weights = freeze_base(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with given_prompts(model, torch.ones(1, PROMPT, dtype=torch.bool)) as state:
        loss = model(IDS, labels=IDS, use_cache=False).loss + sum(state.kept().values())
        loss.backward()
    assert all(0 <= float(kept) <= 1 for kept in state.kept().values())
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in model.named_parameters() if p.grad is not None}
    assert trained == {f"model.layers.{i}.router.weight" for i in ROUTED}
    for weight in weights:
        assert weight.grad is not None and weight.grad.isfinite().all() and weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", DENSE)  # a selection of experts is no smooth function of anything
def test_the_gate_sees_what_attention_adds(bases: dict[str, Path], name: str) -> None:
    """Its gradient is that of scaling what is added to the residual stream, also where a norm comes before that."""
    model = stock(bases[name])
    attach_routers(model, config("attn_sequence", (1,)))
    freeze_base(model)
    with given_prompts(model) as state:
        loss = model(IDS, labels=IDS, use_cache=False).loss
        (gradient,) = torch.autograd.grad(loss, state.decisions[1].applied)
    layer, norm = model.model.layers[1], architecture_of_model(model).post_norms.get("self_attn")
    last, offset = (layer.self_attn.o_proj, 0.0) if norm is None else (getattr(layer, norm), 1.0)
    as_it_was, losses = [p.detach().clone() for p in last.parameters()], []
    with torch.no_grad(), given_prompts(model):
        for factor in (1.01, 0.99):
            for parameter, before in zip(last.parameters(), as_it_was, strict=True):
                parameter.copy_(factor * (before + offset) - offset)  # Gemma's norms multiply by 1 + weight
            losses.append(float(model(IDS, labels=IDS, use_cache=False).loss))
    assert float(gradient) == pytest.approx((losses[0] - losses[1]) / 0.02, rel=0.02, abs=1e-3)
    assert abs(float(gradient)) > 5e-3


@torch.no_grad()
@pytest.mark.parametrize("target", ["attn", "mlp", "block"])
@pytest.mark.parametrize("name", MODELS)
def test_a_patch_is_added_to_the_residual_stream(bases: dict[str, Path], tmp_path: Path, name: str, target: str):
    """As it is: not multiplied, not normed, and once."""
    checkpoint = routed_checkpoint(bases[name], tmp_path / "c", f"{target}_static", (1,), version=2, patch={"rank": 3})
    model, seen = load_reference(checkpoint), {}
    layer = model.model.layers[1]
    norms = {"input": layer.input_layernorm, "mlp": getattr(layer, architecture_of_model(model).mlp_norm)}
    for place, norm in norms.items():
        norm.register_forward_hook(lambda _, args, x, place=place: seen.update({place: args[0], f"{place}, normed": x}))
    layer.register_forward_hook(lambda _, args, output: seen.update(end=output))
    model(IDS, use_cache=False)
    patch = layer.router.patch
    begin, end = ("mlp" if target == "mlp" else "input"), ("mlp" if target == "attn" else "end")
    added = patch(seen[f"{begin}, normed"])
    torch.testing.assert_close(seen[end] - seen[begin], added, atol=1e-5, rtol=1e-5)
    assert added.norm() > 0.1 * seen[begin].norm()


@torch.no_grad()
@pytest.mark.parametrize("granularity", [*DYNAMIC, "attn_static", "mlp_static", "block_static"])
@pytest.mark.parametrize("name", MODELS)
def test_the_base_is_there_below_what_skips(bases: dict[str, Path], tmp_path: Path, name: str, granularity: str):
    checkpoint = routed_checkpoint(
        bases[name], tmp_path / "c", granularity, ROUTED, version=2, patch={"rank": 3}, seed=3
    )
    model = load_reference(checkpoint)
    skipping = model(IDS, use_cache=False).logits
    with nothing_skipped(model):
        assert torch.equal(model(IDS, use_cache=False).logits, stock(bases[name])(IDS, use_cache=False).logits)
    assert torch.equal(model(IDS, use_cache=False).logits, skipping)


@torch.no_grad()
@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_gated_experts_agree_with_a_loop_over_pairs(bases: dict[str, Path], name: str) -> None:
    """A skipped pair adds 0, the others keep their weights, shared experts run: one pair at a time."""
    model, seen = stock(bases[name]), {}
    block = model.model.layers[1].mlp
    experts = block.experts

    def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen["x"], seen["index"], seen["weights"] = args

    hook = experts.register_forward_pre_hook(note)
    hidden, places = model.config.hidden_size, MODELS[name]["num_experts_per_tok"]
    x = torch.randn(1, 11, hidden, generator=torch.Generator().manual_seed(1))
    without_gates = block(x)
    hook.remove()
    router = torch.randn(8, hidden, generator=torch.Generator().manual_seed(2))
    expected, skipped = without_gates[0].clone(), 0
    for t in range(11):
        for k in range(places):
            pair = seen["index"][t : t + 1, k : k + 1]
            if float(router[int(pair)].double() @ x[0, t].double()) < 0:
                skipped += 1
                expected[t] -= experts(x[0, t : t + 1], pair, seen["weights"][t : t + 1, k : k + 1])[0]
    assert 0 < skipped < 11 * places
    attach_routers(model, config("expert_token", (1,)), {1: router})
    torch.testing.assert_close(block(x)[0], expected, atol=1e-5, rtol=1e-4)
    keep = reference_decisions(model)[1]
    assert keep.shape == (1, 11, places) and int((~keep).sum()) == skipped


@torch.no_grad()
@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_padding_is_neither_counted_nor_seen(bases: dict[str, Path], tmp_path: Path, name: str) -> None:
    model = load_reference(routed_checkpoint(bases[name], tmp_path / "c", "expert_token", ROUTED))
    alone = reference_logits(model, IDS[0, :14].tolist(), PROMPT)
    ids, mask = IDS.repeat(2, 1), torch.ones(2, 23, dtype=torch.long)
    mask[1, 14:] = 0
    with given_prompts(model) as state:
        logits = model(ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(logits[1, :14], alone, atol=1e-4, rtol=1e-4)
    kept, routed = state.counts()[1]
    assert routed == (23 + 14) * MODELS[name]["num_experts_per_tok"]
    assert state.expert_counts()[1].sum(1).tolist() == [kept, routed]


def test_router_shapes(bases: dict[str, Path]) -> None:
    for name in WITH_EXPERTS:
        model = stock(bases[name])
        attach_routers(model, config("expert_token"))
        assert {tuple(w.shape) for w in router_weights(model).values()} == {(8, model.config.hidden_size)}


@pytest.mark.parametrize(
    ("name", "layers", "rows", "message"),
    [
        ("qwen3", ROUTED, 1, "needs experts, and this model is dense"),
        ("deepseek", (0, 1), 8, r"layers \[0\] of this model have one dense MLP \(8 experts in the others\)"),
        ("qwen3_moe", (0, 1), 8, r"layers \[0\] of this model have one dense MLP \(8 experts in the others\)"),
        ("deepseek", ROUTED, 6, r"\[6, 128\], this model needs \[8, 128\], a gate for each of its 8 experts"),
        ("olmoe", ROUTED, 1, r"\[1, 128\], this model needs \[8, 128\], a gate for each of its 8 experts"),
    ],
)
def test_refusals_say_what_the_model_has(
    bases: dict[str, Path], name: str, layers: tuple[int, ...], rows: int, message: str
) -> None:
    routers = {i: torch.zeros(rows, 128) for i in layers}
    with pytest.raises(ConfigError, match=message):
        attach_routers(stock(bases[name]), config("expert_token", layers), routers)


def train(base: Path, data_file: Path, output: Path, granularity: str) -> None:
    words = ["train", "--model", str(base), "--data", str(data_file), "--output", str(output)]
    words += ["--granularity", granularity, "--layers", "1-2", "--max-train-samples", "32", "--max-length", "32"]
    assert main([*words, "--use-cpu", "true", "--disable-tqdm", "true"]) == 0


@pytest.mark.parametrize("name", DENSE)
def test_routers_are_trained_from_the_command_line(bases: dict[str, Path], data_file: Path, tmp_path: Path, name: str):
    output = tmp_path / "out"
    train(bases[name], data_file, output, "block_sequence")
    model = load_reference(output)
    assert all(weight.abs().sum() > 0 for weight in router_weights(model).values())
    assert read_json(output / "config.json")["architectures"] == [architecture_of_model(model).routed]
    assert reference_logits(model, IDS[0].tolist(), PROMPT).isfinite().all()


def test_an_attention_that_leaves_a_part_out_is_refused(bases: dict[str, Path]) -> None:
    """transformers' sdpa has no place for Gemma-2's soft cap; its default is sdpa."""
    with pytest.raises(ConfigError, match=r"Gemma2ForCausalLM: attn_implementation='sdpa' .*; use 'eager'"):
        attach_routers(load_base(bases["gemma2"], torch.float32, "sdpa"), config("attn_sequence"))
    assert stock(bases["gemma2"]).config._attn_implementation == "eager"


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_experts_are_trained_from_the_command_line(bases: dict[str, Path], data_file: Path, tmp_path: Path, name: str):
    output = tmp_path / "out"
    train(bases[name], data_file, output, "expert_token")
    experts = BaseShape.of(read_json(output / "config.json"), name).num_experts
    for weight in load_file(output / "routers.safetensors").values():
        assert weight.shape[0] == experts and weight.abs().sum() > 0
    held_out = read_json(output / "trainer_log.json")["held_out"]
    for layer, kept in held_out["kept_per_layer"].items():
        selected, ratios = held_out["selected_per_expert"][layer], held_out["kept_per_expert"][layer]
        assert len(selected) == len(ratios) == experts and [r is None for r in ratios] == [s == 0 for s in selected]
        total = sum(r * s for r, s in zip(ratios, selected, strict=True) if s)
        assert total / sum(selected) == pytest.approx(kept)
