"""A backbone whose deep attentions are redundant, as those of large models are: a second testbed for `ablations`.

Goes on training a small base model, all of its parameters, with stochastic depth (arXiv 1603.09382) on the attentions
of --layers: each sample skips each of them with probability --skip, and the residual stream passes by, as where a
router skips. The last part of each file is held out, as in `router-tuning train`. The last line is {"steps", "loss",
"skip"}.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup

from router_tuning.data import IGNORED, Collator, read_sources, split_tail, tokenize
from router_tuning.model import decoder_layers, load_base
from router_tuning.tokenizer import load_tokenizer
from vllm_mod.config import ConfigError, default_layers

from .lib.common import command_line, fraction, progress, run_command


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command_line("redundant", __doc__)
    add = parser.add_argument
    add("--model", type=Path, required=True, help="base model, a directory")
    add("--data", nargs="+", required=True, help="as for `router-tuning train`")
    add("--output", type=Path, required=True, help="where the model goes; must not be there yet")
    add("--layers", type=int, nargs="+", help="default: those that routers get by default")
    add("--skip", type=float, default=0.5, help="probability (default: %(default)s)")
    add("--steps", type=int, default=600, help="default: %(default)s")
    add("--batch-size", type=int, default=16, help="samples per step (default: %(default)s)")
    add("--max-length", type=int, default=128, help="tokens of a sample (default: %(default)s)")
    add("--learning-rate", type=float, default=1e-3, help="at its highest, cosine decay (default: %(default)s)")
    add("--fraction", type=fraction, default=0.02, help="held-out part of a file (default: %(default)s)")
    add("--seed", type=int, default=0, help="default: %(default)s")
    args = parser.parse_args(argv)
    if not args.model.is_dir():
        parser.error(f"--model {args.model}: no such directory")
    if args.output.exists():
        parser.error(f"--output {args.output}: is there already")
    if not 0 <= args.skip < 1:
        parser.error(f"--skip {args.skip}: a probability below 1")
    return args


def stochastic_depth(attention: nn.Module, probability: float, generator: torch.Generator) -> None:
    """Replace the output of a sample's attention by zero, with `probability`, in every forward."""

    def skip(_: nn.Module, args: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        kept = torch.rand(len(output[0]), 1, 1, generator=generator) >= probability
        return output[0] * kept, *output[1:]

    attention.register_forward_hook(skip)


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    tokenizer = load_tokenizer(args.model)
    rows, _ = split_tail(read_sources(args.data), args.fraction)
    samples, counts = tokenize(rows, tokenizer, args.max_length, args.steps * args.batch_size, args.seed)
    if not len(samples):
        raise ConfigError(f"--data: no usable sample among {counts.read} rows")
    model = load_base(args.model, torch.float32).train()
    layers: Any = decoder_layers(model)
    for layer in args.layers or default_layers(len(layers)):
        stochastic_depth(layers[layer].self_attn, args.skip, generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.1, betas=(0.9, 0.95))
    schedule = get_cosine_schedule_with_warmup(optimizer, args.steps // 20, args.steps)
    collate = Collator(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0)
    loss, bar = torch.tensor(0.0), tqdm(range(args.steps), desc="stochastic depth")
    for step in bar:
        picked = [samples[(step * args.batch_size + i) % len(samples)] for i in range(args.batch_size)]
        batch = collate(picked)
        with torch.autocast("cpu", torch.bfloat16):
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
            loss = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    model.to(torch.bfloat16).save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    progress(f"wrote {args.output}")
    print(json.dumps({"steps": args.steps, "loss": round(loss.item(), 4), "skip": args.skip}))


if __name__ == "__main__":
    run_command(main, "redundant", "interrupted; nothing is written")
