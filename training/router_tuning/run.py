"""One training run, from arguments to a checkpoint."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from vllm_mod.architectures import BaseShape
from vllm_mod.checkpoint import write_checkpoint
from vllm_mod.config import ConfigError, ModConfig
from vllm_mod.trainer_log import LOG_FILE, TrainerLog

from . import card, dry_run, lora, preflight, selection, states
from .arguments import (
    RouterArguments,
    RouterTrainingArguments,
    check_output,
    default_learning_rate,
    make_mod_config,
)
from .data import Collator, Counts, check_sources, describe, read_sources, split_tail, tokenize
from .evaluation import Evaluation
from .export import base_shape
from .flag_words import parse_rank
from .hub import local_model
from .interrupt import StopOnInterrupt, ignored
from .loading import stored_dtype
from .loss import CapacityLoss
from .memory import out_of_memory
from .model import attach_routers, freeze_base, load_base, patch_weights, routing_of
from .patch_record import PATCHES_FILE, PatchRecord
from .patches import PATCH_SAMPLES, check_rank, collate, fit_patches, with_patch
from .plot import PLOT_FILE, plot_training
from .records import ARGUMENTS_FILE, arguments_text
from .ridge import Fitted
from .tokenizer import load_tokenizer
from .trainer import RouterTrainer, writable

log = logging.getLogger(__name__)

#: Ways out where patches cannot be fitted: before the training, and behind it, where routers count on them.
_WITHOUT = "or leave patches out with --patch none"
_LOWER = "the routers are trained: go on with --resume and a lower --patch-rank"

INTERRUPTED = 130
_SMALLER = (
    "lower --per-device-train-batch-size (and raise --gradient-accumulation-steps by as much), or --max-length, or use "
    "--gradient-checkpointing"
)


def run_training(args: RouterArguments, training_args: RouterTrainingArguments, records: dict[str, str]) -> int:
    """Train, write `args.output`; returns the exit code. Everything that can be wrong is checked before the work."""
    command = records["train_command.txt"].splitlines()[0]
    run_dir = Path(args.run_dir or args.output.rstrip("/") + ".run")
    preflight.check_machine(training_args, command)
    preflight.check_patches(args, training_args)
    check_output(args.output)
    preflight.check_directories(args.output, run_dir)
    preflight.check_reports(training_args)
    preflight.check_schedule(training_args)
    check_sources(args.data)  # before a model is fetched
    if args.dry_run and _is_main(training_args):
        dry_run.clear_output(args)
    state = preflight.last_state(args, run_dir, say=log.warning if _is_main(training_args) else log.debug)
    base = local_model(args.model)
    shape = base_shape(base)
    config = _checked_config(args, shape)
    rank = parse_rank(args.patch_rank, config, shape.hidden_size)
    if rank is not None:
        check_rank(rank, config, shape.hidden_size, "--patch-rank")
    adapter = lora.adapter_config(args, config, base, shape)

    tokenizer = load_tokenizer(base)
    train_set, eval_set, data_record = _datasets(args, training_args, tokenizer)
    preflight.check_vocabulary(base, train_set, eval_set)
    if rank is not None:
        _patch_batches(args, config, rank, train_set, 1)
    if args.layers is None and not config.policy.by_experts:
        args.layers = [str(i) for i in selection.choose(args, training_args, shape, base, train_set, state, rank)]
        config = _checked_config(args, shape)
        adapter = lora.adapter_config(args, config, base, shape)

    training_args.output_dir = str(run_dir)
    if training_args.learning_rate is None:
        training_args.learning_rate = default_learning_rate(shape.hidden_size)
    settings = preflight.settings_of(args, training_args, config, train_set)
    if state is not None:
        preflight.check_same(state, settings, training_args.world_size)
    set_seed(training_args.seed)
    try:
        model = load_base(base, torch.bfloat16 if training_args.bf16 else torch.float32)
        attach_routers(model, config)
        freeze_base(model)
        if adapter is not None:
            lora.attach_adapter(model, adapter)
        stop = StopOnInterrupt()
        pad = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
        trainer = RouterTrainer(
            model=model,
            args=training_args,
            train_dataset=train_set,
            eval_dataset=eval_set,
            data_collator=Collator(pad),
            callbacks=[stop],
            capacity=CapacityLoss(args.capacity_loss, args.target_capacity, args.capacity_lambda),  # type: ignore[arg-type]
            adapter_learning_rate=args.lora_learning_rate if adapter is not None else None,
            settings=settings,
        )
        if args.dry_run:
            return dry_run.finish(trainer, args, tokenizer, base, config, records)
        if rank is not None:  # so that routers learn what skipping costs with something in place
            log.info("patches for routers that skip by chance, before these are trained")
            _fit_patches(trainer, args, rank, run_dir, by_chance=True)
        if state is not None:
            trainer.restore(state)
        with stop.installed():
            trainer.train(resume_from_checkpoint=str(state) if state else None)
        if stop.anywhere(training_args.device):
            raise KeyboardInterrupt
        _finish(trainer, args, training_args, Parts(base, config, rank, adapter, records, data_record))
        return 0
    except KeyboardInterrupt:
        if _is_there(args.output):  # all was done but to clear up
            return 0
        if states.newest_whole(run_dir)[0] is None:
            raise
        if _is_main(training_args):
            launched = training_args.world_size > 1  # by a command that is not known here
            again = f"the same launcher and: {command}" if launched else command
            print(f"interrupted; go on with: {again}{'' if args.resume else ' --resume'}", file=sys.stderr)
        return INTERRUPTED
    except RuntimeError as error:
        if (full := out_of_memory(error, _SMALLER)) is None:
            raise
        raise full from None
    finally:
        if args.run_dir is None and _is_main(training_args):
            states.remove_if_empty(run_dir)


@dataclass(frozen=True)
class Parts:
    """What a checkpoint is made of beside its routers."""

    base: Path
    config: ModConfig
    #: of patches, or None
    rank: int | None
    #: peft's LoraConfig, or None
    adapter: Any
    records: dict[str, str]
    data: dict[str, Any]


def _finish(
    trainer: RouterTrainer, args: RouterArguments, training_args: RouterTrainingArguments, parts: Parts
) -> None:
    """Measure what was trained, and write the checkpoint."""
    model, run_dir, output = trainer.model, Path(training_args.output_dir or ""), Path(args.output)
    if args.capacity_loss == "controller":  # the paper's way ends with the last step's routers
        trainer.average.apply(routing_of(model).routers)
    fitted = {} if parts.rank is None else _fit_patches(trainer, args, parts.rank, run_dir)
    routed = trainer.measure()
    with lora.without_adapter(model):
        dense = trainer.measure(threshold=0.0)
    for what, found in (("routed", routed), ("base", dense)):
        if not math.isfinite(found.loss):
            raise ConfigError(f"the {what} model's loss on held-out data is {found.loss}; states are in {run_dir}")
    routers = trainer.final_routers(run_dir / states.FINAL)
    if trainer.is_world_process_zero():
        records = parts.records | {
            ARGUMENTS_FILE: arguments_text(_arguments_record(args, training_args)),
            LOG_FILE: _log_record(trainer, routed, dense, parts.data).to_text(),
        }
        config, patches = parts.config, patch_weights(model, stored_dtype(parts.base)) if fitted else {}
        if parts.rank is not None:
            config = with_patch(config, parts.rank)
            records[PATCHES_FILE] = _patch_record(trainer, args, parts, parts.rank, fitted).to_text()
        with lora.placed(parts.base, run_dir / states.FINAL, parts.adapter, args.lora_output) as (source, folders):
            write_checkpoint(source, output, config, routers, records, folders, patches)
            with ignored():
                with writable(output / PLOT_FILE, "the checkpoint is whole without it"):
                    plot_training(trainer.history, args.target_capacity, output)
                card.write(output)
        _report(args, routed, dense, trainer.state.max_steps)
        if args.run_dir is None:
            states.clear(run_dir)
    trainer.accelerator.wait_for_everyone()


def _patch_samples(args: RouterArguments, train_set: Any) -> list[dict[str, Any]]:
    return list(train_set.select(range(min(len(train_set), PATCH_SAMPLES))))


def _patch_batches(
    args: RouterArguments, config: ModConfig, rank: int, train_set: Any, batch_size: int
) -> list[dict[str, Any]]:
    """What patches will be fitted on; raises ConfigError if that cannot be done."""
    try:
        return collate(_patch_samples(args, train_set), config, rank, batch_size, ", ".join(args.data))
    except ConfigError as error:
        raise ConfigError(f"{error}; {_WITHOUT}") from None


def _fit_patches(
    trainer: RouterTrainer, args: RouterArguments, rank: int, run_dir: Path, by_chance: bool = False
) -> dict[int, Fitted]:
    """For the trained routers, or before that for ones that skip by chance; the model has them from then on."""
    model: Any = trainer.model
    config, batch_size = routing_of(model).config, trainer.args.per_device_eval_batch_size
    batches = _patch_batches(args, config, rank, trainer.train_dataset, batch_size)
    place = preflight.check_writable(run_dir, run_dir.absolute())
    quiet = bool(trainer.args.disable_tqdm)
    try:
        return fit_patches(model.eval(), batches, rank, place, quiet=quiet, by_chance=by_chance)
    except ConfigError as error:
        raise ConfigError(f"{error}; {_WITHOUT if by_chance else _LOWER}") from None


def _patch_record(
    trainer: RouterTrainer, args: RouterArguments, parts: Parts, rank: int, fitted: Mapping[int, Fitted]
) -> PatchRecord:
    command = parts.records["train_command.txt"].splitlines()[0]
    samples = _patch_samples(args, trainer.train_dataset)
    return PatchRecord.of(fitted, rank, command, args.data, samples, parts.data["training"])


def _checked_config(args: RouterArguments, shape: BaseShape) -> ModConfig:
    config = make_mod_config(args, shape, target_capacity=args.target_capacity, base_model=args.model.rstrip("/"))
    if config.is_static:
        raise ConfigError(f"{config.granularity} has nothing to train; use `router-tuning export --granularity …`")
    if not 0 < args.eval_fraction < 1:
        raise ConfigError(f"--eval-fraction {args.eval_fraction:g}: a number above 0 and below 1 is needed")
    return config


def _is_main(training_args: RouterTrainingArguments) -> bool:
    return training_args.process_index == 0


def _is_there(output: str) -> bool:
    """It did not exist, or was empty, when the run began."""
    return (Path(output) / "config.json").is_file()


def _datasets(
    args: RouterArguments, training_args: RouterTrainingArguments, tokenizer: Any
) -> tuple[Any, Any, dict[str, Any]]:
    """(training set, held-out set, record of what became of the rows)."""
    tables = read_sources(args.data)
    train_rows, eval_rows = split_tail(tables, args.eval_fraction, training_args.seed)
    names = ", ".join(args.data)
    train_set, counts = tokenize(
        train_rows, tokenizer, args.max_length, args.max_train_samples or None, training_args.seed
    )
    # The held-out samples do not depend on the seed: runs are compared on the same ones.
    eval_set, eval_counts = tokenize(eval_rows, tokenizer, args.max_length, args.max_eval_samples or None, 0)
    if training_args.process_index == 0:
        log.info("training data: %s", counts)
        log.info("held-out data: %s", eval_counts)
    for what, found in (("training", counts), ("held-out", eval_counts)):
        if not found.used:
            raise ConfigError(f"{names}: no usable {what} sample ({_why(found)})")
    if training_args.dataloader_drop_last and not len(train_set) // training_args.train_batch_size:
        raise ConfigError(f"--dataloader-drop-last: {names}: {len(train_set)} samples do not fill one batch")
    record = {
        "sources": list(args.data),
        "tables": describe(tables),
        "training": counts.to_dict(),
        "held_out": eval_counts.to_dict(),
    }
    return train_set, eval_set, record


def _why(counts: Counts) -> str:
    return f"{counts}" if counts.read else "too few rows to hold some out; lower --eval-fraction or give more"


def _arguments_record(args: RouterArguments, training_args: RouterTrainingArguments) -> dict[str, Any]:
    """What was set, without what names this machine."""
    unwanted = ("_dir", "_n_gpu", "local_rank", "hub_", "push_to", "token", "run_name")
    settings = json.loads(training_args.to_json_string())
    return vars(args) | {k: v for k, v in settings.items() if not any(word in k for word in unwanted)}


def _log_record(trainer: RouterTrainer, routed: Evaluation, dense: Evaluation, data: dict[str, Any]) -> TrainerLog:
    record = {
        "target_capacity": trainer.capacity.target,
        "held_out": routed.to_dict() | {"dense_loss": dense.loss, "dense_perplexity": dense.perplexity},
        "data": data,
        "log": trainer.state.log_history,
        "steps": trainer.history,
    }
    return TrainerLog.parse(record, LOG_FILE)


def _report(args: RouterArguments, routed: Evaluation, dense: Evaluation, steps: int) -> None:
    print(f"kept on held-out data: {routed.mean_kept:.3f} (target {args.target_capacity:g}); {routed}")
    print(f"perplexity on held-out data: {routed.perplexity:.2f} routed, {dense.perplexity:.2f} dense")
    if args.capacity_loss == "controller" and abs(routed.mean_kept - args.target_capacity) > 0.05:
        # Short runs end before the controller settles: it needs a hundred steps.
        log.warning("the target capacity was missed after %d steps; train longer (more samples or epochs)", steps)
    print(f"written: {args.output}")
