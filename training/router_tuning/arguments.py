"""The flags of `router-tuning`: one dataclass field, one flag. Parsed by transformers' HfArgumentParser."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import HfArgumentParser, TrainingArguments

from vllm_mod.checkpoint import BaseShape
from vllm_mod.config import GRANULARITIES, ConfigError, ModConfig, default_layers

#: How far one AdamW step may move a score, at most, for inputs of unit size. See `default_learning_rate`.
SCORE_STEP = 0.25


def default_learning_rate(hidden_size: int) -> float:
    """`SCORE_STEP / hidden_size`.

    AdamW moves every weight by about the learning rate, so a score `w . x` moves by up to `lr * hidden * |x_i|`:
    dividing by the width makes a step mean the same for every model. Decisions depend on the sign of `w . x` alone,
    so the scale of w is free but for the estimator's sigmoid, which must not saturate: a few hundred steps of 0.25
    leave scores of order 1.
    """
    return SCORE_STEP / hidden_size


@dataclass
class RouterArguments:
    """What is trained, on what, and where it goes."""

    _argument_group_name = "routers and data"

    model: str = field(metadata={"help": "base model: a directory, a hub name, or smollm2 (pip brings it)"})
    data: list[str] = field(
        metadata={"help": "json/jsonl (.gz, .xz) files, directories of them, hub names, or a recipe.yaml that mixes "
                          "them; rows are `messages`, `prompt` + `completion`, `text`, or the fields of ShareGPT, "
                          "Alpaca or MetaMath"}
    )  # fmt: skip
    output: str = field(metadata={"help": "the checkpoint to write; must not exist"})
    granularity: str = field(
        default="attn_sequence", metadata={"help": "what is skipped, per what", "choices": list(GRANULARITIES)}
    )
    layers: list[str] | None = field(
        default=None,
        metadata={"help": "routed layers, such as `5 6 7` or `5-10`; default: the deepest half but the last one"},
    )
    target_capacity: float = field(default=0.5, metadata={"help": "kept ratio to reach, from 0 to 1"})
    capacity_loss: str = field(
        default="controller",
        metadata={"help": "`controller` adjusts lambda until the target is met; `paper` keeps it fixed",
                  "choices": ["controller", "paper"]},
    )  # fmt: skip
    capacity_lambda: float | None = field(
        default=None,
        metadata={"aliases": ["--lambda"], "help": "weight of the capacity loss: where the controller starts "
                  "(default 0), or the paper's fixed value (default 0.01)"},
    )  # fmt: skip
    max_length: int = field(default=1024, metadata={"help": "longer samples are truncated; counted"})
    max_train_samples: int | None = field(
        default=8000, metadata={"help": "training samples, of all sources together; 0: all"}
    )
    eval_fraction: float = field(default=0.02, metadata={"help": "the last part of every file, held out"})
    max_eval_samples: int = field(default=512, metadata={"help": "held-out samples that are evaluated"})
    lora_r: int = field(default=0, metadata={"help": "rank of a LoRA adapter trained with the routers; 0: none"})
    lora_alpha: int | None = field(default=None, metadata={"help": "scales it by alpha / r; default: 2 r"})
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout of its input in training"})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "what it adapts; default: the linears of attention and MLP (not of experts)"}
    )
    lora_layers: list[str] | None = field(
        default=None, metadata={"help": "where, written as --layers; default: from the first routed layer on"}
    )
    lora_learning_rate: float = field(default=1e-4, metadata={"help": "the adapter's; the routers keep theirs"})
    lora_output: str = field(
        default="merged",
        metadata={"help": "`merged`: into new weight files; `adapter`: beside the base's, for vLLM's --lora-modules",
                  "choices": ["merged", "adapter"]},
    )  # fmt: skip
    run_dir: str | None = field(
        default=None, metadata={"help": "states to resume from; default: <output>.run, removed when training ends well"}
    )
    resume: bool = field(default=False, metadata={"help": "go on from the last state in the run directory"})


@dataclass
class RouterTrainingArguments(TrainingArguments):
    """transformers' own training flags, with defaults that suit a few thousand router weights."""

    _argument_group_name = "transformers' TrainingArguments"

    output_dir: str | None = field(default=None, metadata={"help": "not used: see --run-dir"})
    learning_rate: float | None = field(
        default=None, metadata={"help": f"AdamW's peak; default: {SCORE_STEP} / hidden size"}
    )
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "learning rate schedule"})
    warmup_steps: float = field(default=0.02, metadata={"help": "steps, or a share of them if below 1"})
    weight_decay: float = field(default=0.0, metadata={"help": "AdamW's"})
    adam_beta2: float = field(default=0.99, metadata={"help": "AdamW's; runs are a few hundred steps long"})
    max_grad_norm: float = field(default=0.0, metadata={"help": "0: no clipping; it would blunt the controller"})
    num_train_epochs: float = field(default=1.0, metadata={"help": "passes over the data"})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "samples per device and micro-step"})
    per_device_eval_batch_size: int = field(default=16, metadata={"help": "samples per device in evaluation"})
    bf16: bool | None = field(
        default=None,
        metadata={
            "help": "base model and autocast in bf16; true or false; default: where the GPU has it, fp32 elsewhere"
        },
    )
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "every router is always used"})
    dataloader_pin_memory: bool = field(default=torch.cuda.is_available(), metadata={"help": "pin batches in memory"})
    logging_steps: float = field(default=10, metadata={"help": "steps between two log lines"})
    save_steps: float = field(default=0.1, metadata={"help": "steps between two states, or a share if below 1"})
    save_total_limit: int | None = field(default=2, metadata={"help": "states kept in the run directory"})
    report_to: str | None = field(default="none", metadata={"help": "tensorboard, wandb, …"})

    def __post_init__(self) -> None:
        if self.bf16 is None:
            self.bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        if self.bf16 and not torch.accelerator.is_available():
            self.use_cpu = True  # transformers wants that to be said
        self.remove_unused_columns = False  # it would drop the prompt mask
        super().__post_init__()


@dataclass
class ExportArguments:
    """Base model + routers (or none, for a static granularity) -> checkpoint."""

    model: str = field(metadata={"help": "base model: a directory, a hub name, or smollm2 (pip brings it)"})
    output: str = field(metadata={"help": "the checkpoint to write; must not exist"})
    routers: str | None = field(default=None, metadata={"help": "router-only directory or hub name"})
    granularity: str | None = field(
        default=None,
        metadata={"help": "for a static checkpoint, or routers that come without mod_config.json",
                  "choices": list(GRANULARITIES)},
    )  # fmt: skip
    layers: list[str] | None = field(default=None, metadata={"help": "as for train"})
    drop_attention: int | None = field(
        default=None,
        metadata={"help": "write an attn_static checkpoint that drops the N attentions which change their input least "
                  "on --data (LLM-Drop's criterion)"},
    )  # fmt: skip
    data: list[str] | None = field(
        default=None, metadata={"help": "calibration data of --drop-attention, as for train"}
    )
    max_samples: int = field(default=128, metadata={"help": "calibration samples"})
    max_length: int = field(default=1024, metadata={"help": "tokens of a calibration sample"})


@dataclass
class CalibrateArguments:
    """Thresholds that give a checkpoint the kept ratio asked for, and a table of further operating points."""

    checkpoint: str = field(metadata={"help": "full checkpoint or router-only directory; its config is rewritten"})
    data: list[str] = field(
        metadata={"help": "prompts like those that will be served (with answers at token level); sources as for train"}
    )
    target_capacity: float = field(metadata={"help": "kept ratio to set, from 0 to 1"})
    per_layer: bool = field(
        default=False, metadata={"help": "a threshold for each layer, so that every layer keeps this ratio by itself"}
    )
    operating_points: list[float] = field(
        default_factory=lambda: [0.9, 0.75, 0.6, 0.5, 0.4, 0.25],
        metadata={"help": "further kept ratios whose thresholds are written down"},
    )
    eval_fraction: float = field(
        default=0.0, metadata={"help": "take the last part of every file alone, as train held it out; 0: all rows"}
    )
    max_samples: int = field(default=512, metadata={"help": "calibration samples"})
    max_length: int = field(default=1024, metadata={"help": "tokens of a sample; longer ones are truncated"})
    batch_size: int = field(default=16, metadata={"help": "samples per forward"})
    model: str | None = field(
        default=None, metadata={"help": "base model of a router-only directory; default: the one it names"}
    )


class OneLineParser(HfArgumentParser):
    """Errors in one line; the hundred flags of TrainingArguments are shown by --help alone."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {message} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)


def parse(types: Sequence[Any], prog: str, argv: Sequence[str]) -> tuple[Any, ...]:
    """One object per type. Raises ConfigError where values do not go together; exits with one line on unknown flags."""
    needed = [f.name for f in fields(types[0]) if f.default is MISSING and f.default_factory is MISSING]
    required = " ".join(f"--{name.replace('_', '-')} {name.upper()}" for name in needed)
    if needed[0] == "checkpoint":  # the one argument without a flag
        required = required.removeprefix("--checkpoint ")
        if argv and not argv[0].startswith("-"):
            argv = ["--checkpoint", *argv]
    parser = OneLineParser(
        list(types),
        prog=prog,
        usage=f"{prog} {required} [flags]",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    try:
        return parser.parse_args_into_dataclasses(list(argv))
    except (ValueError, RuntimeError, ImportError) as error:
        raise ConfigError(" ".join(str(error).split())) from None


def parse_layers(words: Sequence[str] | None, num_layers: int) -> list[int]:
    """`["5-7", "9,10"]` -> `[5, 6, 7, 9, 10]`; None: the default."""
    if words is None:
        return default_layers(num_layers)
    layers: list[int] = []
    for word in (part for w in words for part in w.split(",") if part):
        first, _, last = word.partition("-")
        try:
            layers += range(int(first), int(last or first) + 1)
        except ValueError:
            raise ConfigError(f"--layers: {word!r} is neither a layer number nor a range like 5-10") from None
    return sorted(layers)


def make_mod_config(args: RouterArguments | ExportArguments, shape: BaseShape, **more: Any) -> ModConfig:
    """The flags as a config that fits the base model; raises ConfigError."""
    layers = parse_layers(args.layers, shape.num_layers)
    config: ModConfig = ModConfig.parse(
        {"version": 1, "granularity": args.granularity, "layers": layers, **more}, "mod_config"
    )
    config.check_fits(shape.num_layers, shape.num_experts, shape.dense_layers)
    return config


def check_output(output: str | Path) -> None:
    """Before hours are spent."""
    path = Path(output)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"{path}: exists already; choose another output or remove it")
