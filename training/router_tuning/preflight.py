"""What can be wrong with a training run and is found before a model is loaded."""

from __future__ import annotations

import json
import logging
import tempfile
import zlib
from array import array
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import get_scheduler
from transformers.integrations import get_reporting_integration_callbacks

from vllm_mod.checkpoint import read_json
from vllm_mod.config import ConfigError, ModConfig

from . import states
from .arguments import RouterArguments, RouterTrainingArguments
from .records import read_state

log = logging.getLogger(__name__)

#: Settings whose change would have no effect on a resumed run, as they come from its state, or would mix up its data.
_KEPT = (
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "num_train_epochs", "max_steps",
    "optim", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay", "per_device_train_batch_size",
    "gradient_accumulation_steps", "seed", "data_seed", "train_sampling_strategy", "dataloader_drop_last",
)  # fmt: skip
_KEPT_OF_ROUTERS = (
    "capacity_loss", "capacity_lambda", "lora_r", "lora_alpha", "lora_dropout", "lora_layers", "lora_learning_rate",
    "lora_target_modules",
)  # fmt: skip


def check_machine(training_args: RouterTrainingArguments, command: str) -> None:
    """command: `router-tuning train …`, as it was typed."""
    if training_args.n_gpu > 1:  # transformers would use nn.DataParallel, whose threads share one routing state
        launch = f"accelerate launch --num_processes {training_args.n_gpu} -m router_tuning"
        raise ConfigError(
            f"{training_args.n_gpu} GPUs and one process: start one for each with "
            f"`{launch} {command.removeprefix('router-tuning ')}`, or choose one GPU with CUDA_VISIBLE_DEVICES=0"
        )
    if training_args.mixed_precision == "fp16" and training_args.device.type == "cpu":
        raise ConfigError("--fp16 needs a GPU; on a CPU use --bf16, or neither")


def check_patches(args: RouterArguments, training_args: RouterTrainingArguments) -> None:
    """Whether `--patch-rank` can be had in this run; `auto` is `none` where it cannot."""
    if args.patch_rank == "none" or training_args.world_size == 1:
        return
    if args.patch_rank != "auto":
        raise ConfigError(
            f"--patch-rank: patches are fitted by one process, and this run has {training_args.world_size}; leave it "
            "out, and run `router-tuning patch` on the checkpoint afterwards"
        )
    args.patch_rank = "none"
    if training_args.process_index == 0 and args.window != "none":
        log.warning(
            "nothing will stand in for what is skipped: patches are fitted by one process, and this run has %d; run "
            "`router-tuning patch` on the checkpoint afterwards", training_args.world_size,
        )  # fmt: skip


def check_reports(training_args: RouterTrainingArguments) -> None:
    """Every `--report-to` must be known, and its package there."""
    try:
        for callback in get_reporting_integration_callbacks(training_args.report_to):
            callback()
    except (ValueError, RuntimeError, ImportError) as error:
        names, reason = " ".join(training_args.report_to), " ".join(str(error).split())
        raise ConfigError(f"--report-to {names}: {reason}") from None


def check_schedule(training_args: RouterTrainingArguments) -> None:
    """`--lr-scheduler-kwargs` must be those of `--lr-scheduler-type`."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    kind: Any = training_args.lr_scheduler_type
    try:
        get_scheduler(kind, optimizer, training_args.get_warmup_steps(100), 100, training_args.lr_scheduler_kwargs)
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"--lr-scheduler-type {kind.value}: {reason}; see --lr-scheduler-kwargs") from None


def check_directories(output: str, run_dir: Path) -> None:
    """`check_output` has been called. Both must be places of their own that can be written."""
    there, states_there = Path(output).resolve(), run_dir.resolve()
    inside = there.relative_to(states_there).parts if states_there in there.parents else ()
    if there in (states_there, *states_there.parents) or (inside and states.is_ours(inside[0])):
        raise ConfigError(f"--run-dir {run_dir}: --output {output} would lie where states do; choose another")
    if run_dir.exists() and not run_dir.is_dir():
        raise ConfigError(f"{run_dir}: exists, and is no directory; choose another --run-dir")
    check_writable(Path(output), Path(output).absolute().parent)
    check_writable(run_dir, run_dir.absolute())


def check_writable(path: Path, place: Path) -> Path:
    """Raise ConfigError, naming `path`, unless directories can be made in `place`; nothing of the try is left.

    Returns `place`, or what is there of it.
    """
    try:
        while not place.exists():
            place = place.parent
        with tempfile.TemporaryDirectory(dir=place, prefix=".router-tuning-"):
            return place
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {place}: {error.strerror}") from None


def check_vocabulary(base: Path, *samples: Iterable[Mapping[str, Any]]) -> None:
    """Every token must have an embedding: on a GPU one that has none ends all, without a word of why."""
    size = read_json(base / "config.json").get("vocab_size")
    largest = max(max(sample["input_ids"]) for part in samples for sample in part)
    if isinstance(size, int) and largest >= size:
        raise ConfigError(f"{base}: its tokenizer gives token {largest}, and the model has {size} (vocab_size)")


# ---------------------------------------------------------------- states


def last_state(args: RouterArguments, run_dir: Path, say: Any) -> Path | None:
    """The newest whole state of the run directory if the run is to go on from it; `say` is told what is left out."""
    last, left_out = states.newest_whole(run_dir)
    for line in left_out:
        say(line)
    if args.resume and last is None:
        what = "no whole state" if left_out else "no state"
        raise ConfigError(f"{run_dir}: {what} to resume from; start without --resume")
    if not args.resume and last is not None:
        raise ConfigError(f"{run_dir}: holds an unfinished run; go on with --resume, or remove it")
    if last is not None and left_out:
        say(f"going on from {last}")
    return last


def settings_of(
    args: RouterArguments, training_args: RouterTrainingArguments, config: ModConfig, data: Any
) -> dict[str, Any]:
    """What a run that resumes must have in common with the one before. data: the training set."""
    found = {name: getattr(args, name) for name in _KEPT_OF_ROUTERS}
    found |= {name: getattr(training_args, name) for name in _KEPT}
    found |= {key: value for key, value in config.to_dict().items() if key not in ("base_model", "version")}
    checksum = 0
    for ids in data["input_ids"]:
        checksum = zlib.crc32(array("q", ids), checksum)
    return json.loads(json.dumps(found | {"data": f"{len(data)} samples, checksum {checksum:08x}"}))


def check_same(state: Path, settings: Mapping[str, Any], processes: int) -> None:
    """Raise ConfigError where a run would go on with other settings than it began with."""
    before = read_state(state).settings
    found = states.differences(before, settings)
    if (were := states.processes_of(state)) != processes:
        found.append(f"it had {were} processes, this run has {processes}")
    if found:
        raise ConfigError(
            f"{state}: a run goes on as it began: {'; '.join(found)}; or remove {state.parent}, begin anew"
        )
