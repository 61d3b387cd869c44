"""Patches fitted layer by layer: on the activations that they will have, and to what the sublayer would have added."""

from __future__ import annotations

import gc
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from router_tuning import layerwise, patches, ridge
from router_tuning.data import Collator, calibration_samples
from router_tuning.model import attach_routers, load_base, reference_decisions, reference_logits, routing_of
from router_tuning.patches import collate, fit_patches, with_patch
from router_tuning.sublayers import hide_skipped_keys
from tests.unit.training.helpers import HIDDEN, VOCAB, make_llama
from tests.unit.training.test_model import DYNAMIC, ROUTED, STATIC, config, random_routers
from vllm_mod.config import ConfigError, ModConfig
from vllm_mod.gate import apply_patch
from vllm_mod.tensors import Patch

WINDOWED = [(f"{target}_sequence", {"window": 4}) for target in ("attn", "mlp", "block")]
CASES = [*((granularity, {}) for granularity in DYNAMIC + STATIC), *WINDOWED]


def some_samples(number: int = 40) -> list[dict[str, Any]]:
    generator, made = torch.Generator().manual_seed(11), []
    for _ in range(number):
        length = int(torch.randint(3, 25, (), generator=generator))
        ids = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
        prompt = int(torch.randint(0, length, (), generator=generator))
        made.append({"input_ids": ids, "labels": ids, "prompt_len": prompt})
    return made


def routed(mod: ModConfig, **options: Any) -> Any:
    model = make_llama(**options)
    attach_routers(model, mod, None if mod.is_static else random_routers())
    return model.eval()


def fitted(mod: ModConfig, rank: int, where: Path, batch_size: int = 6, **options: Any) -> tuple[Any, dict[int, Patch]]:
    """All tokens count alike."""
    model = routed(mod, **options)
    batches = collate(some_samples(), mod, rank, batch_size, "data")
    found = fit_patches(model, batches, rank, where, quiet=True, kept_weight=1.0)
    return model, {layer: one.patch for layer, one in found.items()}


@torch.no_grad()
def by_hand(mod: ModConfig, layer: int, given: dict[int, Patch]) -> tuple[Tensor, Tensor]:
    """x and F(x) at a layer, `[tokens, hidden]`, one sample at a time: what the model with these patches has before the
    layer, put through a stock layer's parts."""
    below = tuple(i for i in ROUTED if i < layer)
    model, stock = make_llama(), make_llama().model
    if below:
        rank = next(iter(given.values())).down.shape[0]
        part = ModConfig.parse(with_patch(mod, rank).to_dict() | {"layers": below}, "")
        routers = {i: w for i, w in random_routers().items() if i in below}
        attach_routers(model, part, None if mod.is_static else routers, {i: given[i] for i in below})
    before: list[Tensor] = []
    model.model.layers[layer].register_forward_pre_hook(lambda _, args: before.append(args[0]))
    xs, ys = [], []
    for sample in some_samples():
        ids, prompt = sample["input_ids"], sample["prompt_len"] or len(sample["input_ids"])
        if below:
            reference_logits(model, ids, prompt)
        else:
            model(torch.tensor([ids]))
        h, part = before.pop(), stock.layers[layer]
        rotary = stock.rotary_emb(h, torch.arange(len(ids))[None])
        mask, x = torch.full((1, 1, len(ids), len(ids)), -torch.inf).triu(1), part.input_layernorm(h)
        if mod.policy.packs_kv:
            mask = hide_skipped_keys(mask, (x @ random_routers()[layer][0]) >= 0, x.dtype)
        attention = part.self_attn(x, position_embeddings=rotary, attention_mask=mask)[0]
        normed = part.post_attention_layernorm(h + attention)
        y = {"attn": attention, "mlp": part.mlp(normed), "block": attention + part.mlp(normed)}[mod.policy.target]
        first = 0 if mod.window is None else min(mod.window, prompt)
        xs.append((normed if not mod.policy.skips_attention else x)[0, first:])
        ys.append(y[0, first:])
    return torch.cat(xs), torch.cat(ys)


@pytest.mark.parametrize(("granularity", "more"), CASES)
def test_at_full_rank_it_is_least_squares_on_the_activations(granularity, more, tmp_path, monkeypatch):
    mod = config(granularity, **more)
    monkeypatch.setattr(patches, "fit", partial(ridge.fit, ridges=(0.0,)))
    model, found = fitted(mod, HIDDEN, tmp_path)
    for layer in ROUTED:
        x, y = (part.double() for part in by_hand(mod, layer, found))
        rows = np.c_[x.numpy(), np.ones(len(x))]
        expected, *_ = np.linalg.lstsq(rows, y.numpy(), rcond=None)
        patch = found[layer]
        mine = apply_patch(x.float(), patch.bias, patch.down, patch.up)
        np.testing.assert_allclose(mine.numpy(), rows @ expected, atol=2e-3, rtol=2e-3)
        assert float((torch.from_numpy(rows @ expected) - y.mean(0)).abs().max()) > 0.1  # they say something
        torch.testing.assert_close(routing_of(model).patches[layer](x.float()), mine)
    if not mod.is_static:  # and upstream some were skipped, some not
        kept = []
        for sample in some_samples(12):
            reference_logits(model, sample["input_ids"], sample["prompt_len"] or len(sample["input_ids"]))
            kept.append(reference_decisions(model)[1].float().flatten())
        assert 0 < torch.cat(kept).mean() < 1


def test_requests_that_keep_count_as_little_as_is_said(tmp_path, monkeypatch):
    """The first routed layer: least squares with a weight for each request, by its real decision."""
    mod, layer, weight = config("attn_sequence", version=2, window=2), ROUTED[0], 0.25
    monkeypatch.setattr(patches, "fit", partial(ridge.fit, ridges=(0.0,)))
    model = routed(mod)
    batches = collate(some_samples(), mod, HIDDEN, 6, "data")
    found = fit_patches(model, batches, HIDDEN, tmp_path, quiet=True, kept_weight=weight)[layer].patch
    x, y = (part.double() for part in by_hand(mod, layer, {}))
    weights = []
    for sample in some_samples():
        ids, prompt = sample["input_ids"], sample["prompt_len"] or len(sample["input_ids"])
        reference_logits(model, ids, prompt)
        keep = bool(reference_decisions(model)[layer].all())
        weights += [weight if keep else 1.0] * (len(ids) - min(2, prompt))
    assert len(set(weights)) == 2 and len(weights) == len(x)
    rows, root = np.c_[x.numpy(), np.ones(len(x))], np.sqrt(np.array(weights))[:, None]
    expected, *_ = np.linalg.lstsq(rows * root, y.numpy() * root, rcond=None)
    mine = apply_patch(x.float(), found.bias, found.down, found.up)
    np.testing.assert_allclose(mine.numpy(), rows @ expected, atol=2e-3, rtol=2e-3)
    unweighted, *_ = np.linalg.lstsq(rows, y.numpy(), rcond=None)
    assert np.abs(rows @ (expected - unweighted)).max() > 0.01


@pytest.mark.parametrize("granularity", ["attn_sequence", "block_token", "mlp_static"])
def test_batches_do_not_matter(granularity, tmp_path):
    one, other = (fitted(config(granularity), 4, tmp_path, size)[1] for size in (1, 9))
    for layer in ROUTED:
        torch.testing.assert_close(one[layer].bias, other[layer].bias, atol=1e-4, rtol=1e-4)
        maps = [patch.up @ patch.down for patch in (one[layer], other[layer])]  # type: ignore[operator]
        torch.testing.assert_close(*maps, atol=1e-4, rtol=1e-3)


def test_no_more_hidden_states_are_held_than_those_of_a_batch(tmp_path, monkeypatch):
    def alive() -> list[Tensor]:
        return [o for o in gc.get_objects() if type(o) is Tensor and o.dim() == 3 and o.shape[-1] == HIDDEN]

    def held(samples: int) -> int:
        gc.collect()  # other tests' tensors are not ours to count
        before, most = {id(tensor): tensor for tensor in alive()}, 0

        def counted(*args: Any) -> Any:
            nonlocal most
            found = layerwise.sublayer(*args)
            most = max(most, sum(tensor.numel() for tensor in alive() if id(tensor) not in before))
            return found

        monkeypatch.setattr(patches, "sublayer", counted)
        sample = {"labels": [0] * 20, "prompt_len": 5}
        same = [sample | {"input_ids": [(7 * n + i * n) % 100 + 5 for i in range(20)]} for n in range(samples)]
        fit_patches(model, collate(same, mod, 2, 8, "data"), 2, tmp_path, quiet=True)
        return most

    mod = config("attn_sequence")
    model = routed(mod)
    assert held(160) == held(16) <= 6 * 8 * 20 * HIDDEN


def test_the_model_is_as_it_was(tmp_path):
    mod = config("block_sequence", window=3)
    model = routed(mod)
    names, kinds = list(model.state_dict()), [type(module) for module in model.modules()]
    batches = collate(some_samples(), mod, 2, 4, "data")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(layerwise, "_forward", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            fit_patches(model, batches, 2, tmp_path, quiet=True)
    fit_patches(model, batches, 2, tmp_path, quiet=True)
    assert list(model.state_dict()) == names and [type(module) for module in model.modules()] == kinds
    assert not any(module._forward_pre_hooks for module in model.modules() if module is not model)
    assert not list(tmp_path.iterdir())


def test_patches_that_were_there_are_not_looked_at(tmp_path):
    mod = config("attn_sequence")
    model, first = fitted(mod, 3, tmp_path)
    again = fit_patches(model, collate(some_samples(), mod, 3, 6, "data"), 3, tmp_path, quiet=True, kept_weight=1.0)
    assert all(torch.equal(again[layer].patch.bias, first[layer].bias) for layer in ROUTED)


def test_routers_that_were_never_trained_keep_by_chance(tmp_path, caplog):
    mod = config("attn_sequence", target_capacity=0.3)
    model = make_llama().eval()
    attach_routers(model, mod)
    state, kept = routing_of(model), list[bool]()

    def noted(*args: Any) -> Tensor:
        states = layerwise.advance(*args)
        kept.extend(state.decisions[1].keep.tolist() if args[-1] == 2 else [])
        return states

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(patches, "advance", noted)
        batches = collate(some_samples(200), mod, 2, 200, "data")
        first = fit_patches(model, batches, 2, tmp_path)
        second = fit_patches(model, batches, 2, tmp_path)
    assert 0.2 < sum(kept) / len(kept) < 0.4
    assert "routers of layers [1, 2] are zero: while patches are fitted, chance keeps 0.3" in caplog.text
    assert torch.equal(first[2].patch.bias, second[2].patch.bias)
    assert not routing_of(model).routers[1].weight.any()  # they are back
    dense = fit_patches(model, batches, 2, tmp_path, quiet=True)
    attach = ModConfig.parse(mod.to_dict() | {"threshold": 0.0}, "")  # keeps everything, as it says
    model = make_llama().eval()
    attach_routers(model, attach)
    assert not torch.equal(fit_patches(model, batches, 2, tmp_path)[2].patch.bias, dense[2].patch.bias)


def test_held_out_samples_are_a_tenth_and_have_tokens_that_may_skip():
    mod = config("attn_sequence", window=10)
    samples = some_samples(100)
    batches = collate(samples, mod, 2, 8, "data")
    assert sum(len(batch["input_ids"]) for batch in batches) == 100
    lengths = [n for batch in batches for n in batch["attention_mask"].sum(1).tolist()]
    assert lengths == sorted(lengths)
    behind = sum(len(s["input_ids"]) > min(10, s["prompt_len"] or len(s["input_ids"])) for s in samples)
    held_out = [row for batch in batches for row in zip(batch["held_out"], batch["prompt_mask"].sum(1), strict=True)]
    assert sum(bool(h) for h, _ in held_out) == -(-behind // 10)
    one_batching, other = (collate(samples, mod, 2, size, "data") for size in (100, 3))
    assert torch.equal(one_batching[0]["held_out"], torch.cat([batch["held_out"] for batch in other]))


def test_no_prompt_is_held_out_and_fitted_on():
    """With one answer or with several; of fewer than ten prompts samples are held out, whatever they ask."""
    samples = [sample | {"asked": f"{number % 40}"} for number, sample in enumerate(some_samples(100))]
    told = [sample | {"input_ids": [number, *sample["input_ids"]]} for number, sample in enumerate(samples)]
    found: dict[bool, set[str]] = {True: set(), False: set()}
    for batch in collate(told, config("attn_sequence"), 2, 8, "data"):
        for ids, held_out in zip(batch["input_ids"], batch["held_out"].tolist(), strict=True):
            found[held_out].add(told[int(ids[0])]["asked"])
    assert len(found[True]) == 4 and len(found[False]) == 36 and not found[True] & found[False]
    few = [sample | {"asked": "the same"} for sample in samples]
    batches = collate(few, config("attn_sequence"), 2, 8, "data")
    assert sum(int(batch["held_out"].sum()) for batch in batches) == 10


@pytest.mark.parametrize(
    ("samples", "more", "words"),
    [
        (9, {}, "data: 9 usable samples; patches need 10, one of them held out"),
        (12, {}, "data: 20 tokens to fit patches of rank 20 on; give more --data or --max-samples, or a lower rank"),
        (20, {"window": 1}, "data: 18 tokens behind the window of 1 tokens to fit patches of rank 20 on"),
        (20, {"window": 9}, "data: 0 tokens behind the window of 9 tokens to fit patches of rank 20 on"),
    ],
)
def test_too_little_data(samples, more, words):
    sample = {"input_ids": [5, 6], "labels": [5, 6], "prompt_len": 0}
    with pytest.raises(ConfigError) as error:
        collate([sample] * samples, config("attn_sequence", **more), 20, 4, "data")
    assert str(error.value).startswith(words)


def test_tokens_that_are_all_alike(tmp_path):
    """There are as many as the rank needs, and they differ in fewer directions."""
    mod = config("mlp_static")
    model = make_llama().eval()
    attach_routers(model, mod)
    same = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7], "prompt_len": 2}] * 20
    with pytest.raises(ConfigError, match="layer 1: 60 tokens differ in 2 directions, which does not do for"):
        fit_patches(model, collate(same, mod, 3, 4, "data"), 3, tmp_path, quiet=True)
    assert fit_patches(model, collate(same, mod, 2, 4, "data"), 2, tmp_path, quiet=True)


def test_activations_that_are_not_finite_are_named(tmp_path):
    mod = config("attn_sequence")
    model = routed(mod)
    model.model.layers[1].mlp.down_proj.weight.data.fill_(torch.finfo(torch.float32).max)
    with pytest.raises(ConfigError, match="layer 2: activations are not finite; the base model overflows"):
        fit_patches(model, collate(some_samples(), mod, 2, 4, "data"), 2, tmp_path, quiet=True)


def test_in_bf16_it_is_the_same_but_for_rounding(tmp_path):
    mod = config("block_sequence", window=3)
    batches, found = collate(some_samples(), mod, 4, 6, "data"), []
    for dtype in (torch.float32, torch.bfloat16):
        model = make_llama().to(dtype)
        attach_routers(model, mod, random_routers())
        found.append(fit_patches(model, batches, 4, tmp_path, quiet=True))
        assert all(one.patch.bias.dtype == torch.float32 for one in found[-1].values())
    torch.testing.assert_close(found[0][1].patch.bias, found[1][1].patch.bias, atol=0.05, rtol=0.05)


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(layerwise.HiddenStates, "_write", full)
    with pytest.raises(ConfigError, match="hidden states cannot be kept: No space left on device; lower --max-samples"):
        fitted(config("attn_sequence"), 2, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_hidden_states_come_back_as_they_were(tmp_path, dtype):
    states = layerwise.HiddenStates(tmp_path)
    parts = [torch.randn(2, 3, 5).to(dtype), torch.randn(1, 7, 5).to(dtype)]
    for _ in range(2):
        for number, part in enumerate(parts):
            states.put(number, part)
        assert all(torch.equal(states.get(number), part) for number, part in enumerate(parts))
        parts = [-part for part in parts]
    states.close()


@torch.no_grad()
def test_of_a_real_small_model_the_loss_is_nearer_to_the_dense_one(tmp_path):
    """Held-out answers, with what is skipped replaced by nothing, by the mean, by a map."""
    from types import SimpleNamespace

    root = Path(__file__).parents[3] / "demo"
    args = SimpleNamespace(data=[str(root / "data.jsonl.gz")], eval_fraction=0.02, max_length=64, max_samples=80)
    samples, _ = calibration_samples(args, root / "model")
    train, held_out = samples[:60], Collator(0)(samples[60:])
    mod = ModConfig.parse({"version": 1, "granularity": "attn_static", "layers": [0, 1]}, "test")
    held_out.pop("prompt_mask")
    losses = []
    for rank in (None, 0, 16):
        model = load_base(root / "model", torch.float32).eval()
        if not losses:
            losses.append(float(model(**held_out).loss))
        attach_routers(model, mod)
        if rank is not None:
            fit_patches(model, collate(train, mod, rank, 16, "data"), rank, tmp_path, quiet=True)
        losses.append(float(model(**held_out).loss))
    dense, nothing, mean, mapped = losses
    assert dense < mapped < mean < nothing and mapped - dense < 0.7 * (nothing - dense), losses
