"""The reference semantics of design section 2, against loops that share no code with it."""

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
    reference_decisions,
    reference_logits,
)
from tests.unit.training.helpers import HIDDEN, LAYERS, VOCAB, make_llama
from vllm_mod.checkpoint import write_checkpoint
from vllm_mod.config import ConfigError, ModConfig

ROUTED = (1, 2)
DYNAMIC = [f"{target}_{level}" for target in ("attn", "mlp", "block") for level in ("token", "sequence")]
STATIC = ["attn_static", "mlp_static", "block_static"]
IDS = torch.randint(3, VOCAB, (23,), generator=torch.Generator().manual_seed(5)).tolist()
PROMPT = 9


def config(granularity: str, **more) -> ModConfig:
    version = 2 if {"window", "patch", "cutoff"} & more.keys() else 1
    return ModConfig.parse({"version": version, "granularity": granularity, "layers": list(ROUTED), **more}, "test")


def random_routers(seed: int = 3) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {i: torch.randn(1, HIDDEN, generator=generator) for i in ROUTED}


def routed(granularity: str, routers=None, **more) -> nn.Module:
    llama_options = {k: more.pop(k) for k in ("attn_implementation", "sliding_window") if k in more}
    model = make_llama(**llama_options)
    attach_routers(model, config(granularity, **more), routers)
    return model


def by_hand(model, ids: list[int], granularity: str, routers, prompt_len: int, window: int | None = None, patches=None):
    """Token by token, with explicit lists of visible keys. model: stock Llama. Returns logits `[T, vocab]`."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    target, level = granularity.split("_")
    x = model.model.embed_tokens(torch.tensor(ids))
    cos, sin = model.model.rotary_emb(x[None], torch.arange(len(ids))[None])

    def decide(h: Tensor, layer: int) -> list[bool]:
        if level == "static":
            return [False] * len(ids)
        scores = [float((h[t].double() * routers[layer][0].double()).sum()) for t in range(len(ids))]
        if level == "sequence":
            deciding = prompt_len if window is None else min(window, prompt_len)
            mean = sum(scores[:deciding]) / deciding
            return [mean >= 0 or (window is not None and t < deciding) for t in range(len(ids))]
        return [s >= 0 for s in scores]

    def instead(layer: int, x: Tensor) -> Tensor:
        if patches is None or layer not in ROUTED:
            return torch.zeros(HIDDEN)
        patch = patches[layer]
        return patch.bias if patch.up is None else patch.up @ (patch.down @ x) + patch.bias

    for i, layer in enumerate(model.model.layers):
        h = layer.input_layernorm(x)
        keep = decide(h, i) if i in ROUTED and target in ("attn", "block") else [True] * len(ids)
        attn = layer.self_attn
        shape = (1, len(ids), -1, attn.head_dim)
        q, k = (p(h).view(shape).transpose(1, 2) for p in (attn.q_proj, attn.k_proj))
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        q, k, v = q[0], k[0], attn.v_proj(h).view(shape).transpose(1, 2)[0]
        rows = []
        for t in range(len(ids)):
            visible = [s for s in range(t + 1) if keep[s]]
            heads = []
            for head in range(q.shape[0]):
                kv = head // attn.num_key_value_groups
                if visible and keep[t]:
                    weights = (k[kv, visible] @ q[head, t] * attn.scaling).softmax(0)
                    heads.append(weights @ v[kv, visible])
                else:
                    heads.append(torch.zeros(attn.head_dim))
            rows.append(attn.o_proj(torch.cat(heads)) if keep[t] else instead(i, h[t]))
        x = x + torch.stack(rows)
        h = layer.post_attention_layernorm(x)
        if i in ROUTED and target == "mlp":
            keep = decide(h, i)
        elif i not in ROUTED or target == "attn":
            keep = [True] * len(ids)
        nothing = torch.zeros(HIDDEN)  # the patch of a block stands in the attention's place
        x = x + torch.stack(
            [layer.mlp(h[t]) if keep[t] else instead(i, h[t]) if target == "mlp" else nothing for t in range(len(ids))]
        )
    return model.lm_head(model.model.norm(x))


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("granularity", DYNAMIC + STATIC)
def test_agrees_with_a_loop_over_tokens(granularity, implementation):
    routers = {} if granularity in STATIC else random_routers()
    model = routed(granularity, routers, attn_implementation=implementation)
    expected = by_hand(make_llama(), IDS, granularity, routers, PROMPT)
    torch.testing.assert_close(reference_logits(model, IDS, PROMPT), expected, atol=2e-4, rtol=1e-4)
    if granularity.endswith("token"):
        kept = torch.cat([k.flatten() for k in reference_decisions(model).values()]).float().mean()
        assert 0.1 < kept < 0.9  # otherwise this shows nothing


@pytest.mark.parametrize("granularity", DYNAMIC)
def test_zero_routers_equal_the_base_model_bit_for_bit(granularity, llama):
    model = routed(granularity)
    with torch.no_grad():
        base = llama(torch.tensor([IDS])).logits[0]
    if granularity in ("attn_token", "block_token"):  # a mask in place of is_causal: another kernel
        torch.testing.assert_close(reference_logits(model, IDS, PROMPT), base, atol=1e-5, rtol=1e-5)
    else:
        assert torch.equal(reference_logits(model, IDS, PROMPT), base)


@pytest.mark.parametrize("granularity", DYNAMIC)
def test_zero_routers_equal_the_base_model_exactly_with_eager_attention(granularity):
    model = routed(granularity, attn_implementation="eager")
    with torch.no_grad():
        base = make_llama(attn_implementation="eager")(torch.tensor([IDS])).logits[0]
    assert torch.equal(reference_logits(model, IDS, PROMPT), base)


@pytest.mark.parametrize("granularity", DYNAMIC)
def test_threshold_0_is_the_base_and_1_the_static_model(granularity):
    with torch.no_grad():
        base = make_llama(attn_implementation="eager")(torch.tensor([IDS])).logits[0]
    dense = routed(granularity, random_routers(), threshold=0.0, attn_implementation="eager")
    assert torch.equal(reference_logits(dense, IDS, PROMPT), base)
    skipping = routed(granularity, random_routers(), threshold=1.0)
    static = routed(granularity.split("_")[0] + "_static")
    logits = reference_logits(skipping, IDS, PROMPT)
    assert torch.equal(logits, reference_logits(static, IDS, PROMPT))
    assert logits.isfinite().all()
    assert not any(keep.any() for keep in reference_decisions(skipping).values())


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("granularity", DYNAMIC)
def test_padding_changes_nothing(granularity, side):
    model = routed(granularity, random_routers())
    long, short = IDS, IDS[4:15]
    expected = [reference_logits(model, ids, n) for ids, n in ((long, PROMPT), (short, 5))]
    gap = [2] * (len(long) - len(short))
    ids = torch.tensor([long, gap + short if side == "left" else short + gap])
    mask, prompt = torch.ones_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    start = len(gap) if side == "left" else 0
    mask[1] = 0
    mask[1, start : start + len(short)] = 1
    prompt[0, :PROMPT] = True
    prompt[1, start : start + 5] = True
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with given_prompts(model, prompt):
        logits = model(ids, attention_mask=mask, position_ids=positions).logits
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[0], expected[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits[1, start : start + len(short)], expected[1], atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("granularity", ["attn_sequence", "mlp_sequence", "block_sequence"])
def test_a_sequence_decision_ignores_what_follows_the_prompt(granularity):
    model = routed(granularity, random_routers())
    scores = []
    for tail in ([7, 8, 9], [100, 90, 80, 70, 60]):
        with given_prompts(model, torch.ones(1, PROMPT, dtype=torch.bool)) as state:
            model(torch.tensor([IDS[:PROMPT] + tail]))
            first = state.decisions[ROUTED[0]]
            scores.append(float(first.score))
            assert first.keep.shape == (1,)
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)


@torch.no_grad()
def test_a_sliding_window_survives_routing():
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    settings = MistralConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=5, initializer_range=0.3,
    )  # fmt: skip
    model = MistralForCausalLM(settings).eval()
    base = model(torch.tensor([IDS])).logits[0]
    attach_routers(model, config("attn_token"))
    torch.testing.assert_close(reference_logits(model, IDS, PROMPT), base, atol=1e-5, rtol=1e-5)


def test_no_nan_where_a_skipped_sublayer_overflows():
    model = routed("mlp_token", random_routers(), threshold=1.0)
    freeze_base(model)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(float("inf"))
    with given_prompts(model):
        logits = model(torch.tensor([IDS])).logits
    assert logits.isfinite().all()
    logits.sum().backward()
    assert all(model.model.layers[i].router.weight.grad.isfinite().all() for i in ROUTED)


def test_straight_through_gradient_is_that_of_the_sigmoid():
    model = routed("mlp_token", random_routers())
    weights = freeze_base(model)
    with given_prompts(model) as state:
        model(torch.tensor([IDS]))
        decision = state.decisions[ROUTED[0]]
    assert set(decision.gate.unique().tolist()) <= {0.0, 1.0}
    (got,) = torch.autograd.grad(decision.gate.sum(), decision.score, retain_graph=True)
    soft = torch.sigmoid(decision.score)
    torch.testing.assert_close(got, soft * (1 - soft))
    assert torch.autograd.grad(sum(state.kept().values()), weights[0])[0].abs().sum() > 0


@pytest.mark.parametrize("granularity", DYNAMIC)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_routers_learn_and_the_trunk_keeps_no_graph(granularity, checkpointing):
    model = routed(granularity, random_routers()).train()
    weights = freeze_base(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()  # what peft and Trainer may do: must not bring the trunk back
    seen = []
    model.model.layers[ROUTED[0]].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    ids = torch.tensor([IDS])
    with given_prompts(model, torch.ones(1, PROMPT, dtype=torch.bool)):
        model(ids, labels=ids).loss.backward()
    assert not seen[0].requires_grad and seen[0].grad_fn is None
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"model.layers.{i}.router.weight" for i in ROUTED}
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trained
    assert all(w.grad.abs().sum() > 0 for w in weights)


def test_checkpoint_round_trip(tmp_path, base_dir, caplog):
    routers = random_routers()
    write_checkpoint(base_dir, tmp_path / "ckpt", config("attn_sequence"), routers)
    with caplog.at_level("WARNING"):
        model = load_reference(tmp_path / "ckpt")
    assert "router" not in caplog.text and type(model).__name__ == "LlamaForCausalLM"
    assert torch.equal(
        reference_logits(model, IDS, PROMPT), reference_logits(routed("attn_sequence", routers), IDS, PROMPT)
    )
    dense = load_reference(tmp_path / "ckpt", config=config("attn_sequence", threshold=0.0))
    assert torch.equal(reference_logits(dense, IDS, PROMPT), reference_logits(routed("attn_sequence"), IDS, PROMPT))
    tokens, logprobs = greedy(model, IDS[:PROMPT], 4)
    assert len(tokens) == len(logprobs) == 4
    assert tokens[1] == int(reference_logits(model, IDS[:PROMPT] + tokens[:1], PROMPT)[-1].argmax())
    assert greedy(model, IDS[:PROMPT], 4, eos=tokens[0])[0] == tokens[:1]


def test_refusals_name_what_is_wrong():
    with pytest.raises(ConfigError, match="out of range"):
        attach_routers(make_llama(num_hidden_layers=2), config("attn_token"))
    with pytest.raises(ConfigError, match="expert"):
        attach_routers(make_llama(), config("expert_token"))
    model = make_llama()
    del model.model.layers[2].mlp
    with pytest.raises(ConfigError, match=r"model.layers.2 .* has no mlp"):
        attach_routers(model, config("attn_token"))
    with pytest.raises(ConfigError, match="Linear is not supported"):
        attach_routers(nn.Linear(2, 2), config("attn_token"))
    with pytest.raises(ConfigError, match="already"):
        attach_routers(routed("attn_token"), config("attn_token"))
    with pytest.raises(NotImplementedError, match="KV cache"):
        routed("attn_token")(torch.tensor([IDS]), use_cache=True)
