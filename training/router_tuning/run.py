"""One training run, from arguments to a checkpoint."""

from __future__ import annotations

import json
import logging
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, set_seed
from transformers.trainer_utils import get_last_checkpoint

from vllm_mod.checkpoint import BaseShape, write_checkpoint
from vllm_mod.config import ConfigError, ModConfig

from . import card, dry_run, lora
from .arguments import (
    RouterArguments,
    RouterTrainingArguments,
    check_output,
    default_learning_rate,
    make_mod_config,
)
from .data import Collator, Counts, check_sources, describe, read_sources, split_tail, tokenize
from .export import base_shape, local_model
from .loss import CapacityLoss
from .model import attach_routers, freeze_base, load_base, routing_of
from .plot import plot_training
from .trainer import Evaluation, RouterTrainer, StopOnInterrupt, as_text, summary

log = logging.getLogger(__name__)

INTERRUPTED = 130


def run_training(args: RouterArguments, training_args: RouterTrainingArguments, records: dict[str, str]) -> int:
    """Train, write `args.output`; returns the exit code. Everything that can be wrong is checked before the work."""
    check_output(args.output)
    check_sources(args.data)  # before a model is fetched
    if args.dry_run and training_args.process_index == 0:
        dry_run.clear_output(args)
    base = local_model(args.model)
    shape = base_shape(base)
    config = _checked_config(args, shape)
    adapter = lora.adapter_config(args, config, base, shape)
    run_dir = Path(args.run_dir or args.output.rstrip("/") + ".run")
    last_state = _last_state(args, run_dir)

    tokenizer = AutoTokenizer.from_pretrained(base)
    train_set, eval_set, data_record = _datasets(args, training_args, tokenizer)

    training_args.output_dir = str(run_dir)
    if training_args.learning_rate is None:
        training_args.learning_rate = default_learning_rate(shape.hidden_size)
    if training_args.gradient_checkpointing and training_args.gradient_checkpointing_kwargs is None:
        # Re-entrant checkpoints give no gradient below inputs that need none: exactly our frozen trunk.
        training_args.gradient_checkpointing_kwargs = {"use_reentrant": False}
    set_seed(training_args.seed)
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
    )
    if args.dry_run:
        return dry_run.finish(trainer, args, tokenizer, base, config, records)
    if last_state is not None:
        trainer.restore(Path(last_state))
    with stop.installed():
        trainer.train(resume_from_checkpoint=last_state)
    if stop.interrupted:
        again = shlex.join(["router-tuning", *shlex.split(records["train_command.txt"].splitlines()[0])[1:]])
        print(f"interrupted; go on with: {again}{'' if args.resume else ' --resume'}", file=sys.stderr)
        return INTERRUPTED

    if args.capacity_loss == "controller":  # the paper's way ends with the last step's routers
        trainer.average.apply(routing_of(model).routers)
    routed = trainer.measure()
    with lora.without_adapter(model):
        dense = trainer.measure(threshold=0.0)
    routers = trainer.final_routers(run_dir / "final")
    if trainer.is_world_process_zero():
        records = records | {
            "training_args.json": as_text(_arguments_record(args, training_args)),
            "trainer_log.json": as_text(_log_record(trainer, routed, dense, data_record)),
        }
        with lora.placed(base, run_dir / "final", adapter, args.lora_output) as (source, folders):
            write_checkpoint(source, args.output, config, routers, records, folders)
        plot_training(trainer.history, args.target_capacity, Path(args.output))
        card.write(Path(args.output))
        _report(args, routed, dense, trainer.state.max_steps)
        if args.run_dir is None:
            shutil.rmtree(run_dir, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    return 0


def _checked_config(args: RouterArguments, shape: BaseShape) -> ModConfig:
    config = make_mod_config(args, shape, target_capacity=args.target_capacity, base_model=args.model.rstrip("/"))
    if config.is_static:
        raise ConfigError(f"{config.granularity} has nothing to train; use `router-tuning export --granularity …`")
    if not 0 <= args.eval_fraction < 1:
        raise ConfigError(f"--eval-fraction {args.eval_fraction}: a number from 0 to below 1 is needed")
    return config


def _last_state(args: RouterArguments, run_dir: Path) -> str | None:
    last = get_last_checkpoint(str(run_dir)) if run_dir.is_dir() else None
    if args.resume and last is None:
        raise ConfigError(f"{run_dir}: no state to resume from; start without --resume")
    if not args.resume and last is not None:
        raise ConfigError(f"{run_dir}: holds an unfinished run; go on with --resume, or remove it")
    return last


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


def _log_record(trainer: RouterTrainer, routed: Evaluation, dense: Evaluation, data: dict[str, Any]) -> dict[str, Any]:
    return {
        "target_capacity": trainer.capacity.target,
        "held_out": routed.to_dict() | {"dense_loss": dense.loss, "dense_perplexity": dense.perplexity},
        "data": data,
        "log": trainer.state.log_history,
        "steps": trainer.history,
    }


def _report(args: RouterArguments, routed: Evaluation, dense: Evaluation, steps: int) -> None:
    print(f"kept on held-out data: {routed.mean_kept:.3f} (target {args.target_capacity:g}); {summary(routed)}")
    print(f"perplexity on held-out data: {routed.perplexity:.2f} routed, {dense.perplexity:.2f} dense")
    if args.capacity_loss == "controller" and abs(routed.mean_kept - args.target_capacity) > 0.05:
        # Short runs end before the controller settles: it needs a hundred steps.
        log.warning("the target capacity was missed after %d steps; train longer (more samples or epochs)", steps)
    print(f"written: {args.output}")
