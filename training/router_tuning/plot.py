"""`training.png`: what a run did, step by step."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from vllm_mod.trainer_log import Step

log = logging.getLogger(__name__)

PLOT_FILE = "training.png"
#: Steps that a smooth line is the mean of, as a share of the run.
_SMOOTH = 0.1


def plot_training(steps: Sequence[Step], target: float, directory: Path) -> bool:
    """Write loss, kept ratio against its target, and lambda per step; False, with a log line, without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        log.info('%s was not drawn: it needs matplotlib, pip install "vllm-mod[bench]"', PLOT_FILE)
        return False
    x = [s.step for s in steps]
    width = max(1, round(_SMOOTH * len(x)))
    figure = Figure(figsize=(8, 8), layout="constrained")
    loss, kept, price = figure.subplots(3, 1, sharex=True)
    for axes, key, title in ((loss, "loss", "loss (nats)"), (kept, "kept", "kept ratio"), (price, "price", "λ")):
        y = [getattr(s, key) for s in steps]
        axes.set_ylabel(title)
        axes.grid(alpha=0.3)
        if key == "price":
            axes.plot(x, y, color="C0")
        else:
            axes.plot(x, y, color="C0", alpha=0.3, linewidth=1, label="each step")
            axes.plot(x, _trailing_mean(y, width), color="C0", label=f"mean of the last {width} steps")
    label: str | None = "each layer"
    for layer in steps[-1].kept_per_layer:
        y = _trailing_mean([s.kept_per_layer[layer] for s in steps], width)
        kept.plot(x, y, color="gray", alpha=0.4, linewidth=0.8, label=label)
        label = None
    kept.axhline(target, color="C3", linestyle="--", label=f"target {target:g}")
    kept.set_ylim(-0.02, 1.02)
    kept.legend(fontsize="small", ncols=2)
    price.axhline(0.0, color="black", linewidth=0.5)
    price.set_xlabel("step")
    figure.savefig(directory / PLOT_FILE, dpi=120)
    return True


def _trailing_mean(values: Sequence[float], width: int) -> list[float]:
    return [sum(values[max(0, i - width + 1) : i + 1]) / min(width, i + 1) for i in range(len(values))]
