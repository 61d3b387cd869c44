"""The table and the picture of what `quality` wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm_mod.evaluation import Evaluation

from .common import markdown_table, progress

NAMES = {"base": "base", "checkpoint": "routed", "static": "static drop"}


def text(record: dict[str, Any], stem: str) -> str:
    """Markdown beside the JSON file."""
    mod, kept = record["mod_config"], record["kept_ratio"]
    left_out = ", ".join(record["left_out_of_recovery"])
    parts = [
        "# Quality",
        f"`{record['command']}`",
        f"`{mod['granularity']}`, routed layers {', '.join(map(str, mod['layers']))}; kept ratio in vLLM during these "
        f"tasks {'-' if kept is None else kept}. Static drop: "
        f"{record['static_checkpoint'] or 'layers ' + str(record['static_layers'] or 'none')}. "
        f"Documents per task: {record['limit'] or 'all'}.",
        markdown_table(*table(record)),
        "± is the standard error; *difference* is routed - base on the same documents, with the error of that paired "
        "difference. *Cut*: requests longer than the model allows, which lost their first shots. *In window*: requests "
        "that end within the decision window, and so run every layer; *kept* counts the decisions on them, too.",
        f"Recovery (mean over tasks of the quotient to base): routed {_share(record['recovery'])}, "
        f"static drop {_share(record['static_recovery'])}."
        + (f" Left out, since the base scores 0 or most requests end in the window: {left_out}." if left_out else ""),
        _above_chance(record["above_chance"]),
    ]
    if "perplexity" in record:
        header = ["held-out answers", "kept ratio", "perplexity", "relative to base"]
        rows = [
            [NAMES[n], _share(p["kept"]), f"{p['perplexity']:.2f} ± {p['standard_error']:.2f}",
             f"{p['ratio_to_base']:.3f} ± {p['ratio_standard_error']:.3f}"]
            for n, p in record["perplexity"].items()
        ]  # fmt: skip
        parts += [markdown_table(header, rows)]
    if "reference" in record:
        rows = [
            [n, r["samples"], r["reference"], r["vllm"], _share(r["largest_likelihood_difference"], "{:.1e}")]
            for n, r in record["reference"].items()
        ]
        parts += [
            "## Against the float32 reference",
            markdown_table(["task", "documents", "reference", "vLLM", "largest difference of a log-likelihood"], rows),
        ]
    if record.get("curve"):
        parts += [f"![perplexity against kept ratio]({stem}.png)"]
    return "\n\n".join(parts) + "\n"


def table(record: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    systems = [s for s in NAMES if any(s in row for row in record["tasks"].values())]
    header = [
        "task", "shots", "metric", "documents", *(NAMES[s] for s in systems), "difference", "kept", "cut", "in window"
    ]  # fmt: skip
    rows = []
    for name, row in record["tasks"].items():
        difference = _pm(row["checkpoint_difference"], row["checkpoint_difference_stderr"])
        cells = [_pm(row[s], row[f"{s}_stderr"]) for s in systems]
        about = [_share(row["kept_ratio"]), _share(row["truncated"]), _share(row["in_window"])]
        rows.append([name, row["shots"], row["metric"], row["samples"], *cells, difference, *about])
    return header, rows


def _above_chance(found: dict[str, Any]) -> str:
    if not found["tasks"]:
        return "In no task most of whose requests skip is the base better than guessing by two standard errors."
    values = ", ".join(f"{NAMES[name]} {_share(value)}" for name, value in found.items() if name != "tasks")
    return (
        "Recovery on those where most requests skip and the base is better than guessing by two standard errors "
        f"({', '.join(found['tasks'])}): {values}."
    )


def _pm(value: float, error: float | None) -> str:
    return f"{value:.3f}" if error is None else f"{value:.3f} ± {error:.3f}"


def _share(value: float | None, form: str = "{:.3f}") -> str:
    return "-" if value is None else form.format(value)


def evaluation(record: dict[str, Any]) -> Evaluation:
    """What of it the checkpoint keeps."""
    keys = ("command", "machine", "tasks", "recovery", "static_recovery", "kept_ratio")
    perplexity = {k: v["perplexity"] for k, v in record.get("perplexity", {}).items()}
    more = {"perplexity": perplexity, "curve": record.get("curve", [])}
    return Evaluation.parse({k: record[k] for k in keys} | more, "evaluation")


def plot(record: dict[str, Any], path: Path) -> None:
    """Quality against kept ratio: the checkpoint at several thresholds, and static drops."""
    from vllm_mod.config import ModConfig
    from vllm_mod.report import Record, draw, quality_against_kept

    config = ModConfig.parse(record["mod_config"], "mod_config")
    draw(quality_against_kept, [Record(config.granularity, config, 0, evaluation=evaluation(record))], path)
    progress(f"wrote {path}")
