"""How long vLLM's CPU attention takes over the same KV when a layer's pages lie in other places of the pool.

  neighbours  a layer's pages of one request lie side by side (`vllm_mod.kv.pages` hands them out so)
  strided     they lie as many pages apart as there are layers: rows filled in the order in which they are read
  random      a pool that has been used for long, at worst

One decode step of a batch, attention only, in CPU time, which other work on the machine disturbs less. The last line is
{"ms": {...}, "to_neighbours": {...}}: medians, and those of the ratios repeat by repeat.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from .lib.common import command, command_line, machine, output_argument, run_command, write_json

BLOCK = 32  # tokens


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command_line("page_order", __doc__)
    for name, value in (("layers", 16), ("requests", 16), ("context", 2048), ("heads", 8), ("head-dim", 64)):
        parser.add_argument(f"--{name}", type=int, default=value, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=15, help="default: %(default)s")
    output_argument(parser, "page_order/result.json")
    args = parser.parse_args(argv)
    if args.context % BLOCK:
        parser.error(f"--context {args.context}: a multiple of {BLOCK}")
    return args


def tables(layers: int, requests: int, blocks: int) -> dict[str, Tensor]:
    """Order -> int32 `[layers, requests, blocks]`: the page of each layer, request and token block."""
    total = layers * requests * blocks
    pages = torch.arange(total).view(requests, layers, blocks)
    generator = torch.Generator().manual_seed(0)
    return {
        "neighbours": pages.transpose(0, 1).int().contiguous(),
        "strided": pages.view(requests, blocks, layers).permute(2, 0, 1).int().contiguous(),
        "random": torch.randperm(total, generator=generator).view(layers, requests, blocks).int(),
    }


def measure(args: argparse.Namespace) -> dict[str, list[float]]:
    """Order -> CPU seconds of each repeat; orders take turns."""
    import vllm._custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    heads, size, requests, dtype = args.heads, args.head_dim, args.requests, torch.bfloat16
    orders = tables(args.layers, requests, args.context // BLOCK)
    pool = torch.randn(2, orders["random"].numel(), heads, BLOCK, size).to(dtype)
    query = torch.randn(requests, heads, size).to(dtype)
    lengths = torch.full((requests,), args.context, dtype=torch.int32)
    starts = torch.arange(requests + 1, dtype=torch.int32)
    schedule = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=requests, num_heads=heads, num_kv_heads=heads, head_dim=size, seq_lens=lengths, dtype=dtype,
        query_start_loc=starts, causal=True, sliding_window_size=-1, isa=_get_attn_isa(dtype, BLOCK, size),
        enable_kv_split=True,
    )  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in orders}
    for _ in range(args.repeats):
        for name, layers in orders.items():
            begin = time.process_time()
            for table in layers:
                ops.cpu_attention_with_kv_cache(
                    query=query, key_cache=pool[0], value_cache=pool[1], output=torch.empty_like(query),
                    query_start_loc=starts, seq_lens=lengths, scale=size**-0.5, causal=True, alibi_slopes=None,
                    sliding_window=-1, block_table=table, softcap=0, scheduler_metadata=schedule, s_aux=None,
                )  # fmt: skip
            seconds[name].append(time.process_time() - begin)
    return seconds


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    seconds = measure(args)
    ratios = {n: [a / b for a, b in zip(found, seconds["neighbours"], strict=True)] for n, found in seconds.items()}
    quartiles = {name: [round(q, 3) for q in statistics.quantiles(found)] for name, found in ratios.items()}
    result = {
        "ms": {name: round(1e3 * statistics.median(found), 2) for name, found in seconds.items()},
        "to_neighbours": {name: found[1] for name, found in quartiles.items()},
    }
    record = {"command": command("page_order"), "machine": machine(), "quartiles": quartiles}
    write_json(args.output, record | {"result": result})
    print(json.dumps(result))


if __name__ == "__main__":
    run_command(main, "page_order", "interrupted; nothing is written")
