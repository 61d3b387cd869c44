"""Pictures of checkpoints, from the statistics stored in them; needs matplotlib, neither torch nor vLLM.

Each picture is one function from records to a figure. A record is what `read_record` finds in a checkpoint directory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import ConfigError, ModConfig

if TYPE_CHECKING:
    from .calibration import Calibration
    from .evaluation import Evaluation
    from .trainer_log import HeldOut, TrainerLog

#: Okabe and Ito's colours, which everybody can tell apart; markers say the same again.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


class CannotDraw(Exception):
    """Says what a picture lacks."""


@dataclass(frozen=True)
class Record:
    """The statistics of one checkpoint; None: its file is not there."""

    name: str
    config: ModConfig
    num_layers: int
    log: TrainerLog | None = None
    calibration: Calibration | None = None
    evaluation: Evaluation | None = None

    @property
    def held_out(self) -> HeldOut | None:
        """At the end of training."""
        return self.log.held_out if self.log else None

    @property
    def recovery(self) -> float | None:
        return self.evaluation.recovery if self.evaluation else None

    @property
    def kept_per_layer(self) -> dict[int, float]:
        """As calibrated last, else as trained."""
        calibrated = self.calibration.kept_per_layer if self.calibration else {}
        found = calibrated or (self.held_out.kept_per_layer if self.held_out else {})
        return {int(layer): ratio for layer, ratio in found.items()}

    @property
    def perplexity_ratio(self) -> float | None:
        return self.held_out.perplexity / self.held_out.dense_perplexity if self.held_out else None

    @property
    def training_samples(self) -> int | None:
        return self.log.data.training.used if self.log else None


def read_record(directory: Path) -> Record:
    """Raises ConfigError unless `directory` is a checkpoint."""
    from .calibration import read_calibration
    from .checkpoint import read_json, read_mod_config
    from .evaluation import read_evaluation
    from .trainer_log import read_log

    if not directory.is_dir():
        raise ConfigError(f"{directory}: no such directory")
    config = read_mod_config(directory)
    base = directory / "config.json"
    num_layers = read_json(base).get("num_hidden_layers", 0) if base.is_file() else 0

    return Record(
        name=directory.resolve().name,
        config=config,
        num_layers=max(num_layers, config.layers[-1] + 1),
        log=read_log(directory),
        calibration=read_calibration(directory, config),
        evaluation=read_evaluation(directory),
    )


def legend_names(names: Sequence[str], longest: int = 40) -> list[str]:
    """Names that fit a legend and differ: long ones lose words (`a-b-c`) that all share at an end, and their middle."""
    if len(set(names)) > 1 and max(map(len, names)) > longest:
        words = [name.split("-") for name in names]
        for place in (0, -1):
            while min(map(len, words)) > 1 and len({found[place] for found in words}) == 1:
                for found in words:
                    del found[place]
        names = ["-".join(found) for found in words]
    short = [n if len(n) <= longest else f"{n[: longest // 2]}…{n[-longest // 2 + 1 :]}" for n in names]
    return [n if short.count(n) == 1 else f"{i}: {n}" for i, n in enumerate(short, 1)]


def draw_all(directories: Iterable[Path], output: Path) -> dict[str, str]:
    """Draw what can be drawn into `output`; file name -> "" or the reason why it could not be."""
    records = [read_record(directory) for directory in directories]
    names = legend_names([record.name for record in records])
    records = [replace(record, name=name) for record, name in zip(records, names, strict=True)]

    def attempt(name: str) -> str:
        try:
            draw(PICTURES[name], records, output / name)
        except CannotDraw as reason:
            return str(reason)
        return ""

    return {name: attempt(name) for name in PICTURES}


def draw(picture: Callable[[Sequence[Record]], Any], records: Sequence[Record], path: Path) -> None:
    """Write one picture as PNG; raises CannotDraw, or ConfigError without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise ConfigError('matplotlib is not installed; pip install "vllm-mod[bench]"') from None
    style: Any = {
        "font.size": 11,
        "axes.grid": True,
        "grid.alpha": 0.3,
        "axes.axisbelow": True,
        "legend.frameon": False,
    }
    with matplotlib.rc_context({"backend": "agg", **style}):
        from matplotlib import pyplot

        figure = picture(records)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=130)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None
        finally:
            pyplot.close(figure)


def _axes(columns: int = 1, rows: int = 1, size: tuple[float, float] = (6.4, 4.2), **more: Any) -> tuple[Any, Any]:
    from matplotlib import pyplot

    width, height = size[0] * columns, size[1] * rows
    return pyplot.subplots(rows, columns, figsize=(width, height), layout="constrained", squeeze=False, **more)


def _legend(figure: Any, *axes: Any) -> None:
    """Below the plots, where it hides nothing; each name once."""
    found: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if found:
        width, height = figure.get_size_inches()
        room = width * 12  # characters, roughly
        columns = max(1, min(len(found), int(room / (max(map(len, found)) + 7))))
        figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=columns, fontsize=10)
        figure.set_size_inches(width, height + 0.2 * (len(found) // columns))  # plots keep their height


def kept_per_layer(records: Sequence[Record]) -> Any:
    """The paper's Figure 3: kept ratio of every layer; layers without a router always run."""
    drawn = [r for r in records if r.kept_per_layer]
    if not drawn:
        raise CannotDraw("no checkpoint has trainer_log.json or calibration.json with kept ratios per layer")
    figure, ((axis,),) = _axes(size=(7.6, 4.4))
    for number, record in enumerate(drawn):
        kept = record.kept_per_layer
        color, marker = COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)]
        layers = list(range(record.num_layers))
        ratios = [kept.get(i) for i in layers]
        axis.plot(layers, [1.0 if r is None else r for r in ratios], color=color, alpha=0.35, linewidth=1)
        mean = sum(kept.values()) / len(kept)
        axis.plot(list(kept), list(kept.values()), marker, color=color, label=f"{record.name} (mean {mean:.2f})")
    last = max(r.num_layers for r in drawn) - 1
    axis.set(xlabel="layer", ylabel="kept ratio (held-out data)", xlim=(-0.5, last + 0.5), ylim=(-0.03, 1.05))
    axis.set_xticks(range(0, last + 1, max(1, (last + 1) // 16)))
    axis.set_title("Kept ratio per layer (no marker: no router, always runs)", fontsize=11)
    _legend(figure, axis)
    return figure


def experts(records: Sequence[Record]) -> Any:
    """The paper's Figure 6: how often each expert is selected, and what its gate keeps, as capacity shrinks."""
    drawn = [
        (r, found) for r in records if (found := r.held_out) and found.kept_per_expert and found.selected_per_expert
    ]
    if not drawn:
        raise CannotDraw("no expert_token checkpoint with kept_per_expert and selected_per_expert in trainer_log.json")
    drawn.sort(key=lambda pair: -pair[1].kept)
    figure, axes = _axes(2, len(drawn), size=(5.6, 3.1))
    for row, (record, found) in zip(axes, drawn, strict=True):
        selected, kept = found.selected_per_expert or {}, found.kept_per_expert or {}
        layers = sorted(selected, key=int)
        shares = [[n / (sum(selected[i]) or 1) for n in selected[i]] for i in layers]
        ratios = [[float("nan") if r is None else r for r in kept[i]] for i in layers]
        for axis, values, top, what in (
            (row[0], shares, None, "share of the layer's selections"),
            (row[1], ratios, 1.0, "kept of the selected"),
        ):
            image = axis.imshow(values, aspect="auto", cmap="viridis", vmin=0, vmax=top, interpolation="nearest")
            figure.colorbar(image, ax=axis, label=what)
            axis.set(xlabel="expert", ylabel="layer")
            axis.set_yticks(range(len(layers)), layers)
            axis.set_xticks(range(0, len(values[0]), max(1, len(values[0]) // 16)))
            axis.grid(visible=False)
            axis.set_title(f"{record.name}: kept {found.kept:.2f}", fontsize=11)
    return figure


def _quality(records: Sequence[Record]) -> tuple[str, Callable[[Record], Any]]:
    """The measure that all have: recovery of the tasks, else perplexity."""
    if all(r.recovery is not None for r in records):
        return "recovery (mean over tasks, routed / base)", lambda r: r.recovery
    return "perplexity / dense (held-out answers)", lambda r: r.perplexity_ratio


def _against(
    records: Sequence[Record], what: str, value: Callable[[Record], Any], same: Callable[[Record], str]
) -> Any:
    """Quality against `value`, a line for each set of checkpoints of which `same` is equal."""
    usable = [r for r in records if not r.config.is_static and r.perplexity_ratio and value(r) is not None]
    lines: dict[str, list[Record]] = {}
    for record in usable:
        lines.setdefault(same(record), []).append(record)
    lines = {key: found for key, found in lines.items() if len({value(r) for r in found}) > 1}
    if not lines:
        raise CannotDraw(f"two or more checkpoints are needed that differ in the {what} and in nothing else")
    label, quality = _quality([r for found in lines.values() for r in found])
    figure, ((axis,),) = _axes()
    for number, (key, found) in enumerate(lines.items()):
        found.sort(key=value)
        color, marker = COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)]
        x, y = [value(r) for r in found], [quality(r) for r in found]
        axis.plot(x, y, marker, color=color, label=key)
        means = []
        for at in sorted(set(x)):  # over seeds
            there = [r for r in found if value(r) == at]
            kept = sum(r.held_out.kept for r in there if r.held_out) / len(there)
            means.append(sum(map(quality, there)) / len(there))
            axis.annotate(f"kept {kept:.2f}", (at, max(map(quality, there))), fontsize=9, color=color,
                          xytext=(0, 7), textcoords="offset points", ha="center")  # fmt: skip
        axis.plot(sorted(set(x)), means, color=color, linewidth=1)
    axis.axhline(1.0, color="#666666", linestyle=":", label="dense")
    axis.set(xlabel=what, ylabel=label)
    axis.set_xticks(sorted({value(r) for r in usable}))
    axis.margins(0.12)
    _legend(figure, axis)
    return figure


def routed_layers(records: Sequence[Record]) -> Any:
    """The paper's Figure 4."""

    def same(record: Record) -> str:
        return f"{record.config.granularity}, target {record.config.target_capacity}, {record.training_samples} samples"

    return _against(records, "number of routed layers", lambda r: len(r.config.layers), same)


def training_samples(records: Sequence[Record]) -> Any:
    """The paper's Figure 5."""

    def same(record: Record) -> str:
        layers = f"{len(record.config.layers)} routed layers"
        return f"{record.config.granularity}, target {record.config.target_capacity}, {layers}"

    from matplotlib.ticker import NullLocator, ScalarFormatter

    figure = _against(records, "number of training samples", lambda r: r.training_samples, same)
    axis = figure.axes[0]
    ticks = axis.get_xticks()
    axis.set_xscale("log")
    axis.set_xticks(ticks)
    axis.xaxis.set_major_formatter(ScalarFormatter())
    axis.xaxis.set_minor_locator(NullLocator())
    return figure


def quality_against_kept(records: Sequence[Record]) -> Any:
    """Pareto curves: perplexity (and recovery of tasks, where there is one) against kept ratio, routed and static."""
    entries = []
    for record in records:
        curve = record.evaluation.curve if record.evaluation else []
        points = [(p.system, p.kept, p.ratio_to_base, p.ratio_standard_error) for p in curve if p.kept is not None]
        if not points and record.held_out and record.perplexity_ratio and not record.config.is_static:
            points = [("routed", record.held_out.kept, record.perplexity_ratio, 0.0)]
        if points:
            entries.append((record, points))
    if not entries:
        raise CannotDraw("no checkpoint has evaluation.json or a held-out perplexity in trainer_log.json")
    evaluated = [r for r, _ in entries if r.recovery is not None]
    figure, (axes,) = _axes(2 if evaluated else 1)
    for number, (record, points) in enumerate(entries):
        color = COLORS[number % len(COLORS)]
        name = record.name
        for system, style in (("routed", f"{MARKERS[number % len(MARKERS)]}-"), ("static", "x--")):
            found = sorted(((kept, y, error) for s, kept, y, error in points if s == system), key=lambda p: p[0])
            if found:
                x, y, error = zip(*found, strict=True)
                label = f"{name}, {'routed' if system == 'routed' else 'static drop'}"
                axes[0].errorbar(x, y, error, fmt=style, color=color, capsize=2, label=label,
                                 alpha=1 if system == "routed" else 0.6)  # fmt: skip
        if record.evaluation and record.recovery is not None:
            kept, skipped = record.evaluation.kept_ratio, record.evaluation.static_recovery
            axes[1].plot(kept, record.recovery, MARKERS[number % len(MARKERS)], color=color)
            if skipped is not None:
                axes[1].plot(kept, skipped, "x", color=color, alpha=0.6)
    for axis, label in zip(axes, ("perplexity / dense (held-out answers)", "recovery of the tasks (mean of quotients)"),
                           strict=False):  # fmt: skip
        axis.axhline(1.0, color="#666666", linestyle=":", label="base model")
        axis.set(xlabel="kept ratio of the routed sublayers", ylabel=label, xlim=(1.03, -0.03))
        axis.margins(y=0.1)
    _legend(figure, *axes)
    return figure


PICTURES: dict[str, Callable[[Sequence[Record]], Any]] = {
    "kept_per_layer.png": kept_per_layer,
    "experts.png": experts,
    "routed_layers.png": routed_layers,
    "training_samples.png": training_samples,
    "quality_against_kept.png": quality_against_kept,
}
