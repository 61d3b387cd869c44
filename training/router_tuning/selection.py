"""Which layers can be spared: what the model's predictions lose when one sublayer is skipped, measured layer by layer.

    cost_l = mean over answer tokens of KL(p || p_l)     p: the dense model's prediction, p_l: without sublayer l

In nats, with the patch in the sublayer's place where there shall be one. All tokens skip it but those of a window.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from tqdm import tqdm

from vllm_mod.architectures import BaseShape
from vllm_mod.config import ConfigError, ModConfig
from vllm_mod.granularity import POLICIES

from .arguments import RouterArguments
from .costs_file import CostsFile, Rows
from .data import Collator, prompt_numbers
from .flag_words import parse_window
from .layerwise import Batch, answer_logits, supervised
from .loading import fitting_dtype
from .model import attach_routers, decoder_layers, load_base
from .past import Past, decisions_given, skipping, with_past
from .patches import batch_size, collate, fit_patches, give
from .predictions import divergences, log_probabilities
from .preflight import check_writable
from .records import read_state
from .routing import routing_of

log = logging.getLogger(__name__)

#: Samples that are measured on: the order of layers settles within a few thousand answer tokens.
SAMPLES = 32
#: Samples that patches are fitted on before that: good enough to tell layers apart.
_PATCH_SAMPLES = 128
#: Tokens of a forward, padding included: predictions over the whole vocabulary are held for all of them, twice.
_TOKENS = 2048
#: On a GPU, which a forward of so few may leave idle: up to so many, whose predictions take an eighth of its free
#: memory, at so many bytes a number, what it is compared with included.
_GPU_TOKENS, _GPU_SHARE, _BYTES = 32768, 8, 18


@dataclass(frozen=True)
class Measured:
    """What skipping costs, sample by sample and layer by layer, and what a router sees of a sample."""

    layers: tuple[int, ...]
    #: float64 `[N, layers]`: KL in nats, the mean over a sample's answer tokens
    nats: Tensor
    #: `[N]`: answer tokens of a sample
    tokens: Tensor
    #: float32 `[N, layers, hidden]`: the mean of a sublayer's normed input over the tokens that decide
    inputs: Tensor
    #: int64 `[N]`: which of the samples
    sample: Tensor
    #: int64 `[N]`: which prompt it has, see `data.prompt_numbers`; None: each its own
    prompt: Tensor | None = None

    def costs(self) -> dict[int, float]:
        """Layer -> nats per answer token, cheapest first."""
        mean = (self.nats * self.tokens[:, None]).sum(0) / self.tokens.sum()
        return dict(sorted(zip(self.layers, mean.tolist(), strict=True), key=lambda pair: pair[1]))


def measure(
    model: Any,
    samples: Sequence[Mapping[str, Any]],
    shape: BaseShape,
    target: str,
    window: int | None,
    rank: int | None,
    directory: Path,
    number: int = SAMPLES,
    quiet: bool = False,
    file: CostsFile | None = None,
) -> Measured:
    """Of every layer that `target` (attn, mlp or block) has, on the first `number` samples.

    model: the base model in evaluation mode; it is left with routers of zeros and with patches. samples: as `tokenize`
    gives them; patches (where rank is not None) are fitted on all of them. directory: for what patches need. It costs
    about layers / 2 forwards. file: what it has is not measured again, and what is found goes there. Raises ConfigError
    where no number comes out.
    """
    config, number = every_layer(shape, target, window), min(number, len(samples))
    known = set() if file is None or file.rows is None else set(file.rows.sample.tolist())
    attach_routers(model, config)
    if rank is not None:
        _give_patches(model, samples, config, rank, directory, quiet, file)
    rows = _measure(model, samples, [i for i in range(number) if i not in known], quiet, file)
    order = sorted(range(number), key=lambda i: len(samples[i]["input_ids"]))
    place = {sample: place for place, sample in enumerate(rows.sample.tolist())}
    wanted = torch.tensor([place[sample] for sample in order])
    found = rows.nats[wanted], rows.tokens[wanted], rows.inputs[wanted], torch.tensor(order)
    return Measured(config.layers, *found, torch.tensor(prompt_numbers(samples))[order])


def _give_patches(
    model: Any,
    samples: Sequence[Mapping[str, Any]],
    config: ModConfig,
    rank: int,
    directory: Path,
    quiet: bool,
    file: CostsFile | None,
) -> None:
    """Those that `file` has; else they are fitted, on dense activations: no layer is skipped yet."""
    if file is not None and file.patches:
        for layer, patch in file.patches.items():
            give(routing_of(model), layer, patch, model)
        return
    fit_patches(
        model, collate(samples, config, rank, batch_size(model, samples), "--data"), rank, directory, quiet, 1.0
    )
    if file is not None:
        file.patches = {layer: patch.tensors() for layer, patch in routing_of(model).patches.items()}
        file.write()


def _measure(
    model: Any, samples: Sequence[Mapping[str, Any]], missing: Sequence[int], quiet: bool, file: CostsFile | None
) -> Rows:
    """What `file` has, and the samples that it lacks."""
    found = None if file is None else file.rows
    order = sorted(missing, key=lambda i: len(samples[i]["input_ids"]))
    batches = batches_of([len(samples[i]["input_ids"]) for i in order], tokens_of_a_forward(model))
    total = len(batches) * (len(routing_of(model).config.layers) + 1)
    with tqdm(
        total=total, desc="layer costs", unit="forward", disable=True if quiet or not missing else None
    ) as progress:
        for places in batches:
            these = [order[place] for place in places]
            batch = Collator(0)([dict(samples[i]) for i in these])
            rows = Rows(torch.tensor(these), *_measure_batch(model, batch, progress))
            if not rows.nats.isfinite().all():
                raise ConfigError(
                    "the base model's predictions are not finite on these samples; layers cannot be compared"
                )
            found = rows if found is None else found + rows
            if file is not None:
                file.rows = found
                file.write_now_and_then()
    if file is not None and missing:
        file.write()
    assert found is not None
    return found


def tokens_of_a_forward(model: Any) -> int:
    """For `batches_of`."""
    if model.device.type != "cuda":
        return _TOKENS
    free, _ = torch.cuda.mem_get_info(model.device)
    return min(max(free // (_GPU_SHARE * _BYTES * model.config.vocab_size), _TOKENS), _GPU_TOKENS)


def batches_of(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Places of ascending lengths, no more than `tokens` together when padded to the longest; at least one place."""
    batches: list[list[int]] = []
    for place, length in enumerate(lengths):
        if batches and (len(batches[-1]) + 1) * length <= tokens:
            batches[-1].append(place)
        else:
            batches.append([place])
    return batches


def every_layer(shape: BaseShape, target: str, window: int | None) -> ModConfig:
    """All layers routed, and none skipped: a threshold of 0 keeps whatever the score."""
    settings: dict[str, Any] = {"version": 1} if window is None else {"version": 2, "window": window}
    settings |= {"granularity": f"{target}_sequence", "layers": list(range(shape.num_layers)), "threshold": 0.0}
    return ModConfig.parse(settings, "--layers")


def cheapest(found: Mapping[int, float], number: int) -> list[int]:
    """The `number` layers of least cost, ascending."""
    return sorted(sorted(found, key=lambda layer: (found[layer], layer))[:number])


def cheaper_half(found: Mapping[int, float]) -> list[int]:
    """What is routed where no layers are named."""
    return cheapest(found, max(len(found) // 2, 1))


def report(found: Mapping[int, float], chosen: Sequence[int]) -> None:
    """A line per layer, from the first to the last."""
    for layer in sorted(found):
        print(f"layer {layer:3}: {found[layer]:8.4f} nats per token if skipped{'  routed' if layer in chosen else ''}")


def choose(
    args: RouterArguments,
    training_args: Any,
    shape: BaseShape,
    base: Path,
    train_set: Any,
    state: Path | None,
    rank: int | None,
) -> list[int]:
    """What `train` routes where no --layers are named: half of the layers, those of least cost on training samples.

    The main process measures, for all; a run that resumes has the layers it began with. state: see `last_state`. rank:
    of what will stand in.
    """
    if state is not None:
        return list(read_state(state).settings["layers"])
    chosen: list[Any] = [None]
    if training_args.process_index == 0:
        chosen = [_measured(args, training_args, shape, base, train_set, rank)]
    training_args.device  # noqa: B018 (starts the group of processes, where there are several)
    layers: list[int] = broadcast_object_list(chosen)[0]
    return layers


def _measured(
    args: RouterArguments, training_args: Any, shape: BaseShape, base: Path, train_set: Any, rank: int | None
) -> list[int]:
    samples = list(train_set.select(range(min(len(train_set), _PATCH_SAMPLES))))
    window, quiet = parse_window(args.window), bool(training_args.disable_tqdm)
    # In the precision of `fit`: layers differ by more than bf16 loses.
    model = load_base(base, fitting_dtype(base, training_args.bf16 or None)).to(training_args.device).eval()
    place = check_writable(Path(args.output), Path(args.output).absolute().parent)
    target = POLICIES[args.granularity].target
    log.info(
        "choosing layers: what skipping each of %d costs, on %d samples", shape.num_layers, min(SAMPLES, len(samples))
    )
    found = measure(model, samples, shape, target, window, rank, place, quiet=quiet).costs()
    chosen = cheaper_half(found)
    report(found, chosen)
    return chosen


@torch.no_grad()
def _measure_batch(model: Any, batch: Batch, progress: Any) -> tuple[Tensor, Tensor, Tensor]:
    """nats, tokens and inputs of a batch's samples, see `Measured`."""
    answers = supervised(batch).to(model.device)
    layers = routing_of(model).config.layers
    none = torch.zeros(len(answers), len(layers), dtype=torch.bool)
    rows = answers.nonzero()[:, 0]
    found = torch.zeros(len(answers), len(layers), dtype=torch.float64, device=model.device)
    with decisions_given(model):
        dense, before, inputs, past = _dense(model, skipping(batch, none))
        progress.update()
        for place, layer in enumerate(layers):
            skips = none.clone()
            skips[:, place] = True
            without = answer_logits(model, skipping(batch, skips), before[layer], layer, past.cache())
            found[:, place].index_add_(0, rows, divergences(without, dense).double())
            progress.update()
    tokens = answers.sum(1).double().cpu()
    return found.cpu() / tokens.clamp(min=1.0)[:, None], tokens, inputs


def _dense(model: Any, batch: Batch) -> tuple[Tensor, list[Tensor], Tensor, Past]:
    """The dense model's log probabilities, the hidden states before each layer, the means that routers score, and what
    is not run again."""
    state, before, means = routing_of(model), list[Tensor](), list[Tensor]()

    def enters(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        before.append(args[0] if args else kwargs["hidden_states"])

    def scores(_: nn.Module, args: tuple[Tensor]) -> None:
        (x,) = args
        weights = state.deciding(x.shape[:2], x.device).float()
        means.append((torch.einsum("bt,bth->bh", weights, x.float()) / weights.sum(1)[:, None]).cpu())

    hooks = [layer.register_forward_pre_hook(enters, with_kwargs=True) for layer in decoder_layers(model)]
    hooks += [state.routers[layer].register_forward_pre_hook(scores) for layer in state.config.layers]
    try:
        predicted, past = with_past(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return log_probabilities(predicted), before, torch.stack(means, 1), past
