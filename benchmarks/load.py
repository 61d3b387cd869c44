"""What a server does when requests arrive faster than it can answer: `vllm serve`, asked by `vllm bench serve`.

  stock   the plain architecture
  fixed   the routed checkpoint at `--kept` of its routed layers, whatever the load
  load    the same checkpoint, dense when idle and down to `--kept` under load (`under_load`)

All with prefix caching and chunked prefill. Requests arrive as a Poisson process, at `--rates` times the rate at which
stock saturates (measured first: all requests at once). Weights are random ("dummy"), so nothing is said of quality. The
last line is {"saturation_rps", "points": [{"system", "rate", "tokens_per_s", "ttft_ms", "tpot_ms", "cached",
"preemptions", "kept_ratio"}]}, with [p50, p99] of times to the first token and per output token, and the share of
prompt tokens that was found in the prefix cache: each rate has prompts of its own, so next to none.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.support.server import Server, serve
from vllm_mod.calibration import Calibration, write_calibration

from .lib.common import (
    command,
    command_line,
    cpu_flags,
    llama_config,
    machine,
    markdown_table,
    output_argument,
    progress,
    routed_config,
    run_command,
    write_json,
)
from .lib.shapes import SHAPES, routed_layers, skipped_layers

TOKENIZER = Path(__file__).parents[1] / "demo/model"
SYSTEMS = ("stock", "fixed", "load")
LEVELS = 4
#: tokens that the tokenizer has, of shapes that are no model's
VOCABULARY = 4096


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command_line("load", __doc__)
    parser.add_argument("--shape", choices=SHAPES, default="cpu-attention", help="default: %(default)s")
    parser.add_argument("--routed", type=int, default=8, help="routed layers, a multiple of 4 (default: %(default)s)")
    parser.add_argument("--kept", type=float, default=0.5, help="of the routed layers, under load (default: 0.5)")
    parser.add_argument("--window", type=int, default=64, help="tokens that decide (default: %(default)s)")
    parser.add_argument("--prompt", type=int, default=512, help="prompt tokens, on average (default: %(default)s)")
    parser.add_argument("--output-len", type=int, default=64, help="generated tokens (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=64, help="of each point (default: %(default)s)")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.5, 0.8, 1.25, 2.0], help="of stock's saturation")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), help="default: all")
    parser.add_argument("--kv-cache-memory-bytes", type=int, default=512 << 20, help="default: 512 MiB")
    parser.add_argument("--max-num-seqs", type=int, default=32, help="default: %(default)s")
    output_argument(parser, "load/result.json")
    args = parser.parse_args(argv)
    total = SHAPES[args.shape]["num_hidden_layers"]
    if not 0 < args.routed < total or args.routed % LEVELS:
        parser.error(f"--routed {args.routed}: a multiple of {LEVELS} below this shape's {total} layers")
    if "stock" not in args.systems:
        parser.error("--systems: rates are multiples of what 'stock' can do")
    return args


def checkpoints(directory: Path, args: argparse.Namespace) -> dict[str, tuple[Path, list[str]]]:
    """System -> (checkpoint without weights, its own flags)."""
    base = llama_config(directory / "base", **({"vocab_size": VOCABULARY} | SHAPES[args.shape]))
    layers = routed_layers(SHAPES[args.shape]["num_hidden_layers"], args.routed)
    fixed = routed_config(
        directory / "fixed", base, "attn_sequence", layers, _thresholds(layers, args.kept), args.window
    )  # fmt: skip
    load = routed_config(directory / "load", base, "attn_sequence", layers, [0.0] * len(layers), args.window)
    ratios = [1 - level / LEVELS * (1 - args.kept) for level in range(1, LEVELS + 1)]
    points = [{"target": kept, "kept": kept, "threshold": _thresholds(layers, kept)} for kept in ratios]
    write_calibration(load, Calibration.parse({"operating_points": points}, "operating points"))
    policy = {"mod": {"under_load": {"kept": args.kept, "levels": LEVELS, "waiting": [0, 8]}}}
    return {"stock": (base, []), "fixed": (fixed, []), "load": (load, ["--additional-config", json.dumps(policy)])}


def _thresholds(layers: Sequence[int], kept: float) -> list[float]:
    """0 keeps and 1 skips whatever a router scores: random ones would not tell requests apart."""
    skipped = skipped_layers(layers, kept)
    return [1.0 if layer in skipped else 0.0 for layer in layers]


def server_flags(args: argparse.Namespace) -> list[str]:
    flags = {
        "load-format": "dummy", "tokenizer": TOKENIZER, "max-model-len": 2 * args.prompt + args.output_len,
        "max-num-seqs": args.max_num_seqs, "kv-cache-memory-bytes": args.kv_cache_memory_bytes, "block-size": 32,
        "served-model-name": "model", **cpu_flags(),
    }  # fmt: skip
    return ["--enforce-eager", *(word for name, value in flags.items() for word in (f"--{name}", str(value)))]


def ask(server: Server, args: argparse.Namespace, rate: float, seed: int, directory: Path) -> dict[str, Any]:
    """What `vllm bench serve` finds at this rate, in requests per second; seed: of prompts that no other rate has."""
    found, before = directory / "found.json", server.totals()
    words = {
        "backend": "vllm", "base-url": server.url, "model": "model", "tokenizer": TOKENIZER, "dataset-name": "random",
        "random-input-len": args.prompt, "random-output-len": args.output_len, "random-range-ratio": "0.5",
        "num-prompts": args.requests, "request-rate": rate, "seed": seed, "percentile-metrics": "ttft,tpot",
        "metric-percentiles": "50,99", "result-dir": directory, "result-filename": found.name,
    }  # fmt: skip
    client = [str(Path(sys.executable).with_name("vllm")), "bench", "serve", "--ignore-eos", "--save-result"]
    done = subprocess.run(
        [*client, *(word for name, value in words.items() for word in (f"--{name}", str(value)))],
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"vllm bench serve: status {done.returncode}: {done.stderr[-2000:]}")
    result, after = json.loads(found.read_text()), server.totals()
    assert result["completed"] == args.requests, result
    changed = {name: after.get(name, 0) - before.get(name, 0) for name in after}
    routed = changed.get("vllm:mod_routed_total", 0)
    return {
        "requests_per_s": round(result["request_throughput"], 3),
        "tokens_per_s": round(result["output_throughput"], 1),
        "ttft_ms": [round(result[f"p{p}_ttft_ms"], 1) for p in (50, 99)],
        "tpot_ms": [round(result[f"p{p}_tpot_ms"], 2) for p in (50, 99)],
        "cached": round(changed["vllm:prefix_cache_hits_total"] / changed["vllm:prefix_cache_queries_total"], 3),
        "preemptions": int(changed["vllm:num_preemptions_total"]),
        "kept_ratio": round(changed["vllm:mod_kept_total"] / routed, 4) if routed else None,
    }


def measure(args: argparse.Namespace, record: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {"saturation_rps": None, "points": []}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        systems = checkpoints(directory, args)
        for system in [name for name in SYSTEMS if name in args.systems]:
            progress(f"starting {system}")
            checkpoint, flags = systems[system]
            log, env = directory / f"{system}.log", {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
            with serve(checkpoint, *server_flags(args), *flags, log=log, env=env, timeout=600) as server:
                at_once = ask(server, args, float("inf"), 0, directory)
                if system == "stock":
                    result["saturation_rps"] = at_once["requests_per_s"]
                for seed, share in enumerate(args.rates, 1):
                    found = ask(server, args, share * result["saturation_rps"], seed, directory)
                    result["points"].append({"system": system, "rate": share, **found})
                    progress(json.dumps(result["points"][-1]))
                    write_json(args.output, record | {"result": result})  # what is done stays
    return result


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    record = {"command": command("load"), "machine": machine(), "shape": SHAPES[args.shape]}
    result = measure(args, record | {"flags": [str(flag) for flag in server_flags(args) if "/" not in str(flag)]})
    columns = ["system", "rate", "tokens_per_s", "ttft_ms", "tpot_ms", "cached", "preemptions", "kept_ratio"]
    progress(markdown_table(columns, [[point[column] for column in columns] for point in result["points"]]))
    print(json.dumps(result))


if __name__ == "__main__":
    run_command(main, "load", "interrupted; what was done is in the result file")
