"""Which layers can be spared: what the model's predictions lose when one sublayer is skipped, measured layer by layer.

    cost_l = mean over answer tokens of KL(p || p_l)     p: the dense model's prediction, p_l: without sublayer l

In nats, with the patch in the sublayer's place where there shall be one. All tokens skip it but those of a window.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from tqdm import tqdm

from vllm_mod.checkpoint import BaseShape
from vllm_mod.config import ConfigError, ModConfig

from .arguments import RouterArguments, parse_window
from .data import IGNORED, Collator
from .layerwise import Batch, predictions
from .model import attach_routers, decoder_layers, load_base
from .patches import collate, fit_patches
from .preflight import check_writable, settings_of_state
from .routing import routing_of

#: Samples that are measured on: the order of layers settles within a few thousand answer tokens.
SAMPLES = 32
#: Samples that patches are fitted on before that: good enough to tell layers apart.
_PATCH_SAMPLES = 128
_BATCH = 4


def costs(
    model: Any,
    samples: Sequence[Mapping[str, Any]],
    shape: BaseShape,
    target: str,
    window: int | None,
    rank: int | None,
    directory: Path,
    quiet: bool = False,
) -> dict[int, float]:
    """Layer -> nats per answer token, of every layer that `target` (attn, mlp or block) has, cheapest first.

    model: the base model in evaluation mode; it is left with routers. samples: as `tokenize` gives them; patches (where
    rank is not None) are fitted on all of them, the first `SAMPLES` are measured on. directory: for what patches need.
    Raises ConfigError where no number comes out.
    """
    config = every_layer(shape, target, window)
    attach_routers(model, config)
    if rank is not None:  # on dense activations: no layer is skipped yet
        fit_patches(model, collate(samples, config, rank, 16, "--data"), rank, directory, quiet)
    found = torch.zeros(len(config.layers), dtype=torch.float64)
    tokens = 0
    batches = _batches(samples[:SAMPLES])
    total = len(batches) * (len(config.layers) + 1)
    with tqdm(total=total, desc="layer costs", unit="forward", disable=True if quiet else None) as progress:
        for batch in batches:
            found += _costs_in(model, batch, progress)
            tokens += int((batch["labels"][:, 1:] != IGNORED).sum())
    if not found.isfinite().all():
        raise ConfigError("--layers: the base model's predictions are not finite on these samples")
    mean = (found / max(tokens, 1)).tolist()
    return dict(sorted(zip(config.layers, mean, strict=True), key=lambda pair: pair[1]))


def every_layer(shape: BaseShape, target: str, window: int | None) -> ModConfig:
    """All layers routed, and none skipped: a threshold of 0 keeps whatever the score."""
    settings: dict[str, Any] = {"version": 1} if window is None else {"version": 2, "window": window}
    settings |= {"granularity": f"{target}_sequence", "layers": list(range(shape.num_layers)), "threshold": 0.0}
    return ModConfig.parse(settings, "--layers")


def cheapest(found: Mapping[int, float], number: int) -> list[int]:
    """The `number` layers of least cost, ascending."""
    return sorted(sorted(found, key=lambda layer: (found[layer], layer))[:number])


def report(found: Mapping[int, float], chosen: Sequence[int], what: str) -> None:
    """A line per layer, from the first to the last."""
    for layer in sorted(found):
        print(f"layer {layer:3}: {found[layer]:8.4f} nats per token if skipped{f'  {what}' if layer in chosen else ''}")


def choose(
    args: RouterArguments, training_args: Any, shape: BaseShape, base: Path, train_set: Any, state: Path | None
) -> list[int]:
    """what `train` routes where no --layers are named: half of the layers, those of least cost on training samples.

    The main process measures, for all; a run that resumes has the layers it began with. state: see `last_state`.
    """
    if state is not None:
        return list(settings_of_state(state)["layers"])
    chosen: list[Any] = [None]
    if training_args.process_index == 0:
        chosen = [_measured(args, training_args, shape, base, train_set)]
    training_args.device  # noqa: B018 (starts the group of processes, where there are several)
    layers: list[int] = broadcast_object_list(chosen)[0]
    return layers


def _measured(args: RouterArguments, training_args: Any, shape: BaseShape, base: Path, train_set: Any) -> list[int]:
    samples = list(train_set.select(range(min(len(train_set), _PATCH_SAMPLES))))
    window, quiet = parse_window(args.window), bool(training_args.disable_tqdm)
    model = load_base(base, torch.bfloat16 if training_args.bf16 else torch.float32).to(training_args.device).eval()
    place = check_writable(Path(args.output), Path(args.output).absolute().parent)
    found = costs(model, samples, shape, args.granularity.split("_")[0], window, args.patch_rank, place, quiet)
    chosen = cheapest(found, max(shape.num_layers // 2, 1))
    report(found, chosen, "routed")
    return chosen


def _batches(samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Tensor]]:
    by_length = sorted(samples, key=lambda sample: len(sample["input_ids"]))
    parts = [by_length[first : first + _BATCH] for first in range(0, len(by_length), _BATCH)]
    return [Collator(0)([dict(sample) for sample in part]) for part in parts]


@torch.no_grad()
def _costs_in(model: Any, batch: Batch, progress: Any) -> Tensor:
    """Float64 `[layers]`: nats, summed over a batch's answer tokens."""
    answers = batch["labels"][:, 1:] != IGNORED
    places = answers.any(0).nonzero().flatten()  # a prediction is read where a row has one
    wanted = answers[:, places].to(model.device)
    before: list[Tensor] = []

    def enters(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        before.append(args[0] if args else kwargs["hidden_states"])

    hooks = [layer.register_forward_pre_hook(enters, with_kwargs=True) for layer in decoder_layers(model)]
    try:
        dense = _log_probabilities(predictions(model, batch, None, 0, places), wanted)
    finally:
        for hook in hooks:
            hook.remove()
    progress.update()
    state, layers = routing_of(model), routing_of(model).config.layers
    found = torch.zeros(len(layers), dtype=torch.float64)
    try:
        for place, layer in enumerate(layers):
            state.cutoffs = tuple(float("inf") if other == layer else float("-inf") for other in layers)
            without = _log_probabilities(predictions(model, batch, before[layer], layer, places), wanted)
            found[place] = nn.functional.kl_div(without, dense, reduction="sum", log_target=True).double().cpu()
            progress.update()
    finally:
        state.cutoffs = None
    return found


def _log_probabilities(logits: Tensor, wanted: Tensor) -> Tensor:
    """`[B, P, vocabulary]`, bool `[B, P]` -> float32 `[tokens, vocabulary]`."""
    return logits[wanted].float().log_softmax(-1)
