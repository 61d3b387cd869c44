"""The reference of version 2: a decision window, and patches in place of what is skipped."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from router_tuning.model import (
    attach_routers,
    freeze_base,
    given_prompts,
    greedy,
    load_reference,
    patch_weights,
    reference_decisions,
    reference_logits,
    reference_scores,
    router_weights,
)
from tests.unit.training.helpers import HIDDEN, make_llama
from tests.unit.training.test_model import DYNAMIC, IDS, PROMPT, ROUTED, STATIC, by_hand, config, random_routers
from vllm_mod.checkpoint import write_checkpoint
from vllm_mod.config import ConfigError
from vllm_mod.tensors import Patch

SEQUENCE = ["attn_sequence", "mlp_sequence", "block_sequence"]
WINDOWS = [1, 4, PROMPT - 1, PROMPT, PROMPT + 1, 10**12]


def random_patches(rank: int, seed: int = 7) -> dict[int, Patch]:
    generator = torch.Generator().manual_seed(seed)

    def made(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    return {i: Patch(made(HIDDEN), *((made(rank, HIDDEN), made(HIDDEN, rank)) if rank else ())) for i in ROUTED}


def routed(granularity: str, routers=None, patches=None, **more) -> nn.Module:
    model = make_llama()
    if patches is not None:
        down = patches[ROUTED[0]].down
        more["patch"] = {"rank": 0 if down is None else len(down)}
    attach_routers(model, config(granularity, **more), routers, patches)
    return model


def mixed_routers(granularity: str, window: int, patches=None) -> dict[int, Tensor]:
    """The first routed layer keeps, the last one skips: one wrong decision would show."""
    routers = random_routers()
    for layer, sign in zip(ROUTED, (1, -1), strict=True):
        model = routed(granularity, routers, patches, window=window)
        reference_logits(model, IDS, PROMPT)
        if float(reference_scores(model)[layer]) * sign < 0:
            routers[layer] = -routers[layer]
    return routers


@torch.no_grad()
@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("granularity", SEQUENCE)
def test_a_window_agrees_with_a_loop_over_tokens(granularity, window, rank):
    patches = None if rank is None else random_patches(rank)
    routers = mixed_routers(granularity, window, patches)
    model = routed(granularity, routers, patches, window=window)
    expected = by_hand(make_llama(), IDS, granularity, routers, PROMPT, window, patches)
    torch.testing.assert_close(reference_logits(model, IDS, PROMPT), expected, atol=2e-4, rtol=1e-4)
    assert [bool(keep) for keep in reference_decisions(model).values()] == [True, False]


@torch.no_grad()
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("granularity", DYNAMIC + STATIC)
def test_patches_agree_with_a_loop_over_tokens(granularity, rank):
    patches, routers = random_patches(rank), {} if granularity in STATIC else random_routers()
    model = routed(granularity, routers, patches)
    expected = by_hand(make_llama(), IDS, granularity, routers, PROMPT, None, patches)
    torch.testing.assert_close(reference_logits(model, IDS, PROMPT), expected, atol=2e-4, rtol=1e-4)
    keeps = [keep.float().mean() for keep in reference_decisions(model).values()]
    assert granularity in STATIC or min(keeps) < 1  # otherwise this shows nothing


@torch.no_grad()
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("granularity", SEQUENCE)
def test_everything_is_a_function_of_the_tokens_before_it(granularity, window):
    """What makes chunked prefill and prefix caching exact: a longer sequence changes nothing of a shorter one."""
    model = routed(granularity, mixed_routers(granularity, window), window=window)
    whole = reference_logits(model, IDS, PROMPT)
    for length in (min(window, PROMPT), PROMPT, PROMPT + 1, len(IDS) - 1):
        part = reference_logits(model, IDS[:length], min(length, PROMPT))
        torch.testing.assert_close(part, whole[:length], atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("granularity", SEQUENCE)
def test_a_decision_is_that_of_the_first_tokens(granularity):
    model = routed(granularity, random_routers(), window=3)
    reference_logits(model, IDS, PROMPT)
    windowed = reference_scores(model)
    alone = routed(granularity, random_routers())  # version 1 on the window alone: the first routed layer sees the same
    reference_logits(alone, IDS[:3], 3)
    assert float(windowed[1]) == pytest.approx(float(reference_scores(alone)[1]), abs=1e-4)
    reference_logits(alone, IDS, PROMPT)
    assert float(windowed[1]) != pytest.approx(float(reference_scores(alone)[1]), abs=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("granularity", SEQUENCE)
def test_a_prompt_within_the_window_runs_dense(granularity):
    base = make_llama()(torch.tensor([IDS])).logits[0]
    skipping = routed(granularity, random_routers(), window=PROMPT, threshold=1.0)
    logits = reference_logits(skipping, IDS, PROMPT)
    torch.testing.assert_close(logits[:PROMPT], base[:PROMPT], atol=1e-5, rtol=1e-5)
    assert (logits[PROMPT:] - base[PROMPT:]).abs().max() > 0.01
    dense = routed(granularity, random_routers(), window=2, threshold=0.0)
    torch.testing.assert_close(reference_logits(dense, IDS, PROMPT), base, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("granularity", SEQUENCE)
def test_padding_moves_no_window(granularity, side):
    patches = random_patches(2)
    model = routed(granularity, random_routers(), patches, window=4)
    rows = [(IDS, PROMPT), (IDS[4:15], 5), (IDS[6:12], 2)]  # the last one's prompt is shorter than the window
    expected, decisions = [], []
    for row, n in rows:
        expected.append(reference_logits(model, row, n))
        decisions.append([bool(keep) for keep in reference_decisions(model).values()])
    assert len(set(map(tuple, decisions))) > 1
    length = len(IDS)
    ids, mask, prompt = torch.full((3, length), 2), torch.zeros(3, length), torch.zeros(3, length, dtype=torch.bool)
    starts = [length - len(row) if side == "left" else 0 for row, _ in rows]
    for i, ((row, n), start) in enumerate(zip(rows, starts, strict=True)):
        ids[i, start : start + len(row)] = torch.tensor(row)
        mask[i, start : start + len(row)] = 1
        prompt[i, start : start + n] = True
    positions = (mask.cumsum(1) - 1).clamp(min=0).long()
    with given_prompts(model, prompt):
        logits = model(ids, attention_mask=mask, position_ids=positions).logits
    for i, ((row, _), start) in enumerate(zip(rows, starts, strict=True)):
        torch.testing.assert_close(logits[i, start : start + len(row)], expected[i], atol=1e-4, rtol=1e-4)
    found = torch.stack(list(reference_decisions(model).values()), -1)
    assert found.tolist() == decisions


@torch.no_grad()
@pytest.mark.parametrize("granularity", DYNAMIC + STATIC)
def test_patches_begin_as_nothing(granularity):
    routers = None if granularity in STATIC else random_routers()
    plain, patched = routed(granularity, routers), routed(granularity, routers, patch={"rank": 3})
    assert torch.equal(reference_logits(plain, IDS, PROMPT), reference_logits(patched, IDS, PROMPT))


@pytest.mark.parametrize("granularity", ["attn_sequence", "mlp_token", "block_sequence", "block_static", "mlp_static"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_patches_learn_with_the_routers(granularity, checkpointing):
    routers = None if granularity in STATIC else {i: -w.abs() for i, w in random_routers().items()}
    window = {"window": 3} if granularity in SEQUENCE else {}
    model = routed(granularity, routers, random_patches(2), **window).train()
    trained = freeze_base(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    ids = torch.tensor([IDS])
    with given_prompts(model, torch.ones(1, PROMPT, dtype=torch.bool)) as state:
        loss = model(ids, labels=ids).loss
        assert granularity in STATIC or not all(d.keep.all() for d in state.decisions.values())
        loss.backward()
    parts = ["patch.bias", "patch.down.weight", "patch.up.weight"] + ([] if granularity in STATIC else ["weight"])
    expected = {f"model.layers.{i}.router.{part}" for i in ROUTED for part in parts}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == expected
    assert {id(p) for p in trained} == {id(p) for p in model.parameters() if p.requires_grad}
    assert expected == {name for name in model.state_dict() if ".router." in name}
    skips = [i for i in ROUTED if granularity in STATIC or not state.decisions[i].keep.all()]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            if "patch" not in name or int(name.split(".")[2]) in skips:
                assert parameter.grad.abs().sum() > 0, name


def test_patches_learn_alone():
    """As in distillation: the routers are finished, and hard decisions need no estimator."""
    model = routed("block_token", random_routers(), random_patches(2))
    freeze_base(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("patch" in name)
    with torch.no_grad():
        teacher = make_llama()(torch.tensor([IDS])).logits
    with given_prompts(model, torch.ones(1, PROMPT, dtype=torch.bool)):
        (model(torch.tensor([IDS])).logits - teacher).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and parameter.grad.abs().sum() > 0) == ("patch" in name), name


def test_the_gate_is_worth_what_the_sublayer_adds_beyond_the_patch():
    """d loss / d gate = (F(x) - P(x)) . d loss / d output, from the tokens behind the window alone."""
    model = routed("mlp_sequence", random_routers(), random_patches(2), window=4, threshold=1.0)
    freeze_base(model)
    seen = {}
    layer = model.model.layers[ROUTED[-1]]
    layer.mlp.register_forward_hook(lambda _, args, output: seen.update(x=args[0], output=output))
    with given_prompts(model, torch.ones(1, PROMPT, dtype=torch.bool)) as state:
        loss = model(torch.tensor([IDS])).logits.square().mean()
        decision = state.decisions[ROUTED[-1]]
    by_gate, by_output = torch.autograd.grad(loss, [decision.applied, seen["output"]])
    with torch.no_grad():
        stock = type(layer.mlp).__mro__[2].forward(layer.mlp, seen["x"])
        gain = ((stock - state.stand_in(ROUTED[-1], seen["x"])) * by_output)[:, 4:].sum()
    torch.testing.assert_close(by_gate[0], gain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("granularity", SEQUENCE)
def test_tokens_of_the_window_teach_the_router_nothing(granularity):
    model = routed(granularity, random_routers(), window=4)
    weights = freeze_base(model)
    with given_prompts(model, torch.ones(1, PROMPT, dtype=torch.bool)):
        logits = model(torch.tensor([IDS])).logits
        inside = torch.autograd.grad(logits[:, :4].square().sum(), weights, retain_graph=True, allow_unused=True)
        outside = torch.autograd.grad(logits[:, 4:].square().sum(), weights)
    assert all(g is None or not g.any() for g in inside)
    assert all(g.abs().sum() > 0 for g in outside)


def test_no_nan_where_a_skipped_sublayer_overflows():
    model = routed("mlp_token", random_routers(), random_patches(2), threshold=1.0)
    freeze_base(model)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(float("inf"))
    with given_prompts(model):
        logits = model(torch.tensor([IDS])).logits
    assert logits.isfinite().all()
    logits.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@torch.no_grad()
@pytest.mark.parametrize("granularity", ["attn_sequence", "block_static"])
def test_a_bf16_model_stays_one(granularity):
    model = make_llama().to(torch.bfloat16)
    attach_routers(model, config(granularity, patch={"rank": 2}), None, random_patches(2))
    assert model(torch.tensor([IDS])).logits.dtype == torch.bfloat16
    assert model.model.layers[1].router.patch.bias.dtype == torch.float32


@pytest.mark.parametrize("granularity", ["attn_sequence", "block_sequence", "mlp_static"])
def test_checkpoint_round_trip(tmp_path, base_dir, granularity, caplog):
    settings = config(granularity, patch={"rank": 2}, **({"window": 4} if granularity in SEQUENCE else {}))
    routers = {} if granularity in STATIC else mixed_routers(granularity, 4)
    patches = random_patches(2)
    write_checkpoint(base_dir, tmp_path / "ckpt", settings, routers, patches=patches)
    with caplog.at_level("WARNING"):
        model = load_reference(tmp_path / "ckpt")
    assert "router" not in caplog.text
    direct = make_llama()
    attach_routers(direct, settings, routers or None, patches)
    expected = reference_logits(direct, IDS, PROMPT)
    assert torch.equal(reference_logits(model, IDS, PROMPT), expected)
    tokens, logprobs = greedy(model, IDS[:PROMPT], 4)
    assert len(tokens) == len(logprobs) == 4
    assert router_weights(model).keys() == routers.keys()
    assert all(torch.equal(patch_weights(model)[i].up, patches[i].up) for i in ROUTED)
    write_checkpoint(base_dir, tmp_path / "again", settings, router_weights(model), patches=patch_weights(model))
    assert torch.equal(reference_logits(load_reference(tmp_path / "again"), IDS, PROMPT), expected)


def test_a_static_view_of_a_checkpoint_keeps_its_patches(tmp_path, base_dir):
    patches = random_patches(2)
    settings = config("attn_sequence", window=4, patch={"rank": 2})
    write_checkpoint(base_dir, tmp_path / "ckpt", settings, random_routers(), patches=patches)
    static = config("attn_static", patch={"rank": 2}).model_copy(update={"layers": ROUTED[1:]})
    found = reference_logits(load_reference(tmp_path / "ckpt", config=static), IDS, PROMPT)
    expected = make_llama()
    attach_routers(expected, static, None, {ROUTED[1]: patches[ROUTED[1]]})
    assert torch.equal(found, reference_logits(expected, IDS, PROMPT))
    without = load_reference(tmp_path / "ckpt", config=config("attn_static"))
    assert torch.equal(reference_logits(without, IDS, PROMPT), reference_logits(routed("attn_static"), IDS, PROMPT))


@pytest.mark.parametrize(
    ("patches", "said"),
    [
        (random_patches(3), r"model\.layers\.1\.router\.patch\.down\.weight has shape \[3, 32\]"),
        ({1: random_patches(2)[1]}, r"model\.layers\.2\.router\.patch\.bias is missing"),
        ({}, r"model\.layers\.1\.router\.patch\.bias is missing"),
    ],
)
def test_patches_that_do_not_fit_leave_the_model_as_it_was(patches, said):
    model = make_llama()
    before = model(torch.tensor([IDS])).logits
    with pytest.raises(ConfigError, match=said):
        attach_routers(model, config("attn_sequence", patch={"rank": 2}), None, patches)
    assert not [name for name in model.state_dict() if "router" in name]
    assert torch.equal(model(torch.tensor([IDS])).logits, before)
