"""argv -> dataclasses, by transformers' HfArgumentParser: one line for an error, near flags for an unknown one."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, fields
from difflib import get_close_matches
from typing import Any, NoReturn

from transformers import HfArgumentParser

from vllm_mod.config import ConfigError

from .arguments import ExportArguments, RouterTrainingArguments
from .flag_values import VALUES
from .trainer_flags import REFUSED, Condition, check_flags, check_needs

#: What other tools, and transformers 4, call a flag. Likenesses are found without this table.
_ELSEWHERE = {
    "base-model": "model",
    "cutoff-len": "max-length",
    "dataset": "data",
    "epochs": "num-train-epochs",
    "evaluation-strategy": "eval-strategy",
    "group-by-length": "train-sampling-strategy",
    "lambda-init": "capacity-lambda",
    "lora-rank": "lora-r",
    "lr": "learning-rate",
    "lr-scheduler": "lr-scheduler-type",
    "max-seq-len": "max-length",
    "max-seq-length": "max-length",
    "model-name-or-path": "model",
    "no-cuda": "use-cpu",
    "rank": "lora-r",
    "train-file": "data",
    "warmup-ratio": "warmup-steps",
}


_DROPPING: Condition = (lambda values: values["drop_attention"] is not None, "--drop-attention")
_PATCHING: Condition = (lambda v: v["patch_rank"] is not None, "--patch-rank")
_EXPORT_NEEDS = {
    **dict.fromkeys(("data", "max_samples", "max_length", "eval_fraction", "bf16", "patch_rank"), _DROPPING),
    **dict.fromkeys(("distilled_samples", "distilled_passes"), _PATCHING),
}


class OneLineParser(HfArgumentParser):
    """Flags are shown with dashes; underscores are understood too."""

    def __init__(self, types: Sequence[Any], **kwargs: Any) -> None:
        super().__init__(types, allow_abbrev=False, **kwargs)
        #: Flag, with its dashes -> the field it sets.
        self.fields: dict[str, str] = {}
        for action in self._actions:
            action.option_strings = [name for name in action.option_strings if "_" not in name]
            self.fields |= dict.fromkeys(action.option_strings, action.dest)
            if action.dest == "patch_rank" and action.default is None:  # of `export`
                action.type = _number_or_none
            refused = RouterTrainingArguments in types and action.dest in REFUSED
            if refused or action.dest == "local_rank" or action.const is False:  # the last: --no-x is `--x false`
                action.help = argparse.SUPPRESS
            if refused and action.nargs is None:  # whatever its value is
                action.type = action.choices = None

    def error(self, message: str) -> NoReturn:
        """Exit with one line; the hundred flags of TrainingArguments are shown by --help alone."""
        print(f"{self.prog}: error: {message} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)

    def given(self, argv: Sequence[str]) -> list[str]:
        """The fields that `argv` sets; exits on a flag that is unknown."""
        flags = [word.split("=")[0] for word in argv if word.startswith("--")]
        for flag in flags:
            if flag not in self.fields:
                shown = [name for name in self.fields if self.fields[name] not in REFUSED]
                near = " or ".join(nearest(flag, shown))
                self.error(f"unknown flag {flag}" + (f": did you mean {near}?" if near else ""))
        return [self.fields[flag] for flag in flags]


def _number_or_none(word: str) -> int | None:
    try:
        return None if word == "none" else int(word)
    except ValueError:
        raise argparse.ArgumentTypeError(f"a number, or `none`, is needed (got {word!r})") from None


def nearest(flag: str, known: Iterable[str]) -> list[str]:
    """Up to three flags that `flag` may have meant: those that have all its words, or look like it."""
    name, known = flag.removeprefix("--"), [other.removeprefix("--") for other in known]
    words = set(name.split("-"))
    found = [_ELSEWHERE[name]] if _ELSEWHERE.get(name) in known else []
    found = found or [other for other in known if words <= set(other.split("-"))][:3]
    return [f"--{other}" for other in found or get_close_matches(name, known, n=2, cutoff=0.7)]


def parse(types: Sequence[Any], prog: str, argv: Sequence[str]) -> tuple[Any, ...]:
    """One object per type. Raises ConfigError where values do not go together; exits with one line on unknown flags."""
    needed = [f.name for f in fields(types[0]) if f.default is MISSING and f.default_factory is MISSING]
    required = " ".join(f"--{name.replace('_', '-')} {name.upper()}" for name in needed)
    argv = [_dashed(word) for word in argv]
    if needed[0] == "checkpoint":  # the one argument without a flag
        required = required.removeprefix("--checkpoint ")
        if argv and not argv[0].startswith("-"):
            argv = ["--checkpoint", *argv]
    parser = OneLineParser(
        types,
        prog=prog,
        usage=f"{prog} {required} [flags]",
        description=types[0].__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    given = parser.given(argv)
    if needed[0] == "checkpoint" and "checkpoint" not in given and "help" not in given:
        parser.error(f"the checkpoint comes first: {prog} {required}")
    values = vars(parser.parse_args(argv))
    for name in given:
        right, what = VALUES.get(name, (None, ""))
        if right is not None and values[name] is not None and not right(values[name]):
            shown = f"{values[name]:g}" if isinstance(values[name], float) else values[name]
            raise ConfigError(f"--{name.replace('_', '-')} {shown}: {what}")
    defaults = {name: parser.get_default(name) for name in given}
    if RouterTrainingArguments in types:
        check_flags(values, defaults)
    if ExportArguments in types:
        check_needs(values, defaults, _EXPORT_NEEDS)
    try:
        return parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    except (ValueError, RuntimeError, ImportError, OSError) as error:
        raise ConfigError(" ".join(str(error).split())) from None


def _dashed(word: str) -> str:
    """`--max_steps=5` -> `--max-steps=5`"""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word
