"""The tables and the picture of what `ablations` wrote."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .common import markdown_table, progress

TITLES = {
    "main": "Routers on the deep layers",
    "layers": "Routers elsewhere: redundant layers, all layers",
    "depth": "Number of routed layers",
    "samples": "Number of training samples",
    "data": "Training set",
    "module": "Target module",
}
#: Okabe and Ito's colours, which everybody can tell apart.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#666666"


def report(record: dict[str, Any], output: Path) -> None:
    """Write `<output>.md` and `<output>.png` beside the JSON file."""
    output.with_suffix(".md").write_text(text(record, output.stem), encoding="utf-8")
    progress(f"wrote {output.with_suffix('.md')}")
    plot(record, output.with_suffix(".png"))


def text(record: dict[str, Any], stem: str) -> str:
    about, runs = record["held_out"], record["runs"].values()
    sources = ", ".join(f"{n} {name}" for name, n in about["samples"].items())
    parts = [
        "# Ablations",
        f"Made by `{record['command']}`; everything is in [{stem}.json]({stem}.json). What it says is in "
        "[docs/quality.md](../../../docs/quality.md).",
        f"Held-out answers: {sources}; {about['answer_tokens']} answer tokens, dense perplexity "
        f"{about['dense_perplexity']} ± {about['standard_error']}. Others are given relative to the dense model on "
        "the same samples, with the standard error of that paired difference. *Static* drops as many sublayers as the "
        "run skipped on average; *best static* is the best of all choices tried "
        "(`benchmarks/lib/static_drop.py`), picked with hindsight; *same layers* may drop only layers that the run "
        "routes. *Other decisions*: the checkpoint with the decisions of another sample, or of a coin with the same "
        "odds: below 1, choosing is worth something.",
        f"![ratios]({stem}.png)",
    ]
    for group, title in TITLES.items():
        found = [run for run in runs if group in run["groups"]]
        if len(found) > 1:  # the usual run alone compares nothing
            parts += [f"## {title}", markdown_table(*_table(found))]
    parts += ["## What decides", markdown_table(*_decisions(runs))]
    if "oracle" in record:
        parts += ["## What choosing could give at best", _oracle(record["oracle"])]
    return "\n\n".join(parts) + "\n"


def _table(runs: Iterable[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    header = ["granularity", "layers", "target", "kept", "samples", "data", "seed", "routed / dense",
              "best static / dense", "same layers static / dense", "routed / best static", "routed / same layers",
              "routed / other decisions"]  # fmt: skip
    rows = []
    for run in runs:
        free, bound = best_static(run), best_static(run, ", routed layers")
        rows.append([
            run["granularity"], _layers(run["layers"]), f"{run['target']:g}", f"{run['kept']:.3f}", str(run["samples"]),
            "all" if len(run["sources"]) > 1 else run["sources"][0], str(run["seed"]), _pm(run["ratio_to_dense"]),
            *(_pm(s and s["ratio_to_dense"]) for s in (free, bound)),
            *(_pm(s and s["routed_to_static"]) for s in (free, bound)), _pm(run["ratio_to_random"]),
        ])  # fmt: skip
    return header, rows


def best_static(run: dict[str, Any], kind: str = "") -> dict[str, Any] | None:
    """The static drop with the least perplexity, of those whose choice ends in `kind`."""
    found = [s for name, s in run["static"].items() if name.endswith(kind)]
    return min(found, key=lambda s: s["ratio_to_dense"][0], default=None)


def _decisions(runs: Iterable[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    header = ["granularity", "layers", "target", "seed", "kept per layer", "explained by source", "by token",
              "by position", "correlation with log length"]  # fmt: skip
    rows = []
    for run in runs:
        about = run["decisions"]
        keys = ("explained_by_source", "explained_by_token", "explained_by_position_up_to_8",
                "correlation_with_log_prompt_length")  # fmt: skip
        kept = " ".join(f"{k:.2f}" for k in run["kept_per_layer"].values())
        cells = ["-" if about.get(k) is None else f"{about[k]:.2f}" for k in keys]
        rows.append([run["granularity"], _layers(run["layers"]), f"{run['target']:g}", str(run["seed"]), kept, *cells])
    return header, rows


def _oracle(oracle: dict[str, Any]) -> str:
    names = {
        "fixed": f"one choice for all (drops {', '.join(map(str, oracle['fixed_choice_drops']))})",
        "source": "one choice per source",
        "request": "the best choice for each request",
    }
    rows = [[names[key], _pm(pair)] for key, pair in oracle["ratio_to_dense"].items()]
    return (
        f"Of the {len(oracle['routed'])} attentions {_layers(oracle['routed'])} half are skipped, in each of the "
        f"{oracle['choices']} ways; {oracle['samples']} held-out samples, chosen with their answers known:\n\n"
        + markdown_table(["who chooses", "perplexity / dense"], rows)
    )


def _layers(layers: list[int]) -> str:
    run = layers == list(range(layers[0], layers[-1] + 1)) and len(layers) > 2
    return f"{layers[0]}-{layers[-1]}" if run else ", ".join(map(str, layers))


def _pm(pair: list[float] | None) -> str:
    return "-" if pair is None else f"{pair[0]:.3f} ± {pair[1]:.3f}"


def plot(record: dict[str, Any], path: Path) -> None:
    """Perplexity relative to dense against the number of skipped attentions, routed and static."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    runs = list(record["runs"].values())
    panels = [(g, t) for g, t in (("main", TITLES["main"]), ("layers", TITLES["layers"]))
              if any(g in r["groups"] for r in runs)]  # fmt: skip
    if not panels:
        return
    size = (5.4 * len(panels), 4.2)
    figure, axes = pyplot.subplots(1, len(panels), figsize=size, layout="constrained", sharex=True, sharey=True,
                                   squeeze=False)  # fmt: skip
    for axis, (group, title) in zip(axes[0], panels, strict=True):
        found = [r for r in runs if group in r["groups"]]
        series = [
            (level, marker, color, [(r, r["ratio_to_dense"]) for r in found if r["granularity"] == level])
            for level, marker, color in (("attn_sequence", "o", BLUE), ("attn_token", "s", GREEN))
        ] + [
            (label, marker, color, [(r, s["ratio_to_dense"]) for r in found if (s := best_static(r, kind))])
            for label, marker, color, kind in (
                ("static, same layers", "v", ORANGE, ", routed layers"),
                ("static, any layers", "^", PURPLE, ""),
            )
        ]
        for label, marker, color, points in series:
            if points:
                x, y = [(1 - r["kept"]) * len(r["layers"]) for r, _ in points], [p[0] for _, p in points]
                axis.errorbar(x, y, [p[1] for _, p in points], fmt=marker, color=color, label=label, capsize=2)
        axis.axhline(1.0, color=GREY, linestyle=":")
        axis.set(xlabel="attentions skipped per request, on average", title=title)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("perplexity / dense (held-out answers)")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    progress(f"wrote {path}")
