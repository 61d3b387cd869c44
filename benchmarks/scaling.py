"""How the cost of a decode step grows: with the batch, the context, and the number of routed layers.

Stock and the routed checkpoint (thresholds 0 and 1 per layer, half kept) take turns step by step, see `engines`. One
plot, three panels: no term of the routed model may grow faster than stock's. The last line is

  {"batch": [{"value", "stock_ms", "mod_ms", "ratio"}, …], "context": […], "routed": […]}

with medians over decode steps, and the ratio step by step (mod over stock; its quartiles are in the result file).
"""

from __future__ import annotations

import argparse
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
    run_command,
    write_json,
)
from .lib.engines import Engine, Load, engine_flags, run_in_turn, start_engines
from .lib.shapes import SHAPES, four_systems, positions, routed_layers

LABELS = {"batch": "requests", "context": "tokens of context", "routed": "routed layers"}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command_line("scaling", __doc__)
    parser.add_argument("--shape", choices=SHAPES, default="cpu-attention", help="default: %(default)s")
    parser.add_argument("--granularity", default="attn_sequence", help="default: %(default)s")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 4, 16, 64], help="at --batch-context")
    parser.add_argument("--batch-context", type=int, default=512, help="default: %(default)s")
    parser.add_argument("--context", type=int, nargs="*", default=[256, 1024, 4096, 8192], help="at --context-batch")
    parser.add_argument("--context-batch", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--routed", type=int, nargs="*", default=[2, 4, 8, 12], help="at --batch-context, 16 requests")
    parser.add_argument("--steps", type=int, default=24, help="decode steps of a point (default: %(default)s)")
    parser.add_argument("--kv-cache-memory-bytes", type=int, default=2 << 30, help="default: 2 GiB")
    parser.add_argument("--block-size", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--eager", action="store_true", help="no compilation")
    output_argument(parser, "scaling/result.json")
    args = parser.parse_args(argv)
    total = SHAPES[args.shape]["num_hidden_layers"]
    if bad := [n for n in args.routed if not 0 < n < total or n % 2]:
        parser.error(f"--routed {bad[0]}: an even number below this shape's {total} layers")
    if longest(args) > positions(args.shape):
        parser.error(
            f"--context: {longest(args)} tokens with --steps, {args.shape} has {positions(args.shape)} positions"
        )
    return args


def longest(args: argparse.Namespace) -> int:
    """Tokens of a request at its end."""
    return max([args.batch_context, *args.context]) + args.steps + 1


def engines(args: argparse.Namespace, directory: Path, routed: int) -> dict[str, Engine]:
    length = longest(args)
    requests = max([16, args.context_batch, *args.batch])
    flags = engine_flags(args, length, max(length, 2048), requests)
    layers = routed_layers(SHAPES[args.shape]["num_hidden_layers"], routed)
    systems = four_systems(directory, SHAPES[args.shape], args.granularity, layers, 0.5, mixed=False)
    return start_engines({name: systems[name] for name in ("stock", "mod")}, flags)


def point(found: dict[str, Engine], value: int, load: Load) -> dict[str, Any]:
    for name, engine in found.items():  # warm-up
        progress(f"{name}: {load}")
        run_in_turn({name: engine}, Load(load.requests, 32, 2))
    times = run_in_turn(found, load)
    steps = {name: t.steps["decode"] for name, t in times.items()}
    ratios = [mod / stock for mod, stock in zip(steps["mod"], steps["stock"], strict=False)]
    quartiles = statistics.quantiles(ratios, n=4)
    medians = {f"{name}_ms": round(1e3 * statistics.median(found), 3) for name, found in steps.items()}
    return {"value": value, **medians, "ratio": round(quartiles[1], 3), "quartiles": [round(q, 3) for q in quartiles]}


def plot(result: dict[str, list[dict[str, Any]]], path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    for axes, (key, points) in zip(panels, result.items(), strict=True):
        x = [p["value"] for p in points]
        for name, label, colour in (("stock", "stock", "#555555"), ("mod", "routed, half kept", "#0072B2")):
            axes.plot(x, [p[f"{name}_ms"] for p in points], marker="o", color=colour, label=label)
        axes.set_xlabel(LABELS[key])
        if key != "routed":
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks(x, [str(v) for v in x])
        else:
            axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("decode step, ms (median)")
    panels[0].legend()
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)
    progress(f"wrote {path}")


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    half = SHAPES[args.shape]["num_hidden_layers"] // 2
    result: dict[str, list[dict[str, Any]]] = {"batch": [], "context": [], "routed": []}
    tokens = args.steps + 1
    loads = {
        half: [("batch", n, Load(n, args.batch_context, tokens)) for n in args.batch]
        + [("context", n, Load(args.context_batch, n, tokens)) for n in args.context]
    }
    for routed in args.routed:
        loads.setdefault(routed, []).append(("routed", routed, Load(16, args.batch_context, tokens)))
    record = {"command": command("scaling"), "machine": machine(), "shape": SHAPES[args.shape]}
    for routed, points in loads.items():
        with tempfile.TemporaryDirectory() as directory:
            found = engines(args, Path(directory), routed)
            for key, value, load in points:
                result[key].append(point(found, value, load))
                result[key].sort(key=lambda p: p["value"])
                write_json(args.output, record | {"result": result})  # what is done stays
            for engine in found.values():
                engine.stop()
    title = f"{args.shape}, {args.granularity}; {half} layers routed in the first two"
    plot(result, args.output.with_suffix(".png"), title)
    rows = [[key, p["value"], p["stock_ms"], p["mod_ms"], p["ratio"]] for key, ps in result.items() for p in ps]
    progress(markdown_table(["grows", "value", "stock ms", "mod ms", "mod / stock"], rows))
    print(json.dumps(result))


if __name__ == "__main__":
    run_command(main, "scaling", "interrupted; what was done is in the result file")
