"""transformers' training flags that cannot do here what they say, and why.

A flag is refused rather than accepted without an effect. `tests/unit/training/test_flags.py` goes through all fields of
TrainingArguments, so a new version's flags are looked at before they are let through.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vllm_mod.config import ConfigError

_CONFIGS = Path(__file__).parent / "configs"
_LAUNCH = "accelerate launch --config_file {} -m router_tuning train …"

_BEST = (
    "the least held-out loss is that of the first steps, which still keep everything; a run ends with the mean of its "
    "last half, which holds the target"
)
_NO_PREDICTIONS = "held-out data gives a loss and kept ratios; for tasks evaluate the checkpoint with lm_eval"
_HUB = "nothing is pushed while it trains; upload the checkpoint afterwards, with `hf upload`"
_COMPILED = "each length of a batch would be compiled anew, which takes longer than it saves"
_LAUNCHER = f"the launcher sets processes up: {_LAUNCH.format('FILE')}"

#: Field -> why it is refused, and the way out.
REFUSED: dict[str, str] = {
    "accelerator_config": _LAUNCHER,
    "auto_find_batch_size": "it would begin again with routers that are trained in part; lower "
    "--per-device-train-batch-size, and raise --gradient-accumulation-steps by as much",
    "batch_eval_metrics": _NO_PREDICTIONS,
    "bf16_full_eval": "held-out data is measured in the precision of training: --bf16",
    "deepspeed": _LAUNCH.format(_CONFIGS / "deepspeed.yaml"),
    "do_predict": _NO_PREDICTIONS,
    "enable_jit_checkpoint": "it would save in the middle of a step; SIGINT (Ctrl-C) finishes it and writes a state",
    "eval_accumulation_steps": _NO_PREDICTIONS,
    "eval_do_concat_batches": _NO_PREDICTIONS,
    "eval_use_gather_object": _NO_PREDICTIONS,
    "fp16_full_eval": "held-out data is measured in the precision of training: --fp16",
    "fsdp": _LAUNCH.format(_CONFIGS / "fsdp.yaml"),
    "fsdp_config": _LAUNCH.format(_CONFIGS / "fsdp.yaml"),
    "greater_is_better": _BEST,
    "hub_always_push": _HUB,
    "hub_model_id": _HUB,
    "hub_revision": _HUB,
    "hub_strategy": _HUB,
    "hub_token": _HUB,
    "include_for_metrics": _NO_PREDICTIONS,
    "label_names": "labels are the answers, see docs/training.md",
    "label_smoothing_factor": "the base model is frozen, and its loss on the answers is what routers are judged by",
    "length_column_name": "samples have no such column; their tokens are counted",
    "liger_kernel_config": "its kernels would replace the routed sublayers, and nothing would be skipped",
    "load_best_model_at_end": _BEST,
    "metric_for_best_model": _BEST,
    "optim_target_modules": "routers are all that is optimized, and the adapter of --lora-target-modules",
    "output_dir": "the checkpoint goes to --output, states go to --run-dir",
    "parallelism_config": _LAUNCHER,
    "prediction_loss_only": _NO_PREDICTIONS,
    "push_to_hub": _HUB,
    "remove_unused_columns": "it would drop the prompt mask, which decisions are taken from",
    "restore_callback_states_from_checkpoint": "--resume restores all that a run has",
    "resume_from_checkpoint": "--resume goes on from the newest state in --run-dir",
    "save_only_model": "states are there to be resumed from; the routers alone are in the checkpoint",
    "torch_compile": _COMPILED,
    "torch_compile_backend": _COMPILED,
    "torch_compile_mode": _COMPILED,
    "use_cache": "in training the routed model has no KV cache",
    "use_liger_kernel": "its kernels would replace the routed sublayers, and nothing would be skipped",
}

#: Optimizers that were tried with routers; the learning rate's default is for the first two.
ADAMW = ("adamw_torch", "adamw_torch_fused")
OPTIMIZERS = (*ADAMW, "adafactor", "adagrad", "rmsprop", "sgd")
_TAKE_ARGS = ("adagrad", "rmsprop", "sgd")

#: (what must be so of all values, the same as flags)
Condition = tuple[Callable[[Mapping[str, Any]], bool], str]
_WITH_WORKERS: Condition = (lambda v: v["dataloader_num_workers"] > 0, "--dataloader-num-workers")
_REPORTED: Condition = (lambda v: v["report_to"] != ["none"], "--report-to")
_TRACKIO: Condition = (lambda v: "trackio" in v["report_to"], "--report-to trackio")
#: Field -> without what it has no effect.
NEEDS: dict[str, Condition] = {
    "dataloader_multiprocessing_context": _WITH_WORKERS,
    "dataloader_persistent_workers": _WITH_WORKERS,
    "dataloader_prefetch_factor": _WITH_WORKERS,
    "eval_delay": (lambda v: v["eval_strategy"] != "no", "--eval-strategy steps or epoch"),
    "eval_steps": (lambda v: v["eval_strategy"] == "steps", "--eval-strategy steps"),
    "gradient_checkpointing_kwargs": (lambda v: v["gradient_checkpointing"], "--gradient-checkpointing"),
    "hub_private_repo": _TRACKIO,
    "ignore_data_skip": (lambda v: v["resume"], "--resume"),
    "logging_steps": (lambda v: v["logging_strategy"] == "steps", "--logging-strategy steps"),
    "lr_scheduler_kwargs": (lambda v: v["lr_scheduler_type"] != "constant", "another --lr-scheduler-type"),
    "optim_args": (lambda v: v["optim"] in _TAKE_ARGS, f"--optim {', '.join(_TAKE_ARGS)}"),
    "project": _TRACKIO,
    "run_name": _REPORTED,
    "save_steps": (lambda v: v["save_strategy"] == "steps", "--save-strategy steps"),
    "trackio_bucket_id": _TRACKIO,
    "trackio_space_id": _TRACKIO,
    "trackio_static_space_id": _TRACKIO,
}


def check_needs(values: Mapping[str, Any], given: Mapping[str, Any], needs: Mapping[str, Condition]) -> None:
    """Raise ConfigError on a flag that has no effect without another.

    values: of all flags. given: those on the command line, with their defaults, which may be given, too.
    """
    for name, default in given.items():
        needed, what = needs.get(name, (None, ""))
        if needed is not None and values[name] != default and not needed(values):
            raise ConfigError(f"--{name.replace('_', '-')} says nothing here: it needs {what}")


def check_flags(values: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raise ConfigError on flags of `train` that would have no effect, or the wrong one. As for `check_needs`."""
    for name, default in given.items():
        if name in REFUSED and values[name] != default:
            raise ConfigError(f"--{name.replace('_', '-')} is not for routers: {REFUSED[name]}")
    check_needs(values, given, NEEDS)
    if (optim := values["optim"]) not in ADAMW and values["learning_rate"] is None:
        raise ConfigError(f"--optim {optim}: the default learning rate is AdamW's; pass one with --learning-rate")
    if values["save_strategy"] == "best":
        raise ConfigError(f"--save-strategy best is not for routers: {_BEST}; use steps or epoch")
