"""What a checkpoint keeps of its base model's quality: lm-eval's scores of the paper's nine tasks in vLLM, perplexity
of held-out answers, and the kept ratio that the engine had during that very evaluation.

  base        the base model, in stock vLLM
  checkpoint  the routed checkpoint
  static      as many sublayers dropped for good as the checkpoint skipped on average (LLM-Drop); they are chosen by its
              criterion on --data, among all layers

Without a hub, --data-dir is a directory whose sub-directories are named like the tasks' data sets (`aps/super_glue`,
`allenai/ai2_arc`, ...): lm-eval runs inside it. Shots and metrics are the paper's. To score an answer lm-eval submits
it with its question, so a sequence decision is a mean over both. Prompts that are longer than the model allows lose
their first shots (lm-eval cuts on the left); the share of them is reported. So is that of requests which end within the
checkpoint's decision window: they run every layer, and a task most of whose requests do says little about skipping, so
it is left out of the recovery. --min-shots makes them longer.

Writes --output (.json, .md and .png), `evaluation.json` and the model card in the checkpoint. Finished systems are kept
in <output>.partial.json, so that an interrupted evaluation goes on where it was. The last line of stdout is

  {"tasks", "recovery", "kept_ratio", "static_recovery"}
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from router_tuning.hub import local_model
from vllm_mod.checkpoint import read_json, write_checkpoint
from vllm_mod.config import ConfigError, ModConfig
from vllm_mod.evaluation import write_evaluation

from .lib.common import (
    IN_PROCESS,
    command,
    command_line,
    isolated,
    machine,
    markdown_table,
    output_argument,
    progress,
    run_command,
    write_json,
)
from .lib.errors import above, mean_and_error
from .lib.held_out import check_checkpoint, held_out_arguments
from .lib.tasks import TASKS, Load, check_tasks, reference_scores, vllm_scores

ENVIRONMENT = IN_PROCESS | {"VLLM_NO_USAGE_STATS": "1"}


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command_line("quality", __doc__)
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CKPT", help="what `router-tuning train` wrote")
    add("--model", required=True, help="its base model: a directory, a hub name, or smollm2")
    add("--tasks", nargs="+", default=list(TASKS), metavar="TASK", help=f"default: {' '.join(TASKS)}")
    add("--limit", type=int, help="documents per task, spread over its parts (default: all)")
    add("--min-shots", type=int, default=0, metavar="N", help="examples before the question in tasks that the paper "
        "gives fewer, so that prompts are longer than a decision window (default: the paper's)")  # fmt: skip
    add("--data-dir", type=Path, help="where the tasks' data sets lie as directories (default: the hub)")
    add("--include-path", type=Path, help="lm-eval's: a directory of task files that replace its own")
    add("--data", nargs="+", help="instruction data whose last part was held out in training: perplexity, static drop")
    held_out_arguments(parser)
    add("--static", type=int, nargs="+", metavar="LAYER", help="drop these layers instead of choosing them on --data")
    add("--static-checkpoint", type=Path, metavar="CKPT", help="compare with this static drop, such as one that "
        "`router-tuning fit --static` wrote, with its patches, in place of one without any")  # fmt: skip
    add("--no-static", action="store_true", help="leave the static drop out")
    add("--thresholds", type=float, nargs="*", help="further points of the plot, by perplexity "
        "(default: the operating points that `router-tuning calibrate` stored)")  # fmt: skip
    add("--reference", type=int, default=0, metavar="N", help="score the first N documents of each task by the float32 "
        "reference too, and compare; an eighth as many where answers are generated: it has no KV cache")  # fmt: skip
    add("--dtype", default="auto", help="of the engine; float32 to compare with the reference (default: %(default)s)")
    add("--model-args", type=json.loads, default={}, metavar="JSON", help="more of vLLM's engine arguments, such as "
        """'{"tensor_parallel_size": 2}'""")  # fmt: skip
    output_argument(parser, "quality/result.json")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> ModConfig:
    """Everything that can be wrong, before any long work; raises ConfigError. `--model` becomes a directory."""
    args.model = local_model(str(args.model))
    directories = {
        "CKPT": args.checkpoint,
        "--data-dir": args.data_dir,
        "--include-path": args.include_path,
        "--static-checkpoint": args.static_checkpoint,
    }
    for flag, path in directories.items():
        if path is not None and not path.is_dir():
            raise ConfigError(f"{flag}: {path} is not a directory")
    config = check_checkpoint(args.checkpoint, args.model)
    if config.is_static:
        raise ConfigError(f"{args.checkpoint}: a static checkpoint decides nothing; give a routed one")
    if args.static_checkpoint:
        check_checkpoint(args.static_checkpoint, args.model)
    if unknown := [t for t in args.tasks if t not in TASKS]:
        raise ConfigError(f"--tasks: {unknown[0]!r} is not known; the paper's are {', '.join(TASKS)}")
    if args.limit is not None and args.limit < 1:
        raise ConfigError("--limit: at least 1 document")
    if args.min_shots < 0:
        raise ConfigError("--min-shots: 0 or more")
    if config.policy.by_experts and not args.no_static:
        raise ConfigError("experts have no static drop to compare with; pass --no-static")
    ways = bool(args.static) + bool(args.static_checkpoint) + args.no_static
    if ways > 1:
        raise ConfigError("--static, --static-checkpoint and --no-static are alternatives")
    if not (ways or args.data):
        raise ConfigError(
            "the static drop is chosen on calibration data: pass --data, --static LAYER…, --static-checkpoint CKPT "
            "or --no-static"
        )
    try:
        import lm_eval  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError(f'{error.name} is not installed; pip install "vllm-mod[eval,bench]"') from None
    return config


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    config = check(args)
    places = (p and str(p.resolve()) for p in (args.data_dir, args.include_path))
    load = Load(args.tasks, args.limit, *places, min_shots=args.min_shots)
    documents = isolated(check_tasks, load, **ENVIRONMENT)
    progress(f"documents: {documents}")
    held_out = None
    if args.data:
        from .lib.curve import Perplexities

        held_out = Perplexities(args, config)
    finished = Finished(args.output.with_suffix(".partial.json"), command("quality"))

    model_args = engine_args() | {"dtype": args.dtype} | args.model_args

    def in_vllm(name: str, model: Path, mod: dict[str, Any] | None = None) -> dict[str, Any]:
        progress(f"lm-eval in vLLM: {name}")
        path = str(model.resolve())
        return finished.get(name, lambda: isolated(vllm_scores, path, mod, load, model_args, **ENVIRONMENT))

    systems = {"base": in_vllm("base", args.model), "checkpoint": in_vllm("checkpoint", args.checkpoint, {})}
    kept = kept_ratio(systems["checkpoint"])
    dropped = [] if args.no_static or args.static_checkpoint else static_layers(args, config, kept, held_out)
    if args.static_checkpoint:
        systems["static"] = in_vllm("static", args.static_checkpoint)
    if dropped:
        progress(f"static drop: layers {dropped}")
        with tempfile.TemporaryDirectory(dir=args.checkpoint.resolve().parent) as directory:
            static = ModConfig.parse(
                {"version": 1, "granularity": f"{config.policy.target}_static", "layers": dropped}, "static drop"
            )
            checkpoint = write_checkpoint(args.model, Path(directory) / "static", static, {})
            systems["static"] = in_vllm("static", checkpoint)
    record = {
        "command": command("quality"), "machine": machine(), "mod_config": config.to_dict(),
        "limit": args.limit, "kept_ratio": kept, "static_layers": dropped,
        "static_checkpoint": args.static_checkpoint and str(args.static_checkpoint),
    } | summary(systems, config.window)  # fmt: skip
    if args.reference:
        record["reference"] = compare_with_reference(args, load, systems["checkpoint"], finished)
    if held_out:
        record |= held_out.measure(finished.get, dropped, args.thresholds)
    write(record, args)
    finished.remove()
    print(json.dumps({key: record[key] for key in ("tasks", "recovery", "kept_ratio", "static_recovery")}))


#: Of what `vllm_scores` returns; what an older version left unfinished is measured anew.
_FORMAT = 2


class Finished:
    """What is done, on disk, until the whole evaluation is; belongs to one command line."""

    def __init__(self, path: Path, owner: str) -> None:
        self.path = path
        self.done: dict[str, Any] = {"command": owner, "format": _FORMAT}
        if path.is_file() and self.done.items() <= (stored := read_json(path)).items():
            progress(f"going on from {path}")
            self.done = stored

    def get(self, name: str, work: Callable[[], Any]) -> Any:
        if name not in self.done:
            self.done[name] = work()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.done))
        return self.done[name]

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def engine_args() -> dict[str, Any]:
    """On a CPU vLLM would reserve half of the memory, and compile for minutes."""
    import torch

    if torch.cuda.is_available():
        return {}
    return {"enforce_eager": True, "kv_cache_memory_bytes": 1 << 30, "block_size": 32}


def kept_ratio(result: dict[str, Any]) -> float | None:
    tasks = result["tasks"].values()
    routed = sum(t["routed"] for t in tasks)
    return round(sum(t["kept"] for t in tasks) / routed, 4) if routed else None


def static_layers(args: argparse.Namespace, config: ModConfig, kept: float | None, held_out: Any) -> list[int]:
    if args.static:
        return sorted(args.static)
    number = round((1 - (1.0 if kept is None else kept)) * len(config.layers))
    if not number:
        progress("the checkpoint skipped less than half a layer on average: no static drop is as small")
        return []
    return sorted(held_out.order()[:number])


def summary(systems: dict[str, dict[str, Any]], window: int | None = None) -> dict[str, Any]:
    """Per task mean, standard error and the paired difference to the base; recovery: mean over tasks of the quotient.

    A task in which the base scores 0 has no quotient and is left out of the recovery; so is one most of whose requests
    end within the decision window. `above_chance` are the others that the base does better than guessing by two
    standard errors: what is lost can be seen there.
    """
    tasks: dict[str, dict[str, Any]] = {}
    for name, base in systems["base"]["tasks"].items():
        row: dict[str, Any] = {"metric": TASKS[name].metric, "shots": base["shots"], "samples": len(base["values"])}
        for system, result in systems.items():
            values = result["tasks"][name]["values"]
            row[system], row[f"{system}_stderr"] = map(_rounded, mean_and_error(values))
            if system != "base":
                found = map(_rounded, above(values, base["values"]))
                row[f"{system}_difference"], row[f"{system}_difference_stderr"] = found
        row["truncated"] = _share_of(base["lengths"], lambda length: length > systems["base"]["max_length"] - 1)
        row["in_window"] = _share_of(base["lengths"], lambda length: length <= (window or 0))
        routed = systems["checkpoint"]["tasks"][name]["routed"]
        row["kept_ratio"] = _rounded(systems["checkpoint"]["tasks"][name]["kept"] / routed if routed else None)
        tasks[name] = row
    telling = {name: row for name, row in tasks.items() if row["base"] and row["in_window"] <= 0.5}
    seen = {n: row for n, row in telling.items() if row["base"] - 2 * (row["base_stderr"] or 0) > TASKS[n].chance}
    return {
        "tasks": tasks,
        "recovery": recovery(telling, "checkpoint"),
        "static_recovery": recovery(telling, "static"),
        "left_out_of_recovery": [name for name in tasks if name not in telling],
        "above_chance": {"tasks": list(seen)} | {name: recovery(seen, name) for name in systems if name != "base"},
    }


def _share_of(lengths: Sequence[int], which: Callable[[int], bool]) -> float:
    return round(sum(map(which, lengths)) / max(len(lengths), 1), 4)


def recovery(tasks: dict[str, dict[str, Any]], system: str) -> float | None:
    quotients = [row[system] / row["base"] for row in tasks.values() if system in row]
    return _rounded(sum(quotients) / len(quotients)) if quotients else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def compare_with_reference(
    args: argparse.Namespace, load: Load, engine: dict[str, Any], finished: Finished
) -> dict[str, Any]:
    """The first documents of each task by the reference: both means, and the largest difference of a likelihood."""
    progress("lm-eval on the float32 reference: checkpoint")
    number = min(args.reference, args.limit or args.reference)
    few = replace(load, limit=number, generated=max(1, number // 8))
    path, longest = str(args.checkpoint.resolve()), engine["max_length"]
    found = finished.get("reference", lambda: isolated(reference_scores, path, few, longest, **ENVIRONMENT))["tasks"]
    return {name: _compared(found[name], engine["tasks"][name]) for name in found}


def _compared(reference: dict[str, Any], engine: dict[str, Any]) -> dict[str, Any]:
    places = {tuple(document): i for i, document in enumerate(engine["documents"])}
    same = [places[tuple(document)] for document in reference["documents"]]
    pairs = zip(reference["likelihoods"], (engine["likelihoods"][i] for i in same), strict=True)
    differences = [abs(a - b) for x, y in pairs for a, b in zip(x, y, strict=True)]
    return {
        "samples": len(same),
        "reference": _rounded(mean_and_error(reference["values"])[0]),
        "vllm": _rounded(mean_and_error([engine["values"][i] for i in same])[0]),
        "largest_likelihood_difference": max(differences, default=None),
    }


def write(record: dict[str, Any], args: argparse.Namespace) -> None:
    from router_tuning import card

    from .lib.quality_report import evaluation, plot, table, text

    progress(markdown_table(*table(record)))
    write_json(args.output, record)
    args.output.with_suffix(".md").write_text(text(record, args.output.stem), encoding="utf-8")
    if record.get("curve"):
        plot(record, args.output.with_suffix(".png"))
    write_evaluation(args.checkpoint, evaluation(record))
    card.write(args.checkpoint)


if __name__ == "__main__":
    run_command(main, "quality", "interrupted; the same command goes on from what is done")
