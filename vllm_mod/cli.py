"""`vllm-mod`: look at dynamic-depth checkpoints. Nothing here starts an engine; `doctor` alone imports vLLM."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .config import ConfigError, ModConfig

if TYPE_CHECKING:
    from torch import Tensor

_INSPECT = """\
Show what a checkpoint routes: per layer its threshold and the norm, shape and dtype of its router.

CKPT is a full checkpoint (what `vllm serve` takes), a router-only directory (mod_config.json +
routers.safetensors), or the reference implementation's router-only model.safetensors with a
mod_config.json beside it. Routers are checked as at load: a missing, surplus, misshapen or
non-finite one is an error (exit status 2).

A router norm of 0 means untrained: every token is kept. The norm says little else by itself;
what a layer really keeps is in the server's /metrics (vllm:mod_kept_total, vllm:mod_routed_total).
"""


def inspect(args: argparse.Namespace) -> None:
    """Print the routing of a checkpoint."""
    report = describe(Path(args.checkpoint))
    print(json.dumps(report, indent=2) if args.json else _table(report))


_REPORT = """\
Draw pictures of checkpoints from the statistics stored in them; no engine, no model is loaded.

  kept_per_layer.png        kept ratio of each routed layer (trainer_log.json, calibration.json)
  experts.png               per expert: how often it is selected, and what its gate keeps (expert_token)
  routed_layers.png         quality against the number of routed layers   } several checkpoints that
  training_samples.png      quality against the number of training samples} differ in that alone
  quality_against_kept.png  quality against kept ratio, routed and static drop (evaluation.json of
                            `python -m benchmarks.quality`, else the perplexity that training measured)

What cannot be drawn is said with its reason.
"""


def report(args: argparse.Namespace) -> None:
    """Draw what the checkpoints' statistics allow."""
    from .report import draw_all

    output = Path(args.output)
    outcome = draw_all([Path(checkpoint) for checkpoint in args.checkpoints], output)
    for name, reason in outcome.items():
        print(f"not drawn: {name}: {reason}" if reason else f"written: {output / name}")


_DOCTOR = """\
Would vLLM, in this environment, serve a routed checkpoint? One line for each of: is the plugin found, is vLLM there
and one that is tested, are the architectures registered, are vLLM's private interfaces as expected.
Exit status 1 if something is wrong; the line says what to do.
"""


def doctor(args: argparse.Namespace) -> int:
    """Check the environment."""
    from .doctor import doctor as examine

    return examine()


def describe(directory: Path) -> dict[str, Any]:
    """What a full checkpoint or a router-only directory routes, as one JSON object; its routers are checked."""
    try:
        from . import checkpoint  # imports torch: --help need not wait for it
    except ModuleNotFoundError as error:  # it comes with vLLM, or with the `train` extra
        raise ConfigError(f"{error.name} is not installed; install vLLM, or vllm-mod[train]") from None

    if not directory.is_dir():
        raise ConfigError(f"{directory}: no such directory")
    config = checkpoint.read_mod_config(directory)
    where, tensors = checkpoint.load_router_tensors(directory)
    base = directory / "config.json"
    if base.is_file():
        shape = checkpoint.BaseShape.of(checkpoint.read_json(base), str(base))
    else:  # router-only: the routers themselves are all that tells the base's shape
        rows, hidden = next((t.shape for t in tensors.values() if t.ndim == 2), (1, 0))
        experts = rows if config.target == "expert" else None
        shape = checkpoint.BaseShape("", config.layers[-1] + 1, hidden, experts)
    routers = checkpoint.check_routers(tensors, config, shape, str(where))

    layers = range(shape.num_layers) if shape.architecture else config.layers
    return {
        "path": str(directory),
        "kind": "full checkpoint" if shape.architecture else "router-only",
        "architecture": shape.architecture or None,
        "num_layers": shape.num_layers if shape.architecture else None,
        "hidden_size": shape.hidden_size or None,
        "base_model": config.base_model,
        "granularity": config.granularity,
        "target_capacity": config.target_capacity,
        "layers": [_describe_layer(layer, config, routers.get(layer)) for layer in layers],
    }


def _describe_layer(layer: int, config: ModConfig, weight: Tensor | None) -> dict[str, Any]:
    if layer not in config.layers:
        return {"layer": layer, "routed": False}
    if weight is None:  # a static granularity
        return {"layer": layer, "routed": True, "threshold": None}
    return {
        "layer": layer,
        "routed": True,
        "threshold": config.thresholds[config.layers.index(layer)],
        "router_norm": weight.double().norm().item(),
        "shape": list(weight.shape),
        "dtype": str(weight.dtype).removeprefix("torch."),
    }


def _table(report: dict[str, Any]) -> str:
    layers = report["layers"]
    routed = [row for row in layers if row["routed"]]
    of_all = f" of {report['num_layers']}" if report["num_layers"] else ""
    facts = {
        "checkpoint": f"{report['path']} ({report['kind']})",
        "architecture": report["architecture"],
        "base model": report["base_model"],
        "granularity": f"{report['granularity']} ({_in_words(report['granularity'])})",
        "routed layers": f"{len(routed)}{of_all}",
        "target capacity": report["target_capacity"],
    }
    lines = [f"{name:<17}{'not recorded' if value is None else value}" for name, value in facts.items()]
    header = ("layer", "routed", "threshold", "router norm", "shape", "dtype")
    rows = [header, *(_cells(row) for row in layers)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines.append("")
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def _in_words(granularity: str) -> str:
    target, level = granularity.split("_")
    what = {"attn": "self-attention", "mlp": "MLP", "block": "attention and MLP", "expert": "experts"}[target]
    how = {"token": "decided per token", "sequence": "decided once per request", "static": "always skipped"}[level]
    return f"{what}, {how}"


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    layer = str(row["layer"])
    if not row["routed"]:
        return (layer, "no", "", "", "", "")
    if row["threshold"] is None:
        return (layer, "always skipped", "", "", "", "")
    return (layer, "yes", f"{row['threshold']:g}", f"{row['router_norm']:.4g}", str(row["shape"]), row["dtype"])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vllm-mod",
        description="Dynamic-depth (Router-Tuning) checkpoints for vLLM. Serve one with: vllm serve CKPT",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = commands.add_parser(
        "inspect",
        help="show what a checkpoint routes",
        description=_INSPECT,
        epilog="example: vllm-mod inspect ckpt/llama3-8b-mod --json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("checkpoint", metavar="CKPT", help="checkpoint directory")
    command.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    command.set_defaults(run=inspect)
    command = commands.add_parser(
        "report",
        help="draw pictures from the statistics in checkpoints",
        description=_REPORT,
        epilog="example: vllm-mod report ckpt/llama3-8b-mod-0.75 ckpt/llama3-8b-mod-0.5 --output pictures",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("checkpoints", metavar="CKPT", nargs="+", help="checkpoint directories")
    command.add_argument("--output", metavar="DIR", default="report", help="where to (default: %(default)s)")
    command.set_defaults(run=report)
    command = commands.add_parser(
        "doctor",
        help="check that vLLM will serve checkpoints here",
        description=_DOCTOR,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=doctor)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        return args.run(args) or 0
    except ConfigError as error:
        print(f"vllm-mod: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
