"""The commands of `router-tuning`: the only place that touches argv, and where errors become one line."""

from __future__ import annotations

import importlib.metadata
import logging
import shlex
import sys
from collections.abc import Callable, Sequence

from vllm_mod.config import ConfigError

USAGE = """usage: router-tuning COMMAND [flags]

commands:
  train     tune routers on instruction data, write a full checkpoint
  fit       routers without a gradient: measure what skipping costs, fit routers and patches to it
  export    base model + routers (or a static granularity) -> full checkpoint
  calibrate set a checkpoint's thresholds for an exact kept ratio
  patch     fit what stands in for a checkpoint's skipped sublayers
  answers   let the base model answer prompts: data to fit patches on

`router-tuning COMMAND --help` lists the flags."""


def train(argv: Sequence[str]) -> int:
    from .arguments import RouterArguments, RouterTrainingArguments
    from .parser import parse
    from .run import run_training

    args, training_args = parse([RouterArguments, RouterTrainingArguments], "router-tuning train", argv)
    return run_training(args, training_args, run_record(["train", *argv]))


def fit(argv: Sequence[str]) -> int:
    from .fit_arguments import FitArguments
    from .fit_command import fit as run_fit
    from .parser import parse

    (args,) = parse([FitArguments], "router-tuning fit", argv)
    print(f"written: {run_fit(args, run_record(['fit', *argv]))}")
    return 0


def export(argv: Sequence[str]) -> int:
    from .arguments import ExportArguments
    from .export import export as run_export
    from .parser import parse

    (args,) = parse([ExportArguments], "router-tuning export", argv)
    print(f"written: {run_export(args, run_record(['export', *argv]))}")
    return 0


def calibrate(argv: Sequence[str]) -> int:
    from .arguments import CalibrateArguments
    from .calibrate import calibrate as run_calibrate
    from .calibrate import report
    from .parser import parse

    (args,) = parse([CalibrateArguments], "router-tuning calibrate", argv)
    report(run_calibrate(args, shlex.join(["router-tuning", "calibrate", *argv])), args.checkpoint)
    return 0


def patch(argv: Sequence[str]) -> int:
    from .arguments import PatchArguments
    from .parser import parse
    from .patch_command import patch as run_patch
    from .patch_command import report

    (args,) = parse([PatchArguments], "router-tuning patch", argv)
    report(*run_patch(args, shlex.join(["router-tuning", "patch", *argv])))
    return 0


def answers(argv: Sequence[str]) -> int:
    from .answers import answer
    from .arguments import AnswersArguments
    from .parser import parse

    (args,) = parse([AnswersArguments], "router-tuning answers", argv)
    report, output = answer(args)
    print(f"{report}\nwritten: {output}")
    return 0


def run_record(argv: Sequence[str]) -> dict[str, str]:
    """File name -> text: how a checkpoint came to be. Nothing about the machine."""
    names = ("vllm-mod", "torch", "transformers", "datasets", "accelerate", "peft")
    lines = [shlex.join(["router-tuning", *argv]), *(f"# {name} {_version(name)}" for name in names)]
    return {"train_command.txt": "\n".join(lines) + "\n"}


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


_SMALLER = "give fewer or shorter samples at a time: lower --batch-size where there is one, and --max-length"

COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train,
    "fit": fit,
    "export": export,
    "calibrate": calibrate,
    "patch": patch,
    "answers": answers,
}


def main(argv: Sequence[str] | None = None) -> int:
    process = argv is None  # ours alone
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    if argv[0] not in COMMANDS:
        print(f"router-tuning: error: no command {argv[0]!r}; commands: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    if process:
        from .allocator import keep_freed_memory

        keep_freed_memory()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger(__package__).setLevel(logging.INFO)
    try:
        return COMMANDS[argv[0]](argv[1:])
    except ConfigError as error:
        print(f"router-tuning: error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if (error.name or "").startswith(("router_tuning", "vllm_mod")):
            raise
        print(f'router-tuning: error: {error}; install it with: pip install "vllm-mod[train]"', file=sys.stderr)
        return 2
    except RuntimeError as error:
        from .memory import out_of_memory

        if (full := out_of_memory(error, _SMALLER)) is None:
            raise
        print(f"router-tuning: error: {full}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("router-tuning: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
