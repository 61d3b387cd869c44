"""A Hugging Face causal LM with routers: what is trained, and the reference for the semantics of the checkpoint.

For decoder layer l with router w and sublayer F (arXiv 2410.13184, eq. 2-4):

    keep = w . x >= cutoff        x: F's input after its own norm, cutoff: the config's, or logit(threshold)
    output = residual + F(x) if keep else residual (+ P(x), with a patch P)

Slow and certain: no KV cache; a token that skips attention is masked as a key in that layer. With a window, the first
tokens of a sequence always keep; later ones skip together, so that none of them sees another's key in that layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from vllm_mod.architectures import ARCHITECTURES, Architecture, BaseShape, architecture_of
from vllm_mod.checkpoint import read_mod_config, read_patches, read_routers
from vllm_mod.config import ConfigError, ModConfig
from vllm_mod.files import CONFIG_FILE, read_json, without_strangers
from vllm_mod.tensors import Patch, check_routers, named_tensors

from .experts import gate_experts
from .hub import warn_of_strangers
from .lora import ADAPTER_DIR, load_adapter
from .routing import LinearPatch, ModelRouting, Router, routing_of
from .sublayers import PostNorm, make_skippable, mixins_of


def architecture_of_model(model: nn.Module) -> Architecture:
    """By the name of its class, or of one that it was made from; raises ConfigError if it is not supported."""
    names = [kind.__name__ for kind in type(model).__mro__]
    return architecture_of(next((name for name in names if name in ARCHITECTURES), names[0]))


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """`model.model.layers`; raises ConfigError, naming what is missing, unless every layer can be routed."""
    name = type(model).__name__
    layers = getattr(getattr(model, "model", None), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ConfigError(f"{name} is not supported: it has no decoder layers at model.layers")
    for i, layer in enumerate(layers):
        for part in ("self_attn", "mlp"):
            if not isinstance(getattr(layer, part, None), nn.Module):
                raise ConfigError(f"{name} is not supported: model.layers.{i} ({type(layer).__name__}) has no {part}")
    return layers


def attach_routers(
    model: nn.Module,
    config: ModConfig,
    routers: Mapping[int, Tensor] | None = None,
    patches: Mapping[int, Patch] | None = None,
) -> None:
    """Give `model` the routers and patches of `config`, in place; `routers` (layer -> `[1, hidden]`, for experts
    `[num_experts, hidden]`) or all zero, `patches` or those that add nothing.

    Registers `model.layers.{i}.router.weight` and `….router.patch.…` (float32) and makes the routed sublayers
    skippable. Static granularities get no router: their sublayers are always skipped. Raises ConfigError, with the
    model as it was.
    """
    layers, row = decoder_layers(model), architecture_of_model(model)
    hf_config: Any = model.config
    shape = BaseShape.of(hf_config.to_dict(), type(model).__name__, row.base)
    config.check_fits(shape.num_layers, shape.num_experts, shape.dense_layers)
    if hasattr(model, "_mod_routing"):
        raise ConfigError("this model has routers already")
    implementation = getattr(hf_config, "_attn_implementation", "eager")
    if config.policy.packs_kv and implementation not in ("sdpa", "eager"):
        raise ConfigError(
            f"{config.granularity} masks single keys, which attn_implementation={implementation!r} cannot; "
            "use 'sdpa' or 'eager'"
        )
    if implementation == "sdpa" and row.attention is not None:
        raise ConfigError(
            f"{row.base}: attn_implementation='sdpa' leaves a part of this attention out; use {row.attention!r}"
        )
    routing = ModelRouting(config, residual_multiplier=shape.residual_multiplier, has_post_norms=bool(row.post_norms))
    holders: dict[int, nn.Module] = {}
    for i in config.layers:
        device = next(layers[i].parameters()).device
        rows = config.policy.router_rows(shape.num_experts)
        holders[i] = nn.Module() if config.is_static else Router(shape.hidden_size, device, rows)
        if isinstance(holder := holders[i], Router):
            routing.routers[i] = holder
        if config.patch is not None:
            routing.patches[i] = holders[i].patch = LinearPatch(shape.hidden_size, config.patch.rank, device)
    _fill(routing, holders, shape, routers, patches)
    for i in config.layers:
        if routing.routers or routing.patches:
            layers[i].router = holders[i]
        for part, mixin in mixins_of(config.policy).items():
            make_skippable(getattr(layers[i], part), mixin, i, routing)
            if part in row.post_norms:
                make_skippable(getattr(layers[i], row.post_norms[part]), PostNorm, i, routing)
        if config.policy.by_experts:
            gate_experts(layers[i].mlp, i, routing)
    model._mod_routing = routing  # type: ignore[assignment]
    model.register_forward_pre_hook(_note_padding, with_kwargs=True)
    hf_config.use_cache = False
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.use_cache = False  # type: ignore[union-attr]


@torch.no_grad()
def _fill(
    routing: ModelRouting,
    holders: Mapping[int, nn.Module],
    shape: BaseShape,
    routers: Mapping[int, Tensor] | None,
    patches: Mapping[int, Patch] | None,
) -> None:
    """Copy what is given into the modules; raises ConfigError if it is not what the config asks for."""
    routers = {i: router.weight for i, router in routing.routers.items()} if routers is None else routers
    patches = {i: patch.tensors() for i, patch in routing.patches.items()} if patches is None else patches
    tensors = named_tensors(routers, patches)
    check_routers(tensors, routing.config, shape, "routers")
    for i, holder in holders.items():
        for name, parameter in holder.named_parameters():
            parameter.copy_(tensors[f"model.layers.{i}.router.{name}"])


def _note_padding(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Remember which tokens are padding. Routed layers see no more than a 4D mask, or none."""
    mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    routing = routing_of(model)
    routing.valid = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
    routing.decisions, routing.waiting = {}, {}


@contextlib.contextmanager
def given_prompts(
    model: nn.Module, prompt_mask: Tensor | None = None, scores: Tensor | None = None
) -> Iterator[ModelRouting]:
    """While it lasts, `prompt_mask` (bool `[B, <=T]`; None: all tokens) is the prompt: sequence-level decisions are
    means over it, or over its first tokens where the config has a window. scores: see `ModelRouting.scores`.

    Padding is taken from the `attention_mask` of the forward itself. Yields the state to read `decisions` and
    `kept()` from. Keep it open during `backward` too: gradient checkpointing decides again there.
    """
    state = routing_of(model)
    before = state.prompt_mask, state.scores
    state.prompt_mask, state.scores = prompt_mask, scores
    try:
        yield state
    finally:
        state.prompt_mask, state.scores = before


def freeze_base(model: nn.Module) -> list[nn.Parameter]:
    """Leave only routers and patches trainable; returns their parameters.

    With nothing trainable below it, the first routed layer is where autograd starts to record. The hook keeps it so
    even if something (`enable_input_require_grads`) asks for the gradient of the embeddings.
    """
    model.requires_grad_(False)
    state = routing_of(model)
    trained = [router.weight for router in state.routers.values()]
    trained += [parameter for patch in state.patches.values() for parameter in patch.parameters()]
    for weight in trained:
        weight.requires_grad_(True)

    def detach(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        def cut(value: Any) -> Any:
            return value.detach() if isinstance(value, Tensor) else value

        return tuple(map(cut, args)), {key: cut(value) for key, value in kwargs.items()}

    decoder_layers(model)[0].register_forward_pre_hook(detach, with_kwargs=True)
    return trained


def router_weights(model: nn.Module) -> dict[int, Tensor]:
    """Layer -> router `[1 or num_experts, hidden]`, float32, detached copies on the CPU."""
    return {i: r.weight.detach().float().cpu().clone() for i, r in routing_of(model).routers.items()}


def patch_weights(model: nn.Module, dtype: torch.dtype = torch.float32) -> dict[int, Patch]:
    """Layer -> patch, likewise; empty where there are none."""
    return {i: patch.tensors(dtype) for i, patch in routing_of(model).patches.items()}


# ---------------------------------------------------------------- the reference


def load_reference(
    checkpoint_dir: str | Path,
    dtype: torch.dtype = torch.float32,
    config: ModConfig | None = None,
    attn_implementation: str | None = None,
) -> Any:
    """A full checkpoint as its stock HF class with routers, in eval mode.

    `config` overrides the thresholds; it may also be static (of some of the layers), and have no window or patch.

    An adapter that lies unmerged in the checkpoint is part of it: the routers were trained with it.
    """
    directory = Path(checkpoint_dir)
    stored = read_mod_config(directory)
    shape = BaseShape.of(read_json(directory / CONFIG_FILE), str(directory / CONFIG_FILE))
    routers = read_routers(directory, stored, shape)
    model = load_base(directory, dtype, attn_implementation)
    config = config or stored
    patches = read_patches(directory, stored, shape) if config.patch is not None else {}
    patches = {layer: patch for layer, patch in patches.items() if layer in config.layers}
    attach_routers(model, config, None if config.is_static else routers, patches)
    if (directory / ADAPTER_DIR).is_dir():
        load_adapter(model, directory / ADAPTER_DIR)
    return model.eval()


def load_base(directory: str | Path, dtype: torch.dtype, attn_implementation: str | None = None) -> Any:
    """The stock HF model of `directory` as it would be served: of its config and the weights that its index names.

    An adapter, other weights or code that lie beside them are left out, with a warning. Router tensors in the index are
    left for `attach_routers`. Raises ConfigError where this is no whole model.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    from .deepseek import register

    register()
    directory = Path(directory)
    try:
        hf_config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(hf_config)]
    except (KeyError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{directory}: not a causal language model that transformers knows: {reason}") from None
    if hasattr(hf_config, "transformers_weights"):
        hf_config.transformers_weights = None  # names a file that vLLM does not ask for
    warn_of_strangers(directory)
    attn_implementation = attn_implementation or _attention(model_class)
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    with without_strangers(directory) as view, _ignoring_routers(model_class):
        try:
            model, info = model_class.from_pretrained(
                view, config=hf_config, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
        except (ImportError, OSError, RuntimeError, ValueError, SafetensorError) as error:
            raise ConfigError(f"{directory}: weights cannot be loaded: {' '.join(str(error).split())}") from None
    # transformers would fill both with random numbers
    if missing := sorted(info["missing_keys"]):
        raise ConfigError(f"{directory}: the weights lack {missing[0]} ({len(missing)} tensors in all)")
    for name, found, needed in info["mismatched_keys"]:
        raise ConfigError(f"{directory}: {name} has shape {list(found)}, the config asks for {list(needed)}")
    model.name_or_path = model.config.name_or_path = str(directory)
    return model


def _attention(model_class: Any) -> str | None:
    row = ARCHITECTURES.get(model_class.__name__)
    return None if row is None else row.attention


@contextlib.contextmanager
def _ignoring_routers(model_class: Any) -> Iterator[None]:
    """transformers warns about tensors it has no place for; routers get theirs a moment later."""
    name = "_keys_to_ignore_on_load_unexpected"
    before = model_class.__dict__.get(name)
    setattr(model_class, name, [*(getattr(model_class, name) or []), r"layers\.\d+\.router\..+"])
    try:
        yield
    finally:
        if before is None:
            delattr(model_class, name)
        else:
            setattr(model_class, name, before)


@torch.no_grad()
def reference_logits(model: Any, token_ids: list[int], prompt_len: int) -> Tensor:
    """Logits `[T, vocab]`, float32, of one sequence whose first `prompt_len` tokens are the prompt."""
    ids = torch.tensor([token_ids], device=model.device)
    prompt_mask = torch.arange(len(token_ids), device=model.device)[None] < prompt_len
    with given_prompts(model, prompt_mask):
        return model(input_ids=ids, use_cache=False).logits[0].float()


def reference_decisions(model: nn.Module) -> dict[int, Tensor]:
    """Keep decision per routed layer of the last forward: bool `[B, T]` (token level), `[B]` (sequence level) or
    `[B, T, K]` (of the K experts that each token selected)."""
    return {layer: decision.keep for layer, decision in routing_of(model).decisions.items()}


def reference_scores(model: nn.Module) -> dict[int, Tensor]:
    """`w . x` per routed layer of the last forward: `[B, T]`, or its mean over the prompt `[B]`."""
    return {layer: decision.score.detach() for layer, decision in routing_of(model).decisions.items()}


def greedy(
    model: Any, prompt_ids: list[int], max_new_tokens: int, eos: int | Iterable[int] | None = None
) -> tuple[list[int], list[float]]:
    """Greedy tokens (the end token included) and their log-probabilities, one whole forward per token."""
    stop = {eos} if isinstance(eos, int) else set(eos or ())
    tokens: list[int] = []
    logprobs: list[float] = []
    for _ in range(max_new_tokens):
        logits = reference_logits(model, prompt_ids + tokens, len(prompt_ids))[-1]
        tokens.append(int(logits.argmax()))
        logprobs.append(float(logits.log_softmax(-1)[tokens[-1]]))
        if tokens[-1] in stop:
            break
    return tokens, logprobs
