"""How much better routers get with more measured requests: of a file that `router-tuning fit --costs` wrote.

The requests are cut into groups of each size. Routers are fitted in each by `fit`'s own closed form, and their
decisions on a request are those of a fit that had not seen it. In nats per answer token, layers by themselves:

  static   the cheapest layers for everyone
  routed   as many, each request its own
  oracle   each request's own cheapest, known with hindsight: part of that is chance, so no router gets there

The last line is {"points": [{"requests", "groups", "skip", "explained", "static", "routed", "oracle", "share"}, …]},
means over groups; share: (static - routed) / (static - oracle).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from router_tuning.choice import inputs_of, routers_of
from router_tuning.cost_routers import CostRouter, price, saving, spared
from router_tuning.costs_file import CostsFile, Rows
from router_tuning.selection import Measured
from vllm_mod.config import ConfigError

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

#: Fewer say nothing.
_FEWEST = 32


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command_line("measured_requests", __doc__)
    parser.add_argument("costs", type=Path, help="a file that `router-tuning fit --costs FILE` left")
    parser.add_argument("--sizes", type=int, nargs="+", default=[150, 300, 600, 1200], help="requests of a group")
    parser.add_argument("--skip", type=float, nargs="+", default=[4, 8, 12], help="layers a request skips on average")
    parser.add_argument("--share", type=float, default=0.5, help="of what a request's layers have in common")
    output_argument(parser, "measured_requests/result.json")
    return parser.parse_args(argv)


def groups(rows: Rows, size: int) -> list[Measured]:
    """Disjoint ones, in the order of the samples."""
    order = rows.sample.argsort()
    layers = tuple(range(rows.nats.shape[1]))
    parts = [order[first : first + size] for first in range(0, len(order) - size + 1, size)]
    return [Measured(layers, rows.nats[p], rows.tokens[p], rows.inputs[p], rows.sample[p]) for p in parts]


def point(measured: Sequence[Measured], routers: Sequence[Mapping[int, CostRouter]], skip: float) -> dict[str, Any]:
    """Means over groups. routers: of each group, every layer's."""
    sums = dict.fromkeys(("explained", "static", "routed", "oracle"), 0.0)
    for group, of_layers in zip(measured, routers, strict=True):
        layers = spared(group.layers, of_layers, skip, group.tokens)
        if not layers:
            raise ConfigError(f"--skip {skip:g}: hardly any request would skip a layer; a higher number is needed")
        chosen = [of_layers[layer] for layer in layers]
        worth = saving(group, chosen, layers, price(chosen, max(1.0 - skip / len(layers), 0.0), group.tokens))
        explained = sum(router.explained for router in of_layers.values()) / len(of_layers)
        for name, value in vars(worth).items() | {("explained", explained)}:
            sums[name] += value / len(measured)
    row = {name: round(value, 4) for name, value in sums.items()}
    gained = (sums["static"] - sums["routed"]) / (sums["static"] - sums["oracle"])
    row |= {"share": round(gained, 3)}
    return {"requests": len(measured[0].sample), "groups": len(measured), "skip": skip, **row}


def draw(points: Sequence[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for skip in dict.fromkeys(row["skip"] for row in points):
        line = [row for row in points if row["skip"] == skip]
        axes.plot([r["requests"] for r in line], [r["share"] for r in line], marker="o", label=f"{skip:g} skipped")
    axes.set(xscale="log", xlabel="measured requests", ylabel="part of the oracle's gain over static", ylim=(0, None))
    sizes = sorted({row["requests"] for row in points})
    axes.set_xticks(sizes, [str(size) for size in sizes], minor=False)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    args = arguments()
    if not args.costs.is_file():
        raise ConfigError(f"{args.costs}: no such file; `router-tuning fit --costs {args.costs}` writes one")
    file = CostsFile(args.costs, {})
    number = 0 if file.rows is None else len(file.rows.sample)
    if min(args.sizes) < _FEWEST or max(args.sizes) > number:
        raise ConfigError(f"--sizes: from {_FEWEST} to the {number} requests of {args.costs} are possible")
    assert file.rows is not None
    points = []
    for size in args.sizes:
        measured = groups(file.rows, size)
        routers = [routers_of(group, inputs_of(group), args.share) for group in measured]
        points += [point(measured, routers, skip) for skip in args.skip]
    points.sort(key=lambda row: args.skip.index(row["skip"]))
    progress(markdown_table([*points[0]], [[*row.values()] for row in points]))
    record = {"command": command("measured_requests"), "machine": machine(), "measured": number, "points": points}
    write_json(args.output, record)
    draw(points, args.output.with_suffix(".png"))
    print(json.dumps({"points": points}))


if __name__ == "__main__":
    run_command(main, "measured_requests", "interrupted; nothing was written")
