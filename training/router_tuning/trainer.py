"""transformers' Trainer for routers: adds the capacity loss, saves nothing but routers, measures kept ratios."""

from __future__ import annotations

import contextlib
import json
import math
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from vllm_mod.checkpoint import ROUTERS_FILE, router_name
from vllm_mod.config import ConfigError

from . import lora
from .average import TailAverage
from .data import IGNORED
from .loss import CapacityLoss
from .model import routing, routing_of

_STATE_FILE = "capacity.json"
_AVERAGE_FILE = "average.{}.safetensors"  # one per process


@dataclass(frozen=True)
class Evaluation:
    """Held-out results. `kept`: ratio per routed layer."""

    loss: float
    kept: dict[int, float]
    #: Per routed layer, where experts are routed: how often each was kept, and selected at all; float64 `[2, experts]`.
    experts: dict[int, Tensor] = field(default_factory=dict)

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    @property
    def mean_kept(self) -> float:
        return sum(self.kept.values()) / len(self.kept) if self.kept else 0.0

    def to_dict(self) -> dict[str, Any]:
        data: dict[str, Any] = {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "kept": self.mean_kept,
            "kept_per_layer": {str(layer): ratio for layer, ratio in self.kept.items()},
        }
        if self.experts:
            counts = {str(layer): counts.tolist() for layer, counts in self.experts.items()}
            data["kept_per_expert"] = {
                layer: [k / s if s else None for k, s in zip(kept, selected, strict=True)]
                for layer, (kept, selected) in counts.items()
            }
            data["selected_per_expert"] = {layer: [int(n) for n in selected] for layer, (_, selected) in counts.items()}
        return data


class RouterTrainer(Trainer):
    """Trains the routers of a model that went through `attach_routers` and `freeze_base`."""

    control: Any

    def __init__(
        self, *args: Any, capacity: CapacityLoss, adapter_learning_rate: float | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.capacity = capacity
        #: None: there is no adapter, see `lora`.
        self.adapter_learning_rate = adapter_learning_rate
        self.average = TailAverage()
        #: One entry per optimizer step: kept ratio per layer and lambda. Goes into trainer_log.json.
        self.history: list[dict[str, Any]] = []
        #: Kept ratios of the micro-batches of the step that is being taken.
        self._measured: list[Tensor] = []
        #: What keeping is worth in them, and their task loss.
        self._effects: list[Tensor] = []
        self._losses: list[Tensor] = []
        self._logged = 0
        self.add_callback(_AfterStep(self))

    # ------------------------------------------------------------ a step

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        made, optimizer = self.optimizer is None, super().create_optimizer(model)
        if made and self.adapter_learning_rate is not None:
            lora.own_group(optimizer, model or self.model, self.adapter_learning_rate, self.args.weight_decay)
        return optimizer

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        prompt_mask = inputs.pop("prompt_mask").to(self.args.device)
        with routing(self.model, prompt_mask) as state:  # backward too: gradient checkpointing decides again
            loss = super().training_step(model, inputs, num_items_in_batch)
        effect = torch.stack(list(state.effects.values())).square().mean().sqrt()
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
        loss = loss + penalty / parts
        return (loss, outputs) if return_outputs else loss

    def after_step(self) -> None:
        """Let the controller answer to what this step kept."""
        if not self._measured:
            return
        kept = torch.stack(self._measured).mean(0).tolist()
        # The task loss is normalised over all micro-batches, kept ratios over each.
        effect = float(torch.stack(self._effects).sum())
        loss = float(torch.stack(self._losses).mean())
        for noted in (self._measured, self._effects, self._losses):
            noted.clear()
        mean = sum(kept) / len(kept)
        self.capacity.step(mean, effect, self._learning_rate_share())
        state = routing_of(self.model)
        self.average.update(state.routers, self.state.global_step / max(self.state.max_steps, 1))
        self.history.append(
            {"step": self.state.global_step, "loss": loss, "kept": mean}
            | {"lambda": self.capacity.weight, "scale": self.capacity.scale}
            | {"kept_per_layer": dict(zip(map(str, state.config.layers), kept, strict=True))}
        )

    def _learning_rate_share(self) -> float:
        """This step's part of the run's learning: what the schedule gives it, about 1 / steps on average."""
        peak = self.args.learning_rate
        rate = self.lr_scheduler.get_last_lr()[0] if self.lr_scheduler is not None else peak
        return (rate / peak if peak else 1.0) / max(self.state.max_steps, 1)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        recent = self.history[self._logged :]
        if recent and "loss" in logs:
            logs["kept"] = round(sum(h["kept"] for h in recent) / len(recent), 4)
            logs["lambda"] = round(self.capacity.weight, 5)
            self._logged = len(self.history)
        super().log(logs, start_time)

    # ------------------------------------------------------------ held-out data

    @torch.no_grad()
    def measure(self, threshold: float | None = None) -> Evaluation:
        """Loss per supervised token and kept ratios on the held-out data; `threshold` overrides all (0: dense)."""
        state = routing_of(self.model)
        config = state.config
        model = self.model_wrapped if self.is_fsdp_enabled or self.is_deepspeed_enabled else self.model
        was_training = model.training
        totals = torch.zeros(2 + 2 * len(config.layers), dtype=torch.float64, device=self.args.device)
        experts: dict[int, Tensor] = {}
        if threshold is not None:
            state.config = config.with_threshold(threshold)
        model.eval()
        try:
            for batch in self.get_eval_dataloader():
                inputs = self._prepare_inputs(batch)
                supervised = int((inputs["labels"][:, 1:] != IGNORED).sum())
                with routing(model, inputs.pop("prompt_mask")) as state, self.compute_loss_context_manager():
                    loss = model(**inputs).loss
                pairs = state.counts()
                row = [float(loss) * supervised, supervised, *(n for layer in config.layers for n in pairs[layer])]
                totals += torch.tensor(row, dtype=torch.float64, device=totals.device)
                for layer, counts in state.expert_counts().items():
                    experts[layer] = experts.get(layer, 0) + counts
        finally:
            state.config = config
            model.train(was_training)
        values = self.accelerator.reduce(totals, "sum").tolist()
        kept = {layer: values[2 + 2 * i] / values[3 + 2 * i] for i, layer in enumerate(config.layers)}
        experts = {layer: self.accelerator.reduce(counts, "sum").cpu() for layer, counts in experts.items()}
        return Evaluation(values[0] / values[1], kept, experts)

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        result = self.measure()
        metrics = {f"{metric_key_prefix}_loss": result.loss, f"{metric_key_prefix}_kept": result.mean_kept}
        metrics |= {f"{metric_key_prefix}_kept_{layer}": ratio for layer, ratio in result.kept.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # ------------------------------------------------------------ states

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
        state = {"capacity": self.capacity.state_dict(), "history": self.history}
        (directory / _STATE_FILE).write_text(json.dumps(state), encoding="utf-8")

    def save_average(self, directory: Path) -> None:
        save_file(self.average.state_dict(), directory / _AVERAGE_FILE.format(self.args.process_index))

    def restore(self, directory: Path) -> None:
        """Routers and controller of a saved state. Call it before `train`, while no parameter is sharded yet."""
        try:
            tensors = load_file(directory / ROUTERS_FILE)
            state = json.loads((directory / _STATE_FILE).read_text(encoding="utf-8"))
            for layer, router in routing_of(self.model).routers.items():
                router.weight.data.copy_(tensors[router_name(layer)])
            if self.adapter_learning_rate is not None:
                lora.load_adapter_tensors(self.model, load_file(directory / lora.ADAPTER_FILE))
            self.capacity.load_state_dict(state["capacity"])
            self.history = state["history"]
            self.average.load_state_dict(load_file(directory / _AVERAGE_FILE.format(self.args.process_index)))
        except (OSError, KeyError, RuntimeError, ValueError, SafetensorError) as error:
            raise ConfigError(f"{directory}: cannot be resumed from: {error}") from None
        self._logged = len(self.history)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Nothing left to do: see `restore`. (Trainer itself restores optimizer, schedule and random states.)"""

    def final_routers(self, directory: Path) -> dict[int, Tensor]:
        """Router weights on the CPU, gathered from all processes; `directory` holds them, and the adapter's file."""
        self.save_model(str(directory))
        self.accelerator.wait_for_everyone()
        tensors = load_file(directory / ROUTERS_FILE)
        return {layer: tensors[router_name(layer)] for layer in routing_of(self.model).routers}


class _AfterStep(TrainerCallback):
    def __init__(self, trainer: RouterTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.after_step()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.save_average(Path(args.output_dir) / f"checkpoint-{state.global_step}")


class StopOnInterrupt(TrainerCallback):
    """Ctrl-C finishes the step, saves the state and stops; a second one stops at once."""

    def __init__(self) -> None:
        self.interrupted = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.interrupted:
            control.should_save = True
            control.should_training_stop = True

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        def stop(number: int, frame: FrameType | None) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True

        before = signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def summary(evaluation: Evaluation) -> str:
    """`5: 0.42  6: 0.61 …`"""
    return "  ".join(f"{layer}: {ratio:.2f}" for layer, ratio in evaluation.kept.items())


def as_text(record: Mapping[str, Any]) -> str:
    return json.dumps(record, indent=2, ensure_ascii=False) + "\n"
