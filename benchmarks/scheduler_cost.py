"""What pages per (request, layer) cost the scheduler, against stock allocation, prefix caching on in both.

Drives vLLM's own `KVCacheManager` as `Scheduler.schedule()` does, without a model: lookups and prefills, then decoding,
then the end of every request, and what is told to workers and heard of them. Three ways to allocate, taking turns in
one process:

  stock   vLLM's full-attention manager: one block per token block, for all layers
  pages   this plugin's manager, nothing skipped
  skip    this plugin's manager, every request skips half of the layers behind its window

Reported per request and step in microseconds (median over the repeats, with the spread). New pages come with every
block_size-th token, so decode steps are averaged over whole blocks. The last line of stdout is

  {"decode_us": {"stock", "pages", "skip"}, "ratio", "worst_step_ratio", "whole_request_ratio"}

each ratio that of the slower of the two page managers to stock: of a decode step; of the step in which every request
needs new pages at once; and of all a request costs, from its prefill over --steps output tokens to its end.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import time
from collections.abc import Sequence
from typing import Any

from .lib.common import (
    command,
    command_line,
    machine,
    markdown_table,
    output_argument,
    progress,
    run_command,
    write_json,
)


def kv_manager(args: argparse.Namespace, paged: bool) -> Any:
    """A KVCacheManager with room for all requests, of stock blocks or of pages."""
    import torch
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

    from vllm_mod.compat import manager_of
    from vllm_mod.kv.spec import PageSpec

    shape: dict[str, Any] = {"num_kv_heads": 8, "head_size": 128, "dtype": torch.bfloat16}
    shape["block_size"] = args.block_size
    spec = PageSpec(**shape, columns=args.layers, routed=routed(args)) if paged else FullAttentionSpec(**shape)
    tokens = args.requests * (args.prompt + args.steps + args.block_size)
    blocks = (tokens // args.block_size + 1) * (args.layers if paged else 1)
    names = [f"model.layers.{i}.self_attn.attn" for i in range(args.layers)]
    manager = KVCacheManager(
        KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(names, spec)]),
        max_model_len=tokens,
        scheduler_block_size=args.block_size,
        hash_block_size=args.block_size,
        enable_caching=True,
    )
    if paged:
        manager_of(manager).use_window(args.window)
    return manager


def routed(args: argparse.Namespace) -> tuple[int, ...]:
    return tuple(range(1, args.layers, 2))


def make_requests(args: argparse.Namespace, seed: int) -> list[Any]:
    """Of different tokens: each has its blocks alone, as a prompt that nobody sent before."""
    from vllm import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.request import Request

    init_none_hash(sha256)
    hasher, params = get_request_block_hasher(args.block_size, sha256), SamplingParams(max_tokens=1 << 20)
    prompts = [[seed * args.requests + n, *[1] * (args.prompt - 1)] for n in range(args.requests)]
    return [Request(f"request-{n}", prompt, params, None, block_hasher=hasher) for n, prompt in enumerate(prompts)]


def schedule(manager: Any, pages: Any, requests: Sequence[Any], tokens: int, new: bool) -> Any:
    """One step as in `schedule()`: lookups, slots, and what workers are told."""
    for request in requests:
        found = (manager.get_computed_blocks(request)[:2] if new else (None, 0))  # fmt: skip
        slots = manager.allocate_slots(request, tokens, found[1], found[0])
        assert slots is not None and not found[1]
        slots.get_block_ids(allow_none=True)
        request.num_computed_tokens += tokens
    return pages.take_message() if pages is not None else None


def one_round(manager: Any, args: argparse.Namespace, keep: bool | None, seed: int) -> dict[str, Any]:
    """Seconds of each phase; the pool must be full again afterwards. keep: None for the stock manager."""
    import numpy as np

    from vllm_mod.compat import manager_of
    from vllm_mod.kv.messages import Scored

    pages = None if keep is None else manager_of(manager)
    free = manager.block_pool.get_num_free_blocks()
    requests = make_requests(args, seed)
    gc.collect()
    clock = time.process_time_ns
    start = clock()
    if pages is not None:
        for request in requests:
            pages.open(request, np.zeros(len(routed(args))))
    message = schedule(manager, pages, requests, args.prompt, new=True)
    prefill = clock() - start
    sums = np.full((-(-args.window // args.block_size), len(routed(args))), 1.0 if keep else -1.0)
    heard = {s.serial: Scored(0, sums, sums[-1] > 0) for s in message.starts} if message is not None else {}
    start = clock()
    for serial, scored in heard.items():
        pages.hear(serial, scored)
    decide, steps = clock() - start, []
    for _ in range(args.steps):
        start = clock()
        for request in requests:
            request.append_output_token_ids(2)
        schedule(manager, pages, requests, 1, new=False)
        steps.append(clock() - start)
    start = clock()
    for request in requests:
        if pages is not None:
            pages.close(request.request_id)
        manager.free(request)
    finish = clock() - start
    assert manager.block_pool.get_num_free_blocks() == free, "pages leaked"
    per_request = 1e-3 / args.requests
    return {
        "prefill_us": prefill * per_request,
        "decide_us": decide * per_request,
        "decode_us": statistics.mean(steps) * per_request,
        "worst_step_us": max(steps) * per_request,
        "finish_us": finish * per_request,
        "whole_request_us": (prefill + decide + sum(steps) + finish) * per_request,
    }


def measure(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    keeps = {"stock": None, "pages": True, "skip": False}
    managers = {name: kv_manager(args, paged=keep is not None) for name, keep in keeps.items()}
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in managers}
    for number in range(args.repeats + 1):
        for name, manager in managers.items():
            rounds[name].append(one_round(manager, args, keeps[name], number))
        progress(f"round {number} of {args.repeats}" + (" (warm-up)" if number == 0 else ""))
    results: dict[str, dict[str, Any]] = {}
    for name, measured in rounds.items():
        results[name] = {}
        for key in measured[0]:
            values = sorted(r[key] for r in measured[1:])
            results[name][key] = round(statistics.median(values), 3)
            results[name][f"{key}_spread"] = [round(values[0], 3), round(values[-1], 3)]
    return results


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command_line("scheduler_cost", __doc__)
    add = parser.add_argument
    add("--layers", type=int, default=32, help="decoder layers")
    add("--requests", type=int, default=256, help="requests running at once")
    add("--prompt", type=int, default=500, help="tokens per prompt")
    add("--steps", type=int, default=128, help="decode steps per round, a multiple of --block-size")
    add("--block-size", type=int, default=16, help="tokens per KV block")
    add("--window", type=int, default=64, help="tokens that decide")
    add("--repeats", type=int, default=7, help="rounds per manager, taking turns, after one of warm-up")
    output_argument(parser, "scheduler_cost/result.json")
    args = parser.parse_args(argv)
    if args.steps % args.block_size:
        parser.error("--steps: a multiple of --block-size is needed, so that whole rows are counted")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    results = measure(args)
    keys = ("prefill_us", "decide_us", "decode_us", "worst_step_us", "finish_us", "whole_request_us")
    progress(markdown_table(["", *keys], [[name, *(r[k] for k in keys)] for name, r in results.items()]))

    def ratio(key: str) -> float:
        return round(max(results[n][key] for n in ("pages", "skip")) / results["stock"][key], 3)

    line = {
        "decode_us": {name: r["decode_us"] for name, r in results.items()},
        "ratio": ratio("decode_us"),
        "worst_step_ratio": ratio("worst_step_us"),
        "whole_request_ratio": ratio("whole_request_us"),
    }
    settings = {k: v for k, v in vars(args).items() if k != "output"}
    about = {"command": command("scheduler_cost"), "machine": machine(), "settings": settings}
    write_json(args.output, about | line | {"managers": results})
    print(json.dumps(line))


if __name__ == "__main__":
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    run_command(main, "scheduler_cost", "interrupted; nothing is written")
