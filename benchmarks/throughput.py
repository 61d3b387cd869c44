"""What routing costs and what skipping gives, four ways on one machine in one run (design: same flags, alternating).

  stock   the plain architecture
  keep    the routed checkpoint with `force: keep`: pure overhead
  mod     the routed checkpoint at `--kept`: thresholds 0 and 1 per layer, so every request skips the same layers;
          with --mixed random routers, about half of the (request, layer) pairs, each request its own
  static  as many layers dropped for good: what skipping can give at best

Weights are random ("dummy"). All four engines stay up in a process each and are asked in turn, `--repeats` times;
speeds are medians of the repeats. Prefill and decode steps are timed apart, inside vLLM's own engine loop. The last
line is

  {"workload", "tokens_per_s": {...}, "spread": {...}, "kept_ratio", "overhead", "speedup", "fraction_of_static", ...}

where spread is (max - min) / median of the repeats, and differences within it are called not significant.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from .common import RESULTS, command, llama_config, machine, markdown_table, progress, routed_config, write_json

SHAPES: dict[str, dict[str, Any]] = {
    "cpu-attention": {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 16, "num_attention_heads": 8,
                      "num_key_value_heads": 8, "head_dim": 64},
    "llama3-8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
                  "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "max_position_embeddings": 131072,
                  "torch_dtype": "bfloat16"},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8},
}  # fmt: skip
SYSTEMS = ("stock", "keep", "mod", "static")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.throughput",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shape", choices=SHAPES, default="cpu-attention", help="default: %(default)s")
    parser.add_argument("--workload", choices=("decode", "prefill"), default="decode", help="default: %(default)s")
    parser.add_argument("--granularity", default="attn_sequence", help="default: %(default)s")
    parser.add_argument("--requests", type=int, default=16, help="submitted at once (default: %(default)s)")
    parser.add_argument("--prompt", type=int, default=2048, help="prompt tokens (default: %(default)s)")
    parser.add_argument("--output-len", type=int, default=32, help="generated tokens (default: %(default)s)")
    parser.add_argument("--routed", type=int, default=None, help="routed layers (default: half of them)")
    parser.add_argument(
        "--kept", type=float, default=0.5, help="kept ratio of the routed layers (default: %(default)s)"
    )
    parser.add_argument("--mixed", action="store_true", help="each request skips layers of its own")
    parser.add_argument("--kv-cache-memory-bytes", type=int, default=4 << 30, help="default: 4 GiB")
    parser.add_argument("--repeats", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--compile", action="store_true", help="vLLM's default compilation instead of eager")
    parser.add_argument("--output", type=Path, default=RESULTS / "throughput.json", help="default: %(default)s")
    args = parser.parse_args()
    total = SHAPES[args.shape]["num_hidden_layers"]
    args.routed = total // 2 if args.routed is None else args.routed
    if not 0 < args.routed < total:
        parser.error(f"--routed: 1 to {total - 1} of this shape's {total} layers")
    dropped = args.routed * (1 - args.kept)
    if not args.mixed and abs(dropped - round(dropped)) > 1e-9:
        parser.error(f"--kept {args.kept}: {args.routed} routed layers give steps of {1 / args.routed:g} only")
    return args


_state: dict[str, Any] = {}  # of an engine's own process


def start(model: str, mod: dict[str, Any] | None, flags: dict[str, Any]) -> None:
    import os

    os.dup2(2, 1)  # vLLM logs to stdout, whose last line is ours
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    from vllm import LLM

    _state["llm"] = LLM(model, **flags, **({} if mod is None else {"additional_config": {"mod": mod}}))


def run(requests: int, prompt: int, output: int) -> dict[str, float]:
    """Tokens and seconds of prefill and of decode steps; the kept ratio so far."""
    from vllm import SamplingParams

    llm = _state["llm"]
    engine, scheduler = llm.llm_engine, llm.llm_engine.engine_core.engine_core.scheduler
    schedule, scheduled = scheduler.schedule, []

    def watched(*args: Any, **kwargs: Any) -> Any:
        step = schedule(*args, **kwargs)
        scheduled.append(dict(step.num_scheduled_tokens))
        return step

    scheduler.schedule = watched
    params = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True, detokenize=False)
    for number in range(requests):
        # One token repeated: random routers then decide otherwise for another request.
        engine.add_request(f"{time.time()}-{number}", {"prompt_token_ids": [7 + number] * prompt}, params)
    found = dict.fromkeys(("prefill_tokens", "prefill_s", "decode_tokens", "decode_s"), 0.0)
    while engine.has_unfinished_requests():
        begin = time.perf_counter()
        engine.step()
        seconds, counts = time.perf_counter() - begin, scheduled[-1] if scheduled else {}
        kind = "decode" if counts and max(counts.values()) == 1 else "prefill"
        found[f"{kind}_tokens"] += sum(counts.values())
        found[f"{kind}_s"] += seconds
    scheduler.schedule = schedule
    totals = {n: sum(m.value for m in llm.get_metrics() if m.name == f"vllm:mod_{n}") for n in ("kept", "routed")}
    return found | totals


def checkpoints(args: argparse.Namespace, directory: Path) -> dict[str, tuple[Path, dict[str, Any] | None]]:
    total = SHAPES[args.shape]["num_hidden_layers"]
    base = llama_config(directory / "base", **SHAPES[args.shape])
    # Spread over the depth, so that kept and skipped layers alternate.
    routed = sorted({total - 1 - round(i * total / args.routed) for i in range(args.routed)} - {0})[-args.routed :]
    dropped = round(len(routed) * (1 - args.kept))
    skipped = set(routed[:: max(len(routed) // max(dropped, 1), 1)][:dropped])
    threshold = 0.5 if args.mixed else [1.0 if i in skipped else 0.0 for i in routed]
    mod = routed_config(directory / "mod", base, args.granularity, routed, threshold)
    static = routed_config(directory / "static", base, args.granularity.split("_")[0] + "_static", sorted(skipped))
    return {"stock": (base, None), "keep": (mod, {"force": "keep"}), "mod": (mod, {}), "static": (static, None)}


def measure(args: argparse.Namespace, directory: Path) -> dict[str, list[dict[str, float]]]:
    longest = args.prompt + args.output_len
    flags = {
        "load_format": "dummy", "skip_tokenizer_init": True, "enforce_eager": not args.compile,
        "max_model_len": longest,
        "enable_prefix_caching": False, "enable_chunked_prefill": False, "max_num_batched_tokens": 4 * longest,
        "block_size": 32, "max_num_seqs": max(args.requests, 16), "disable_log_stats": False,
        "kv_cache_memory_bytes": args.kv_cache_memory_bytes,
    }  # fmt: skip
    spawn = multiprocessing.get_context("spawn")
    engines = {}
    for name, (model, mod) in checkpoints(args, directory).items():
        progress(f"starting {name}")
        engines[name] = ProcessPoolExecutor(1, mp_context=spawn)
        engines[name].submit(start, str(model), mod, flags).result()
    load = (args.requests, args.prompt, args.output_len)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in SYSTEMS}
    for repeat in range(args.repeats + 1):
        for name in SYSTEMS[repeat % 4 :] + SYSTEMS[: repeat % 4]:  # nobody always goes first
            result = engines[name].submit(run, *load).result()
            progress(
                f"{'warm-up' if repeat == 0 else f'repeat {repeat}'} {name}: {rate(result, args.workload):.0f} tokens/s"
            )
            if repeat:
                runs[name].append(result)
    for pool in engines.values():
        pool.shutdown()
    return runs


def rate(result: dict[str, float], workload: str) -> float:
    return result[f"{workload}_tokens"] / max(result[f"{workload}_s"], 1e-9)


def compared(runs: dict[str, list[dict[str, float]]], workload: str) -> dict[str, Any]:
    """Ratios of medians, and for each whether it exceeds what repeats of one system differ by."""
    rates = {name: [rate(r, workload) for r in found] for name, found in runs.items()}
    median = {name: statistics.median(found) for name, found in rates.items()}
    spread = {name: (max(found) - min(found)) / median[name] for name, found in rates.items()}
    ratios = {
        "overhead": ("keep", "stock"),
        "speedup": ("mod", "stock"),
        "fraction_of_static": ("mod", "static"),
        "ceiling": ("static", "stock"),
    }
    result: dict[str, Any] = {key: round(median[a] / median[b], 3) for key, (a, b) in ratios.items()}
    unclear = [key for key, (a, b) in ratios.items() if abs(result[key] - 1) < max(spread[a], spread[b])]
    last = runs["mod"][-1]
    return {
        "workload": workload,
        "tokens_per_s": {name: round(value, 1) for name, value in median.items()},
        "spread": {name: round(value, 3) for name, value in spread.items()},
        "kept_ratio": round(last["kept"] / last["routed"], 3) if last["routed"] else None,
        **result,
        "not_significant": unclear,
    }


def main() -> None:
    args = arguments()
    with tempfile.TemporaryDirectory() as directory:
        runs = measure(args, Path(directory))
    result = compared(runs, args.workload)
    others = compared(runs, "prefill" if args.workload == "decode" else "decode")
    record = {"command": command("throughput"), "machine": machine(), "shape": SHAPES[args.shape], "result": result}
    write_json(args.output, record | {"other_steps_of_the_same_run": others, "runs": runs})
    rows = [[n, result["tokens_per_s"][n], f"{result['spread'][n]:.1%}"] for n in SYSTEMS]
    progress(markdown_table(["system", f"{args.workload} tokens/s", "spread"], rows))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
