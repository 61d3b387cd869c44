"""What routing costs and what skipping gives, four ways on one machine in one run, with the same engine flags.

  stock   the plain architecture
  keep    the routed checkpoint with `force: keep`: pure overhead
  mod     the routed checkpoint at `--kept`: thresholds 0 and 1 per layer, every request skips the same layers; with
          --mixed random routers with calibrated thresholds: in every layer that share of the requests keeps it
  static  as many layers dropped for good: what skipping can give at best
  patched mod with patches of rank --patch-rank, where that is given

Weights are random ("dummy"): no speed depends on them. All engines are up, each in a process, and take turns step by
step (`--turns load`: load by load; `--alone`: one engine at a time, where they do not fit together), `--repeats` times.

  decode   tokens/s of the decode steps, all requests running
  prefill  tokens/s of the prefill steps
  pool     generated tokens over all the time, with more requests than the KV memory holds

  Llama-3-8B on a GPU, long context, as many requests as fit:
    python -m benchmarks.throughput --shape llama3-8b --workload pool --alone --prompt 4096 --output-len 512 \\
        --requests 192 --kv-cache-memory-bytes 40000000000 --block-size 16 --repeats 3
  and its batch of one:
    python -m benchmarks.throughput --shape llama3-8b --alone --requests 1 --prompt 1024 --output-len 256

The last line is {"workload", "tokens_per_s", "generated_per_s" (over all the time), "spread", "kept_ratio", "overhead",
"speedup", "fraction_of_static", "ceiling", "patches", "not_significant", "notes"}. Ratios are medians of the ratios of
single repeats; spread is their (max - min) / median; a ratio whose repeats lie on both sides of 1 is "not significant".
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .lib.common import (
    command,
    command_line,
    machine,
    markdown_table,
    output_argument,
    progress,
    routed_config,
    run_command,
    write_json,
)
from .lib.engines import Engine, Load, Times, engine_flags, run_in_turn, start_engines
from .lib.shapes import SHAPES, SYSTEMS, four_systems, positions, routed_layers, settle_routed

RATIOS = {
    "overhead": ("keep", "stock"),
    "speedup": ("mod", "stock"),
    "fraction_of_static": ("mod", "static"),
    "ceiling": ("static", "stock"),
    "patches": ("patched", "mod"),
}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command_line("throughput", __doc__)
    parser.add_argument("--shape", choices=SHAPES, default="cpu-attention", help="default: %(default)s")
    parser.add_argument("--workload", choices=("decode", "prefill", "pool"), default="decode")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), help="default: all")
    parser.add_argument("--granularity", default="attn_sequence", help="default: %(default)s")
    parser.add_argument("--requests", type=int, default=16, help="submitted at once (default: %(default)s)")
    parser.add_argument("--prompt", type=int, default=2048, help="prompt tokens (default: %(default)s)")
    parser.add_argument("--output-len", type=int, default=48, help="generated tokens (default: %(default)s)")
    parser.add_argument("--routed", type=int, default=None, help="routed layers (default: half of them)")
    parser.add_argument("--kept", type=float, default=0.5, help="kept ratio of the routed layers (default: 0.5)")
    parser.add_argument("--window", type=int, help="decide from so many tokens (version 2; default: the whole prompt)")
    parser.add_argument(
        "--caching", action="store_true", help="prefix caching and chunked prefill on in all engines; needs --window"
    )
    parser.add_argument(
        "--batched-tokens", type=int, default=2048, help="of a step, with --caching (default: %(default)s)"
    )
    parser.add_argument(
        "--turns", choices=("step", "load"), default="step",
        help="engines take turns step by step, or load by load, which a GPU needs: it works on while the host goes on",
    )  # fmt: skip
    parser.add_argument("--patch-rank", type=int, help="measure patches of this rank, too")
    parser.add_argument("--mixed", action="store_true", help="each request skips layers of its own")
    parser.add_argument("--sweep", choices=("prompt", "kept", "requests"), help="repeat for each of --values, and plot")
    parser.add_argument("--values", type=float, nargs="+", default=[], help="of --sweep")
    parser.add_argument("--kv-cache-memory-bytes", type=int, default=2 << 30, help="default: 2 GiB")
    parser.add_argument(
        "--gpu-memory-utilization", type=float, help="of one engine, where several share a GPU (default: vLLM's)"
    )
    parser.add_argument("--block-size", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--eager", action="store_true", help="no compilation (default: what vLLM does by default)")
    parser.add_argument("--alone", action="store_true", help="one engine at a time")
    output_argument(parser, "throughput/result.json")
    args = parser.parse_args(argv)
    settle_routed(parser, args)
    if bool(args.sweep) != bool(args.values):
        parser.error("--sweep and --values belong together")
    for prompt in args.values if args.sweep == "prompt" else [args.prompt]:
        if prompt + args.output_len > positions(args.shape):
            parser.error(f"--prompt {prompt:g} and --output-len: {args.shape} has {positions(args.shape)} positions")
    if args.caching and args.window is None:
        parser.error("--caching: a decision over the whole prompt cannot cache prefixes; give --window as well")
    if args.patch_rank is not None and args.mixed:
        parser.error("--patch-rank: not with --mixed, whose thresholds are calibrated for `mod`")
    if "stock" not in args.systems:
        parser.error("--systems: everything is compared with 'stock'")
    for kept in args.values if args.sweep == "kept" else [args.kept]:
        if not 0 <= kept <= 1:
            parser.error(f"--kept {kept}: a number from 0 to 1")
        if not args.mixed and not _whole(args.routed * kept):
            parser.error(
                f"--kept {kept}: {args.routed} routed layers give steps of {1 / args.routed:g} only; "
                "pass --mixed, or another --routed"
            )
    return args


def _whole(number: float) -> bool:
    return abs(number - round(number)) < 1e-9


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Times of each repeat per system, the kept ratio of `mod`, and how many requests ran at once."""
    load, longest = Load(args.requests, args.prompt, args.output_len), args.prompt + args.output_len
    flags = engine_flags(args, longest, max(2 * longest, args.requests), args.requests)
    found: dict[str, Any] = {"times": {}, "kept_ratio": None, "running": {}}
    with tempfile.TemporaryDirectory() as directory:
        routed = routed_layers(SHAPES[args.shape]["num_hidden_layers"], args.routed)
        systems = four_systems(
            Path(directory), SHAPES[args.shape], args.granularity, routed, args.kept, args.mixed, args.window,
            args.patch_rank,
        )  # fmt: skip
        systems = {name: system for name, system in systems.items() if name in args.systems}
        for group in [[name] for name in systems] if args.alone else [list(systems)]:
            engines = start_engines({name: systems[name] for name in group}, flags)
            if args.mixed and "mod" in engines:
                progress("calibrating mod")
                thresholds = engines["mod"].thresholds(load, args.kept)
                engines["mod"].stop()
                mod, knobs = systems["mod"]
                base = systems["stock"][0]
                routed_config(mod, base, args.granularity, routed, thresholds, args.window)
                engines["mod"] = Engine(mod, knobs, flags)
            whole = args.turns == "load"
            run_in_turn(engines, Load(min(args.requests, 4), args.prompt, 4), whole=whole)  # warm-up
            for repeat in range(args.repeats):
                before = engines["mod"].counts() if "mod" in engines else None
                if not args.mixed:  # thresholds are made for these prompts
                    load = dataclasses.replace(load, variant=repeat + 1)  # others, which no cache has seen
                for name, times in run_in_turn(engines, load, repeat, whole).items():
                    progress(f"repeat {repeat + 1} {name:<7} {times.rate(args.workload):8.1f} tokens/s")
                    found["times"].setdefault(name, []).append(times)
            for name, engine in engines.items():
                found["running"][name] = engine.running()
            if before is not None:
                kept, pairs = (b - a for a, b in zip(before, engines["mod"].counts(), strict=True))
                found["kept_ratio"] = round(kept / pairs, 4)
            for engine in engines.values():
                engine.stop()
    return found


def compared(times: dict[str, list[Times]], workload: str) -> dict[str, Any]:
    """Medians over repeats; ratios repeat by repeat, because the machine's speed drifts between repeats."""
    rates = {name: [t.rate(workload) for t in found] for name, found in times.items()}
    result: dict[str, Any] = {
        "workload": workload,
        "tokens_per_s": {name: round(statistics.median(found), 1) for name, found in rates.items()},
        "generated_per_s": {
            name: round(statistics.median(t.rate("pool") for t in found), 1) for name, found in times.items()
        },
        "spread": {},
    }
    unclear = []
    for key, (a, b) in RATIOS.items():
        if a not in rates or b not in rates:
            result[key] = None
            continue
        ratios = [x / y for x, y in zip(rates[a], rates[b], strict=True)]
        result[key] = round(statistics.median(ratios), 3)
        result["spread"][key] = round((max(ratios) - min(ratios)) / statistics.median(ratios), 3)
        if len(ratios) < 3 or min(ratios) <= 1 <= max(ratios):
            unclear.append(key)
    return result | {"not_significant": unclear}


def point(args: argparse.Namespace) -> dict[str, Any]:
    """One measurement, with all that its number depends on."""
    found = measure(args)
    result = compared(found["times"], args.workload) | {"kept_ratio": found["kept_ratio"], "notes": []}
    dropped = args.routed * (1 - args.kept)
    if "static" in args.systems and not _whole(dropped):
        result["notes"].append(f"static drops {round(dropped)} layers, {dropped:g} would match: not comparable")
    if found["kept_ratio"] is not None and abs(found["kept_ratio"] - args.kept) > 0.5 / args.requests:
        result["notes"].append(f"kept ratio {found['kept_ratio']} instead of {args.kept}")
    if args.workload == "pool":
        result["running"] = found["running"]
        if "stock" in found["running"] and found["running"]["stock"] >= args.requests:
            result["notes"].append("all requests ran at once: the KV memory was no limit")
    steps = {
        name: {kind: round(1e3 * statistics.median(s for t in runs for s in t.steps[kind]), 3)
               for kind in ("prefill", "decode") if runs[0].steps[kind]}
        for name, runs in found["times"].items()
    }  # fmt: skip
    return result | {"median_step_ms": steps}


def plot(points: Sequence[dict[str, Any]], args: argparse.Namespace, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    labels = {"prompt": "prompt tokens", "kept": "kept ratio of the routed layers", "requests": "requests at once"}
    lines = {"ceiling": ("static drop (ceiling)", "#999999", "--"), "speedup": ("routed", "#0072B2", "-"),
             "overhead": ("all routers keep", "#D55E00", ":")}  # fmt: skip
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for key, (label, colour, style) in lines.items():
        shown = [(x, p[key], p["spread"][key]) for x, p in zip(args.values, points, strict=True) if p[key]]
        if shown:
            x, y, spread = zip(*shown, strict=True)
            error = [value * s / 2 for value, s in zip(y, spread, strict=True)]
            axes.errorbar(x, y, yerr=error, label=label, color=colour, linestyle=style, marker="o", capsize=3)
    axes.axhline(1, color="black", linewidth=0.8)
    if args.sweep != "kept":
        axes.set_xscale("log", base=2)
        axes.set_xticks(args.values, [f"{v:g}" for v in args.values])
    axes.set_xlabel(labels[args.sweep])
    axes.set_ylabel(f"{args.workload} tokens/s, stock = 1")
    axes.set_title(f"{args.shape}, {args.routed} layers routed, {args.granularity}", fontsize=10)
    axes.legend()
    figure.savefig(path, dpi=150)
    progress(f"wrote {path}")


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    record = {"command": command("throughput"), "machine": machine(), "shape": SHAPES[args.shape]}
    if args.sweep:
        points = []
        for value in args.values:
            setattr(args, args.sweep, value if args.sweep == "kept" else int(value))
            progress(f"{args.sweep} = {value:g}")
            points.append(point(args))
            points[-1][args.sweep] = value
            write_json(args.output, record | {"points": points})  # what is done stays
        plot(points, args, args.output.with_suffix(".png"))
        table = [
            [f"{p[args.sweep]:g}", *(p[key] for key in RATIOS), ", ".join(p["not_significant"]) or "-"] for p in points
        ]
        progress(markdown_table([args.sweep, *RATIOS, "not significant"], table))
        print(json.dumps({"workload": args.workload, "sweep": args.sweep, "points": points}))
        return
    result = point(args)
    write_json(args.output, record | {"result": result})
    rows = [[n, rate, result["median_step_ms"][n].get("decode")] for n, rate in result["tokens_per_s"].items()]
    progress(markdown_table(["system", f"{args.workload} tokens/s", "decode step ms"], rows))
    print(json.dumps(result))


if __name__ == "__main__":
    run_command(main, "throughput", "interrupted; the points of a sweep that were done are in the result file")
