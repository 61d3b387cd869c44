"""transformers' Trainer for routers: adds the capacity loss, saves nothing but routers, measures kept ratios."""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from vllm_mod.checkpoint import ROUTERS_FILE, router_name
from vllm_mod.config import ConfigError
from vllm_mod.trainer_log import Step

from . import lora, states
from .average import TailAverage, local
from .evaluation import Evaluation, measure
from .interrupt import IgnoredInWorkers, deferred
from .loss import CapacityLoss
from .model import given_prompts, routing_of
from .records import Controller, State, read_state

_AVERAGE_FILE = "average.{}.safetensors"  # one per process
#: Overflows in a row after which a smaller loss scale will not help: from 2^16 it has fallen below 2^-4.
MOST_OVERFLOWS = 20


class RouterTrainer(Trainer):
    """Trains the routers of a model that went through `attach_routers` and `freeze_base`."""

    control: Any

    def __init__(
        self,
        *args: Any,
        capacity: CapacityLoss,
        adapter_learning_rate: float | None = None,
        settings: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.capacity = capacity
        #: None: there is no adapter, see `lora`.
        self.adapter_learning_rate = adapter_learning_rate
        #: Saved with each state: what a run that resumes from it must have in common.
        self.settings = settings or {}
        self.average = TailAverage()
        #: Goes into trainer_log.json.
        self.history: list[Step] = []
        #: Kept ratios of the micro-batches of the step that is being taken.
        self._measured: list[Tensor] = []
        #: What keeping is worth in them, and their task loss.
        self._effects: list[Tensor] = []
        self._losses: list[Tensor] = []
        #: How often more than its task loss counts in the backward pass of a micro-batch: loss scale / micro-batches.
        self._weight = torch.ones(())
        self._overflows = 0
        self._logged = 0
        #: Where a state is being written; None: none is.
        self._states_in: Path | None = None
        if self.args.should_save:  # what a killed run had begun
            shutil.rmtree(Path(self.args.output_dir) / states.TEMPORARY, ignore_errors=True)
        self.add_callback(_Steps(self))

    # ------------------------------------------------------------ a step

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        made, optimizer = self.optimizer is None, super().create_optimizer(model)
        if made and self.adapter_learning_rate is not None:
            lora.own_group(optimizer, model or self.model, self.adapter_learning_rate, self.args.weight_decay)
        return optimizer

    def get_train_dataloader(self) -> Any:
        loader = super().get_train_dataloader()
        inner = getattr(loader, "base_dataloader", loader)  # accelerate's wrapper has one
        inner.worker_init_fn = IgnoredInWorkers(inner.worker_init_fn)
        return loader

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step < self.state.max_steps:  # a run may resume from its last step
            super()._run_epoch(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        prompt_mask = inputs.pop("prompt_mask").to(self.args.device)
        with given_prompts(self.model, prompt_mask) as state:  # backward too: gradient checkpointing decides again
            loss = super().training_step(model, inputs, num_items_in_batch)
        effect = torch.stack(list(state.effects.values())).square().mean().sqrt() / self._weight
        self._effects.append(self.accelerator.reduce(effect, "mean"))
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        kept = routing_of(self.model).kept()
        # All processes must pay the same price.
        measured = self.accelerator.reduce(torch.stack(list(kept.values())).detach(), "mean")
        self._measured.append(measured)
        penalty = self.capacity(kept, float(measured.mean()))
        parts = 1
        if num_items_in_batch is not None and self.model_accepts_loss_kwargs:
            parts = self.current_gradient_accumulation_steps  # the task loss is scaled already
        self._losses.append(self.accelerator.reduce(loss.detach() * parts, "mean"))
        loss.register_hook(lambda gradient: self._note_weight(gradient / parts))  # before those of the gates
        loss = loss + penalty / parts
        return (loss, outputs) if return_outputs else loss

    def _note_weight(self, weight: Tensor) -> None:
        """Whatever stands between loss and backward (accumulation, fp16's loss scale) scales the gates' gradients."""
        self._weight = weight.detach()

    def before_step(self) -> None:
        """Raise ConfigError unless what the optimizer will take is finite."""
        if not torch.stack(self._losses).isfinite().all():  # of all processes
            self._stop(f"the loss is {float(torch.stack(self._losses).sum())}")
        finite = self._all_finite([p.grad for p in self._trained()])
        if not finite and self.accelerator.scaler is None:
            self._stop("a gradient is not finite")
        # In fp16 that is nothing unusual: the loss scale is lowered and the step left out. (accelerate's own
        # `optimizer_step_was_skipped` is never true of a fused optimizer.)
        self._overflows = 0 if finite else self._overflows + 1
        if self._overflows == MOST_OVERFLOWS:
            self._stop(f"{MOST_OVERFLOWS} steps in a row overflowed in fp16")

    def after_step(self) -> None:
        """Let the controller answer to what this step kept."""
        if not self._measured:
            return
        kept = torch.stack(self._measured).mean(0).tolist()
        # The task loss is normalised over all micro-batches, kept ratios over each.
        effect = float(torch.stack(self._effects).mean())
        loss = float(torch.stack(self._losses).mean())
        for noted in (self._measured, self._effects, self._losses):
            noted.clear()
        state = routing_of(self.model)
        if not self._overflows and math.isfinite(effect):
            if not self._all_finite(self._trained()):
                self._stop("a trained weight is not finite")
            self.capacity.step(sum(kept) / len(kept), effect, self._learning_rate_share())
            self.average.update(state.routers, self.state.global_step / max(self.state.max_steps, 1))
        step: dict[str, Any] = {"step": self.state.global_step, "loss": loss, "kept": sum(kept) / len(kept)}
        step |= {"lambda": self.capacity.weight, "scale": self.capacity.scale}
        step |= {"kept_per_layer": dict(zip(map(str, state.config.layers), kept, strict=True))}
        self.history.append(Step.parse(step, "step"))

    def _trained(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def _all_finite(self, tensors: Sequence[Tensor | None]) -> bool:
        """In all processes; one that is not there counts as finite."""
        faults = [(~local(t.detach()).isfinite()).any() for t in tensors if t is not None]
        found = torch.stack(faults).any() if faults else torch.zeros((), device=self.args.device)
        return not self.accelerator.reduce(found.float(), "sum")

    def _stop(self, fault: str) -> NoReturn:
        """End a run that can only get worse, in one line."""
        step, rates = len(self.history) + 1, f"a --learning-rate below {self.args.learning_rate:g}"
        if self.adapter_learning_rate is not None:
            rates += f" or a --lora-learning-rate below {self.adapter_learning_rate:g}"
        if step == 1:
            rates = "--bf16 false; nothing was trained yet, so look at the base model's weights, too"
        state, _ = states.newest_whole(Path(self.args.output_dir))
        left = f"the last good state is {state}" if state else "no state had been written"
        raise ConfigError(f"step {step}: {fault}, so training was stopped; try {rates}; {left}")

    def _learning_rate_share(self) -> float:
        """This step's part of the run's learning: what the schedule gives it, about 1 / steps on average."""
        peak = self.args.learning_rate
        rate = self.lr_scheduler.get_last_lr()[0] if self.lr_scheduler is not None else peak
        return (rate / peak if peak else 1.0) / max(self.state.max_steps, 1)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        recent = self.history[self._logged :]
        if recent and "loss" in logs:
            logs["kept"] = round(sum(h.kept for h in recent) / len(recent), 4)
            logs["lambda"] = round(self.capacity.weight, 5)
            self._logged = len(self.history)
        super().log(logs, start_time)

    # ------------------------------------------------------------ held-out data

    def measure(self, threshold: float | None = None) -> Evaluation:
        """Loss per supervised token and kept ratios on the held-out data; `threshold` overrides all (0: dense)."""
        state = routing_of(self.model)
        config, was_training = state.config, self.model.training
        if threshold is not None:
            state.config = config.with_threshold(threshold)
        self.model.eval()
        try:
            return measure(self)
        finally:
            state.config = config
            self.model.train(was_training)

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        result = self.measure()
        metrics = {f"{metric_key_prefix}_loss": result.loss, f"{metric_key_prefix}_kept": result.mean_kept}
        metrics |= {f"{metric_key_prefix}_kept_{layer}": ratio for layer, ratio in result.kept.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # ------------------------------------------------------------ states

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """A state in the run directory, whole or not at all: see `states`."""
        run_dir, step = Path(self.args.output_dir), self.state.global_step
        temporary = run_dir / states.TEMPORARY / states.path_of(run_dir, step).name
        before = "states before it are as they were: make room, then --resume"
        self._states_in = temporary.parent
        try:
            with writable(states.path_of(run_dir, step), before if states.found_in(run_dir) else "make room"):
                super()._save_checkpoint(model, trial)
                save_file(self.average.state_dict(), temporary / _AVERAGE_FILE.format(self.args.process_index))
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    with deferred():
                        states.publish(temporary, states.path_of(run_dir, step), self.args.world_size)
                    states.prune(run_dir, step, self.args.save_total_limit)
                self.accelerator.wait_for_everyone()
        finally:
            self._states_in = None
            if self.args.should_save:
                shutil.rmtree(temporary.parent, ignore_errors=True)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._states_in or super()._get_output_dir(trial))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Routers, adapter and controller only. `state_dict` is the gathered one where parameters are sharded."""
        directory = Path(output_dir or self.args.output_dir)
        if not self.args.should_save:
            return
        tensors = {}
        for layer, router in routing_of(self.model).routers.items():
            name = router_name(layer)
            gathered = {key.removeprefix("module."): value for key, value in (state_dict or {}).items()}
            tensors[name] = gathered.get(name, router.weight).detach().float().cpu().contiguous()
        directory.mkdir(parents=True, exist_ok=True)
        save_file(tensors, directory / ROUTERS_FILE, metadata={"format": "pt"})
        if self.adapter_learning_rate is not None:
            save_file(lora.adapter_tensors(self.model, state_dict), directory / lora.ADAPTER_FILE)
        controller = Controller(**self.capacity.state_dict())
        State(capacity=controller, history=self.history, settings=self.settings).write(directory)

    def restore(self, directory: Path) -> None:
        """Routers and controller of a saved state. Call it before `train`, while no parameter is sharded yet."""
        try:
            tensors = load_file(directory / ROUTERS_FILE)
            state = read_state(directory)
            for layer, router in routing_of(self.model).routers.items():
                router.weight.data.copy_(tensors[router_name(layer)])
            if self.adapter_learning_rate is not None:
                lora.load_adapter_tensors(self.model, load_file(directory / lora.ADAPTER_FILE))
            self.capacity.load_state_dict(state.capacity.model_dump())
            self.history = state.history
            self.average.load_state_dict(load_file(directory / _AVERAGE_FILE.format(self.args.process_index)))
        except (OSError, KeyError, RuntimeError, ValueError, SafetensorError) as error:
            raise ConfigError(f"{directory}: cannot be resumed from: {error}") from None
        self._logged = len(self.history)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Nothing left to do: see `restore`. (Trainer itself restores optimizer, schedule and random states.)"""

    def final_routers(self, directory: Path) -> dict[int, Tensor]:
        """Router weights on the CPU, gathered from all processes; `directory` holds them, and the adapter's file."""
        with writable(directory, "the last state is as it was: make room, then --resume"):
            self.save_model(str(directory))
        self.accelerator.wait_for_everyone()
        tensors = load_file(directory / ROUTERS_FILE)
        return {layer: tensors[router_name(layer)] for layer in routing_of(self.model).routers}


@contextlib.contextmanager
def writable(path: Path, advice: str) -> Iterator[None]:
    """Turn what a full or failing disk raises (torch and safetensors have exceptions of their own) into ConfigError."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"{path}: cannot be written: {' '.join(str(error).split())}; {advice}") from error


class _Steps(TrainerCallback):
    def __init__(self, trainer: RouterTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.before_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.after_step()
