"""The flags of `router-tuning`: one dataclass field, one flag (see `parser`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from vllm_mod.architectures import BaseShape
from vllm_mod.config import ConfigError, ModConfig
from vllm_mod.granularity import GRANULARITIES, POLICIES

from .fit_arguments import DEFAULT_RANK, DEFAULT_WINDOW, FitArguments, distilled_passes, distilled_samples, in_bf16
from .flag_words import parse_layers, parse_window
from .trainer_flags import OPTIMIZERS

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
        metadata={"help": "JSON, CSV or Parquet files, directories of them, hub names, or a recipe.yaml that mixes "
                          "them; rows are `messages`, `prompt` + `completion`, `text`, or the fields of ShareGPT, "
                          "Alpaca or MetaMath"}
    )  # fmt: skip
    output: str = field(metadata={"help": "the checkpoint to write; must not exist"})
    granularity: str = field(
        default="attn_sequence", metadata={"help": "what is skipped, per what", "choices": list(GRANULARITIES)}
    )
    layers: list[str] | None = field(
        default=None,
        metadata={
            "help": "routed layers, such as `5 6 7` or `5-10`; default, or `auto`: the half whose skipping, one at a "
            "time, costs predictions least, measured on training data (experts: the deepest half but the last one)"
        },
    )
    window: str = field(
        default="auto",
        metadata={"help": "*_sequence: decide by the first W tokens of the prompt alone, which always run, so that "
                  f"prefixes can be shared; `auto`: {DEFAULT_WINDOW}, and none for other granularities; `none`: by the "
                  "whole prompt, as in the paper"},
    )  # fmt: skip
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
    patch_rank: str = field(
        default="auto",
        metadata={"aliases": ["--patch"],
                  "help": "when the routers are trained, fit patches of this rank, which stand in for what is skipped, "
                  "on training samples (as `router-tuning patch` does); 0: a bias; `auto`: "
                  f"{DEFAULT_RANK}, or an eighth of the hidden size if that is less, where there is a window; `none`: "
                  "nothing stands in, as in the paper"},
    )  # fmt: skip
    max_length: int = field(default=1024, metadata={"help": "longer samples are truncated; counted"})
    max_train_samples: int | None = field(
        default=8000, metadata={"help": "training samples, of all sources together; 0: all"}
    )
    eval_fraction: float = field(default=0.02, metadata={"help": "the last part of every file, held out"})
    max_eval_samples: int = field(default=512, metadata={"help": "held-out samples that are evaluated; 0: all"})
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
    dry_run: bool = field(
        default=False,
        metadata={"help": "check everything, show a sample as it is supervised, evaluate a batch, write an untrained "
                  "checkpoint to <output>.dry-run, and stop"},
    )  # fmt: skip

    def __post_init__(self) -> None:
        self.layers = None if self.layers == ["auto"] else self.layers
        if self.window == "auto":
            self.window = str(DEFAULT_WINDOW) if POLICIES[self.granularity].by_request else "none"


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
    optim: str = field(
        default="adamw_torch_fused", metadata={"help": "those tried with routers", "choices": list(OPTIMIZERS)}
    )
    optim_args: str | None = field(default=None, metadata={"help": "of SGD, Adagrad, RMSprop: `momentum=0.9,…`"})
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
    gradient_checkpointing_kwargs: dict | str | None = field(
        default=None, metadata={"help": "a JSON object; use_reentrant is false"}
    )
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "every router is always used"})
    dataloader_pin_memory: bool = field(default=torch.cuda.is_available(), metadata={"help": "pin batches in memory"})
    logging_steps: float = field(default=10, metadata={"help": "steps between two log lines"})
    save_steps: float = field(default=0.1, metadata={"help": "steps between two states, or a share if below 1"})
    save_total_limit: int | None = field(default=2, metadata={"help": "states kept in the run directory"})
    report_to: list[str] = field(default_factory=lambda: ["none"], metadata={"help": "tensorboard, wandb, …"})
    remove_unused_columns: bool = field(default=False, metadata={"help": "it would drop the prompt mask"})

    def __post_init__(self) -> None:
        if self.bf16 is None:
            self.bf16 = not self.fp16 and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        if self.bf16 and not torch.accelerator.is_available():
            self.use_cpu = True  # transformers wants that to be said
        super().__post_init__()
        if self.gradient_checkpointing:
            # Re-entrant checkpoints give no gradient below inputs that need none: exactly our frozen trunk.
            given = self.gradient_checkpointing_kwargs or {}
            if not isinstance(given, dict) or given.get("use_reentrant"):
                raise ValueError("--gradient-checkpointing-kwargs: use_reentrant would cut the routers' gradients off")
            self.gradient_checkpointing_kwargs = given | {"use_reentrant": False}


@dataclass
class ExportArguments:
    """Base model + routers (or none, for a static granularity) -> checkpoint."""

    model: str = field(metadata={"help": "base model: a directory, a hub name, or smollm2 (pip brings it)"})
    output: str = field(metadata={"help": "the checkpoint to write; must not exist"})
    routers: str | None = field(
        default=None, metadata={"help": "router-only directory or hub name; a full checkpoint's are taken, too"}
    )
    without_base: bool = field(
        default=False,
        metadata={"help": "write them without the base's weights: what is shared, and joined by --routers"},
    )
    granularity: str | None = field(
        default=None,
        metadata={"help": "for a static checkpoint, or routers that come without mod_config.json",
                  "choices": list(GRANULARITIES)},
    )  # fmt: skip
    layers: list[str] | None = field(default=None, metadata={"help": "as for train"})
    window: str = field(default="none", metadata={"help": "as for train; of routers that come without mod_config.json"})
    drop_attention: int | None = field(
        default=None,
        metadata={"help": "write an attn_static checkpoint that drops the N attentions which change their input least "
                  "on --data (LLM-Drop's criterion)"},
    )  # fmt: skip
    patch_rank: int | None = field(
        default=None,
        metadata={"aliases": ["--patch"],
                  "help": "fit patches of this rank, which stand in for the dropped attentions, on the same --data (as "
                  "`router-tuning patch` does for checkpoints that are there); default, or `none`: nothing stands in"},
    )  # fmt: skip
    distilled_samples: int = distilled_samples()
    distilled_passes: int = distilled_passes()
    bf16: bool | None = in_bf16()
    data: list[str] | None = field(
        default=None, metadata={"help": "calibration data of --drop-attention, as for train"}
    )
    max_samples: int = field(
        default=128, metadata={"help": "calibration samples; patches are the better for several times more"}
    )
    max_length: int = field(default=1024, metadata={"help": "tokens of a calibration sample"})
    eval_fraction: float = field(
        default=0.0, metadata={"help": "leave out the last part of every file, as train holds it out (there 0.02)"}
    )


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


@dataclass
class PatchArguments:
    """Patches for a routed or static checkpoint: a linear map and a bias that stand in for a sublayer where it is
    skipped, fitted in closed form to what it would have added, then distilled. They cost no KV cache."""

    checkpoint: str = field(metadata={"help": "full checkpoint or router-only directory; patches it has are replaced"})
    data: list[str] = field(metadata={"help": "prompts with answers like those that will be served, as for train"})
    rank: int = field(
        default=64, metadata={"help": "rank of the map, up to the hidden size: more fits better and costs more at "
                              "serving; 0: the bias alone"}
    )  # fmt: skip
    output: str | None = field(
        default=None, metadata={"help": "write another checkpoint instead, which must not exist; default: in place"}
    )
    eval_fraction: float = field(
        default=0.02, metadata={"help": "leave out the last part of every file, as train held it out; 0: all rows"}
    )
    max_samples: int = field(
        default=512, metadata={"help": "samples that are fitted on; a tenth of them chooses the ridge"}
    )
    distilled_samples: int = distilled_samples()
    distilled_passes: int = distilled_passes()
    bf16: bool | None = in_bf16()
    max_length: int = field(default=1024, metadata={"help": "tokens of a sample; longer ones are truncated"})
    batch_size: int = field(default=16, metadata={"help": "samples per forward"})
    model: str | None = field(
        default=None, metadata={"help": "base model of a router-only directory; default: the one it names"}
    )


@dataclass
class AnswersArguments:
    """What the base model itself answers to prompts, greedily: data to fit patches on, for requests whose answers it
    will generate. Answers that end in a loop are left out."""

    model: str = field(metadata={"help": "base model: a directory, a hub name, or smollm2 (pip brings it)"})
    data: list[str] = field(metadata={"help": "prompts like those that will be served; sources as for train"})
    output: str = field(metadata={"help": "the JSONL file to write, for --data; must not exist"})
    max_samples: int = field(default=512, metadata={"help": "prompts"})
    max_length: int = field(default=512, metadata={"help": "tokens of a prompt; longer ones are left out"})
    tokens: int = field(default=128, metadata={"help": "tokens of an answer, which is cut there"})
    eval_fraction: float = field(
        default=0.02, metadata={"help": "leave out the last part of every file, for evaluation; 0: all rows"}
    )
    batch_size: int = field(default=16, metadata={"help": "prompts at a time"})
    bf16: bool | None = in_bf16()
    seed: int = field(default=0, metadata={"help": "which of the rows are taken, as in `fit`"})


def make_mod_config(args: RouterArguments | ExportArguments | FitArguments, shape: BaseShape, **more: Any) -> ModConfig:
    """The flags as a config that fits the base model; raises ConfigError."""
    layers, window = parse_layers(args.layers, shape.num_layers), parse_window(args.window)
    settings = {"version": 1} if window is None else {"version": 2, "window": window}
    config = ModConfig.parse(settings | {"granularity": args.granularity, "layers": layers, **more}, "mod_config")
    config.check_fits(shape.num_layers, shape.num_experts, shape.dense_layers)
    return config


def check_output(output: str | Path) -> None:
    """Before hours are spent."""
    path = Path(output)
    try:
        taken = path.exists() and (not path.is_dir() or any(path.iterdir()))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}; choose another output") from None
    if taken:
        raise ConfigError(f"{path}: exists already; choose another output or remove it")
