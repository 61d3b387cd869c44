"""How many requests fit at once when skipped layers give their KV pages back.

The same engine flags and the same KV memory for every system, each in a process of its own:

  stock   the plain architecture
  keep    the routed checkpoint with `force: keep`: nothing is skipped, pages are per layer
  mod     the routed checkpoint; every request skips the same share of all layers (thresholds 0 and 1 per layer)
  static  the same layers dropped for good: what skipping can give at best

All requests are submitted at once, so the pool is what limits how many run. Weights are random ("dummy"): nothing
measured here depends on them. The last line of stdout is

  {"kept_ratio", "max_running": {"stock", "keep", "mod"}, "ratio", "ideal_ratio", "leaked_pages"}

and the whole record goes to --output. With --sweep the skipped share varies and a plot is drawn as well.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vllm_mod.granularity import POLICIES

from .lib.common import (
    RESULTS,
    command,
    command_line,
    copied_config,
    isolated,
    llama_config,
    machine,
    markdown_table,
    metric_totals,
    progress,
    result_file,
    routed_config,
    run_command,
    write_json,
)


@dataclass(frozen=True)
class Load:
    """The workload and the engine flags, the same for every system."""

    requests: int
    prompt: int
    output: int
    kv_cache_memory_bytes: int
    block_size: int
    max_num_seqs: int

    def engine_flags(self) -> dict[str, Any]:
        longest = self.prompt + self.output
        return {
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "enforce_eager": True,
            "max_model_len": longest,
            "max_num_batched_tokens": max(4 * longest, self.max_num_seqs),
            "enable_chunked_prefill": False,
            "enable_prefix_caching": False,
            "block_size": self.block_size,
            "max_num_seqs": self.max_num_seqs,
            "kv_cache_memory_bytes": self.kv_cache_memory_bytes,
            "disable_log_stats": False,
        }


class Watch:
    """Looks at every step of a scheduler that runs in this process."""

    def __init__(self, scheduler: Any) -> None:
        config = scheduler.kv_cache_config
        self.pool = scheduler.kv_cache_manager.block_pool
        self.bytes_per_page = sum(t.size for t in config.kv_cache_tensors) // config.num_blocks
        self.running: list[int] = []
        self.pages_for_outputs = self.output_tokens = 0
        self._scheduler, self._schedule = scheduler, scheduler.schedule
        self._per_row = scheduler.connector is None
        scheduler.schedule = self.schedule

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        step = self._schedule(*args, **kwargs)
        if step.num_scheduled_tokens:
            waiting = len(self._scheduler.waiting) > 0
            self.running.append(len(step.num_scheduled_tokens) if waiting else -len(step.num_scheduled_tokens))
        cached = step.scheduled_cached_reqs
        for request, blocks in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if request not in cached.resumed_req_ids:
                self.output_tokens += 1
                self.pages_for_outputs += sum(page != 0 for group in blocks or () for page in group) * self._per_row
        message = step.kv_connector_metadata
        if message is not None:  # of a routed model: rows name the request, and pages travel by themselves
            growing = np.isin(message.pages.slots, [start.slot for start in message.starts], invert=True)
            self.pages_for_outputs += np.count_nonzero(message.pages.pages[np.repeat(growing, message.pages.counts)])
        return step

    def summary(self) -> dict[str, Any]:
        contended = [n for n in self.running if n > 0]  # steps in which requests had to wait
        return {
            "max_running": max(map(abs, self.running)),
            "mean_running": round(sum(contended) / max(len(contended), 1), 2),
            "steps": len(self.running),
            "kv_bytes_per_generated_token": round(
                float(self.pages_for_outputs * self.bytes_per_page / self.output_tokens)
            ),
        }


def measure(model: str, mod: dict[str, Any] | None, load: Load) -> dict[str, Any]:
    """Run the load through one engine in this process."""
    from vllm import LLM, SamplingParams

    extra = {} if mod is None else {"additional_config": {"mod": mod}}
    llm = LLM(model, **load.engine_flags(), **extra)
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    prompts = [{"prompt_token_ids": [5 + i % 100] * load.prompt} for i in range(load.requests)]
    params = SamplingParams(temperature=0, max_tokens=load.output, ignore_eos=True, detokenize=False)
    llm.generate(prompts[:1], params, use_tqdm=False)  # warm-up
    free, watch = scheduler.kv_cache_manager.block_pool.get_num_free_blocks(), Watch(scheduler)
    start, cpu = time.perf_counter(), time.process_time()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    totals = metric_totals(llm)
    generated = sum(len(output.outputs[0].token_ids) for output in outputs)
    assert generated == load.requests * load.output
    routed = totals.get("vllm:mod_routed", 0)
    return watch.summary() | {
        "kept_ratio": round(totals["vllm:mod_kept"] / routed, 4) if routed else None,
        "preemptions": int(totals["vllm:num_preemptions"]),
        "pages_freed_early": int(totals.get("vllm:mod_kv_pages_freed", 0)),
        "leaked_pages": free - watch.pool.get_num_free_blocks(),
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu_seconds, 2),
        "output_tokens_per_second": round(generated / seconds, 1),
    }


def run(name: str, model: Path, mod: dict[str, Any] | None, load: Load, repeats: int = 1) -> dict[str, Any]:
    """The fastest of `repeats` runs; what fits does not vary between them."""
    results = []
    for _ in range(repeats):
        progress(f"{name}: {load.requests} requests of {load.prompt} + {load.output} tokens ...")
        flags = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
        flags["PYTHONWARNINGS"] = "ignore"
        results.append(isolated(measure, str(model), mod, load, **flags))
    best = min(results, key=lambda r: r["seconds"])
    best["seconds_of_all_repeats"] = sorted(r["seconds"] for r in results)
    best["leaked_pages"] = max(r["leaked_pages"] for r in results)
    progress(f"  at once {best['max_running']} (mean {best['mean_running']}), {best['preemptions']} preemptions, "
             f"{best['output_tokens_per_second']} tokens/s")  # fmt: skip
    return best


def routed_layers(num_layers: int) -> list[int]:
    """Half of all layers, evenly spread, the first and the last never among them."""
    count = num_layers // 2
    return sorted({1 + i * (num_layers - 2) // count for i in range(count)})


def thresholds(layers: Sequence[int], skipped: int) -> list[float]:
    """1 (skip) for `skipped` of the layers, 0 (keep) for the others."""
    return [1.0 if i < skipped else 0.0 for i in range(len(layers))]


def capacity(args: argparse.Namespace, base: Path, load: Load, directory: Path) -> dict[str, Any]:
    num_layers = json.loads((base / "config.json").read_text())["num_hidden_layers"]
    layers = routed_layers(num_layers)
    skipped = round(args.skip_share * num_layers)
    checkpoint = routed_config(directory / "mod", base, args.granularity, layers, thresholds(layers, skipped))
    kind = POLICIES[args.granularity].target + "_static"
    static = routed_config(directory / "static", base, kind, layers[:skipped])
    systems: dict[str, tuple[Path, dict[str, Any] | None]] = {
        "stock": (base, None),
        "keep": (checkpoint, {"force": "keep"}),
        "mod": (checkpoint, {}),
        "static": (static, None),
    }
    results = {name: run(name, model, mod, load, args.repeats) for name, (model, mod) in systems.items()}
    header = ["", "running at once", "mean", "KV bytes per generated token", "preemptions", "tokens/s"]
    keys = ["max_running", "mean_running", "kv_bytes_per_generated_token", "preemptions", "output_tokens_per_second"]
    progress(markdown_table(header, [[name, *(r[k] for k in keys)] for name, r in results.items()]))
    return {
        "kept_ratio": results["mod"]["kept_ratio"],
        "max_running": {name: results[name]["max_running"] for name in ("stock", "keep", "mod")},
        "ratio": round(results["mod"]["max_running"] / results["stock"]["max_running"], 3),
        "ideal_ratio": round(num_layers / (num_layers - skipped), 3),
        "leaked_pages": sum(r["leaked_pages"] for r in results.values()),
        "systems": results,
        "layers": {"all": num_layers, "routed": layers, "skipped_by_every_request": layers[:skipped]},
    }


def sweep(args: argparse.Namespace, base: Path, load: Load, directory: Path) -> dict[str, Any]:
    """Running requests and throughput against the kept ratio, all decisions fixed by thresholds."""
    num_layers = json.loads((base / "config.json").read_text())["num_hidden_layers"]
    layers = routed_layers(num_layers)
    points = [run("stock", base, None, load, args.repeats) | {"system": "stock", "ideal_ratio": 1.0}]
    for skipped in sorted({round(share * len(layers)) for share in (0, 0.25, 0.5, 0.75, 1)}):
        name = f"{skipped} of {len(layers)} routed layers skipped"
        checkpoint = routed_config(
            directory / f"{skipped}", base, args.granularity, layers, thresholds(layers, skipped)
        )
        ideal = round(num_layers / (num_layers - skipped), 3)
        points.append(run(name, checkpoint, {}, load, args.repeats) | {"system": "mod", "ideal_ratio": ideal})
    plot(points, args.output.with_suffix(".png"), f"{len(layers)} of {num_layers} layers routed ({args.granularity})")
    return {"points": points, "leaked_pages": sum(p["leaked_pages"] for p in points)}


def plot(points: list[dict[str, Any]], path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    stock, routed = points[0], points[1:]
    kept = [p["kept_ratio"] for p in routed]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    left.plot(kept, [p["max_running"] for p in routed], "o-", label="routed")
    left.plot(kept, [stock["max_running"] * p["ideal_ratio"] for p in routed], ":", color="C1", label="ideal")
    left.axhline(stock["max_running"], color="gray", linestyle="--", label="stock")

    def tokens(point: dict[str, Any]) -> float:
        return point["output_tokens_per_second"] * point["seconds"]

    for seconds, color, label in (("seconds", "C0", "per second"), ("cpu_seconds", "C2", "per CPU second")):
        right.plot(kept, [tokens(p) / p[seconds] for p in routed], "o-", color=color, label=f"routed, {label}")
        right.axhline(tokens(stock) / stock[seconds], color=color, linestyle="--", label=f"stock, {label}")
    slowest = [tokens(p) / max(p["seconds_of_all_repeats"]) for p in routed]
    right.fill_between(kept, slowest, [tokens(p) / p["seconds"] for p in routed], alpha=0.15, label="spread of repeats")
    for axis, ylabel in ((left, "requests running at once"), (right, "output tokens")):
        axis.set(xlabel="kept ratio of the routed layers", ylabel=ylabel, ylim=(0, None))
        axis.invert_xaxis()
        axis.legend(fontsize="small")
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    progress(f"wrote {path}")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command_line("kv_capacity", __doc__)
    add = parser.add_argument
    add(
        "--model", type=Path, help="directory whose config.json gives the model's shape (default: a Llama of 16 layers)"
    )
    add("--granularity", default="attn_sequence", choices=["attn_sequence", "block_sequence"], help="what is skipped")
    add("--skip-share", type=float, default=0.25, help="share of all layers that every request skips (at most 0.5)")
    add("--requests", type=int, default=300, help="submitted at once; several times what fits")
    add("--prompt", type=int, default=96, help="tokens per prompt")
    add("--output-tokens", type=int, default=64, help="tokens per answer")
    add("--kv-cache-memory-bytes", type=int, default=48 << 20, help="the pool, the same for every system")
    add("--block-size", type=int, default=32, help="tokens per KV block")
    add("--max-num-seqs", type=int, default=256, help="must not be what limits the running requests")
    add("--repeats", type=int, default=1, help="runs per system; the fastest counts for tokens/s")
    add("--sweep", action="store_true", help="vary the skipped share instead, and draw a plot (needs matplotlib)")
    add(
        "--output",
        type=result_file,
        help="result file (default: benchmarks/results/kv_capacity/result.json, or sweep.json)",
    )
    args = parser.parse_args(argv)
    if not 0 <= args.skip_share <= 0.5:
        parser.error("--skip-share: half of the layers are routed, so a number from 0 to 0.5 is needed")
    args.output = args.output or RESULTS / "kv_capacity" / ("sweep.json" if args.sweep else "result.json")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    load = Load(args.requests, args.prompt, args.output_tokens, args.kv_cache_memory_bytes, args.block_size,
                args.max_num_seqs)  # fmt: skip
    about = {
        "command": command("kv_capacity"),
        "machine": machine(),
        "load": asdict(load),
        "flags": load.engine_flags(),
    }
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        base = copied_config(directory / "base", args.model) if args.model else llama_config(directory / "base")
        result = (sweep if args.sweep else capacity)(args, base, load, directory)
    write_json(args.output, about | result)
    line = {k: v for k, v in result.items() if k not in ("systems", "layers")}
    if args.sweep:
        keys = ("system", "kept_ratio", "max_running", "output_tokens_per_second")
        line["points"] = [{key: point[key] for key in keys} for point in result["points"]]
    print(json.dumps(line))


if __name__ == "__main__":
    run_command(main, "kv_capacity", "interrupted; nothing is written")
