"""What routers are worth, one choice varied at a time: routers are trained again and again, and each checkpoint is
compared on held-out answers with the dense model and with static drops at the same kept ratio.

Groups (--groups), each a few training runs:

  main     attn_sequence and attn_token at targets 0.75 and 0.5, every seed
  layers   where --redundant-layers says, at 0.5; and all layers but the first, with as many skipped as in `main` at 0.5
  depth    attn_sequence at 0.5 with fewer and with more routed layers
  samples  attn_sequence at 0.5 with a quarter and with twice the samples
  data     attn_sequence at 0.5, trained on each source alone
  module   mlp and block instead of attn, at 0.5
  oracle   no training: what deciding per request could give at best, knowing the answers

Runs that the result file has already are skipped, so an interrupted script goes on where it was; Ctrl-C loses nothing
but the current step. The last line of stdout is {"runs", "main"}.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from router_tuning.states import newest_whole
from vllm_mod.checkpoint import read_json
from vllm_mod.config import ConfigError, default_layers

from .lib.common import (
    RESULTS,
    command,
    command_line,
    fraction,
    machine,
    progress,
    result_file,
    run_command,
    write_json,
)

GROUPS = ("main", "oracle", "layers", "depth", "samples", "data", "module")


@dataclass(frozen=True)
class Run:
    """One training run; its `name` is its directory and its key in the result file."""

    granularity: str = "attn_sequence"
    target: float = 0.5
    layers: tuple[int, ...] = ()
    samples: int = 0
    seed: int = 0
    sources: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        sources = "+".join(Path(s).name.split(".")[0] for s in self.sources)
        layers = ".".join(map(str, self.layers))
        return f"{self.granularity}-{self.target:g}-layers{layers}-{self.samples}-{sources}-seed{self.seed}"

    def flags(self, args: argparse.Namespace) -> list[str]:
        """Of `router-tuning train`."""
        return [
            "--model", str(args.model), "--data", *self.sources, "--output", str(args.work / self.name),
            "--granularity", self.granularity, "--target-capacity", f"{self.target:g}",
            "--layers", *map(str, self.layers), "--max-train-samples", str(self.samples),
            "--max-length", str(args.max_length), "--eval-fraction", f"{args.fraction:g}", "--max-eval-samples", "32",
            "--per-device-train-batch-size", str(args.batch_size), "--bf16", str(args.bf16).lower(),
            "--seed", str(self.seed), "--window", "none", "--patch", "none",  # as in the paper
        ]  # fmt: skip


def plan(args: argparse.Namespace, num_layers: int) -> dict[str, list[Run]]:
    """Group -> runs. A run may be in several groups; it is done once."""
    deep = tuple(default_layers(num_layers))
    usual = Run(layers=deep, samples=args.samples, seed=args.seeds[0], sources=tuple(args.data))
    both = ("attn_sequence", "attn_token")
    everywhere = replace(
        usual, layers=tuple(range(1, num_layers)), target=round(1 - usual.target * len(deep) / (num_layers - 1), 2)
    )
    return {
        "main": [
            replace(usual, granularity=g, target=t, seed=s)
            for s, t, g in itertools.product(args.seeds, (0.5, 0.75), both)
        ],
        "oracle": [],
        "layers": [
            replace(run, granularity=g)
            for run in (replace(usual, layers=tuple(args.redundant_layers)), everywhere)
            for g in both
        ],
        "depth": [
            replace(usual, layers=tuple(range(num_layers - 1 - n, num_layers - 1)))
            for n in sorted({max(len(deep) // 3, 1), len(deep), num_layers - 3})
        ],
        "samples": [replace(usual, samples=n) for n in (args.samples // 4, args.samples, args.samples * 2)],
        "data": [usual, *(replace(usual, sources=(s,)) for s in args.data)],
        "module": [usual]
        + [replace(usual, granularity=f"{t}_{level}") for t in ("mlp", "block") for level in ("sequence", "token")],
    }


def train(run: Run, args: argparse.Namespace) -> Path:
    """`router-tuning train` in a process of its own; goes on where an earlier one stopped."""
    checkpoint = args.work / run.name
    if checkpoint.is_dir():
        return checkpoint
    resume = ["--resume"] if newest_whole(Path(f"{checkpoint}.run"))[0] else []
    args.work.mkdir(parents=True, exist_ok=True)
    with (args.work / f"{run.name}.log").open("a") as log:
        words = [sys.executable, "-m", "router_tuning.cli", "train", *run.flags(args), *resume]
        process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT)
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.wait()  # it got the signal too, and saves its state
            raise
    if code == 130:  # interrupted by itself, its state saved
        raise KeyboardInterrupt
    if code:
        raise ConfigError(f"{run.name}: training failed; see {args.work / run.name}.log")
    return checkpoint


def runs_to_do(args: argparse.Namespace, groups: dict[str, list[Run]], done: dict[str, Any]) -> Iterator[Run]:
    wanted = dict.fromkeys(run for group in args.groups for run in groups[group])
    return (run for run in wanted if run.name not in done)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command_line("ablations", __doc__)
    add = parser.add_argument
    add("--model", type=Path, required=True, help="base model")
    add("--data", nargs="+", required=True, help="training sources; the last part of each is held out")
    add("--groups", nargs="+", choices=GROUPS, default=list(GROUPS), help="in this order (default: all)")
    add("--seeds", type=int, nargs="+", default=[0, 1], help="of training (default: 0 1)")
    add("--samples", type=int, default=1920, help="training samples of the usual run (default: %(default)s)")
    add("--batch-size", type=int, default=16, help="training samples per step (default: %(default)s)")
    add("--bf16", action="store_true", help="train in bf16; evaluation is in float32 always")
    add("--max-length", type=int, default=256, help="tokens of a sample (default: %(default)s)")
    add("--redundant-layers", type=int, nargs="+", default=[1, 3, 4], help="routed in group `layers`")
    add("--fraction", type=fraction, default=0.02, help="held-out part of a source (default: %(default)s)")
    add("--held-out", type=int, default=400, help="held-out samples in all (default: %(default)s)")
    add("--calibration", type=int, default=32, help="training samples that static drops are chosen on")
    add("--oracle-samples", type=int, default=100, help="held-out samples of group `oracle` (default: %(default)s)")
    add("--work", type=Path, default=Path("ckpt/ablations"), help="checkpoints and logs (default: %(default)s)")
    output = RESULTS / "ablations/result.json"
    add("--output", type=result_file, default=output, help="default: %(default)s; .md and .png beside it")
    args = parser.parse_args(argv)
    if not args.model.is_dir():
        parser.error(f"--model {args.model}: no such directory")
    for name in ("samples", "held_out", "calibration", "oracle_samples", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: at least 1 is needed")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    from .lib.ablation_report import report
    from .lib.measure import Bench

    groups = plan(args, read_json(args.model / "config.json")["num_hidden_layers"])
    record = json.loads(args.output.read_text()) if args.output.is_file() else {"runs": {}}
    bench = Bench(args)
    record |= {"command": command("ablations"), "machine": machine(), "held_out": bench.summary()}
    if "oracle" in args.groups and "oracle" not in record:
        record["oracle"] = bench.oracle(default_layers(len(bench.layers)), args.oracle_samples)
        write_json(args.output, record)
    todo = list(runs_to_do(args, groups, record["runs"]))
    for number, run in enumerate(todo, 1):
        progress(f"run {number} of {len(todo)}: {run.name}")
        result = bench.evaluate(train(run, args), len(run.layers))
        about = {"command": shlex.join(["router-tuning", "train", *run.flags(args)]), "seed": run.seed}
        about |= {"groups": [name for name, runs in groups.items() if run in runs], "samples": run.samples}
        about |= {"sources": [Path(s).name.split(".")[0] for s in run.sources]}
        record["runs"][run.name] = about | result
        write_json(args.output, record)
    report(record, args.output)
    main_runs = {r.name: record["runs"][r.name]["ratio_to_dense"] for r in groups["main"] if r.name in record["runs"]}
    print(json.dumps({"runs": len(record["runs"]), "main": main_runs}))


if __name__ == "__main__":
    run_command(main, "ablations", "interrupted; the same command goes on")
