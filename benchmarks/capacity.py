"""Is the capacity that is asked for the one that is had? Trains and calibrates routers for several targets and seeds
with the same flags throughout, and measures the kept ratio on data that neither saw.

The last `--eval-fraction` of every file is held out: one half of it, shuffled, is calibrated on, the other measured.
A kept ratio is a mean over samples, so each comes with its standard error; a distance within it says nothing. With
`--engine` the last checkpoint's kept ratio is also read from vLLM's counters, on the prompts it was calibrated on.
The last line is {"within_0.02_after_training", "within_0.005_after_calibration", "runs": [...], ...}.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_mod.calibration import read_calibration
from vllm_mod.checkpoint import read_json, read_mod_config

from .lib.common import (
    IN_PROCESS,
    command,
    fraction,
    isolated,
    machine,
    markdown_table,
    output_argument,
    progress,
    run_command,
    write_json,
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.capacity", description=__doc__)
    parser.add_argument("--model", required=True, help="base model")
    parser.add_argument("--data", nargs="+", required=True, help="files to train on, their last part held out")
    parser.add_argument("--targets", type=float, nargs="+", default=[0.75, 0.5, 0.25], help="default: %(default)s")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="default: %(default)s")
    parser.add_argument("--granularity", default="attn_sequence", help="default: %(default)s")
    parser.add_argument("--layers", nargs="+", help="as for train")
    parser.add_argument("--train-samples", type=int, default=1920, help="default: %(default)s")
    parser.add_argument("--max-length", type=int, default=256, help="tokens of a sample (default: %(default)s)")
    parser.add_argument("--eval-fraction", type=fraction, default=0.1, help="default: %(default)s")
    parser.add_argument(
        "--held-out", type=int, default=1600, help="samples, half to calibrate on (default: %(default)s)"
    )
    parser.add_argument("--engine", action="store_true", help="compare with vLLM's counters")
    parser.add_argument("--resume", action="store_true", help="keep the runs that --output has already")
    output_argument(parser, "capacity/result.json")
    return parser.parse_args()


def held_out_files(args: argparse.Namespace, directory: Path) -> tuple[Path, Path]:
    """(what is calibrated on, what is measured on)."""
    from router_tuning.data import read_sources, split_tail

    rows = split_tail(read_sources(args.data), args.eval_fraction)[1]
    random.Random(0).shuffle(rows)
    rows = rows[: args.held_out]
    parts = {"calibration.jsonl": rows[::2], "measured.jsonl": rows[1::2]}
    for name, part in parts.items():
        (directory / name).write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    return directory / "calibration.jsonl", directory / "measured.jsonl"


def router_tuning(*words: object) -> None:
    """The installed command, its stdout kept apart from ours."""
    from router_tuning.cli import main

    with contextlib.redirect_stdout(sys.stderr):
        code = main([str(word) for word in words])
    if code:
        raise SystemExit(code)


def kept_ratio(checkpoint: Path, file: Path, max_length: int) -> dict[str, Any]:
    """By the reference, of all samples in `file`."""
    from router_tuning.calibrate import collate
    from router_tuning.data import read_sources, tokenize
    from router_tuning.fitting import measure
    from router_tuning.model import load_reference
    from router_tuning.tokenizer import load_tokenizer
    from vllm_mod.checkpoint import read_mod_config

    config = read_mod_config(checkpoint)
    samples, _ = tokenize(read_sources([str(file)])[str(file)], load_tokenizer(checkpoint), max_length)
    found = measure(load_reference(checkpoint), collate(list(samples), config, 32), title="kept ratio")
    layers = {str(layer): round(kept, 4) for layer, kept in found.kept_per_layer.items()}
    error = round(found.standard_error, 4)
    return {"kept": round(found.kept, 4), "standard_error": error, "samples": len(samples), "layers": layers}


def one_run(args: argparse.Namespace, target: float, seed: int, directory: Path, files: tuple[Path, Path]) -> Any:
    """Train, measure, calibrate, measure."""
    checkpoint = directory / f"kept-{target:g}-seed-{seed}"
    layers = ["--layers", *args.layers] if args.layers else []
    router_tuning(
        "train", "--model", args.model, "--data", *args.data, "--output", checkpoint, "--target-capacity", target,
        "--granularity", args.granularity, *layers, "--seed", seed, "--max-train-samples", args.train_samples,
        "--max-length", args.max_length, "--eval-fraction", args.eval_fraction, "--max-eval-samples", 64,
        "--disable-tqdm", "true", "--window", "none", "--patch", "none",  # as in the paper
    )  # fmt: skip
    calibration, measured = files
    run: dict[str, Any] = {"target": target, "seed": seed}
    run["after_training"] = kept_ratio(checkpoint, measured, args.max_length)
    router_tuning(
        "calibrate", checkpoint, "--data", calibration, "--target-capacity", target, "--operating-points", target,
        "--max-length", args.max_length, "--max-samples", args.held_out, "--batch-size", 32,
    )  # fmt: skip
    found = read_calibration(checkpoint, read_mod_config(checkpoint))
    record = found.to_dict() if found else {}
    kept = ("kept", "samples", "threshold", "cutoff", "kept_per_layer")
    run["calibrated"] = {key: record[key] for key in kept if key in record}
    run["after_calibration"] = kept_ratio(checkpoint, measured, args.max_length)
    return run


def in_the_engine(args: argparse.Namespace, checkpoint: Path, file: Path) -> dict[str, Any]:
    """vLLM's kept ratio on the prompts that the checkpoint was calibrated on."""
    from router_tuning.data import read_sources, tokenize
    from router_tuning.tokenizer import load_tokenizer

    from .lib.engine_kept import engine_kept
    from .lib.held_out import prompts_of

    rows = read_sources([str(file)])[str(file)]
    samples, _ = tokenize(rows, load_tokenizer(checkpoint), args.max_length)
    return isolated(engine_kept, checkpoint, prompts_of(samples), **IN_PROCESS)


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    after_training = [abs(r["after_training"]["kept"] - r["target"]) for r in runs]
    calibrated = [abs(r["calibrated"]["kept"] - r["target"]) for r in runs]
    return {
        "within_0.02_after_training": f"{sum(d <= 0.02 for d in after_training)} of {len(runs)}",
        "farthest_after_training": round(max(after_training), 4),
        "within_0.005_after_calibration": f"{sum(d <= 0.005 for d in calibrated)} of {len(runs)}",
        "farthest_after_calibration": round(max(calibrated), 5),
    }


def main() -> None:
    args = arguments()
    runs: list[dict[str, Any]] = read_json(args.output)["runs"] if args.resume else []
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        files = held_out_files(args, directory)
        record: dict[str, Any] = {"command": command("capacity"), "machine": machine()}
        for seed in args.seeds:
            for target in args.targets:
                if any((r["target"], r["seed"]) == (target, seed) for r in runs):
                    continue
                runs.append(one_run(args, target, seed, directory, files))
                record |= summary(runs) | {"runs": runs}
                write_json(args.output, record)
        last = directory / f"kept-{args.targets[-1]:g}-seed-{args.seeds[-1]}"
        if args.engine and last.exists():
            record["engine"] = in_the_engine(args, last, files[0]) | {"target": args.targets[-1]}
            write_json(args.output, record)
    header = ("target", "seed", "after training", "on calibration data", "after calibration")
    rows = []
    for r in runs:
        cells = [f"{r[k]['kept']:.3f} ± {r[k]['standard_error']:.3f}" for k in ("after_training", "after_calibration")]
        rows.append([r["target"], r["seed"], cells[0], f"{r['calibrated']['kept']:.4f}", cells[1]])
    progress(markdown_table(header, rows))
    print(json.dumps({key: value for key, value in record.items() if key not in ("machine", "command")}))


if __name__ == "__main__":
    run_command(main, "capacity", "interrupted; --resume goes on from the runs that are in the result file")
