"""Many requests behind one system prompt: does routing take away what prefix caching gives?

  stock   the plain architecture
  mod     the routed checkpoint, `--kept` of the routed layers, the decision taken from the first `--window` tokens

Both run with vLLM's own prefix caching and chunked prefill, and have the system prompt cached from an earlier request.
All requests are submitted at once; engines, each in a process, take turns step by step. Weights are random ("dummy").
The last line is

  {"ttft_ratio", "throughput_ratio", "cached_tokens", "spread"}

routed / stock: the mean time to the first token, and generated tokens over all the time; medians of the repeats.
spread: (max - min) / median. cached_tokens: of all repeats' prompts, per system.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .lib.common import command, command_line, machine, output_argument, progress, run_command, write_json
from .lib.engines import Load, Times, engine_flags, run_in_turn, start_engines
from .lib.shapes import SHAPES, four_systems, positions, routed_layers, settle_routed


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command_line("shared_prompt", __doc__)
    parser.add_argument("--shape", choices=SHAPES, default="cpu-attention", help="default: %(default)s")
    parser.add_argument("--granularity", default="attn_sequence", help="default: %(default)s")
    parser.add_argument("--requests", type=int, default=64, help="submitted at once (default: %(default)s)")
    parser.add_argument("--system", type=int, default=1000, help="tokens of the system prompt (default: %(default)s)")
    parser.add_argument("--own", type=int, default=64, help="tokens of each request's own (default: %(default)s)")
    parser.add_argument("--output-len", type=int, default=64, help="generated tokens (default: %(default)s)")
    parser.add_argument("--window", type=int, default=64, help="tokens that decide (default: %(default)s)")
    parser.add_argument("--kept", type=float, default=0.25, help="kept ratio of the routed layers (default: 0.25)")
    parser.add_argument("--routed", type=int, default=None, help="routed layers (default: half of them)")
    parser.add_argument("--kv-cache-memory-bytes", type=int, default=2 << 30, help="default: 2 GiB")
    parser.add_argument("--block-size", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--eager", action="store_true", help="no compilation (default: what vLLM does by default)")
    output_argument(parser, "shared_prompt/result.json")
    args = parser.parse_args(argv)
    settle_routed(parser, args)
    if (longest := args.system + args.own + args.output_len) > positions(args.shape):
        parser.error(f"--system: {longest} tokens in all, and {args.shape} has {positions(args.shape)} positions")
    args.caching = True
    return args


def measure(args: argparse.Namespace) -> tuple[dict[str, list[Times]], dict[str, float]]:
    """(times of each repeat per system, cached tokens per system)."""
    prompt = args.system + args.own
    flags = engine_flags(args, prompt + args.output_len, 2048, args.requests)
    times: dict[str, list[Times]] = {"stock": [], "mod": []}
    routed = routed_layers(SHAPES[args.shape]["num_hidden_layers"], args.routed)
    with tempfile.TemporaryDirectory() as directory:
        systems = four_systems(
            Path(directory), SHAPES[args.shape], args.granularity, routed, args.kept, False, args.window
        )  # fmt: skip
        engines = start_engines({name: systems[name] for name in times}, flags)
        run_in_turn(engines, Load(1, prompt, 4, shared=args.system))  # caches the system prompt
        run_in_turn(engines, Load(args.requests, args.own, 2))
        for repeat in range(args.repeats):
            load = Load(args.requests, prompt, args.output_len, shared=args.system, variant=1 + repeat)
            for name, found in run_in_turn(engines, load, repeat).items():
                times[name].append(found)
                progress(f"repeat {repeat + 1} {name:<5} first token after {mean_ttft(found):6.3f} s on average, "
                         f"{found.rate('pool'):8.1f} tokens/s")  # fmt: skip
        cached = {name: engine.metric("vllm:prefix_cache_hits") for name, engine in engines.items()}
        for engine in engines.values():
            engine.stop()
    return times, cached


def mean_ttft(times: Times) -> float:
    assert len(times.first_tokens) == times.requests
    return statistics.mean(times.first_tokens)


def compared(times: dict[str, list[Times]]) -> dict[str, Any]:
    """Repeat by repeat, because the machine's speed drifts between repeats."""
    pairs = list(zip(times["mod"], times["stock"], strict=True))
    found = {
        "ttft_ratio": [mean_ttft(mod) / mean_ttft(stock) for mod, stock in pairs],
        "throughput_ratio": [mod.rate("pool") / stock.rate("pool") for mod, stock in pairs],
    }
    result: dict[str, Any] = {key: round(statistics.median(ratios), 3) for key, ratios in found.items()}
    result["spread"] = {key: round((max(r) - min(r)) / statistics.median(r), 3) for key, r in found.items()}
    return result


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    times, cached = measure(args)
    result = compared(times) | {"cached_tokens": cached}
    seconds = {
        name: {
            "ttft_s": [round(mean_ttft(t), 4) for t in found],
            "tokens_per_s": [round(t.rate("pool"), 1) for t in found],
        }
        for name, found in times.items()
    }
    record = {"command": command("shared_prompt"), "machine": machine(), "shape": SHAPES[args.shape]}
    write_json(args.output, record | {"repeats": seconds, "result": result})
    print(json.dumps(result))


if __name__ == "__main__":
    run_command(main, "shared_prompt", "interrupted; nothing is written")
