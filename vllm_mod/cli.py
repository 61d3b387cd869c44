"""`vllm-mod`: look at dynamic-depth checkpoints. Nothing here starts an engine; `doctor` alone imports vLLM."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .architectures import BaseShape
from .config import ConfigError, ModConfig
from .granularity import POLICIES

if TYPE_CHECKING:
    from torch import Tensor

    from .tensors import Patch

_INSPECT = """\
Show what a checkpoint routes: its window and, per layer, its threshold (or cutoff) and the norm, shape and dtype of
its router; and the norms of a patch, of its bias and of its map `up down`.

CKPT is a full checkpoint (what `vllm serve` takes), a router-only directory (mod_config.json +
routers.safetensors), or the reference implementation's router-only model.safetensors with a
mod_config.json beside it. Routers are checked as at load: a missing, surplus, misshapen or
non-finite one is an error (exit status 2), and so are files beside them that would make vLLM serve
another model. Notes name files of which transformers would make another model.

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
        from . import checkpoint, files  # imports torch: --help need not wait for it
        from .tensors import patches_of
    except ModuleNotFoundError as error:  # it comes with vLLM, or with the `train` extra
        raise ConfigError(f"{error.name} is not installed; install vLLM, or vllm-mod[train]") from None

    if not directory.is_dir():
        raise ConfigError(f"{directory}: no such directory")
    config = checkpoint.read_mod_config(directory)
    where, tensors = checkpoint.load_router_tensors(directory)
    alone = checkpoint.is_router_only(directory)
    if alone:
        shape = _shape_of(tensors, config)
    else:
        files.refuse_mistral_files(directory)
        base = directory / files.CONFIG_FILE
        shape = BaseShape.of(files.read_json(base), str(base))
    routers, patches = checkpoint.check_routers(tensors, config, shape, str(where)), patches_of(tensors, config)

    layers = config.layers if alone else range(shape.num_layers)
    return {
        "path": str(directory),
        "kind": "router-only" if alone else "full checkpoint",
        "architecture": None if alone else shape.architecture,
        "num_layers": None if alone else shape.num_layers,
        "hidden_size": shape.hidden_size or None,
        "base_model": config.base_model,
        "version": config.version,
        "granularity": config.granularity,
        "window": config.window,
        "patch": None if config.patch is None else config.patch.model_dump(),
        "target_capacity": config.target_capacity,
        "layers": [_describe_layer(layer, config, routers.get(layer), patches.get(layer)) for layer in layers],
        "notes": [] if alone else _notes(directory),
    }


def _shape_of(tensors: Mapping[str, Tensor], config: ModConfig) -> BaseShape:
    """Of a router-only directory: its tensors are all that tells the base's shape."""
    from .tensors import patch_name, router_name

    layer = config.layers[0]
    tensor = tensors.get(patch_name(layer, "bias") if config.is_static else router_name(layer))
    hidden = tensor.shape[-1] if tensor is not None and tensor.dim() else 0
    experts = tensor.shape[0] if tensor is not None and config.policy.by_experts else None
    return BaseShape("", config.layers[-1] + 1, hidden, experts)


def _notes(directory: Path) -> list[str]:
    """What else could be made of a full checkpoint, and by whom."""
    from . import files

    path = str(directory)
    command = files.REFERENCE_COMMAND.replace("CKPT", path if re.fullmatch(r"[\w./-]+", path) else "CKPT")
    return [
        *(f"{directory / name}: {why}; remove it" for name, why in files.strangers(directory).items()),
        "transformers' AutoModelForCausalLM, and with it peft and lm-eval's hf backend, gives the dense base model of "
        f"this checkpoint without a word; with its routers: {command}",
    ]


def _describe_layer(layer: int, config: ModConfig, weight: Tensor | None, patch: Patch | None) -> dict[str, Any]:
    if layer not in config.layers:
        return {"layer": layer, "routed": False}
    found: dict[str, Any] = {"layer": layer, "routed": True}
    if weight is None:  # a static granularity
        found["threshold"] = None
    else:
        found[config.criterion] = config.limits[config.layers.index(layer)]
        found["router_norm"] = weight.double().norm().item()
        found |= {"shape": list(weight.shape), "dtype": str(weight.dtype).removeprefix("torch.")}
    if patch is not None:
        found |= {"patch_bias_norm": patch.bias.double().norm().item(), "patch_map_norm": _map_norm(patch)}
    return found


def _map_norm(patch: Patch) -> float:
    """Frobenius norm of `up down`, without making that `[hidden, hidden]`."""
    if patch.up is None or patch.down is None:
        return 0.0
    up, down = patch.up.double(), patch.down.double()
    return ((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt().item()


def _table(report: dict[str, Any]) -> str:
    layers = report["layers"]
    routed = [row for row in layers if row["routed"]]
    of_all = f" of {report['num_layers']}" if report["num_layers"] else ""
    facts = {
        "checkpoint": f"{report['path']} ({report['kind']})",
        "architecture": report["architecture"],
        "base model": report["base_model"],
        "granularity": f"{report['granularity']} ({_in_words(report)})",
        "routed layers": f"{len(routed)}{of_all}",
        "target capacity": report["target_capacity"],
    }
    if report["patch"]:
        facts["patch"] = f"rank {report['patch']['rank']}, in place of what is skipped"
    lines = [f"{name:<17}{'not recorded' if value is None else value}" for name, value in facts.items()]
    criterion = "cutoff" if any("cutoff" in row for row in routed) else "threshold"
    rows = [("layer", "routed", criterion, "router norm", "shape", "dtype"), *(_cells(row) for row in layers)]
    if report["patch"]:
        norms = [tuple(f"{row[k]:.4g}" if k in row else "" for k in _PATCH_NORMS) for row in layers]
        rows = [(*row, *norm) for row, norm in zip(rows, [tuple(_PATCH_NORMS.values()), *norms], strict=True)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines.append("")
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += ["", *(f"note: {note}" for note in report["notes"])] if report["notes"] else []
    return "\n".join(lines)


_PATCH_NORMS = {"patch_bias_norm": "patch bias norm", "patch_map_norm": "patch map norm"}


def _in_words(report: dict[str, Any]) -> str:
    policy = POLICIES[report["granularity"]]
    how = "always skipped" if policy.is_static else "decided per token"
    if policy.by_request:
        how = "decided once per request"
    if report["window"]:
        how += f" by its first {report['window']} prompt tokens, which always run"
    return f"{policy.words}, {how}"


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    layer = str(row["layer"])
    if not row["routed"]:
        return (layer, "no", "", "", "", "")
    limit = row.get("cutoff", row.get("threshold"))
    if limit is None:
        return (layer, "always skipped", "", "", "", "")
    return (layer, "yes", f"{limit:g}", f"{row['router_norm']:.4g}", str(row["shape"]), row["dtype"])


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
