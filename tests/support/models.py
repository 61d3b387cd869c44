"""Tiny models with random weights, and routed checkpoints made of them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vllm_mod.architectures import BaseShape
from vllm_mod.checkpoint import read_json, write_checkpoint
from vllm_mod.config import ModConfig
from vllm_mod.tensors import Patch

SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "<|bos|>{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}<|eos|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_tokenizer() -> Any:
    """A real tokenizer with one token per byte, six special tokens and a chat template."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    tokenizer = Tokenizer(BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    bos, eos, pad = SPECIAL_TOKENS[:3]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad, chat_template=CHAT_TEMPLATE
    )


def tiny_llama(path: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """A random-weight Llama: GQA, a head size of its own, float32."""
    return tiny_model(path, "llama", seed=seed, **overrides)


def tiny_model(path: Path, model_type: str, *, seed: int = 0, **overrides: Any) -> Path:
    """Write a random-weight model with its tokenizer.

    Its weights are large enough that greedy answers differ from prompt to prompt and do not repeat one token, and
    small enough that the softmax is not saturated. `overrides` are fields of its config; None leaves one out.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if model_type == "deepseek":
        from router_tuning.deepseek import register

        register()
    tokenizer = byte_tokenizer()
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 1024,
        "initializer_range": 0.2,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": False,
        "dtype": "float32",
    }
    settings = {key: value for key, value in (settings | overrides).items() if value is not None}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))
    for name, parameter in model.named_parameters():
        if not parameter.any():  # zero as made, a bias or a norm of Gemma's: one that is lost would go unnoticed
            torch.nn.init.normal_(parameter, std=0.2 if name.endswith(".bias") else 1.0)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def random_routers(
    config: ModConfig, hidden_size: int, *, rows: int = 1, seed: int = 0, scale: float = 1.0
) -> dict[int, torch.Tensor]:
    """Routers whose decisions differ between requests (and tokens); none for a static granularity."""
    if config.is_static:
        return {}
    generator = torch.Generator().manual_seed(seed)
    return {layer: scale * torch.randn(rows, hidden_size, generator=generator) for layer in config.layers}


def random_patches(config: ModConfig, hidden_size: int, *, seed: int = 0, scale: float = 0.3) -> dict[int, Patch]:
    """Patches that no answer is the same without; none where the config has none."""
    if config.patch is None:
        return {}
    generator, rank = torch.Generator().manual_seed(seed + 1), config.patch.rank

    def made(*shape: int) -> torch.Tensor:
        return scale * torch.randn(*shape, generator=generator)

    return {
        layer: Patch(made(hidden_size), *((made(rank, hidden_size), made(hidden_size, rank)) if rank else ()))
        for layer in config.layers
    }


def routed_checkpoint(
    base: Path, output: Path, granularity: str, layers: Sequence[int], *, seed: int = 0, **config: Any
) -> Path:
    """`base` with random routers (and patches) at `layers`; `config` are further keys of `mod_config`."""
    version = 2 if config.keys() & {"cutoff", "window", "patch"} else 1
    mod = ModConfig.parse({"version": version, "granularity": granularity, "layers": list(layers), **config}, "test")
    shape = BaseShape.of(read_json(base / "config.json"), str(base))
    rows = mod.policy.router_rows(shape.num_experts)
    routers = random_routers(mod, shape.hidden_size, rows=rows, seed=seed)
    return write_checkpoint(base, output, mod, routers, patches=random_patches(mod, shape.hidden_size, seed=seed))


def edit_json(path: Path, **changes: Any) -> None:
    """Replace top-level keys of a JSON file; None removes one."""
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))
