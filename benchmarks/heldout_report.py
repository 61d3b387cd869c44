"""The results of `heldout` at several numbers of skipped layers on one page: a table and a picture of what skipping
costs in nats per answer token, routed and by the static drops that it was compared with.
"""

from __future__ import annotations

import itertools
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_mod.checkpoint import read_json
from vllm_mod.config import ConfigError

from .lib.common import command_line, markdown_table, progress, result_file, run_command

#: What systems without patches lose is of another scale.
_DRAWN = {"routed": "C0", "static": "C3", "random": "C7", "paper": "C2"}
_BY: dict[str, dict[str, Any]] = {"token": {}, "request": {"linestyle": "none", "markerfacecolor": "white"}}
_UNITS = {"attn": "attentions", "mlp": "MLPs", "block": "layers"}


def points(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row per system of a result but the dense one: nats are negative log-likelihood above dense's."""
    rows = []
    for name, row in record["quality"].items():
        if name == "dense":
            continue
        ratio, above = row["ratio_to_dense"], row["ratio_to_routed"]
        rows.append({
            "name": name,
            # Results of older versions have it by request only.
            "skipped": row.get("sublayers_skipped_by_token", row["sublayers_skipped"]),
            "by": "token" if "sublayers_skipped_by_token" in row else "request",
            "nats": math.log(ratio), "error": row["ratio_to_dense_standard_error"] / ratio,
            "kl": row["kl_to_dense"], "kl_error": row["kl_standard_error"],
            "above": above - 1.0, "above_error": row["ratio_to_routed_standard_error"],
            "same": row["same_token"],
        })  # fmt: skip
    return rows


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Markdown, in order of what is skipped."""
    header = [
        "what is skipped", "result", "window", "system", "skipped", "on average by", "held-out requests",
        "nats above dense", "KL to dense", "same likeliest token", "perplexity above routed",
    ]  # fmt: skip
    rows = []
    for record in records:
        unit = _unit(record)
        for row in points(record):
            routed = row["name"] == "routed"
            rows.append([
                unit, f"[{record['stem']}]({record['place']})", _window(record),
                f"**{row['name']}**" if routed else row["name"], f"{row['skipped']:.1f}", row["by"], record["samples"],
                f"{row['nats']:.3f} ± {row['error']:.3f}", f"{row['kl']:.3f} ± {row['kl_error']:.3f}",
                f"{row['same']:.1%}", "" if routed else f"{row['above']:.1%} ± {row['above_error']:.1%}",
            ])  # fmt: skip
    return markdown_table(header, rows)


def draw(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Nats and KL against skipped sublayers, an axis pair per kind of sublayer."""
    from matplotlib.figure import Figure

    units = list(dict.fromkeys(_unit(record) for record in records))
    figure = Figure(figsize=(5 * len(units), 8), layout="constrained")
    axes = figure.subplots(2, len(units), squeeze=False)
    for column, unit in enumerate(units):
        rows = [row for record in records if _unit(record) == unit for row in points(record)]
        for below, (value, error, title) in enumerate(
            (("nats", "error", "nats above dense, held-out answers"), ("kl", "kl_error", "KL to dense (nats)"))
        ):
            # Those of older versions, by request, are on no line with the others.
            for (name, colour), (by, style) in itertools.product(_DRAWN.items(), _BY.items()):
                line = sorted((row for row in rows if (_kind(row), row["by"]) == (name, by)), key=_skipped)
                if not line:
                    continue
                x, y, e = ([row[key] for row in line] for key in ("skipped", value, error))
                label = name if by == "token" else f"{name}, by {by}"
                axes[below][column].errorbar(x, y, e, marker="o", capsize=3, color=colour, label=label, **style)
            axes[below][column].set(xlabel=f"{unit} skipped", ylabel=title)
            axes[below][column].grid(alpha=0.3)
            axes[below][column].legend(fontsize="small")
    figure.savefig(path, dpi=120)


def _kind(row: Mapping[str, Any]) -> str:
    """`static` of `static-mlp-8`; of a system without patches its whole name."""
    name = str(row["name"])
    return name if " " in name else name.partition("-")[0]


def _window(record: Mapping[str, Any]) -> int | str:
    found: int | str = record["mod_config"].get("window", "none")
    return found


def _skipped(row: Mapping[str, Any]) -> float:
    return float(row["skipped"])


def _unit(record: Mapping[str, Any]) -> str:
    return _UNITS[record["mod_config"]["granularity"].partition("_")[0]]


def _read(path: Path) -> dict[str, Any]:
    record = read_json(path)
    if not {"quality", "mod_config", "samples"} <= set(record):
        raise ConfigError(f"{path}: not a result of benchmarks.heldout")
    return record


def main() -> None:
    parser = command_line("heldout_report", __doc__)
    parser.add_argument("results", type=Path, nargs="+", help="files that `heldout` wrote")
    parser.add_argument("--output", type=result_file, required=True, help="a .md file; the picture goes beside it")
    args = parser.parse_args()
    here = args.output.parent.resolve()
    records = [
        _read(path) | {"stem": path.stem, "place": os.path.relpath(path.resolve(), here)} for path in args.results
    ]
    order = list(_UNITS.values())
    records.sort(key=lambda record: (order.index(_unit(record)), points(record)[0]["skipped"]))
    picture = args.output.with_suffix(".png")
    windows = Counter(map(_window, records))
    draw([record for record in records if _window(record) == windows.most_common(1)[0][0]], picture)
    args.output.write_text(
        "# Quality on held-out answers\n\n"
        "Command, machine and versions are in the results.\n\n"
        f"{table(records)}\n\n"
        "± is the standard error over requests, of the paired difference where two systems are compared. The picture "
        "has those with patches, and the window that most have. Skipped by request, as in results of older "
        "versions (hollow marks), may be more than by token, where short answers skip more.\n\n"
        f"![nats and KL against what is skipped]({picture.name})\n"
    )
    progress(f"written: {args.output}, {picture}")


if __name__ == "__main__":
    run_command(main, "heldout_report", "interrupted")
